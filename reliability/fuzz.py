"""Broken and hostile inputs by the thousand: each is accepted, or refused with one sentence.

    python reliability/fuzz.py [--inputs 10000] [--seed 0] [--only NAME]

Every reader of files and settings gets intact inputs that were damaged at random. Wrong are: an
exception that isn't InputError (the user would see a traceback), a message that isn't one printable
line, an input that takes longer than HANG_SECONDS, memory that grows by more than GROWTH_MB, and a
checkpoint of ours that loads with other values than were saved. Needs the extra `test`. Prints a
table; the exit code is 1 if anything is wrong. The same seed makes the same inputs.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.pool
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.gettempdir()  # Nothing is compiled.
os.environ["OPENCV_LOG_LEVEL"] = "SILENT"  # As the command line sets it.

import absl.logging
import cv2
import damage
import hypothesis
import jax
import numpy as np
import pydicom
import pydicom.dataset
import pydicom.uid
import safetensors.numpy
import torch
from hypothesis import strategies as st

from fetal_flax import checkpoints
from fetal_flax._util.files import json_bytes
from fetal_flax.checkpoints import shipped
from fetal_flax.commands import main as command_line
from fetal_flax.commands.train import Train
from fetal_flax.config import ModelConfig, TrainConfig, from_dict, to_dict
from fetal_flax.conversion.names import TABLES
from fetal_flax.conversion.recognition import read_network
from fetal_flax.conversion.transfer import to_state_dict
from fetal_flax.data import hc18
from fetal_flax.data.dicom import DicomFile
from fetal_flax.errors import InputError, one_line
from fetal_flax.inference.sources import Outcome, find_files, listed, pixel_sizes, read_sources
from fetal_flax.models import functional
from fetal_flax.training.workdir import read_config

HANG_SECONDS = 60
GROWTH_MB = 1024  # hc18 decodes images of up to 2^25 pixels, 256 MB each, one per processor.
LONGEST_MESSAGE = 20_000  # A file that lacks every tensor of a network names them all.

MODEL = ModelConfig(name="unet", base_width=1)


class Row(NamedTuple):
    """A line of the table."""

    target: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    wrong: int = 0
    slowest_ms: float = 0
    growth_mb: float = 0
    problems: tuple[str, ...] = ("the process died or hung",)


class Campaign:
    """Tries inputs on one target, in a process of its own, and counts what becomes of them."""

    def __init__(self, stderr: int):
        self._stderr = stderr
        self._counts: Counter[str] = Counter()
        self._problems: dict[str, str] = {}
        self._slowest = 0.0
        self._start_mb = 0.0

    def check(self, attempt: Callable[[], object], **facts: object) -> None:
        """Runs one input; the first must be accepted, else the others would tell nothing."""
        # Until the next input is tried, lest making that one hangs.
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=self._stderr)
        start = time.perf_counter()
        outcome, problem = "accepted", ""
        try:
            attempt()
        except InputError as error:
            outcome, problem = "refused", _fault(str(error))
        except SystemExit as error:  # tyro's usage, and --help
            outcome = "refused" if error.code else "accepted"
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            problem = f"{type(error).__name__} in {place}: {ascii(str(error))[:150]}"
        self._slowest = max(self._slowest, time.perf_counter() - start)
        number = self._counts.total()
        self._counts["wrong" if problem else outcome] += 1
        if problem:
            kind = re.sub(r"\d+|'.*?'", "", problem)
            self._problems.setdefault(kind, f"input {number} {ascii(facts)[:300]}: {problem}")
        if number == 0:
            assert outcome == "accepted" and not problem, (outcome, problem)
            Path("/proc/self/clear_refs").write_text("5")  # Sets VmHWM, the peak, to what is used.
            self._start_mb = _memory_mb("VmRSS")

    def row(self, target: str) -> Row:
        """Returns what became of the inputs so far."""
        counts, growth = self._counts, _memory_mb("VmHWM") - self._start_mb
        problems = [*self._problems.values()]
        if growth > GROWTH_MB:
            problems.append(f"memory grew by {growth:.0f} MB")
        outcomes = (counts["accepted"], counts["refused"], counts["wrong"])
        return Row(target, counts.total(), *outcomes, self._slowest * 1000, growth, tuple(problems))


def _fault(message: str) -> str:
    """Returns what is wrong with a message to the user, or nothing."""
    if message.isprintable() and 10 <= len(message) <= LONGEST_MESSAGE:
        return ""
    return f"a message that is no printable line ({len(message)} characters): {message[:150]!r}"


def _memory_mb(what: str) -> float:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


# PyTorch files.


STRUCTURES = {
    0: damage.damaged_zip,
    1: damage.damaged_stream,
    None: damage.damaged_safetensors,
}


def torch_files(campaign: Campaign, inputs: int, rng: random.Random, folder: Path) -> None:
    """`convert`, `--encoder.weights`, `parity`: both serialisations and safetensors."""
    network = to_state_dict(functional.init(MODEL, 0), TABLES["unet"])
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in network.items()}
    view = torch.arange(60, dtype=torch.float16).reshape(3, 4, 5).transpose(0, 2)[1:, ::2]
    mixed = {
        "epoch": 3,
        "model_state_dict": {
            "module.a": torch.nn.Parameter(view.to(torch.bfloat16)),
            **{
                f"module.{n}": torch.ones(2, 3).to(t)
                for n, t in enumerate((torch.int8, torch.bool))
            },
            "module.shared": view,
            "module.empty": torch.zeros(0, 3),
        },
    }
    intact: list[tuple[bytes, int | None]]
    intact = [(_torch_bytes(s, legacy), legacy) for s in (tensors, mixed) for legacy in (0, 1)]
    intact.append((safetensors.numpy.save(network, {"format": "pt"}), None))
    path = folder / "a.pth"

    def read() -> None:
        read_network(path)

    for number in range(inputs):
        data, legacy = intact[0] if number == 0 else rng.choice(intact)
        how = "intact" if number == 0 else rng.choice(("bytes", "structure", "structure", "noise"))
        if how == "bytes":
            data = damage.damaged(data, rng)
        elif how == "noise":
            head = rng.choice((b"", b"\x80\x02", b"PK\x03\x04", struct.pack("<Q", 90) + b"{"))
            data = head + rng.randbytes(rng.randrange(500))
        elif how == "structure":
            data = STRUCTURES[legacy](data, rng)
        path.write_bytes(data)
        campaign.check(read, how=how, legacy=legacy)


def _torch_bytes(state: dict[str, Any], legacy: int) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


# Our own checkpoints.


def own_checkpoints(campaign: Campaign, inputs: int, rng: random.Random, folder: Path) -> None:
    """`evaluate`, `predict`, `convert --to-torch`: one to three files of a checkpoint damaged."""
    saved = checkpoints.Description("network", MODEL, config=to_dict(TrainConfig(model=MODEL)))
    variables = functional.init(MODEL, 0)
    checkpoints.save_checkpoint(folder / "intact", checkpoints.Checkpoint(variables, saved))
    files = [path for path in sorted((folder / "intact").rglob("*")) if path.is_file()]
    broken = folder / "broken"

    def load() -> None:
        loaded, description = checkpoints.load_checkpoint(broken)
        if not jax.tree.all(jax.tree.map(np.array_equal, loaded, variables)):
            raise AssertionError("other arrays were loaded than were saved")
        if (description.model, description.dataset) != (MODEL, "hc18"):
            raise AssertionError(f"another description was loaded: {description}")

    for number in range(inputs):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder / "intact", broken)
        done = []
        for _ in range(rng.randint(1, 2) if number else 0):
            chosen = rng.choice(files)
            path = broken / chosen.relative_to(folder / "intact")
            done.append(damage.damage_file(path, rng))
        campaign.check(load, damage=done)


# Networks in plain files.


def plain_networks(campaign: Campaign, inputs: int, rng: random.Random, folder: Path) -> None:
    """`--checkpoint`: a file of a shipped network damaged, half the time with fitting digests."""
    halves = shipped.to_float16(functional.init(MODEL, 0))
    variables = shipped.to_float32(halves, functional.shapes(MODEL))
    config = to_dict(TrainConfig(model=MODEL))
    described = checkpoints.Description("network", MODEL, config=config)
    intact = shipped.contents(halves, described, {"dice": 0.5})
    path = folder / "network"

    def load() -> None:
        loaded, description = checkpoints.load_checkpoint(path)
        if fitting:  # Whatever it says it is, nothing later may stumble over it.
            assert all(np.isfinite(array).all() for array in jax.tree.leaves(loaded))
            json_bytes(to_dict(description) | {"dataset": description.dataset})
            return
        if not jax.tree.all(jax.tree.map(np.array_equal, loaded, variables)):
            raise AssertionError("other arrays were loaded than were saved")
        if (description.model, description.dataset) != (MODEL, "hc18"):
            raise AssertionError(f"another description was loaded: {description}")

    for number in range(inputs):
        shutil.rmtree(path, ignore_errors=True)
        shipped.save(path, intact)
        done, fitting = [], bool(number) and rng.random() < 0.5
        for _ in range(rng.randint(1, 2) if number else 0):
            name = rng.choice(list(intact))
            if name == shipped.ARRAYS and rng.random() < 0.5 and (path / name).is_file():
                with contextlib.suppress(Exception):  # Of what was damaged before.
                    content = damage.damaged_safetensors((path / name).read_bytes(), rng)
                    (path / name).write_bytes(content)
                    done.append("structure")
            else:
                done.append(damage.damage_file(path / name, rng))
        if fitting:
            damage.fit_digests(path)
        campaign.check(load, damage=done, fitting=fitting)


# HC18 folders and the CSV of pixel sizes.


def hc18_folders(campaign: Campaign, inputs: int, rng: random.Random, folder: Path) -> None:
    """`data prepare`, `train`, `evaluate`: folders with one to three things wrong."""
    images = folder / "intact" / hc18.IMAGES
    images.mkdir(parents=True)
    rows = [",".join(hc18.COLUMNS)]
    for name, center in (("000_HC", (40, 30)), ("001_HC", (44, 28)), ("001_2HC", (36, 32))):
        shade = np.full((60, 80), 90, np.uint8)
        line = cv2.ellipse(np.zeros_like(shade), center, (28, 20), 10.0, 0, 360, (255,), 1)
        cv2.imwrite(str(images / f"{name}.png"), shade)
        cv2.imwrite(str(images / f"{name}_Annotation.png"), line)
        rows.append(f"{name}.png,0.25,38.5")
    (folder / "intact" / hc18.CSV).write_text("\r\n".join(rows))
    broken = folder / "broken"

    def read() -> None:
        hc18.fingerprint(broken)
        for record in hc18.find_records(broken):
            hc18.load(record)

    for number in range(inputs):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder / "intact", broken)
        times = rng.randint(1, 3) if number else 0
        done = [damage.damage_folder(broken, rng) for _ in range(times)]
        campaign.check(read, damage=done)


def csv_files(campaign: Campaign, inputs: int, rng: random.Random, folder: Path) -> None:
    """`predict --pixel-size-csv`, `submission`: cells, encodings, quotes, bytes."""
    names = [f"{number:03}_HC.png" for number in range(4)]
    for name in names:
        (folder / name).touch()
    path = folder / "sizes.csv"
    for number in range(inputs):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            path.rmdir() if path.is_dir() else os.unlink(path)
        intact = "filename,pixel size(mm)\n" + "".join(f"{name},0.25\n" for name in names)
        path.write_bytes(damage.odd_csv(rng, names) if number else intact.encode())
        if number and rng.random() < 0.02:
            path.unlink()
            rng.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path)))()
        campaign.check(lambda: pixel_sizes([folder / name for name in names], path))


# DICOM files, and folders of everything.


def _dicom_bytes(pixels: np.ndarray, **attributes: Any) -> bytes:
    """An intact ultrasound file."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = pydicom.uid.UltrasoundImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.tobytes()
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _intact_dicoms() -> list[bytes]:
    gray = np.add.outer(np.arange(32), 3 * np.arange(40)).astype(np.uint8)
    region = pydicom.Dataset()
    region.RegionSpatialFormat = region.RegionDataType = 1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3
    region.PhysicalDeltaX = region.PhysicalDeltaY = 0.02
    return [
        _dicom_bytes(gray, SequenceOfUltrasoundRegions=[region]),
        _dicom_bytes(gray, PixelSpacing=[0.25, 0.25], WindowCenter=100, WindowWidth=80),
        _dicom_bytes(gray.astype(np.uint16) * 16, BitsStored=12, HighBit=11),
        _dicom_bytes(np.stack([gray] * 3), NumberOfFrames=3, PixelSpacing=[0.25, 0.25]),
    ]


def dicom_files(campaign: Campaign, inputs: int, rng: random.Random, folder: Path) -> None:
    """`predict`: bytes and values of DICOM files damaged, with the pixel size and every frame."""
    intact, path = _intact_dicoms(), folder / "a.dcm"

    def read() -> None:
        file = DicomFile(path)
        size = file.pixel_size_mm
        assert size is None or 0 < size < hc18.MOST_MM, size
        for frame in itertools.islice(file.frames(), 5):
            assert frame.dtype == np.uint8 and frame.ndim == 2

    for number in range(inputs):
        data = intact[0] if number == 0 else rng.choice(intact)
        how = "intact" if number == 0 else rng.choice(("bytes", "values", "values"))
        if how == "bytes":
            data = damage.damaged(data, rng)
        elif how == "values":
            data = damage.damaged_dicom(data, rng)
        path.write_bytes(data)
        campaign.check(read, how=how)


def mixed_folders(campaign: Campaign, inputs: int, rng: random.Random, folder: Path) -> None:
    """`predict`: folders of DICOM files, images and rubbish; intact files always come through."""
    dicoms, source = _intact_dicoms(), folder / "in"
    gray = np.add.outer(np.arange(32), 3 * np.arange(40)).astype(np.uint8)
    images = [cv2.imencode(kind, gray)[1].tobytes() for kind in (".png", ".jpg", ".bmp", ".webp")]

    def read() -> None:
        outcome = Outcome()
        paths = find_files(source, outcome.skipped)
        found = {s.name for s in read_sources(paths, pixel_sizes(paths, None), outcome)}
        assert {"intact", "whole"} <= found, "an intact file was lost"
        assert outcome.done == outcome.files == len(paths)
        for sentence in outcome.failed:
            assert not (fault := _fault(one_line(sentence))), fault
        listed(outcome.skipped)

    for number in range(inputs):
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        (source / "intact.dcm").write_bytes(dicoms[0])
        (source / "whole.png").write_bytes(images[0])
        made = []
        for _ in range(rng.randint(1, 4) if number else 0):
            ending = rng.choice((".png", ".dcm", "", ".jpg", ".gif", ".tif", ".ima", ".txt", "."))
            stem = rng.choice((b"a", b"b", b"\xff", b"._a", b"DICOMDIR", b"n\nl", b"x" * 240))
            path = source / os.fsdecode(stem + ending.encode())
            with contextlib.suppress(OSError):  # Two things of one name.
                made.append(damage.odd_entry(path, rng, dicoms, images))
        campaign.check(read, made=made)


# Settings.

_ODD = st.one_of(
    st.sampled_from(damage.WORDS),
    st.sampled_from(damage.NUMBERS),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=20),
)
_JSON = st.recursive(
    _ODD, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3)
)
_SECTIONS = {
    name: [field.name for field in dataclasses.fields(kind)]
    if dataclasses.is_dataclass(kind)
    else []
    for name, kind in typing.get_type_hints(TrainConfig).items()
}
_FLAGS = [
    f"--{name}{field and '.'}{field}".replace("_", "-")
    for name, fields in _SECTIONS.items()
    for field in fields or [""]
]
_CONFIG_FILES = (
    *("", "config = 3", "def config(): return 3", "def config(:", "def config(x): return x", "\0"),
    *(
        "import nothing_like_this",
        "raise ValueError('a\\nb')",
        "def config(): config()",
        "é = '\\ud8",
    ),
    "from fetal_flax.config import *\ndef config(): return TrainConfig(seed=-1)",
    "from fetal_flax.config import *\ndef config(): return TrainConfig(seed='x')",
    "from fetal_flax.config import *\ndef config(): return TrainConfig(name='ok')",
)


def _valid(config: TrainConfig) -> None:
    """Checks settings that were accepted: their JSON gives them back, float32 holds the numbers."""
    assert from_dict(TrainConfig, json.loads(json_bytes(to_dict(config)))) == config
    for value in jax.tree.leaves(to_dict(config)):
        if isinstance(value, (int, float)):
            assert np.isfinite(np.float32(value)) and abs(value) < 2**128, value
    jax.random.key(config.seed)


def command_lines(campaign: Campaign, inputs: int, rng: random.Random, folder: Path) -> None:
    """`train --section.field VALUE`, `--config FILE`: parsed and checked, not run."""
    accepted: list[TrainConfig] = []

    def keep(self: Train) -> int:
        accepted.append(self.settings)
        return 0

    Train.run = keep
    path = folder / "settings.py"
    value = _ODD.map(str) | st.sampled_from(damage.WORDS)
    odd_flag = st.sampled_from(("--config", "--fold", "--resume", "--hlep")) | value
    odd_option = st.tuples(odd_flag, st.lists(value, max_size=3))
    option = st.tuples(st.sampled_from(_FLAGS), value.map(lambda word: [word]))
    pair = st.tuples(st.sampled_from(_FLAGS), st.lists(value, min_size=2, max_size=2))
    options = st.lists(option | option | option | pair | odd_option, max_size=2)

    def parse(arguments: list[str]) -> None:
        accepted.clear()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = command_line.main(["train", *arguments])
        message = printed.getvalue().removesuffix("\n")
        for word in filter(None, arguments):  # Repeated as it was typed.
            message = message.replace(word, "…")
        if code:
            raise InputError(message)
        _valid(accepted[0])

    @_examples(inputs, rng)
    @hypothesis.given(options, st.none() | st.sampled_from(_CONFIG_FILES))
    def run(options: list[tuple[str, list[str]]], settings: str | None) -> None:
        arguments = [word for flag, values in options for word in (flag, *values)]
        if settings is not None:
            path.write_text(settings)
            arguments = ["--config", str(path), *arguments]
        campaign.check(lambda: parse(arguments), arguments=arguments, settings=settings)

    campaign.check(lambda: parse(["--seed", "3"]))
    run()


def config_files(campaign: Campaign, inputs: int, rng: random.Random, folder: Path) -> None:
    """`--resume`: any JSON, and any bytes, as a run's config.json."""
    path = folder / "config.json"
    fields = {
        name: st.fixed_dictionaries({}, optional=dict.fromkeys(fields, _JSON)) if fields else _JSON
        for name, fields in _SECTIONS.items()
    }
    structured = st.fixed_dictionaries({}, optional=fields)
    deep = st.sampled_from((900, 5000, 10**6)).map(lambda n: b'{"name": ' + b"[" * n + b"]" * n)
    texts = (structured | structured | _JSON).map(lambda values: json.dumps(values).encode())

    @_examples(inputs, rng)
    @hypothesis.given(texts | texts | texts | deep | st.binary(max_size=50))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        campaign.check(lambda: _valid(read_config(folder)), content=content)

    path.write_bytes(json_bytes(to_dict(TrainConfig())))
    campaign.check(lambda: _valid(read_config(folder)))
    run()


def _examples(inputs: int, rng: random.Random) -> Callable[[Any], Any]:
    """Makes hypothesis try this many inputs, the same ones for the same seed."""
    settings = hypothesis.settings(
        max_examples=inputs,
        phases=(hypothesis.Phase.generate,),
        database=None,
        deadline=None,
        suppress_health_check=[*hypothesis.HealthCheck.__members__.values()],
    )
    return lambda test: hypothesis.seed(rng.getrandbits(32))(settings(test))


TARGETS: dict[str, Callable[[Campaign, int, random.Random, Path], None]] = {
    "PyTorch files": torch_files,
    "config.json": config_files,
    "pixel-size CSV": csv_files,
    "DICOM files": dicom_files,
    "mixed folders": mixed_folders,
    "HC18 folders": hc18_folders,
    "command line": command_lines,
    "own checkpoints": own_checkpoints,
    "shipped networks": plain_networks,
}


def _run(name: str, inputs: int, seed: int, answer: multiprocessing.connection.Connection) -> None:
    """A target's process: readers may print to stderr, which is thrown away."""
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    absl.logging.set_verbosity(absl.logging.ERROR)  # As the command line sets it.
    campaign = Campaign(stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            TARGETS[name](campaign, inputs, random.Random(seed), Path(folder))
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.dup2(stderr, 2)  # For what is wrong with this script.
    answer.send(campaign.row(name))


def _row(name: str, inputs: int, seed: int) -> Row:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(name, inputs, seed, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return Row(name)
    finally:
        process.join()


def main() -> int:
    """Runs the targets, two at a time, and prints what became of their inputs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one target instead of all")
    options = parser.parse_args()
    names = [options.only] if options.only else list(TARGETS)
    print("| target | inputs | accepted | refused | wrong | slowest, ms | memory, MB |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    wrong = []
    with multiprocessing.pool.ThreadPool(2) as pool:
        for row in pool.imap(lambda name: _row(name, options.inputs, options.seed), names):
            numbers = f"{row.inputs:,} | {row.accepted:,} | {row.refused:,} | {row.wrong:,}"
            print(f"| {row.target} | {numbers} | {row.slowest_ms:.0f} | {row.growth_mb:.0f} |")
            sys.stdout.flush()
            wrong += [f"{row.target}: {problem}" for problem in row.problems]
    for problem in wrong:
        print(problem, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
