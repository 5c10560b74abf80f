"""Files that are broken or made to harm, given to the command: one sentence, and nothing done.

What the reader itself refuses, instruction by instruction, is in test_torch_file.py.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fetal_flax.commands.main import main
from fetal_flax.config import ModelConfig
from fetal_flax.conversion.convert import from_torch_file
from fetal_flax.parity.reference import create_reference

STATE = create_reference(ModelConfig(name="unet", base_width=1)).state_dict()
MANY_BYTES = 10 * 2**30


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, so that what a file's code would touch appears in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(folder, capsys) -> Callable[..., str]:
    def convert(*flags: str, output: str = "out") -> str:
        """Runs a command that must fail and change nothing, and returns what it prints."""
        before = contents(folder)
        assert main(["convert", "--output", output, *flags]) == 2
        printed = capsys.readouterr()
        assert not printed.out
        assert re.fullmatch(r"fetal-flax convert: [^\n]+\n", printed.err)
        assert contents(folder) == before
        return printed.err

    return convert


def contents(folder: Path) -> dict[str, bytes | None]:
    paths = folder.rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def test_the_file_that_these_are_made_from_converts(folder):
    torch.save(STATE, "a.pth")
    assert main(["convert", "--source", "a.pth", "--output", "out"]) == 0
    assert (folder / "out" / "checkpoints").is_dir()


# Code.


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


CALLS = {
    "os.system": Call(os.system, "touch ran"),
    "eval": Call(eval, "open('ran', 'w')"),
    "exec": Call(exec, "open('ran', 'w')"),
    "getattr": Call(getattr, Call(__import__, "os"), "system"),
    "Popen": Call(subprocess.Popen, ["touch", "ran"]),
    "open": Call(open, "ran", "w"),
    "torch.load": Call(torch.load, "a.pth"),
    "Linear": Call(torch.nn.Linear, 2, 3),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_among_the_tensors_are_not_made(refused, call, legacy):
    torch.save({**STATE, "x": call}, "a.pth", _use_new_zipfile_serialization=not legacy)
    assert "a.pth: 'x' must be tensors and are not (one is " in refused("--source", "a.pth")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_calls_in_place_of_the_tensors_are_not_made(refused, call, protocol):
    code = pickle.dumps(call, protocol)
    Path("bare.pth").write_bytes(code)
    assert "bare.pth" in refused("--source", "bare.pth")
    torch.save(STATE, "a.pth")
    rewrite(Path("a.pth"), {"data.pkl": code})
    assert "a.pth" in refused("--source", "a.pth")


def test_the_calls_would_have_been_made(folder):
    """By a reader that unpickles."""
    torch.save({"x": CALLS["os.system"]}, "a.pth")
    torch.load("a.pth", weights_only=False)
    assert (folder / "ran").exists()


@pytest.mark.filterwarnings("ignore")  # torch's own, of saving a module
def test_a_whole_module_is_refused_with_the_way_out(refused):
    torch.save(torch.nn.Linear(2, 3), "a.pth")
    assert "torch.save(model.state_dict(), PATH)" in refused("--source", "a.pth")


# Damage.


def rewrite(path: Path, changes: dict[str, bytes], **settings: Any) -> None:
    """Writes a zip archive anew with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    root = next(iter(members)).partition("/")[0]
    with zipfile.ZipFile(path, "w", **settings) as archive:
        for name, content in members.items():
            archive.writestr(name, changes.get(name.removeprefix(f"{root}/"), content))


WRITERS: dict[str, Callable[[Path], object]] = {
    "zip": lambda path: torch.save(STATE, path),
    "stream": lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: safetensors.torch.save_file(STATE, path),
}
# How much of the file is left, and where that is negative, how much is not.
LENGTHS = (0, 1, 4, 8, 9, 100, 5000, 20_000, -1000, -22, -8, -1)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_cut_short_is_refused(refused, kind, length):
    WRITERS[kind](Path("a.pth"))
    size = Path("a.pth").stat().st_size
    assert size > 40_000
    os.truncate("a.pth", length if length >= 0 else size + length)
    assert "a.pth" in refused("--source", "a.pth")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2, dtype=torch.int32), "bias holds int32, not floats"),
        (torch.ones(2, dtype=torch.uint8), "bias holds uint8, not floats"),
        (torch.ones(2, dtype=torch.bool), "bias holds bool, not floats"),
        (torch.ones(2, dtype=torch.complex64), "[Cc]omplex"),
        (torch.tensor([0, torch.nan]), "bias holds values that are not finite"),
        (torch.tensor([0, torch.inf]), "bias holds values that are not finite"),
        (torch.tensor([0, -torch.inf]).half(), "bias holds values that are not finite"),
        (torch.tensor([0, torch.nan]).bfloat16(), "bias holds values that are not finite"),
        (torch.tensor([0, 1e39], dtype=torch.float64), "not finite in float32"),
    ],
    ids=str,
)
def test_values_that_are_no_weights_are_refused(refused, monkeypatch, kind, value, words):
    name = "down1.maxpool_conv.1.double_conv.1.bias"
    monkeypatch.setitem(STATE, name, value)
    WRITERS[kind](Path("a.pth"))
    printed = refused("--source", "a.pth")
    assert "a.pth" in printed and re.search(words, printed)


def test_float64_that_float32_can_hold_converts(folder):
    double = {name: tensor.double() for name, tensor in STATE.items()}
    torch.save(double, "a.pth")
    assert main(["convert", "--source", "a.pth", "--output", "out"]) == 0


def test_all_that_is_wrong_is_said_in_one_sentence(refused, monkeypatch):
    monkeypatch.delitem(STATE, "up1.up.bias")
    monkeypatch.setitem(STATE, "surplus\nname", torch.ones(1))
    monkeypatch.setitem(STATE, "outc.bias", torch.ones(2))
    monkeypatch.setitem(STATE, "up2.up.bias", STATE["up2.up.bias"] * torch.nan)
    WRITERS["zip"](Path("a.pth"))
    printed = refused("--source", "a.pth")
    for words in ("missing up1.up.bias", r"surplus\nname", "outc.bias has shape", "not finite"):
        assert words in printed


# Few bytes that ask for much.


def claim_storage(path: Path) -> None:
    """Lets the first storage have 10 GB, by torch's own pickle."""
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        code = archive.read(name)
    count = b"K" + bytes([STATE["inc.double_conv.0.weight"].numel()]) + b"t"
    start = code.index(count)
    more = b"\x8a\x05" + (MANY_BYTES // 4).to_bytes(5, "little") + b"t"
    rewrite(path, {"data.pkl": code[:start] + more + code[start + len(count) :]})


def expanded(path: Path) -> None:
    """One number that is repeated ten billion times."""
    torch.save({**STATE, "outc.bias": torch.zeros(1).expand(MANY_BYTES)}, path)


def bomb(path: Path) -> None:
    torch.save(STATE, path)
    rewrite(path, {"data/0": bytes(100 * 2**20)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20


def safetensors_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", MANY_BYTES) + b"{}" + bytes(1000))


def safetensors_tensor(path: Path) -> None:
    claim = {"dtype": "F32", "shape": [MANY_BYTES // 4], "data_offsets": [0, MANY_BYTES]}
    header = json.dumps({"outc.bias": claim}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(1000))


@contextlib.contextmanager
def allocating_less_than(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (claim_storage, "claims 10737418240 bytes, but the whole file has"),
        (expanded, "'outc.bias' makes the tensors far larger than the file"),
        (bomb, "is a compressed zip archive"),
        (safetensors_header, "cannot be read"),
        (safetensors_tensor, "cannot be read"),
    ],
)
def test_what_a_file_claims_is_not_reserved(refused, write, words):
    write(Path("a.pth"))
    with allocating_less_than(5 * 2**20):
        printed = refused("--source", "a.pth")
    assert "a.pth: " in printed and words in printed


@pytest.mark.parametrize("shape", [(4096, 1, 3, 3), (2**40, 0, 3, 3), (0, 1, 3, 3), (1,) * 9, ()])
def test_the_width_that_the_first_tensor_claims_is_not_reserved(refused, monkeypatch, shape):
    # The one tensor that the width of a U-Net is read off; 4096 would have 500 GB.
    monkeypatch.setitem(STATE, "inc.double_conv.0.weight", torch.zeros(shape))
    WRITERS["safetensors"](Path("a.pth"))
    with allocating_less_than(200 * 2**20):
        printed = refused("--source", "a.pth")
    assert "a.pth doesn't fit unet" in printed


# Names of members.


@pytest.mark.parametrize(
    "name",
    [
        "../../evil",
        "/evil",
        "a/../../evil",
        "..\\evil",
        "C:\\evil",
        "a/../data.pkl",
        "../../data.pkl",
        "/etc/data.pkl",
    ],
)
def test_members_with_paths_are_never_written(folder, name):
    torch.save(STATE, "a.pth")
    with zipfile.ZipFile("a.pth", "a") as archive:
        archive.writestr(name, pickle.dumps(CALLS["os.system"], 2))
    beside = set(folder.parent.iterdir())
    assert main(["convert", "--source", "a.pth", "--output", "out"]) == 0
    assert {path.name for path in folder.iterdir()} == {"a.pth", "out"}
    assert set(folder.parent.iterdir()) == beside and not Path("/evil").exists()


@pytest.mark.parametrize("name", ["b/data.pkl", "../data.pkl", "A/data.pkl"])
def test_a_second_pickle_is_not_chosen_from(refused, name):
    torch.save(STATE, "a.pth")
    with zipfile.ZipFile("a.pth", "a") as archive:
        archive.writestr(name, pickle.dumps(CALLS["os.system"], 2))
    assert "is a zip archive, but not one of torch.save" in refused("--source", "a.pth")


@pytest.mark.parametrize("key", ["../data.pkl", "/etc/passwd", "../../a.pth", "0/", ""])
def test_storages_are_members_and_not_paths(refused, key):
    torch.save(STATE, "a.pth")
    with zipfile.ZipFile("a.pth") as archive:
        code = archive.read("a/data.pkl")
    first = b"X\x01\0\0\0000"
    assert first in code
    other = b"X" + struct.pack("<I", len(key)) + key.encode()
    rewrite(Path("a.pth"), {"data.pkl": code.replace(first, other, 1)})
    assert "a.pth: storage " in refused("--source", "a.pth")


# No file.


def test_an_empty_file_is_refused(refused):
    Path("a.pth").touch()
    assert "a.pth" in refused("--source", "a.pth")


def test_a_directory_is_refused(refused):
    Path("folder").mkdir()
    assert "folder: is a directory; give" in refused("--source", "folder")


def test_a_file_that_does_not_exist_is_named(refused):
    assert "none.pth: there is no such file" in refused("--source", "none.pth")


def test_a_pipe_is_not_waited_for(refused):
    os.mkfifo("pipe.pth")
    assert "pipe.pth" in refused("--source", "pipe.pth")


@pytest.mark.parametrize("output", ["file", "file/out"])
def test_an_output_that_cant_be_made_is_named(refused, output):
    Path("file").write_text("mine")
    torch.save(STATE, "a.pth")
    assert f"can't write {output} " in refused("--source", "a.pth", output=output)


# The way back.


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    torch.save(STATE, folder / "a.pth")
    from_torch_file(folder / "a.pth", folder / "unet")
    return folder / "unet"


@pytest.mark.parametrize("output", ["taken.pth", "taken.safetensors", "folder.pth"])
def test_an_output_that_exists_is_left_as_it_is(refused, converted, output):
    Path(output).write_text("mine") if output.startswith("taken") else Path(output).mkdir()
    printed = refused("--source", str(converted), "--to-torch", output=output)
    assert f"{output} exists: choose another --output" in printed


@pytest.mark.parametrize("output", ["a", "a.onnx", "a.pth.tar", "a.PTH", ".pth"])
def test_another_suffix_is_refused_with_the_right_ones(refused, converted, output):
    printed = refused("--source", str(converted), "--to-torch", output=output)
    assert f"--output {output} must end in .pth, .pt or .safetensors" in printed


@pytest.mark.parametrize("output", ["file/a.pth", "file/folder/a.safetensors"])
def test_a_folder_that_cant_be_made_is_named(refused, converted, output):
    Path("file").write_text("mine")
    printed = refused("--source", str(converted), "--to-torch", output=output)
    assert f"can't write {output} " in printed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("back", [True, False])
def test_a_folder_that_may_not_be_written_is_named(refused, converted, back):
    torch.save(STATE, "a.pth")
    Path("locked").mkdir(mode=0o500)
    flags = ["--source", str(converted), "--to-torch"] if back else ["--source", "a.pth"]
    assert "can't write locked/" in refused(*flags, output="locked/b.pth")


@pytest.mark.parametrize("source", ["none", "empty", "a.pth", "unfinished"])
def test_a_source_without_checkpoint_is_named(refused, source):
    Path("empty").mkdir()
    torch.save(STATE, "a.pth")
    Path("unfinished/checkpoints").mkdir(parents=True)
    printed = refused("--source", source, "--to-torch", output="b.pth")
    assert re.search(rf"{source} (holds no (complete )?checkpoint|is a file of weights)", printed)


def test_a_damaged_checkpoint_is_named(refused, converted, folder):
    shutil.copytree(converted, folder / "unet")
    for path in folder.glob("unet/checkpoints/0/variables/**/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    printed = refused("--source", "unet", "--to-torch", output="b.pth")
    assert "unet/checkpoints/0 is damaged" in printed


def test_channels_are_for_the_way_there(refused, converted):
    flags = ("--source", str(converted), "--to-torch", "--channels", "1")
    assert "--channels is for reading" in refused(*flags, output="a.pth")
