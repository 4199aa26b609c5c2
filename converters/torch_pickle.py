"""A pickle reader that can rebuild tensors and plain containers, and do nothing else.

The pickle's opcodes are checked against a list before anything runs, and the only globals that mean something are those that torch,
DeepSpeed and Lightning need to save a checkpoint. Each of those is an inert object of ours, and a foreign class becomes an empty one
(`foreign_objects`), so a file can neither import nor call anything.
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import pickle
import pickletools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from keysync_jax.converters import foreign_objects
from keysync_jax.converters.lazy import BFLOAT16, LazyTensor
from keysync_jax.core.errors import KeySyncError, in_one_line

STORAGE_TYPES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype(bool),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
    "UntypedStorage": np.dtype("u1"),
}
_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float16": np.dtype("<f2"),
    "bfloat16": BFLOAT16,
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
    "uint64": np.dtype("<u8"),
    "bool": np.dtype(bool),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
}
_MAX_COPIED = 10_000_000  # items and characters that calls in one pickle may copy, so that a small file cannot fill the memory

# All but EXT* (globals by number, from a registry of the process) and NEXT_BUFFER (data outside the pickle). The opcodes that construct
# instances fail on our inert globals; of a foreign class they make an empty object.
_OPCODES = frozenset(
    """PROTO FRAME STOP MARK POP POP_MARK DUP
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET
    PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET MEMOIZE
    GLOBAL STACK_GLOBAL REDUCE BUILD INST OBJ NEWOBJ NEWOBJ_EX PERSID BINPERSID""".split()
)


class Storage(NamedTuple):
    """Bytes of one `torch.Storage`."""

    dtype: np.dtype
    numel: int
    offset: int  # of its first byte in the file


class Storages(Protocol):
    """Where the pickle's storages live; both methods raise KeySyncError for anything outside the file."""

    path: Path

    def storage(self, dtype: np.dtype, key: str, numel: int) -> Storage: ...

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None = None) -> LazyTensor: ...


def unpickle(data: bytes, storages: Storages, skipped: Counter[str] | None = None) -> Any:
    """The object that `data` describes, without the foreign objects in it, which are counted in `skipped` by name.

    Raises:
      KeySyncError: an opcode or a global that no weight file needs (named), a foreign object with tensors in it, or a damaged pickle.
    """
    path = storages.path
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name not in _OPCODES:
                raise KeySyncError(f"{path}: its pickle uses {opcode.name} at byte {position}, which no weight file needs; refused")
            # The C unpickler allocates memory for the memo index that a file asks for.
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
                raise KeySyncError(f"{path}: its pickle is damaged (memo {argument} in {len(data)} bytes)")
        reader = _Unpickler(io.BytesIO(data), storages)
        value = reader.load()
        reader.refuse_lost_tensors()
        if skipped is not None:
            skipped.update(reader.skipped)
        return value
    except KeySyncError:
        raise
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise KeySyncError(f"{path}: its pickle is damaged ({in_one_line(error)})") from None
    except (MemoryError, RecursionError) as error:
        raise KeySyncError(f"{path}: its pickle asks for more memory than a checkpoint needs ({type(error).__name__})") from None


@dataclasses.dataclass
class _Budget:
    left: int


class _Global:
    """What a whitelisted name of the pickle becomes: something that can be called or compared, and nothing else.

    It has no attributes that a pickle's BUILD could set and is no class, so the unpickler can neither patch nor subclass it.
    """

    __slots__ = ("_call", "_name", "_value")

    def __init__(self, name: str, call: Callable | None = None, value: Any = None):
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_call", call)
        object.__setattr__(self, "_value", value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"the pickle sets {name} on {self._name}")

    def __call__(self, *arguments: Any) -> Any:
        if self._call is None:
            raise pickle.UnpicklingError(f"the pickle calls {self._name}")
        return self._call(*arguments)

    def __repr__(self) -> str:
        return self._name


class _Dict(dict):
    """OrderedDict of a state dict, whose extra state (`_metadata`) is dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _NumpyType:
    """A `numpy.dtype` under construction; only plain numbers, little-endian."""

    __slots__ = ("dtype",)

    def __init__(self, name: str, *_: Any):
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "fiub":
            raise pickle.UnpicklingError(f"numpy type {name} is not a number")

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|", "="):
            raise pickle.UnpicklingError("big-endian numpy value")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, LazyTensor | Storage)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storages: Storages):
        super().__init__(file, encoding="utf-8")
        self._storages = storages
        self._globals = _whitelist(storages)
        self._foreign: dict[str, type] = {}
        self.skipped: Counter[str] = Counter()
        self._holding: Counter[str] = Counter()

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "numpy._core.multiarray": "numpy.core.multiarray"}.get(module, module)
        try:
            return self._globals[f"{module}.{name}"]
        except KeyError:
            full = f"{module}.{name}"
            if full not in self._foreign:
                if not foreign_objects.may_be_skipped(module, name):
                    raise KeySyncError(
                        f"{self._storages.path}: its pickle names {full}, which a weight file has no need of; refused "
                        "(re-save the tensors alone, or open it only if you trust it with torch and export a state_dict)"
                    ) from None
                self._foreign[full] = foreign_objects.skipped_class(full, _is_tensor, self.skipped, self._holding)
            return self._foreign[full]

    def refuse_lost_tensors(self) -> None:
        """Raises KeySyncError where foreign objects were given tensors, which would be lost with them."""
        if lost := [(name, count) for name, count in self._holding.most_common() if count]:
            names = ", ".join(f"{name} ({count} tensor{'s' * (count > 1)})" for name, count in lost[:4])
            raise KeySyncError(
                f"{self._storages.path}: tensors lie inside objects of foreign classes, which are not built here: {names}; "
                "open it where that code is installed and save its state_dict() alone"
            )

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", _Global(_value=np.dtype() as dtype), str(key), str(), int(numel)):
                return self._storages.storage(dtype, key, numel)
            case (_, type() as kind, *_) if issubclass(kind, foreign_objects.Skipped):
                raise KeySyncError(f"{self._storages.path}: its tensors are of the type {kind.__qualname__}, which is not read here")
        raise pickle.UnpicklingError(f"persistent id {pid!r:.100} is not a storage")


def _whitelist(storages: Storages) -> dict[str, _Global]:
    """Every global a pickle may name, each with our own harmless meaning of it."""

    budget = _Budget(_MAX_COPIED)

    def copied(items):
        budget.left -= len(items)
        if budget.left < 0:
            raise MemoryError("copies")
        return items

    def rebuild(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
        return storages.tensor(storage, offset, shape, strides)

    def rebuild_typed(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None):
        return storages.tensor(storage, offset, shape, strides, dtype._value)

    def rebuild_subclass(function, cls, arguments, state):
        return function(*arguments)

    def parameter(data, *_):
        return data

    def scalar(dtype, data=b"\0"):
        return np.frombuffer(data, dtype.dtype, count=1)[0].item()

    def text_as_bytes(text, encoding="utf-8"):
        if encoding not in ("latin1", "utf-8"):
            raise pickle.UnpicklingError(f"text encoding {encoding}")
        return codecs.encode(copied(text), encoding)

    functions: dict[str, Callable | None] = {
        "torch._utils._rebuild_tensor": rebuild,
        "torch._utils._rebuild_tensor_v2": rebuild,
        "torch._utils._rebuild_tensor_v3": rebuild_typed,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch._tensor._rebuild_from_type_v2": rebuild_subclass,
        "torch.Tensor": None,
        "torch.nn.parameter.Parameter": parameter,
        "torch.nn.parameter.Buffer": None,
        "torch.Size": lambda items=(): tuple(copied(items)),
        "torch.device": lambda kind, index=0: f"{kind}:{index}",
        "collections.OrderedDict": lambda items=(): _Dict(copied(items)),
        "collections.defaultdict": lambda factory=None, items=(): _Dict(copied(items)),
        "builtins.set": lambda items=(): set(copied(items)),
        "builtins.frozenset": lambda items=(): frozenset(copied(items)),
        "builtins.complex": complex,
        "builtins.bytearray": lambda data=b"": bytes(copied(data)) if isinstance(data, bytes) else b"",
        # Named as the factory of a defaultdict or as a hyper-parameter, never called.
        "builtins.dict": None,
        "builtins.list": None,
        "builtins.tuple": None,
        "builtins.int": None,
        "builtins.float": None,
        "builtins.str": None,
        "builtins.bool": None,
        "numpy.dtype": _NumpyType,
        "numpy.core.multiarray.scalar": scalar,
        "_codecs.encode": text_as_bytes,
    }
    out = {name: _Global(name, call) for name, call in functions.items()}
    for module in ("torch", "torch.storage", "torch.cuda"):
        for name, dtype in STORAGE_TYPES.items():
            out[f"{module}.{name}"] = _Global(f"{module}.{name}", value=dtype)
    for name, dtype in _DTYPES.items():
        out[f"torch.{name}"] = _Global(f"torch.{name}", value=dtype)
    return out
