"""Write state dicts as `torch.save` does, without PyTorch.

The file is a zip archive: a pickle that rebuilds an `OrderedDict` of tensors, and one stored member
per tensor (PyTorch's notes "Serialization semantics"). Python's pickler refuses to name functions
of a module that isn't there, so the few instructions are written by hand; torch_file.py reads them.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

# As in torch.save's files, so that torch.load can map tensors from disk.
_ALIGNMENT = 64
_LOCAL_HEADER = 30
_EXTRA_HEADER = 4


def state_dict_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Returns the content of a `.pth` file that `torch.load(weights_only=True)` reads.

    Args:
        tensors: float32 arrays by name.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        _add(archive, "data.pkl", _pickle(tensors))
        _add(archive, "byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            _add(archive, f"data/{key}", array.astype("<f4", order="C").tobytes())
        _add(archive, "version", b"3\n")
    return file.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Stores a member whose content begins at a multiple of the alignment."""
    # ZipInfo's default date is 1980, so equal tensors make equal files.
    entry = zipfile.ZipInfo(f"archive/{name}")
    position = archive.start_dir + _LOCAL_HEADER + len(entry.filename) + _EXTRA_HEADER
    padding = -position % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(entry, content)


def _pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    items = b"".join(
        _text(name) + _tensor(str(key), array) for key, (name, array) in enumerate(tensors.items())
    )
    return pickle.PROTO + b"\x02" + _ORDERED_DICT + pickle.MARK + items + pickle.SETITEMS + b"."


def _tensor(key: str, array: np.ndarray) -> bytes:
    """Calls `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, grad, hooks)`."""
    strides = [step // array.itemsize for step in np.empty(array.shape, array.dtype).strides]
    storage = _tuple(
        _text("storage"),
        _global("torch", "FloatStorage"),
        _text(key),
        _text("cpu"),
        _integer(array.size),
    )
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _integer(0),
        _tuple(*map(_integer, array.shape)),
        _tuple(*map(_integer, strides)),
        pickle.NEWFALSE,
        _ORDERED_DICT,
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*parts: bytes) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(number: int) -> bytes:
    return pickle.BININT + struct.pack("<i", number)


_ORDERED_DICT = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
