"""What may be sent: classes that were exposed, exceptions, registered types, operations."""

import dataclasses
import enum
import threading
from typing import NamedTuple

import numpy as np
import pytest

import distgrad as dg
from distgrad import rpc
from distgrad.config import config
from distgrad.errors import NotExposedError, RemoteError, SerializationError
from distgrad.testing import World


@rpc.expose
class Color(enum.Enum):
    RED = 1


@rpc.expose
class Mode(enum.IntFlag):
    READ = 1
    WRITE = 2


@rpc.expose
@dataclasses.dataclass
class Point:
    x: int
    rest: object = None


@rpc.expose
class Size(NamedTuple):
    width: int
    height: int = 3


@rpc.expose
class QuotaError(Exception):
    def __init__(self, limit, lock=None):
        super().__init__(f"more than {limit}")
        self.limit = limit
        self.lock = lock


class Private(Exception):
    pass


class Ratio:
    def __init__(self, over, under):
        self.over, self.under = over, under

    def __eq__(self, other):
        return type(other) is Ratio and vars(self) == vars(other)

    __hash__ = None


def ratio_from(value):
    over, under = value
    if under == 0:
        raise ZeroDivisionError("a ratio over zero")
    return Ratio(over, under)


rpc.register_type(Ratio, lambda ratio: (ratio.over, ratio.under), ratio_from)


@rpc.expose
def echo(value):
    return value


@rpc.expose
def give(what):
    return {"lock": [threading.Lock()], "zero": Ratio(1, 0)}[what]


def nested(depth):
    value = None
    for _ in range(depth):
        value = (value,)
    return value


def chain_of(length):
    error = ValueError(0)
    for number in range(1, length):
        error, inner = ValueError(number), error
        error.inner = inner
    return error


@rpc.expose
def fail(how):
    if how == "quota":
        raise QuotaError(5, threading.Lock())
    if how == "unicode":
        b"\xff".decode()
    if how == "group":
        raise ExceptionGroup("both", [QuotaError(1), KeyError("k")])
    if how == "circle":
        first, second = QuotaError(6), ValueError("second")
        first.other, second.other = second, first
        raise first
    if how == "chain":
        raise chain_of(12)
    if how == "long":
        raise chain_of(40)
    if how == "deep":
        raise ValueError("text", nested(config.max_depth - 1))
    raise rpc.WorkerLostError("gone", detail="at noon", hint="wait")


@pytest.fixture(params=["inproc", "unix"])
def pair(request):
    with World(2, transport=request.param) as world:
        yield world


def send_instances(rank):
    values = [Color.RED, Mode.READ | Mode.WRITE, Point(1, [Size(2)]), Size(1, 2), Ratio(1, 2)]
    values.append(rpc.get_worker_info())
    back = rpc.rpc_sync(1, echo, (values,))
    made = rpc.rpc_sync(1, Point, (7,))
    return back == values and [type(v) for v in back] == [type(v) for v in values], made


def test_instances_of_exposed_and_registered_classes_travel(pair):
    ((equal, made),) = pair.run(send_instances, ranks=[0])
    assert equal
    assert made == Point(7)


def send_exceptions(rank):
    told = [
        ValueError("bad", 3),
        QuotaError(9),
        OSError(2, "no"),
        Private("mine"),
        StopIteration(4),
    ]
    back, same = rpc.rpc_sync(1, echo, ((told, {"same": told[0]}),))
    value, quota, system, private, stop = back
    return (
        (type(value), value.args, same["same"] is value),
        (type(quota), str(quota), quota.limit),
        (type(system), system.errno),
        (type(private), "Private: mine" in str(private)),
        stop.value,
    )


def test_exceptions_travel_as_values(pair):
    ((value, quota, system, private, stop),) = pair.run(send_exceptions, ranks=[0])
    assert value == (ValueError, ("bad", 3), True)
    assert quota == (QuotaError, "more than 9", 9)
    assert system == (FileNotFoundError, 2)
    assert private == (RemoteError, True)
    assert stop == 4


def failure(how):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what is asked
        rpc.rpc_sync(1, fail, (how,))
    return caught.value


def collect_failures(rank):
    quota, text, group, lost = (failure(how) for how in ("quota", "unicode", "group", "lost"))
    return (
        (type(quota), str(quota), quota.limit, hasattr(quota, "lock")),
        str(text),
        [type(member) for member in group.exceptions],
        str(lost),
    )


def collect_tangled_failures(rank):
    circle, chain, long, deep = (failure(how) for how in ("circle", "chain", "long", "deep"))
    return (type(circle), str(circle)), (chain.args, chain.inner.args), str(long), str(deep)


def test_failures_whose_parts_cannot_be_sent_together_arrive_all_the_same(pair):
    ((circle, chain, long, deep),) = pair.run(collect_tangled_failures, ranks=[0])
    assert circle == (QuotaError, "more than 6")
    assert chain == ((11,), (10,))
    assert long == "39"
    assert deep.startswith("('text', ")


def test_failures_keep_attributes_and_text(pair):
    ((quota, text, group, lost),) = pair.run(collect_failures, ranks=[0])
    assert quota == (QuotaError, "more than 5", 5, False)  # a lock cannot be sent
    assert "can't decode byte 0xff" in text
    assert group == [QuotaError, KeyError]
    assert lost == "gone\nat noon\nhint: wait"


def refusals(rank):
    lock = threading.Lock()
    calls = [
        lambda: rpc.rpc_sync(1, echo, (0, {"model": Point(1, lock)})),
        lambda: rpc.rpc_async(1, echo, kwargs={"value": [lock]}),
        lambda: rpc.remote(1, echo, (lock,)),
        lambda: rpc.remote(1, Point, kwargs={"x": [lock]}),
        lambda: rpc.rpc_sync(1, give, ("lock",)),
    ]
    texts = []
    for call in calls:
        with pytest.raises(SerializationError) as caught:
            call()
        texts.append(caught.value.message)
    return texts


def test_values_that_cannot_be_sent_are_named_by_their_path(pair):
    (texts,) = pair.run(refusals, ranks=[0])
    paths = [text.removeprefix("cannot send ").partition(":")[0] for text in texts]
    assert paths == [
        "args[1]['model'].rest",
        "kwargs['value'][0]",
        "args[0]",
        "kwargs['x'][0]",
        "value[0]",
    ]


def receive_nonsense(rank):
    with pytest.raises(SerializationError, match="a ratio over zero"):
        rpc.rpc_sync(1, echo, (Ratio(1, 0),))
    with pytest.raises(SerializationError, match="a ratio over zero"):
        rpc.rpc_sync(1, give, ("zero",))
    return rpc.rpc_sync(1, echo, (Ratio(1, 2),)) == Ratio(1, 2)


def test_decoder_of_a_registered_type_that_raises_fails_its_call_only(pair):
    assert pair.run(receive_nonsense, ranks=[0]) == [True]


def test_register_type_without_functions_is_refused():
    with pytest.raises(TypeError, match="expected a class, a function"):
        rpc.register_type(Ratio, "Ratio", lambda value: value)


def call_operations(rank):
    ones = rpc.rpc_sync(1, dg.ones, ((2, 3),))
    total = rpc.rpc_sync(1, np.sum, (ones,), {"axis": 0})
    mean = rpc.rpc_sync(1, dg.Tensor.mean, (ones,))
    for refused in (np.load, np.fromfile, eval):
        with pytest.raises(NotExposedError):
            rpc.rpc_sync(1, refused, ("x",))
    return ones.shape, total.tolist(), mean.item()


def test_operations_of_distgrad_and_numpy_may_be_called(pair):
    assert pair.run(call_operations, ranks=[0]) == [((2, 3), [2.0, 2.0, 2.0], 1.0)]


def call_wrongly(rank):
    array = np.ones(3)
    with pytest.raises(TypeError, match=r"args of type ndarray: expected a tuple"):
        rpc.rpc_sync(1, echo, (array))
    with pytest.raises(TypeError, match="kwargs of type int"):
        rpc.rpc_sync(1, echo, kwargs=5)
    for timeout in (None, "1"):
        with pytest.raises(TypeError, match="expected seconds"):
            rpc.rpc_sync(1, echo, (1,), timeout=timeout)
    for timeout in (-2, float("nan")):
        with pytest.raises(ValueError, match="expected 0 or more"):
            rpc.rpc_sync(1, echo, (1,), timeout=timeout)
    with pytest.raises(NotExposedError, match="travel by name"):
        rpc.rpc_sync(1, lambda: 1)
    return rpc.rpc_sync(1, echo, [3])


def test_arguments_of_a_call_are_checked_by_name(pair):
    assert pair.run(call_wrongly, ranks=[0]) == [3]


class Base:
    @classmethod
    def own_name(cls):
        return cls.__name__


@rpc.expose
class Derived(Base):
    def double(self):
        return 2 * self


def bound_methods(rank):
    if rank == 0:
        assert rpc.rpc_sync(1, Derived.own_name) == "Derived"
        with pytest.raises(NotExposedError, match=r"Base\.own_name"):
            rpc.rpc_sync(1, Base.own_name)
        for bound in (Derived().double, [].append):
            with pytest.raises(TypeError, match="the object would not travel"):
                rpc.rpc_sync(1, bound, (1,))
        assert rpc.rpc_sync(np.int64(1), Derived.double, (2,)) == 4


def test_methods_are_called_on_the_class_or_object_that_was_meant(pair):
    pair.run(bound_methods)


@rpc.expose
def open_missing_file():
    open("/no/such/file").close()


@rpc.expose
def import_missing_module():
    raise ImportError("not there", name="nothing", path="/no/such/path")


def failures_of_builtin_classes(rank):
    if rank == 0:
        with pytest.raises(FileNotFoundError) as caught:
            rpc.rpc_sync(1, open_missing_file)
        assert caught.value.filename == "/no/such/file"
        assert str(caught.value).endswith("directory: '/no/such/file'")
        with pytest.raises(ImportError) as caught:
            rpc.rpc_sync(1, import_missing_module)
        assert (caught.value.name, caught.value.path) == ("nothing", "/no/such/path")
        echoed = rpc.rpc_sync(1, echo, (OSError(2, "gone", "a", None, "b"),))
        assert (echoed.filename, echoed.filename2) == ("a", "b")
        assert str(rpc.rpc_sync(1, echo, (OSError(2, "gone"),))) == "[Errno 2] gone"


def test_failures_of_builtin_classes_keep_what_they_name(pair):
    pair.run(failures_of_builtin_classes)
