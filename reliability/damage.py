"""Damage at random, for fuzz.py: to bytes, PyTorch files, our own checkpoints and HC18 folders."""

import contextlib
import hashlib
import io
import json
import os
import pickletools
import random
import re
import shutil
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pydicom.dataelem
import pydicom.tag
import safetensors.numpy

from fetal_flax.checkpoints import shipped
from fetal_flax.checkpoints.integrity import digest_of_arrays, digest_of_json
from fetal_flax.config import ModelConfig, from_dict
from fetal_flax.data import hc18
from fetal_flax.models import functional

NUMBERS = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63)
WORDS = (
    *("", "nan", "-nan", "inf", "-inf", "1e400", "1e308", "1e-320", "-1", "0", "0.5", "1", "True"),
    *(
        "99999999999999999999",
        "9" * 5000,
        "None",
        "none",
        "auto",
        "unet",
        "0x10",
        "1_0",
        "\u0661",
        "é",
    ),
    *(
        "~nobody/x",
        "../..",
        "/",
        "a\nb",
        "a\x1b[31m",
        "\ud800",
        "x" * 300,
        "x" * 5000,
        "--",
        "-1.5",
    ),
    *(
        "{}",
        "[1]",
        "'",
        '"',
        ",",
        ";",
        "\t",
        "\ufeff",
        "256",
        "64",
        "hc18",
        "-0.0",
        "-1.5",
        "1,5",
        "\0",
    ),
)


# Damage to bytes.


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Changes, removes, doubles and adds bytes, more often where headers are: near both ends."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = int(len(result) * rng.random() ** 3)
        at = at if rng.random() < 0.7 else len(result) - at
        length = int(2 ** rng.uniform(0, 10))
        match rng.randrange(6):
            case 0:
                result[at : at + 1] = bytes(b ^ 1 << rng.randrange(8) for b in result[at : at + 1])
            case 1:
                number = rng.choice(NUMBERS).to_bytes(9, "little", signed=True)
                width = rng.choice((1, 2, 4, 8))
                result[at : at + width] = number[:width]
            case 2:
                del result[at:]
            case 3:
                del result[at : at + length]
            case 4:
                result[at:at] = result[at : at + length]
            case 5:
                result[at:at] = rng.randbytes(length)
    return bytes(result)


# PyTorch files.


def _damaged_pickle(code: bytes, pickles: int, rng: random.Random) -> bytes:
    """Removes, doubles, swaps and replaces instructions, and damages their arguments."""
    file = io.BytesIO(code)
    starts = [at for _ in range(pickles) for *_, at in pickletools.genops(file)]
    parts = [code[a:b] for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        match rng.randrange(6):
            case 0:
                parts[at] = b""
            case 1:
                parts[at] *= rng.choice((2, 2, 100, 10_000))
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts[at] = parts[other]
            case 4:
                code = rng.choice(pickletools.opcodes).code.encode("latin-1")
                parts[at] = code + rng.randbytes(rng.randrange(9))
            case 5:
                parts[at] = parts[at][:1] + damaged(parts[at][1:], rng)
    return b"".join(parts)


def damaged_stream(data: bytes, rng: random.Random) -> bytes:
    """Changes the instructions of a legacy stream's five pickles; the last one carries the data."""
    return _damaged_pickle(data, 5, rng)


def damaged_zip(data: bytes, rng: random.Random) -> bytes:
    """Writes the archive anew, checksums and all, with a member or its name changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    code = next(n for n, (name, _) in enumerate(members) if name.endswith("/data.pkl"))
    at = code if rng.random() < 0.7 else rng.randrange(len(members))
    name, content = members[at]
    match rng.randrange(8):
        case 0:
            del members[at]
        case 1:
            members.append((name, content))
        case 2:
            members[at] = (rng.choice(("", "/", "../x", "data.pkl", "é", name + "/")), content)
        case 3:
            members[at] = (name, damaged(content, rng))
        case _ if at == code:
            members[at] = (name, _damaged_pickle(content, 1, rng))
        case _:
            members[at] = (name, content[: rng.randrange(len(content) + 1)])
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")  # Of a name twice.
        for name, content in members:
            archive.writestr(name or "empty", content)
    return file.getvalue()


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Changes the JSON header: its text, names, shapes, offsets and dtypes, or its length."""
    (length,) = struct.unpack_from("<Q", data)
    text, rest = data[8 : 8 + length], data[8 + length :]
    header = json.loads(text)
    name = rng.choice(list(header))
    match rng.randrange(5):
        case 0:
            text = damaged(text, rng)
        case 1:
            header[name] = rng.choice((None, [], {}, "x", 1, [[1]], {"dtype": {}}))
        case 2:
            header[rng.choice(WORDS)] = header.pop(name)
        case 3:
            values = [abs(rng.choice(NUMBERS)) for _ in range(rng.randrange(5))]
            header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | {
                rng.choice(("shape", "data_offsets")): values
            }
        case 4:
            kind = rng.choice(("F64", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "U8", "X", ""))
            header[name] = {**header[name], "dtype": kind}
    text = text if text != data[8 : 8 + length] else json.dumps(header).encode()
    claimed = len(text) if rng.random() < 0.9 else abs(rng.choice(NUMBERS))
    return struct.pack("<Q", claimed) + text + rest


# DICOM files.


def damaged_dicom(data: bytes, rng: random.Random) -> bytes:
    """Changes one or two elements of a file: their text, numbers, kinds or presence."""
    with warnings.catch_warnings(action="ignore"):
        dataset = pydicom.dcmread(io.BytesIO(data))
        for _ in range(rng.randint(1, 2)):
            # The spacing and the regions more often than the others.
            tags = [*dataset.keys(), *[t for t in _SPACINGS if t in dataset] * 5]
            tag = rng.choice(tags)
            with contextlib.suppress(Exception):  # What pydicom doesn't take or write.
                _damage_element(dataset, tag, rng)
        file = io.BytesIO()
        try:
            dataset.save_as(file, enforce_file_format=False)
        except Exception:  # The same.
            return damaged(data, rng)
    return file.getvalue() if rng.random() < 0.9 else file.getvalue()[132:]


_SPACINGS = (0x00280030, 0x00186011)  # PixelSpacing, SequenceOfUltrasoundRegions


def _damage_element(dataset: pydicom.Dataset, tag: Any, rng: random.Random) -> None:
    element = dataset[tag]
    kind = rng.choice(("text", "number", "kind", "delete", "list", "inside"))
    if element.VR == "SQ" and element.value and kind != "delete":
        inner = element.value[0]
        _damage_element(inner, rng.choice([*inner.keys()]), rng)
    elif kind == "delete":
        del dataset[tag]
    elif kind == "kind":
        vr = rng.choice(("LO", "UN", "DS", "FD", "US", "SQ", "OB"))
        value = rng.choice((b"0.1\\0.1 ", b"x ", b"\0\0"))
        dataset[tag] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(tag), vr, len(value), value, 0, False, True
        )
    else:
        words = [w for w in WORDS if len(w) < 64] + ["0,1\\0,1", "0.1 mm\\0.1 mm", "0.1\\", "1e9"]
        value = "\\".join(rng.choice(words) for _ in range(rng.randint(1, 3)))
        if element.VR in ("US", "UL", "SS", "FD", "FL"):
            numbers = [*NUMBERS, float("nan"), float("inf"), -1.5, 1e300]
            value = [rng.choice(numbers) for _ in range(rng.randint(1, 2))]
            value = value if kind == "list" else value[0]
            element._value = value
            return
        raw = value.encode("utf-8", "surrogateescape")
        dataset[tag] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(tag), element.VR, len(raw), raw, 0, False, True
        )


def odd_entry(path: Path, rng: random.Random, dicoms: list[bytes], images: list[bytes]) -> str:
    """Makes an entry of a folder that may be anything, and returns what."""
    if os.path.lexists(path):  # Writing to a pipe would wait for ever.
        return "nothing"
    how = rng.choice(
        (
            "dicom",
            "dicom",
            "image",
            "image",
            "odd image",
            "noise",
            "empty",
            "folder",
            "pipe",
            "link",
        )
    )
    match how:
        case "dicom":
            intact = rng.choice(dicoms)
            path.write_bytes(rng.choice((damaged, damaged_dicom))(intact, rng))
        case "image":
            path.write_bytes(damaged(rng.choice(images), rng))
        case "odd image":
            path.write_bytes(_odd_image(rng))
        case "noise":
            path.write_bytes(rng.randbytes(rng.randrange(300)))
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(rng.choice((path.name, "nowhere", "intact.dcm", "/dev/zero", ".")))
    return how


# Files of any kind.


def damage_file(path: Path, rng: random.Random) -> str:
    """Removes, replaces or damages a file, if it is still there, and returns what was done."""
    how = rng.choice(("bytes", "bytes", "bytes", "empty", "remove", "folder", "loop", "json"))
    if not path.is_file():
        return "nothing"
    data = path.read_bytes()
    if how == "bytes":
        path.write_bytes(damaged(data, rng))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "json":
        path.write_bytes(_damaged_json(data, rng))
    else:
        path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    return f"{how} {path.name}"


def _damaged_json(data: bytes, rng: random.Random) -> bytes:
    """Replaces one value, key or number of a JSON text, or the whole of another file."""
    others = (None, [], {}, 3, -1, 2**70, "x", True, [[1]], {"format": 1}, "é" * 300)
    other = json.dumps(rng.choice(others)).encode()
    values = list(re.finditer(rb'"[^"]*"|-?[\d.]+|true|false|null', data[:100_000]))
    if not values or not data.lstrip().startswith(b"{"):
        return other
    chosen = rng.choice(values)
    return data[: chosen.start()] + other + data[chosen.end() :]


# Networks in plain files.


def fit_digests(folder: Path) -> None:
    """Makes a shipped network's digests fit its files again, as far as these can be read."""
    path = folder / shipped.DESCRIPTION
    with contextlib.suppress(Exception):  # Of what damage left.
        values = json.loads(path.read_bytes())
        digests = values.pop("sha256")
        digests["description"] = digest_of_json(values)
        path.write_text(json.dumps(values | {"sha256": digests}))
        arrays = (folder / shipped.ARRAYS).read_bytes()
        digests[shipped.ARRAYS] = hashlib.sha256(arrays).hexdigest()
        path.write_text(json.dumps(values | {"sha256": digests}))
        shapes = functional.shapes(from_dict(ModelConfig, values["model"]))
        loaded = shipped.to_float32(safetensors.numpy.load(arrays), shapes)
        digests["variables"] = digest_of_arrays(loaded._asdict())
        path.write_text(json.dumps(values | {"sha256": digests}))


# HC18 folders and their CSV.


def damage_folder(folder: Path, rng: random.Random) -> str:
    """Does one thing to an HC18 folder, and returns to which file."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    if not paths:
        return "nothing"
    path = rng.choice(paths)
    with contextlib.suppress(OSError):  # Where damage before is in the way.
        _damage_one_of(folder, path, rng)
    return path.name


def _damage_one_of(folder: Path, path: Path, rng: random.Random) -> None:
    match rng.randrange(10):
        case 0:
            damage_file(path, rng)
        case 1:
            (folder / hc18.CSV).unlink()  # It may be a pipe.
            (folder / hc18.CSV).write_bytes(odd_csv(rng, ["000_HC.png", "001_HC.png"]))
        case 2:
            path.write_bytes(_odd_png(path.read_bytes(), rng))
        case 3 | 4:
            path.write_bytes(_odd_image(rng))
        case 5:
            ends = ("{}_HC.png", "{}_2HC_Annotation.png", "{}HC.png", "{}/x", "{}.csv")
            odd = rng.choice(ends).format(
                rng.choice(("9", "\u0663", "a", "\udcff", "9\n", "9" * 200))
            )
            path.rename(path.parent / odd)
        case 6:
            path.unlink()
            rng.choice((os.mkfifo, os.mkdir))(path)
        case 7:
            target = rng.choice((folder, path, Path("/dev/zero"), Path("/nowhere"), Path(".")))
            path.unlink()
            path.symlink_to(target)
        case 8:
            shutil.copy(path, path.with_name(f"{rng.randrange(1000):03}_HC_Annotation.png"))
        case 9:
            path.rename(folder / path.name)


def _odd_png(data: bytes, rng: random.Random) -> bytes:
    """A PNG whose header, with the right checksum, says something else."""
    header = bytearray(data[12:29])  # IHDR, width, height, depth, colour, ...
    at = rng.choice((4, 8, 12, 13, 14, 15, 16))
    size = 4 if at < 12 else 1
    header[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "big")
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _odd_image(rng: random.Random) -> bytes:
    """An image of another mode, size, format or content."""
    height, width = rng.choice(((60, 80), (60, 80), (1, 1), (1, 3000), (2, 2), (300, 300)))
    channels = rng.choice((1, 3, 4))
    kind = rng.choice((np.uint8, np.uint8, np.uint16))
    noise = np.frombuffer(rng.randbytes(height * width * channels), np.uint8).astype(kind)
    shown = noise.reshape(height, width, channels) > rng.choice((0, 127, 250, 254, 255))
    ending = rng.choice((".png", ".png", ".jpg", ".bmp", ".tiff"))
    pixels = shown.astype(np.uint8 if ending in (".jpg", ".bmp") else kind) * 255
    return cv2.imencode(ending, pixels)[1].tobytes()


def odd_csv(rng: random.Random, names: list[str]) -> bytes:
    """Makes a CSV of pixel sizes with odd cells, rows, separators, line ends and encodings."""
    columns = [*hc18.COLUMNS[: rng.randint(2, 3)]]
    rows = [columns, *([name, "0.25", "175.5"][: len(columns)] for name in names)]
    for _ in range(rng.randint(1, 4)):
        row = rng.choice(rows)
        match rng.randrange(5):
            case 0 if row:
                row[rng.randrange(len(row))] = rng.choice(WORDS)
            case 1:
                row.insert(rng.randrange(len(row) + 1), rng.choice((*WORDS, "y" * 200_000)))
            case 2:
                del row[rng.randrange(len(row) + 1) :]
            case 3:
                rows.insert(rng.randrange(len(rows) + 1), list(row))
            case 4:
                rng.shuffle(row)
    separator, end = rng.choice(",,,,;\t"), rng.choice(("\n", "\r\n", "\r", "\n\n", "\0", '"\n'))
    text = end.join(separator.join(row) for row in rows)
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"))
    data = text.encode(encoding, "replace")
    return damaged(data, rng) if rng.random() < 0.3 else data
