# cython: auto_pickle=False, autotestdict=False, boundscheck=True, wraparound=True
"""What encoder and decoder agree on: tags, limits, dtypes and registered types.

``docs/wire-format.md`` is the contract; the tables here are compared with it by a test.
The registry is what this process can send, filled at import; nothing of a worker is in it.
"""

import dataclasses
import datetime
import enum
import pickle
import re
import zoneinfo

import numpy as np

from distgrad.config import config
from distgrad.errors import ProtocolError, SerializationError

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF

cdef extern from "float.h":
    int LDBL_MANT_DIG

cdef enum:
    DEPTH_CAP = 1000    # a level costs about 500 bytes of C stack

HIGHEST = dict(
    max_depth=DEPTH_CAP, max_meta_bytes=2**32 - 256, max_payload_bytes=2**62, max_items=2**32 - 1,
    max_buffers=2**16 - 1, inline_array_bytes=2**31,
)

# Limits that receivers enforce, in the order in which workers tell each other.
RECEIVABLE = ("max_depth", "max_meta_bytes", "max_payload_bytes", "max_items", "max_buffers")

TAGS = {
    "int7": 0x00, "str5": T_STR5, "none": T_NONE, "false": T_FALSE, "true": T_TRUE,
    "i64": T_I64, "bigint": T_BIGINT, "f64": T_F64, "complex": T_COMPLEX, "str": T_STR,
    "bytes": T_BYTES, "ellipsis": T_ELLIPSIS, "range": T_RANGE, "slice": T_SLICE,
    "scalar": T_SCALAR, "ref": T_REF, "tuple": T_TUPLE, "list": T_LIST, "dict": T_DICT,
    "set": T_SET, "frozenset": T_FROZENSET, "array": T_ARRAY, "buffer": T_BUFFER,
    "tensor": T_TENSOR, "extension": T_EXTENSION, "record": T_RECORD,
}

DTYPES = {
    "described": DESCRIBED, "bool": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5,
    "uint8": 6, "uint16": 7, "uint32": 8, "uint64": 9, "float16": 10, "float32": 11,
    "float64": 12, "complex64": 13, "complex128": 14, "x87float": 15, "x87complex": 16,
    "quadfloat": 17, "quadcomplex": 18,
}

ZEROS = bytes(ALIGNMENT)
tensor_type = tensor_unwrap = tensor_wrap = None
codecs_by_type = {}
codecs_by_name = {}
exception_codec = None
message_fields = {}


cdef object malformed(str fact):
    return ProtocolError(f"cannot decode message: {fact}")


def configure(
    *, max_depth=None, max_meta_bytes=None, max_payload_bytes=None, max_items=None,
    max_buffers=None, inline_array_bytes=None,
):
    """Change limits of this process; return those that were in force.

    ``configure(**configure(max_depth=8))`` changes nothing in the end. Arguments that are
    None stay. Frames in flight are not affected.

    Parameters
    ----------
    max_depth
        Deepest nesting of values, at most 1000.
    max_meta_bytes, max_payload_bytes
        Largest meta block (below 4 GiB) and payload.
    max_items
        Most elements of one container.
    max_buffers
        Most out-of-band arrays of one message, at most 65535.
    inline_array_bytes
        Arrays up to this size travel inside the meta block.
    """
    old = dict(limits)
    new = {name: value for name, value in dict(
        max_depth=max_depth, max_meta_bytes=max_meta_bytes, max_items=max_items,
        max_payload_bytes=max_payload_bytes, max_buffers=max_buffers,
        inline_array_bytes=inline_array_bytes,
    ).items() if value is not None}
    for name, value in new.items():
        if not 0 <= value <= HIGHEST[name]:
            raise ValueError(f"cannot set {name} to {value}: expected 0 to {HIGHEST[name]}")
    global limits
    limits = old | new
    return old


@cython.final
cdef class Bounds:
    """What a worker takes, as it has told the others.

    Parameters
    ----------
    name
        Of the worker.
    told
        Its limits as `receivable` gives them. One that is missing at the end does not bound.
    """

    def __init__(self, str name not None, told):
        known = dict(zip(RECEIVABLE, told, strict=False))
        self.name = name
        self.limits = {limit: max(0, min(known.get(limit, highest), highest))
                       for limit, highest in HIGHEST.items()}


def receivable():
    """Return the limits of what this process takes, in the order of `RECEIVABLE`."""
    return tuple([dict(limits)[name] for name in RECEIVABLE])


# -- dtypes -------------------------------------------------------------------------------

cdef int fill_dtype_tables() except -1:
    long_double, complex_long = {
        64: ("x87float", "x87complex"), 113: ("quadfloat", "quadcomplex"),
    }.get(LDBL_MANT_DIG, ("float64", "complex128"))
    names = {np.dtype(np.longdouble).num: long_double, np.dtype(np.clongdouble).num: complex_long}
    for char in "?bBhHiIlLqQefdgFDG":
        dtype = np.dtype(char)
        code = DTYPES[names.get(dtype.num, dtype.name)]
        code_of_type[dtype.num] = code
        if dtype_of_code[code] == NULL:
            Py_INCREF(dtype)
            dtype_of_code[code] = <PyObject *>dtype
    return 0


cdef object describe(dtype):
    """Return a dtype as plain values, or None if it has no form on the wire."""
    if dtype.hasobject or dtype.num >= 256:
        return None
    if dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        formats = tuple([describe(field[0]) for field in fields])
        offsets = tuple([field[1] for field in fields])
        titles = tuple([field[2] if len(field) > 2 else None for field in fields])
        if None in formats:
            return None
        return dtype.names, formats, offsets, titles, dtype.itemsize, dtype.isalignedstruct
    if dtype.subdtype is not None:
        base = describe(dtype.base)
        return None if base is None else (base, dtype.shape)
    return dtype.str


cdef object PLAIN_DTYPE = re.compile(
    r"[<>|]([biufcSUV]\d{1,9}|[Mm]8(\[\d{0,9}[A-Za-z]{1,2}\])?)"
)


cdef object undescribe(description):
    """Build the dtype that `describe` described; never a dtype of objects."""
    if type(description) is str and PLAIN_DTYPE.fullmatch(description):
        return np.dtype(description)
    if type(description) is tuple and len(description) == 2:
        base, shape = description
        if type(shape) is not tuple:
            raise malformed("the shape of a dtype is no tuple")
        return np.dtype((undescribe(base), shape))
    if type(description) is tuple and len(description) == 6:
        names, formats, offsets, titles, itemsize, aligned = description
        if not all([type(part) is tuple for part in (names, formats, offsets, titles)]):
            raise malformed("the fields of a dtype are no tuples")
        formats = [undescribe(item) for item in formats]
        return np.dtype(
            {"names": list(names), "formats": formats, "offsets": list(offsets),
             "titles": list(titles), "itemsize": itemsize}, align=aligned is True,
        )
    raise malformed("a dtype is not described by plain values")


# -- registered types ---------------------------------------------------------------------

class Unsendable(Exception):
    """A hook refuses an object: ``(fact, hint)``. The encoder adds where the object is."""


@cython.final
cdef class Extension:
    """A type that travels as the value its hook makes of it."""

    def __init__(self, cls, name, encode, decode, bint alone=False):
        self.cls, self.name, self.encode, self.decode = cls, name, encode, decode
        self.alone = alone


cdef class Record:
    """A class that travels as the values of its fields, by position."""

    def __init__(self, cls, name, fields):
        self.cls, self.name, self.fields = cls, name, tuple(fields)

    def values(self, obj):
        """Return the values of the fields of an instance."""
        return tuple([getattr(obj, field) for field in self.fields])

    def build(self, values):
        """Make an instance without running its constructor."""
        raise NotImplementedError


cdef class _DataclassRecord(Record):
    """A dataclass; no constructor runs."""

    def __init__(self, cls, name):
        super().__init__(cls, name, [field.name for field in dataclasses.fields(cls)])
        object.__new__(cls)  # a TypeError here, not at the receiver

    def build(self, values):
        obj = object.__new__(self.cls)
        for field, value in zip(self.fields, values):
            object.__setattr__(obj, field, value)
        for field in dataclasses.fields(self.cls)[len(values):]:
            object.__setattr__(obj, field.name, default_of(field))
        return obj


cdef object default_of(field):
    """Return the default of a dataclass field that an older sender does not know."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    raise ProtocolError(f"cannot decode message: the field {field.name!r} is missing")


cdef class _NamedTupleRecord(Record):
    """A named tuple."""

    def __init__(self, cls, name):
        super().__init__(cls, name, cls._fields)

    def values(self, obj):
        return tuple(obj)

    def build(self, values):
        defaults = self.cls._field_defaults
        missing = [defaults[field] for field in self.fields[len(values):]]
        return tuple.__new__(self.cls, (*values, *missing))


cdef class _EnumRecord(Record):
    """An enum member by name; a combination of flags by its number."""

    def __init__(self, cls, name):
        super().__init__(cls, name, ("name",))

    def values(self, obj):
        members = self.cls.__members__
        return (obj.name if obj.name in members else obj.value,)

    def build(self, values):
        key, = values
        if type(key) is str:
            return self.cls.__members__[key]
        if not issubclass(self.cls, enum.Flag) or type(key) is not int:
            raise ProtocolError(f"cannot decode message: no member of {self.name!r}")
        return self.cls(key)


def set_tensor_type(cls, unwrap, wrap):
    """Tell the codec which class the tensors have; return what it knew before.

    Parameters
    ----------
    cls
        The class. Instances of subclasses travel too and arrive as what `wrap` makes.
    unwrap
        ``unwrap(tensor, session) -> (ndarray, requires_grad, slot)``; slot -1 for none.
    wrap
        ``wrap(ndarray, requires_grad, slot, session) -> tensor``.

    Returns
    -------
    tuple
        The three arguments of the call before, or three times None.
    """
    global tensor_type, tensor_unwrap, tensor_wrap
    old = tensor_type, tensor_unwrap, tensor_wrap
    tensor_type, tensor_unwrap, tensor_wrap = cls, unwrap, wrap
    return old


cdef int add_codec(object codec) except -1:
    known = codecs_by_name.get(codec.name)
    # A class that was defined again, as notebooks do, takes the place of its former self.
    if known is not None and (known.cls.__module__, known.cls.__qualname__) != (
        codec.cls.__module__, codec.cls.__qualname__
    ):
        raise ValueError(
            f"cannot register {codec.cls.__qualname__}: the name {codec.name!r} "
            f"belongs to {known.cls.__qualname__}"
        )
    codecs_by_type[codec.cls] = codec
    codecs_by_name[codec.name] = codec
    return 0


def register_type(cls, name, encode, decode, *, alone=False):
    """Let instances of exactly this class be sent, under a name both sides know.

    Parameters
    ----------
    cls, name
        The class, and its name on the wire.
    encode
        ``encode(obj, session) -> value``: something that can be sent, without `obj`.
    decode
        ``decode(value, session) -> obj``. The value comes from a peer: check it. What it
        raises reaches the receiver as ProtocolError.
    alone
        Whether the value stands alone: no reference to what came before is in it. For plain
        values and a `decode` that copies, which references could make copy one thing many times.

    Raises
    ------
    ValueError
        The name belongs to another class.
    """
    add_codec(Extension(cls, name, encode, decode, alone))


def register_exceptions(encode, decode):
    """Let exceptions of every class be sent.

    Parameters
    ----------
    encode, decode
        As for `register_type`; the name on the wire is ``"exception"``.
    """
    global exception_codec
    exception_codec = Extension(BaseException, "exception", encode, decode)
    add_codec(exception_codec)


def name_fields(int kind, names):
    """Have the errors of the encoder name the fields of a kind of message."""
    message_fields[kind] = tuple(names)


def register_record(cls, name):
    """Let instances of exactly this dataclass, named tuple or enum be sent.

    Fields travel by position. A receiver fills fields that are missing at the end with
    their defaults, so a class may grow by appending. No constructor runs.

    Raises
    ------
    TypeError
        The class is none of the three, or needs a constructor.
    ValueError
        The name belongs to another class.
    """
    if isinstance(cls, type) and issubclass(cls, enum.Enum):
        add_codec(_EnumRecord(cls, name))
    elif isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields"):
        add_codec(_NamedTupleRecord(cls, name))
    elif isinstance(cls, type) and dataclasses.is_dataclass(cls):
        add_codec(_DataclassRecord(cls, name))
    else:
        raise TypeError(
            f"cannot register {cls!r}: it is no dataclass, named tuple or enum class"
        )


cdef tuple arguments(value):
    """Return the arguments for a constructor: an array might have a million rows of nothing."""
    if type(value) is not tuple:
        raise malformed("the arguments of a constructor are no tuple")
    return value


cdef object ZONE_KEY = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*")


def _key_of(zone, session):
    """Return the key of a time zone: its rules do not travel, the receiver has its own."""
    try:
        zone.__reduce__()           # tells a file's rules from those of the time zone database
    except pickle.PicklingError:
        raise Unsendable(
            "a time zone that was read from a file",
            "make it by its key, zoneinfo.ZoneInfo('Europe/Paris'), or send the time in UTC",
        ) from None
    return zone.key


def _zone_of(key, session):
    """Return the time zone of a key; nothing else is looked for on disk."""
    if type(key) is not str or len(key) > 255 or not ZONE_KEY.fullmatch(key):
        raise malformed("the key of a time zone is none")
    try:
        return zoneinfo.ZoneInfo(key)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise SerializationError(
            f"cannot receive a time zone: {key!r} is not known here",
            hint="install the package tzdata on the worker that receives it, or send UTC",
        ) from None


def _register_time():
    """Register the datetime types, and time zones by offset or by key."""
    register_type(
        datetime.date, "date", lambda day, session: (day.year, day.month, day.day),
        lambda value, session: datetime.date(*arguments(value)),
    )
    register_type(
        datetime.timedelta, "timedelta",
        lambda delta, session: (delta.days, delta.seconds, delta.microseconds),
        lambda value, session: datetime.timedelta(*arguments(value)),
    )
    register_type(
        datetime.timezone, "timezone", lambda zone, session: zone.__getinitargs__(),
        lambda value, session: datetime.timezone(*arguments(value)),
    )
    register_type(zoneinfo.ZoneInfo, "zoneinfo", _key_of, _zone_of)
    register_type(
        datetime.time, "time",
        lambda at, session: (
            at.hour, at.minute, at.second, at.microsecond, at.tzinfo, at.fold),
        lambda value, session: datetime.time(*arguments(value)[:5], fold=value[5]),
    )
    register_type(
        datetime.datetime, "datetime",
        lambda at, session: (
            at.year, at.month, at.day, at.hour, at.minute, at.second, at.microsecond,
            at.tzinfo, at.fold),
        lambda value, session: datetime.datetime(*arguments(value)[:8], fold=value[8]),
    )


configure(
    max_depth=config.max_depth, max_meta_bytes=config.max_meta_bytes,
    max_payload_bytes=config.max_payload_bytes, max_items=config.max_items,
    max_buffers=config.max_buffers, inline_array_bytes=config.inline_array_bytes,
)
fill_dtype_tables()
_register_time()
