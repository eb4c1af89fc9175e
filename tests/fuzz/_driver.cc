// The fuzzer's end of a target: libFuzzer with a Python interpreter in it.
//
// Calls `one(data)` of the module tests/fuzz/target_<name>.py for each input, where an exception
// is a finding, and `repair(data)` after each mutation, so that inputs get past lengths and
// checksums. Where it has a text `TRACED`, lines of Python in files with that in their path count
// as reached code. fuzz.py builds and starts it; DISTGRAD_FUZZ_* are its orders.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>

extern "C" size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);

// libFuzzer looks for this section, and at these counters after each input.
__attribute__((section("__libfuzzer_extra_counters"))) uint8_t lines[1 << 14];

namespace {

PyObject *one, *repair;

[[noreturn]] void give_up()
{
    PyErr_Print();
    abort();  // with the input at hand, if there is one
}

void start_python()
{
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    config.install_signal_handlers = 0;  // libFuzzer has its own, but not for this one
    signal(SIGPIPE, SIG_IGN);
    // The interpreter of the environment that built this, so that its packages are found.
    PyStatus status = PyConfig_SetBytesString(&config, &config.program_name,
                                              getenv("DISTGRAD_FUZZ_PYTHON"));
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
    PyConfig_Clear(&config);
}

// Counts lines of traced files; PYTHONHASHSEED makes their places the same each time.
int count_line(PyObject *traced, PyFrameObject *frame, int what, PyObject *)
{
    if (what != PyTrace_LINE)
        return 0;
    PyCodeObject *code = PyFrame_GetCode(frame);
    Py_ssize_t length = PyUnicode_GET_LENGTH(code->co_filename);
    if (PyUnicode_Find(code->co_filename, traced, 0, length, 1) >= 0) {
        size_t file = (size_t)PyObject_Hash(code->co_filename);
        uint8_t &count = lines[(file + (size_t)PyFrame_GetLineNumber(frame)) % sizeof(lines)];
        count += count < 255;
    }
    Py_DECREF(code);
    return 0;
}

void trace(PyObject *target)
{
    PyObject *traced = PyObject_GetAttrString(target, "TRACED");
    if (traced)
        PyEval_SetTrace(count_line, traced);
    else
        PyErr_Clear();
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***)
{
    start_python();
    PyObject *target = PyImport_ImportModule(getenv("DISTGRAD_FUZZ_TARGET"));
    if (!target || !(one = PyObject_GetAttrString(target, "one")) ||
        !(repair = PyObject_GetAttrString(target, "repair")))
        give_up();
    trace(target);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    PyObject *result = PyObject_CallFunction(one, "y#", (const char *)data, (Py_ssize_t)size);
    if (!result)
        give_up();
    Py_DECREF(result);
    return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed)
{
    size = LLVMFuzzerMutate(data, size, most);
    if (seed % 16 == 0)
        return size;  // damaged as it is
    PyObject *result = PyObject_CallFunction(repair, "y#", (const char *)data, (Py_ssize_t)size);
    char *bytes;
    Py_ssize_t nbytes;
    if (!result || PyBytes_AsStringAndSize(result, &bytes, &nbytes) < 0)
        give_up();
    size = (size_t)nbytes < most ? (size_t)nbytes : most;
    memcpy(data, bytes, size);
    Py_DECREF(result);
    return size;
}
