"""Read PyTorch checkpoints as numpy arrays, without PyTorch and without running code from the file.

A checkpoint is a pickle plus raw storages. Two wrappings exist: the zip archive of torch >= 1.6 and
the older stream of pickles, in which torchvision's `mobilenet_v2-b0353104.pth` is kept. The pickle
is not given to `pickle`: a small stack machine knows the instructions that state dicts use, builds
plain containers, and has no way to import or call anything. Whatever else lies beside the weights
(settings, random states, whole objects) becomes an `Opaque` that says what it would have been.
Facts about the layout are from
PyTorch's notes "Serialization semantics" and `torch/serialization.py`; the instructions are
documented in Python's `pickletools`.
"""

import math
import os
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from fetal_flax.errors import InputError

_SAVE_AGAIN = "save it again with torch.save(model.state_dict(), PATH)"
_COPY_AGAIN = "copy or download it again"

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

_OTHER_STORAGES = {
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QInt32Storage": 4,
}
"""Bytes of an element; the stream's storages lie one behind the other."""

# Views can share or repeat storage, so a few bytes may stand for huge arrays; real state dicts
# stay near the size of their file.
_GROWTH = 8
_ALWAYS_ALLOWED = 64 * 2**20

# What damaged bytes raise in the readers below, in zipfile and in safetensors.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,  # includes RecursionError and NotImplementedError
    TypeError,
    ValueError,  # includes UnicodeError
    safetensors.SafetensorError,
    struct.error,
    zipfile.BadZipFile,
)

_AXES = 64  # of numpy
_DEPTH = 4  # of wrappers around a state dict
_WRAPPERS = ("model_state_dict", "state_dict", "model")
"""Taken first where several state dicts are of one network."""
_COUNTER = "n_averaged"
"""What `torch.optim.swa_utils.AveragedModel` keeps beside its network."""

# How files begin that are no checkpoints, and what to say of them.
_OTHER_KINDS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run git lfs pull"),
    (b"<", "is an HTML or XML page, such as an error in a download's place; download it again"),
    (b"\x1f\x8b", "is a gzip archive; unpack it first"),
    (b"\x89HDF", "is an HDF5 file, such as Keras writes; only PyTorch's can be read"),
)
_TOO_NARROW = (
    "holds {}, floats of 8 bits or fewer, which lose too much for a measurement; save float16 or "
    "float32"
)
_TAR_MAGIC = (257, b"ustar")


class Opaque:
    """Stands for an object in a file that is not built, since that would run code.

    Attributes:
        name: What it is: its class or the function that makes it.
    """

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


class StateDict(NamedTuple):
    """Tensors by name, and where in the file they are."""

    keys: tuple[str, ...]
    """The way to it from the file's own object; positions in lists as text."""
    tensors: dict[str, np.ndarray]


class CheckpointError(InputError):
    """A checkpoint file that cannot be read; the message names the file and the way out."""


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Reads the object in a file of `torch.save`, tensors as numpy arrays.

    Args:
        path: A zip archive (torch >= 1.6) or a legacy stream.

    Returns:
        The saved object. Dicts, lists, tuples, strings, numbers, booleans and None come back as
        they are; `torch.Size` as a tuple; tensors and parameters as contiguous arrays that own
        their memory, in the machine's byte order, bfloat16 as `ml_dtypes.bfloat16`. Attributes on
        containers, such as the `_metadata` of a state dict, are dropped; a `defaultdict` is a dict,
        and every other object an `Opaque`. Dict items whose key is no text or number are left out.

    Raises:
        CheckpointError: If the file is missing, damaged or not of `torch.save`.
    """
    return _reading(path, _read_torch)


def read_state_dicts(path: str | os.PathLike[str]) -> list[StateDict]:
    """Reads every state dict in a file: dicts of tensors alone, wrapped in whatever it is.

    Args:
        path: A file of `torch.save` or a safetensors file; the content decides, not the suffix.

    Returns:
        At least one, those under the usual names of a model first. Names are as they are stored,
        with what wrappers put before them; what `swa_utils` counts is left out.

    Raises:
        CheckpointError: If the file cannot be read, or holds no tensors, or other values among
            them.
    """
    return _reading(path, _read_state_dicts)


def _reading(path: str | os.PathLike[str], read: Callable[[Path], Any]) -> Any:
    """Runs `read(path)`; whatever damaged bytes raise becomes one sentence that names the file."""
    path = Path(path)
    try:
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "there is no such file"
            raise CheckpointError(f"{what}; give the path of a checkpoint file")
        return read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except _DAMAGE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{path}: cannot be read ({reason}); {_COPY_AGAIN}") from error


def _read_state_dicts(path: Path) -> list[StateDict]:
    with path.open("rb") as file:
        head = file.read(9)
    # safetensors: eight bytes of header length, then the header, which is JSON.
    saved = _read_safetensors(path) if head[8:] == b"{" else _read_torch(path)
    found: list[StateDict] = []
    _collect(saved, (), found)
    if not found:
        raise CheckpointError(_why_no_tensors(saved))
    return sorted(found, key=lambda state: _rank(state.keys))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = safetensors.numpy.load_file(path)
    except (KeyError, AttributeError, TypeError, safetensors.SafetensorError) as error:
        if kinds := sorted(set(re.findall(r"F8_\w+|F4\w*|F6_\w+", f"{error} {_header(path)}"))):
            raise CheckpointError(_TOO_NARROW.format(", ".join(kinds))) from None
        raise
    # The loader's arrays are views of its read buffer.
    return {name: np.array(value) for name, value in loaded.items()}


def _header(path: Path) -> str:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(min(length, 2**20)).decode(errors="replace")


def _collect(saved: Any, keys: tuple[str, ...], found: list[StateDict]) -> None:
    """Adds the state dicts at and below an object; nothing in a state dict is one."""
    if isinstance(saved, list | tuple) and len(keys) < _DEPTH:
        saved = {str(at): value for at, value in enumerate(saved[:8])}
    if not isinstance(saved, dict):
        return
    tensors = {name: value for name, value in saved.items() if isinstance(value, np.ndarray)}
    # A few tensors beside other things are a loss or a random state, not weights.
    if len(tensors) > len(saved) / 2 or (tensors and not any(map(_holds_more, saved.values()))):
        others = [name for name, value in saved.items() if name not in tensors]
        if others:
            kinds = sorted({repr(saved[n]) for n in others if isinstance(saved[n], Opaque)})
            what = f" (one is {_short(kinds[0])[1:-1]})" if kinds else ""
            raise CheckpointError(
                f"{_names(others)} must be tensors and are not{what}; {_SAVE_AGAIN}"
            )
        unnamed = [name for name in saved if not isinstance(name, str)]
        if unnamed:
            raise CheckpointError(
                f"{_names(unnamed)} must be strings to name tensors; {_SAVE_AGAIN}"
            )
        tensors.pop(_COUNTER, None)
        if tensors:
            found.append(StateDict(keys, tensors))
        return
    if len(keys) < _DEPTH:
        for key, value in saved.items():
            # An optimizer's tensors are its own.
            if isinstance(key, str) and not key.startswith("optim"):
                _collect(value, (*keys, key), found)


def _holds_more(value: Any) -> bool:
    return isinstance(value, dict | list | tuple)


def _rank(keys: tuple[str, ...]) -> int:
    return _WRAPPERS.index(keys[0]) if keys and keys[0] in _WRAPPERS else len(_WRAPPERS)


def _objects(saved: Any, depth: int) -> Iterator[str]:
    """Yields what the objects at and below one would have been."""
    if isinstance(saved, Opaque):
        yield saved.name
    elif isinstance(saved, dict) and depth:
        for value in saved.values():
            yield from _objects(value, depth - 1)


def _why_no_tensors(saved: Any) -> str:
    """Returns what is wrong with an object without a state dict."""
    objects = list(_objects(saved, _DEPTH))
    if narrow := [name for name in objects if name.startswith("torch.float8")]:
        return _TOO_NARROW.format(narrow[0])
    if objects:
        return (
            f"holds no named tensors, but {_short(objects[0])}, which is no part of a state dict "
            f"and is not loaded; {_SAVE_AGAIN}"
        )
    if isinstance(saved, dict) and saved and not any(map(_holds_more, saved.values())):
        return f"{_names(list(saved))} must be tensors and are not; {_SAVE_AGAIN}"
    return f"holds no named tensors; {_SAVE_AGAIN}"


def _names(names: list[Any]) -> str:
    listed = ", ".join(_short(name) for name in names[:3])
    return listed + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(name: Any) -> str:
    """Text from the file, made safe to print."""
    text = repr(name)
    return text if len(text) <= 100 else text[:100] + "…"


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"is empty; {_COPY_AGAIN}")
    if head[:4] == b"PK\x03\x04":
        return _read_zip(path)
    if head[:1] == pickle.PROTO:
        return _read_stream(path.read_bytes())
    for beginning, words in _OTHER_KINDS:
        if head.lstrip().startswith(beginning):
            raise CheckpointError(words)
    at, magic = _TAR_MAGIC
    if head[at : at + len(magic)] == magic:
        raise CheckpointError("is a tar archive; unpack it first")
    raise CheckpointError(f"is not a file of torch.save; {_SAVE_AGAIN}")


def _read_zip(path: Path) -> Any:
    """Reads `NAME/data.pkl`, `NAME/byteorder` and the storages `NAME/data/KEY`."""
    file_size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        members = {entry.filename: entry for entry in entries}
        if len(members) != len(entries):
            raise CheckpointError(f"is a zip archive with a name twice; {_SAVE_AGAIN}")
        if any(re.fullmatch(r"[^/]+/(code/.*|constants\.pkl)", name) for name in members):
            raise CheckpointError(
                "is a TorchScript archive, a program with its weights, which is not run; load it "
                "with torch.jit.load(PATH) and torch.save(module.state_dict(), OTHER_PATH)"
            )
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(
                f"is a compressed zip archive, torch.save's are not; {_SAVE_AGAIN}"
            )
        # Overlapping members could unfold to more than the file.
        if sum(entry.file_size for entry in entries) > file_size:
            raise CheckpointError(f"is a zip archive with members larger than it; {_COPY_AGAIN}")
        pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            inside = [name for name in members if name.endswith((".pth", ".pt", ".ckpt"))]
            held = f" (it holds {_short(inside[0])}: unpack it)" if inside else ""
            raise CheckpointError(
                f"is a zip archive, but not one of torch.save{held}; {_SAVE_AGAIN}"
            )
        root = pickles[0].removesuffix("data.pkl")

        machine = _PickleMachine(file_size)
        result, _ = machine.load(archive.read(root + "data.pkl"), 0)

        order = b"little"
        if root + "byteorder" in members:
            order = archive.read(root + "byteorder")
        if order not in (b"little", b"big"):
            raise CheckpointError(f"has the unknown byte order {_short(order)}; {_COPY_AGAIN}")
        for key, (_, claimed) in machine.storages.items():
            member = members.get(f"{root}data/{key}")
            held = member.file_size if member else 0
            if member is None or held != claimed:
                raise CheckpointError(
                    f"storage {_short(key)} claims {claimed} bytes, but the file holds {held}; "
                    f"{_COPY_AGAIN}"
                )
            machine.fill(key, archive.read(member), order.decode())
    return result


def _read_stream(data: bytes) -> Any:
    """Reads the legacy stream.

    Five pickles (magic number, protocol version, system information, the object, storage keys),
    then per key the number of elements as int64 and the elements, all little-endian.
    """
    machine = _PickleMachine(len(data))
    magic, position = machine.load(data, 0)
    if magic != _MAGIC:
        raise CheckpointError(f"is a pickle, but not one of torch.save; {_SAVE_AGAIN}")
    protocol, position = machine.load(data, position)
    if protocol != _PROTOCOL:
        raise CheckpointError(f"has an unknown protocol version; {_SAVE_AGAIN}")
    _, position = machine.load(data, position)  # system information: the data do not depend on it
    result, position = machine.load(data, position)
    keys, position = machine.load(data, position)
    if not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(machine.storages):
        raise CheckpointError(f"lists other storages than its tensors use; {_COPY_AGAIN}")

    for key in keys:
        count, claimed = machine.storages[key]
        (held,) = struct.unpack_from("<q", data, position)
        position += 8
        raw = data[position : position + claimed]
        position += claimed
        if held != count or len(raw) != claimed:
            raise CheckpointError(
                f"storage {_short(key)} claims {count} elements, but the file holds "
                f"{'fewer' if held == count else held}; {_COPY_AGAIN}"
            )
        machine.fill(key, raw, "little")
    return result


class _Global(NamedTuple):
    """A class or function that the pickle names; nothing is imported for it."""

    module: str
    name: str


class _Storage(NamedTuple):
    """Elements `start` to `start + size` of the storage `key`."""

    key: str
    dtype: np.dtype
    start: int
    size: int


class _View(NamedTuple):
    """An array that waits for its elements: `offset` and `strides` count elements of a storage."""

    array: np.ndarray
    offset: int
    strides: tuple[int, ...]


class _PickleMachine:
    """Interprets the pickle instructions of state dicts, with nothing that can run code.

    The standard unpickler restricted by `find_class` would still let a few bytes reserve gigabytes
    (a memo index) or hang and crash on hashing (nested tuples as dict keys).

    Tensors are built as empty arrays; `fill` gives them their elements once a storage is read,
    which in the legacy stream comes after the pickle.

    Attributes:
        storages: Number of elements and bytes that the pickle claims, by storage key.
    """

    def __init__(self, file_size: int):
        self.storages: dict[str, tuple[int, int]] = {}
        self._file_size = file_size
        self._budget = max(_GROWTH * file_size, _ALWAYS_ALLOWED)
        self._views: dict[str, list[_View]] = defaultdict(list)
        self._stack: list[Any] = []
        self._functions: dict[_Global, Callable[..., Any]] = {
            _Global("collections", "OrderedDict"): _ordered_dict,
            _Global("torch", "Size"): _torch_size,
            _Global("torch._utils", "_rebuild_tensor"): self._rebuild_tensor,
            _Global("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor_v2,
            _Global("torch._utils", "_rebuild_parameter"): self._rebuild_parameter,
            _Global("torch._utils", "_rebuild_parameter_with_state"): self._rebuild_parameter,
            _Global("torch._tensor", "_rebuild_from_type_v2"): self._rebuild_from_type,
            _Global("collections", "defaultdict"): _default_dict,
        }

    def load(self, data: bytes, position: int) -> tuple[Any, int]:
        """Runs the pickle at `position` and returns its object and the position after it."""
        self._stack = stack = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def take(count: int) -> bytes:
            nonlocal position
            if not 0 <= count <= len(data) - position:
                raise EOFError("the file ends early")
            position += count
            return data[position - count : position]

        def number(layout: str) -> Any:
            return struct.unpack(layout, take(struct.calcsize(layout)))[0]

        def line() -> str:
            return take(data.index(b"\n", position) + 1 - position)[:-1].decode()

        def pop_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        while True:
            match take(1):
                case pickle.PROTO:
                    take(1)
                case pickle.FRAME:
                    take(8)
                case pickle.STOP:
                    return stack.pop(), position
                case pickle.MARK:
                    marks.append(len(stack))

                case pickle.NONE:
                    stack.append(None)
                case pickle.NEWTRUE:
                    stack.append(True)
                case pickle.NEWFALSE:
                    stack.append(False)
                case pickle.BININT1:
                    stack.append(number("<B"))
                case pickle.BININT2:
                    stack.append(number("<H"))
                case pickle.BININT:
                    stack.append(number("<i"))
                case pickle.LONG4:
                    stack.append(int.from_bytes(take(number("<i")), "little", signed=True))
                case pickle.LONG1:
                    stack.append(int.from_bytes(take(number("<B")), "little", signed=True))
                case pickle.BINFLOAT:
                    stack.append(number(">d"))
                case pickle.SHORT_BINUNICODE:
                    stack.append(take(number("<B")).decode())
                case pickle.BINUNICODE:
                    stack.append(take(number("<I")).decode())
                case pickle.SHORT_BINSTRING:  # str of Python 2
                    stack.append(take(number("<B")).decode())
                case pickle.BINSTRING:
                    stack.append(take(number("<i")).decode())
                case pickle.BINUNICODE8:
                    stack.append(take(number("<Q")).decode())
                case pickle.BINBYTES8:
                    stack.append(take(number("<Q")))
                case pickle.BYTEARRAY8:
                    stack.append(take(number("<Q")))
                case pickle.SHORT_BINBYTES:
                    stack.append(take(number("<B")))
                case pickle.BINBYTES:
                    stack.append(take(number("<I")))

                case pickle.EMPTY_TUPLE:
                    stack.append(())
                case pickle.TUPLE1:
                    stack[-1:] = [(stack[-1],)]
                case pickle.TUPLE2:
                    stack[-2:] = [(stack[-2], stack[-1])]
                case pickle.TUPLE3:
                    stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
                case pickle.TUPLE:
                    stack.append(tuple(pop_mark()))
                case pickle.EMPTY_LIST:
                    stack.append([])
                case pickle.APPEND:
                    _append(stack[-2], [stack.pop()])
                case pickle.APPENDS:
                    items = pop_mark()
                    _append(stack[-1], items)
                case pickle.EMPTY_DICT:
                    stack.append({})
                case pickle.SETITEM:
                    value, key = stack.pop(), stack.pop()
                    _set_items(stack[-1], [(key, value)])
                case pickle.SETITEMS:
                    items = pop_mark()
                    _set_items(stack[-1], list(zip(items[::2], items[1::2], strict=True)))

                case pickle.EMPTY_SET:
                    stack.append(Opaque("set"))
                case pickle.ADDITEMS:
                    pop_mark()
                    if not isinstance(stack[-1], Opaque):
                        raise TypeError("items added to something that is no set")
                case pickle.FROZENSET:
                    pop_mark()
                    stack.append(Opaque("frozenset"))
                case pickle.POP:
                    stack.pop()
                case pickle.POP_MARK:
                    pop_mark()

                case pickle.BINPUT:
                    memo[number("<B")] = stack[-1]
                case pickle.LONG_BINPUT:
                    memo[number("<I")] = stack[-1]
                case pickle.MEMOIZE:
                    memo[len(memo)] = stack[-1]
                case pickle.BINGET:
                    stack.append(memo[number("<B")])
                case pickle.LONG_BINGET:
                    stack.append(memo[number("<I")])

                case pickle.GLOBAL:
                    stack.append(self._known(line(), line()))
                case pickle.STACK_GLOBAL:
                    name, module = stack.pop(), stack.pop()
                    stack.append(self._known(module, name))
                case pickle.REDUCE:
                    arguments, function = stack.pop(), stack.pop()
                    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
                        raise TypeError("call of something that is no function")
                    stack.append(self._call(function, arguments))
                case pickle.NEWOBJ:
                    _, made = stack.pop(), stack.pop()
                    stack.append(_instance(made))
                case pickle.NEWOBJ_EX:
                    _, _, made = stack.pop(), stack.pop(), stack.pop()
                    stack.append(_instance(made))
                case pickle.BUILD:
                    stack.pop()  # attributes, such as the _metadata of a state dict
                case pickle.BINPERSID:
                    stack.append(self._storage(stack.pop()))

                case code:
                    raise CheckpointError(
                        f"is damaged or holds more than tensors in dicts, lists and tuples "
                        f"(pickle instruction {code!r} at byte {position - 1}); {_SAVE_AGAIN}"
                    )

    def fill(self, key: str, raw: bytes, order: str) -> None:
        """Copies the elements of storage `key` into the arrays that view it."""
        for array, offset, strides in self._views[key]:
            width = array.dtype.itemsize
            # As integers, because bfloat16 has no byte order of its own in numpy.
            words = np.frombuffer(raw, f"u{width}")
            if order != sys.byteorder:
                words = words.byteswap()
            array[...] = np.lib.stride_tricks.as_strided(
                words.view(array.dtype)[offset:], array.shape, [width * step for step in strides]
            )

    def _known(self, module: Any, name: Any) -> _Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("global without a name")
        return _Global(module, name)

    def _call(self, function: _Global, arguments: tuple[Any, ...]) -> Any:
        """Returns what the few known functions make, and an `Opaque` in place of all others."""
        if function in self._functions:
            return self._functions[function](*arguments)
        # The float of 8 bits that a tensor is of says more than the function that would build it.
        kinds = [f"{a.module}.{a.name}" for a in arguments if isinstance(a, _Global)]
        narrow = next((kind for kind in kinds if kind.startswith("torch.float8")), None)
        return Opaque(narrow or f"{function.module}.{function.name}")

    def _storage(self, reference: Any) -> "_Storage | Opaque | _Global":
        """Follows ("storage", type, key, device, elements[, view]), the reference to a storage.

        Those of types that no weights have are passed over.
        """
        kind, storage_type, *more = reference
        if kind == "module" and isinstance(storage_type, _Global):
            return storage_type  # A class; the stream keeps its source code beside it.
        key, _, count, *views = more
        if (
            kind != "storage"
            or not isinstance(storage_type, _Global)
            or not isinstance(key, str)
            or not _counts(count)
        ):
            raise TypeError("reference to something that is no storage")
        dtype = _STORAGES.get(storage_type.name)
        if dtype is None:
            if width := _OTHER_STORAGES.get(storage_type.name):
                self.storages[key] = (count, count * width)
            return Opaque(f"{storage_type.module}.{storage_type.name}")
        claimed = (count, count * dtype.itemsize)
        if claimed[1] > self._file_size:
            raise CheckpointError(
                f"storage {_short(key)} claims {claimed[1]} bytes, but the whole file has "
                f"{self._file_size}; {_COPY_AGAIN}"
            )
        if self.storages.setdefault(key, claimed) != claimed:
            raise CheckpointError(f"storage {_short(key)} has two sizes; {_COPY_AGAIN}")

        # torch < 0.4 saved views of storages as (key of the view, first element, elements).
        start, size = (views[0][1], views[0][2]) if views and views[0] else (0, count)
        if not _counts(start, size) or start + size > count:
            raise CheckpointError(f"storage {_short(key)} has a view outside it; {_COPY_AGAIN}")
        return _Storage(key, dtype, start, size)

    def _rebuild_tensor(
        self, storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> np.ndarray | Opaque:
        """Returns an empty array of `shape` and notes where its elements will be."""
        if isinstance(storage, Opaque):
            return storage
        if not isinstance(storage, _Storage):
            raise TypeError("tensor without a storage")
        if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) > _AXES:
            raise TypeError("tensor with a shape that is no tuple, or too long")
        if not _counts(offset, *shape, *strides):
            raise ValueError("tensor with a size that is no natural number")
        elements = math.prod(shape)
        steps = zip(shape, strides, strict=True)
        last = offset + sum((size - 1) * stride for size, stride in steps)
        if elements and last >= storage.size:
            raise CheckpointError(
                f"tensor {self._current_name()} reaches to element {last} of a storage with "
                f"{storage.size}; {_COPY_AGAIN}"
            )
        self._budget -= elements * storage.dtype.itemsize
        if self._budget < 0:
            raise CheckpointError(
                f"tensor {self._current_name()} makes the tensors far larger than the file; "
                f"clone expanded tensors, then {_SAVE_AGAIN}"
            )
        array = np.empty(shape, storage.dtype)
        if elements:
            # The stride of an axis of length 1 is free, so it may be out of numpy's range.
            used = (stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
            self._views[storage.key].append(_View(array, storage.start + offset, tuple(used)))
        return array

    def _rebuild_tensor_v2(
        self,
        storage: Any,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        requires_grad: bool,
        hooks: Any,
        metadata: Any = None,
    ) -> np.ndarray | Opaque:
        del requires_grad, hooks
        if metadata:  # conjugate or negative bit: the stored elements are not the values
            raise CheckpointError(
                f"tensor {self._current_name()} is a lazy view; resolve it, then {_SAVE_AGAIN}"
            )
        return self._rebuild_tensor(storage, offset, shape, strides)

    def _rebuild_parameter(
        self, data: Any, requires_grad: bool, hooks: Any, state: Any = None
    ) -> Any:
        del requires_grad, hooks, state
        return data

    def _rebuild_from_type(self, function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """Returns the tensor in one of a class of its own."""
        del kind, state
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise TypeError("tensor of a class that says not how it is built")
        return self._call(function, arguments)

    def _current_name(self) -> str:
        """The last string on the stack, which in a state dict is the name of the tensor."""
        return next((_short(item) for item in reversed(self._stack) if isinstance(item, str)), "?")


def _counts(*numbers: Any) -> bool:
    """Whether all are natural numbers that torch can save, booleans excluded."""
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _torch_size(shape: Any) -> tuple[Any, ...]:
    if not isinstance(shape, tuple):
        raise TypeError("torch.Size of something that is no tuple")
    return shape


def _ordered_dict(items: Any = None) -> OrderedDict[Any, Any]:
    """An OrderedDict; Python 2 saved it with the list of its items."""
    if not isinstance(items, list | None):
        raise TypeError("OrderedDict of something that is no list")
    result: OrderedDict[Any, Any] = OrderedDict()
    _set_items(result, items or [])
    return result


def _default_dict(factory: Any = None, items: Any = None) -> dict[Any, Any]:
    """A dict; what would make its missing values is not called."""
    del factory
    if not isinstance(items, dict | None):
        raise TypeError("defaultdict of something that is no dict")
    return dict(items or {})


def _instance(made: Any) -> Any:
    """What `cls.__new__` would return: an OrderedDict is a dict, all others are opaque."""
    if not isinstance(made, _Global):
        raise TypeError("instance of something that is no class")
    if made == _Global("collections", "OrderedDict"):
        return OrderedDict()
    return Opaque(f"{made.module}.{made.name}")


def _set_items(target: Any, items: Any) -> None:
    if isinstance(target, Opaque):
        return
    if not isinstance(target, dict):
        raise TypeError("item set on something that is no dict")
    for key, value in items:
        # Hashing nested tuples can take for ever, or overflow the C stack.
        if isinstance(key, str | int | float | bytes | None):
            target[key] = value


def _append(target: Any, items: list[Any]) -> None:
    if isinstance(target, Opaque):
        return
    if not isinstance(target, list):
        raise TypeError("append to something that is no list")
    target.extend(items)
