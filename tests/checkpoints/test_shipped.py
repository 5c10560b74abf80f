"""Networks in plain files: what comes back, by which names, and what is refused."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import pytest
import safetensors.numpy

from fetal_flax import checkpoints
from fetal_flax.checkpoints import Checkpoint, DamagedError, Description, shipped
from fetal_flax.checkpoints.integrity import digest_of_arrays, digest_of_json
from fetal_flax.commands.main import main
from fetal_flax.config import ModelConfig, TrainConfig, to_dict
from fetal_flax.conversion.encoder_weights import load_encoder
from fetal_flax.data import splits
from fetal_flax.errors import InputError
from fetal_flax.evaluation.evaluate import evaluate
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables
from fetal_flax.performance import benchmark

pytestmark = pytest.mark.usefixtures("quick_compilation", "empty_charts")

MODEL = ModelConfig(name="unet", base_width=2)
NAME = "hc18-tiny"
DESCRIPTION = Description(
    "network",
    MODEL,
    (64, 64),
    config=json.loads(json.dumps(to_dict(TrainConfig(model=MODEL)) | {"pos_weight": 2.5})),
    progress={"history": [{"epoch": 7, "validation_dice": 0.5}], "trained_on": "a split"},
)


@pytest.fixture(scope="module")
def variables() -> Variables:
    """Random numbers, each in float16's range; negative and the smallest ones among them."""
    rng = np.random.default_rng(0)

    def random(shape: jax.ShapeDtypeStruct) -> jax.Array:
        array = np.abs(rng.normal(size=shape.shape)).astype(np.float32)
        array.flat[0] = 6e-8
        return jax.device_put(array)

    params, batch_stats = jax.tree.map(random, functional.shapes(MODEL))
    return Variables({name: -array for name, array in params.items()}, batch_stats)


def write(folder: Path, variables: Variables, description: Description = DESCRIPTION) -> Path:
    shipped.save(folder, shipped.contents(shipped.to_float16(variables), description, {}))
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch, variables) -> Path:
    """The package's networks: one of them."""
    folder = tmp_path / "package"
    monkeypatch.setattr(shipped, "FOLDER", folder)
    write(folder / NAME, variables)
    (folder / "LICENSE.torchvision").touch()
    return folder


def same(loaded: Any, expected: Any) -> bool:
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    return jax.tree.all(jax.tree.map(lambda a, b: bytes(a) == bytes(b), loaded, expected))


def rounded(variables: Variables) -> Variables:
    """Kernels with float16's values; vectors as they are."""

    def nearest(array: jax.Array) -> np.ndarray:
        return np.asarray(array, np.float16 if array.ndim > 1 else None).astype(np.float32)

    return jax.tree.map(nearest, variables)


# What comes back.


def test_arrays_come_back_as_float32_with_exactly_the_float16_values(variables, tmp_path):
    loaded, description = checkpoints.load_checkpoint(write(tmp_path / "network", variables))
    numbers = jax.tree.map(np.asarray, loaded)
    assert {array.dtype for array in jax.tree.leaves(numbers)} == {np.dtype(np.float32)}
    assert same(numbers, rounded(variables))
    assert not same(numbers, jax.tree.map(np.asarray, variables))
    assert description == DESCRIPTION
    again = write(tmp_path / "again", loaded, description)
    for name in ("network.safetensors", "description.json"):
        assert (again / name).read_bytes() == (tmp_path / "network" / name).read_bytes()


def test_the_files_are_what_their_names_say(variables, tmp_path):
    folder = write(tmp_path / "network", variables)
    stored = safetensors.numpy.load_file(folder / "network.safetensors")
    for array in stored.values():
        assert array.dtype == (np.float16 if array.ndim > 1 else np.float32)
    assert stored.keys() == (variables.params | variables.batch_stats).keys()
    values = json.loads((folder / "description.json").read_text())
    digest = hashlib.sha256((folder / "network.safetensors").read_bytes()).hexdigest()
    assert values["sha256"]["network.safetensors"] == digest
    assert values["sha256"]["variables"] == digest_of_arrays(rounded(variables)._asdict())


@pytest.mark.parametrize(("value", "named"), [(7e4, "70000"), (np.nan, "nan"), (np.inf, "inf")])
def test_what_float16_cannot_hold_is_not_shipped(variables, value, named):
    params = dict(variables.params)
    params["head/kernel"] = np.full_like(params["head/kernel"], value)
    with pytest.raises(InputError, match=rf"float16 can't hold head/kernel.* is {named}"):
        shipped.to_float16(Variables(params, variables.batch_stats))


def test_an_encoder_can_stay_as_it_is(tmp_path):
    model = ModelConfig(name="mobilenet_unet")
    variables = functional.init(model, 3)
    arrays = shipped.to_float16(variables, encoder=False)
    shipped.save(tmp_path / "n", shipped.contents(arrays, Description("network", model), {}))
    loaded, _ = checkpoints.load_checkpoint(tmp_path / "n")
    assert same(functional.encoder_part(loaded), functional.encoder_part(variables))
    others = {n: a for n, a in rounded(variables).params.items() if not n.startswith("encoder/")}
    assert same(Variables({n: loaded.params[n] for n in others}, {}), Variables(others, {}))
    assert not all(np.array_equal(others[name], variables.params[name]) for name in others)


def test_saving_is_all_or_nothing(variables, tmp_path):
    folder = write(tmp_path / "network", variables)
    with pytest.raises(InputError, match="network exists"):
        shipped.save(folder, {})
    with pytest.raises(InputError, match=r"can't write .*other \(No such file"):
        shipped.save(tmp_path / "other", {"a": b"", "no/where": b""})
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't write"):
        shipped.save(tmp_path / "file" / "network", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "network"]


@pytest.mark.parametrize("name", shipped.names())
def test_the_packages_own_networks_load_and_their_cards_are_theirs(name):
    folder = shipped.FOLDER / name
    _, description = checkpoints.load_checkpoint(name)
    card = (folder / shipped.CARD).read_text()
    digest = hashlib.sha256((folder / shipped.ARRAYS).read_bytes()).hexdigest()
    assert card.startswith(f"# {name}\n") and digest in card and description.model.title in card
    on_a_split = description.progress[shipped.TRAINED_ON] == shipped.A_SPLIT
    assert (folder / shipped.SPLIT).is_file() == on_a_split
    assert (shipped.FOLDER / "LICENSE.torchvision").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("network", shipped.list_networks(), ids=lambda network: network.name)
def test_the_packages_own_networks_measure_what_their_cards_say(network, shared_dir):
    metrics = evaluate(network.name, shared_dir / "hc18", split="validation")
    assert metrics["run"]["missed"] == []
    assert metrics["dice"]["mean"] == pytest.approx(network.dice, abs=1e-4)
    assert metrics["hc_abs_error_mm"]["mean"] == pytest.approx(network.adf_mm, abs=0.01)


def test_the_default_is_among_the_packages_own():
    assert shipped.DEFAULT_NETWORK in shipped.names()


# Names.


def test_a_name_is_the_packages_network(package, variables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.names() == (NAME,)
    for source in (NAME, Path(NAME), package / NAME):
        assert checkpoints.locate(source) == package / NAME
        assert same(checkpoints.load_checkpoint(source)[0], rounded(variables))


def test_an_unknown_name_is_told_the_known_ones(package, variables):
    write(package / "a-network", variables)
    named = (
        "hc18-tinny holds no checkpoint: give a training workdir, a converted directory or the "
        "name of a shipped network (a-network, hc18-tiny)"
    )
    with pytest.raises(InputError, match=re.escape(named)):
        checkpoints.load_checkpoint("hc18-tinny")


def test_a_package_without_networks_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "nowhere")
    assert shipped.names() == ()
    with pytest.raises(InputError, match="shipped network, of which this package has none"):
        checkpoints.load_checkpoint("hc18-tiny")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 56), np.uint8))
    flags = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    assert main(["predict", *flags]) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(
        r"fetal-flax predict: .* not in this package: give .*--checkpoint\n", printed
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["orbax", "plain"])
def test_a_name_that_is_also_a_checkpoint_here_is_refused(
    package, variables, tmp_path, monkeypatch, form
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    # A folder that holds no checkpoint, such as an --output, is in nobody's way.
    (here / NAME).mkdir()
    assert checkpoints.locate(NAME) == package / NAME
    shutil.rmtree(here / NAME)
    if form == "orbax":
        checkpoints.save_checkpoint(here / NAME, Checkpoint(variables, DESCRIPTION))
    else:
        write(here / NAME, variables)
    for load in (
        checkpoints.load_checkpoint,
        lambda name: checkpoints.load_encoder(name, variables),
    ):
        with pytest.raises(InputError, match=rf"give the folder as {here / NAME}, or rename it"):
            load(NAME)
    assert checkpoints.locate(here / NAME) == here / NAME
    checkpoints.load_checkpoint(here / NAME)


def test_without_a_checkpoint_predict_takes_the_default(package, tmp_path, monkeypatch):
    """Also where a checkpoint of that name is in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "DEFAULT_NETWORK", NAME)
    shutil.copytree(package / NAME, tmp_path / NAME)
    cv2.imwrite("a.png", np.random.default_rng(0).integers(0, 256, (40, 56), np.uint8))
    common = ["predict", "--input", "a.png", "--save-logits"]
    assert main([*common, "--output", "default"]) == 0
    assert main([*common, "--output", "named", "--checkpoint", str(package / NAME)]) == 0
    logits = [np.load(f"{output}/logits/a.npy") for output in ("default", "named")]
    assert np.array_equal(*logits) and logits[0].std() > 0


def test_every_command_takes_a_name(package, tiny_hc18, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    images = str(tiny_hc18 / "training_set")
    sizes = str(tiny_hc18 / "training_set_pixel_size_and_HC.csv")
    data, named = ["--data-dir", str(tiny_hc18)], ["--checkpoint", NAME]
    assert main(["predict", *named, "--input", images, "--output", "predicted"]) == 0
    assert main(["evaluate", *named, *data, "--output", "evaluated"]) == 0
    metrics = json.loads(Path("evaluated/metrics.json").read_text())
    assert metrics["run"]["checkpoint"] == NAME and metrics["run"]["epoch"] == 7
    of_challenge = ["--input", images, "--pixel-size-csv", sizes]
    assert main(["submission", *named, *of_challenge]) in (0, 2)
    # It knows nothing yet, and may find no head.
    assert Path("submission.csv").is_file() == ("heads are in" in capsys.readouterr().out)
    assert main(["convert", "--to-torch", "--source", NAME, "--output", "network.pth"]) == 0


@pytest.mark.slow
def test_parity_takes_a_name(package, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "--to-torch", "--source", NAME, "--output", "network.pth"]) == 0
    flags = ["--reference", "network.pth", "--image-size", "32", "32", "--steps", "0"]
    flags += ["--batch-size", "1", "--batches", "1", "--precisions", "float32"]
    flags += ["--cache-dir", "cache"]
    assert main(["parity", "--checkpoint", NAME, *flags]) == 0
    # Another network than the reference's: the name's is what was compared.
    model = ModelConfig(name="unet", base_width=1)
    write(package / "other", functional.init(model, 0), Description("network", model))
    assert main(["parity", "--checkpoint", "other", *flags]) == 2
    assert "other holds a unet, and the reference another network" in capsys.readouterr().err


def test_the_benchmark_measures_the_network_of_a_name(package, variables, capsys):
    model, taken, size = benchmark.network(ModelConfig(), Path(NAME), None)
    assert (model, size) == (MODEL, (64, 64)) and same(taken, rounded(variables))
    assert benchmark.network(ModelConfig(), Path(NAME), (32, 32))[2] == (32, 32)
    model, taken, size = benchmark.network(MODEL, None, None)
    assert (model, size) == (MODEL, (256, 256)) and not same(taken, rounded(variables))
    flags = ["--checkpoint", NAME, "--model.name", "unet"]
    assert main(["benchmark", *flags]) == 2
    assert "leave --model.* out" in capsys.readouterr().err


def test_training_can_begin_with_a_shipped_networks_encoder(package, tmp_path):
    model = ModelConfig(name="mobilenet_unet")
    variables = functional.init(model, 3)
    write(package / "with-encoder", variables, Description("network", model))
    encoder = load_encoder("with-encoder", model, tmp_path)
    assert encoder is not None
    assert same(encoder, functional.encoder_part(rounded(variables)))
    with pytest.raises(InputError, match="neither imagenet1k_v1, imagenet1k_v2, hc18-tiny, with-"):
        load_encoder("with-decoder", model, tmp_path)


# The split.


def test_a_side_of_the_split_is_the_one_beside_the_network(
    package, tiny_hc18, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    names = ["000_HC", "001_2HC", "001_HC", "002_HC"]
    sides = splits.Split((0, 3), (1, 2))
    splits.write_manifest(package / NAME / "split.json", sides, names, method={})
    output = tmp_path / "out"
    flags = ["--checkpoint", NAME, "--data-dir", str(tiny_hc18), "--output", str(output)]
    assert main(["evaluate", *flags, "--split", "validation"]) == 0
    with (output / "per_image.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["001_2HC", "001_HC"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_was_trained_on_all_images_has_no_split(
    package, variables, tiny_hc18, tmp_path, capsys, split
):
    on_all = dataclasses.replace(DESCRIPTION, progress={"trained_on": "all images"})
    write(package / "on-all", variables, on_all)
    output = tmp_path / "out"
    flags = ["--checkpoint", "on-all", "--data-dir", str(tiny_hc18), "--output", str(output)]
    assert main(["evaluate", *flags, "--split", split]) == 2
    printed = capsys.readouterr().err
    assert f"trained on all images and left none out, so it has no {split} images" in printed
    assert not output.exists()


def test_the_list_tells_what_the_description_does(package, variables):
    (network,) = shipped.list_networks()
    count = sum(array.size for array in variables.params.values())
    assert network == (NAME, MODEL.title, count, None, None, "CC BY 4.0")
    figures = {"evaluations": [{"dice": {"mean": 0.97}, "hc_abs_error_mm": {"mean": 1.9}}]}
    files = shipped.contents(shipped.to_float16(variables), DESCRIPTION, figures)
    shipped.save(package / "measured", files)
    assert shipped.list_networks()[1] == ("measured", *network[1:3], 0.97, 1.9, "CC BY 4.0")
    forge(package / "measured", figures=3)
    with pytest.raises(DamagedError, match="measured is damaged"):
        shipped.list_networks()


# What is refused.


def test_a_flipped_byte_is_refused_with_one_sentence(variables, tmp_path):
    rng = np.random.default_rng(0)
    refused = 0
    for name in ("network.safetensors", "description.json"):
        for number in range(60):
            folder = write(tmp_path / f"{name}{number}", variables)
            content = bytearray((folder / name).read_bytes())
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            (folder / name).write_bytes(content)
            try:
                loaded, description = checkpoints.load_checkpoint(folder)
            except InputError as error:
                assert str(folder) in str(error) and str(error).isprintable()
                refused += 1
            else:  # One blank of JSON for another.
                assert same(loaded, rounded(variables)) and description == DESCRIPTION
    assert refused > 110


def forge(folder: Path, arrays: bytes | None = None, **changed: Any) -> None:
    """Changes a network's files so that their digests agree again, but for those in `changed`."""
    path = folder / "description.json"
    values = json.loads(path.read_text())
    digests = values.pop("sha256")
    if arrays is not None:
        (folder / "network.safetensors").write_bytes(arrays)
        digests["network.safetensors"] = hashlib.sha256(arrays).hexdigest()
    values |= changed
    values = {name: value for name, value in values.items() if value != "left out"}
    digests["description"] = digest_of_json(values)
    path.write_text(json.dumps({"sha256": digests} | values))


def with_arrays(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        arrays = dict(safetensors.numpy.load(content))
        change(arrays)
        return safetensors.numpy.save(arrays)

    return changed


def with_header(**changed: Any) -> Callable[[bytes], bytes]:
    def rewritten(content: bytes) -> bytes:
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        header["head/bias"] |= changed
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return rewritten


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", content)
    return file.getvalue()


BIAS = "head/bias"
HOSTILE_ARRAYS = {
    "empty": (lambda content: b"", "SafetensorError|too small|HeaderTooSmall"),
    "cut": (lambda content: content[:-2], "damaged"),
    "cut in its header": (lambda content: content[:90], "damaged"),
    "longer": (lambda content: content + b"\0\0", "damaged"),
    "much longer": (lambda content: content + bytes(2**21), "larger than such a network's"),
    "a pickle": (lambda content: pickle.dumps(content), "damaged"),
    "an archive": (zipped, "damaged"),
    "a header that claims all memory": (
        lambda content: struct.pack("<Q", 2**62) + content[8:],
        "damaged",
    ),
    "a header of nothing": (lambda content: struct.pack("<Q", 2) + b"{}", "lacks"),
    "an array outside the file": (with_header(data_offsets=[0, 2**40]), "damaged"),
    "an array of negative size": (with_header(shape=[-1]), "damaged"),
    "an array of another size": (with_header(shape=[2**40]), "damaged"),
    "float64": (with_header(dtype="F64"), "damaged"),
    "bfloat16": (with_header(dtype="BF16"), "damaged"),
    "integers": (with_header(dtype="I32"), "head/bias is int32, neither float16 nor float32"),
    "arrays of float64": (
        with_arrays(lambda arrays: arrays.update({BIAS: np.zeros(1)})),
        "head/bias is float64, neither",
    ),
    "another shape": (
        with_arrays(lambda arrays: arrays.update({BIAS: np.zeros((1, 1), np.float16)})),
        r"head/bias has shape \(1, 1\), not \(1,\)",
    ),
    "a missing array": (with_arrays(lambda arrays: arrays.pop(BIAS)), "lacks head/bias"),
    "a surplus array": (
        with_arrays(lambda arrays: arrays.update(x=np.zeros(1, np.float16))),
        "has a surplus x",
    ),
    "a name of control characters": (
        with_arrays(lambda arrays: arrays.update({"\x1b[31m": np.zeros(1, np.float16)})),
        r"surplus .x1b",
    ),
    "NaN": (
        with_arrays(lambda arrays: arrays.update({BIAS: np.full(1, np.nan, np.float16)})),
        "head/bias holds values that are not finite",
    ),
    "infinity": (
        with_arrays(lambda arrays: arrays.update({BIAS: np.full(1, -np.inf, np.float16)})),
        "head/bias holds values that are not finite",
    ),
    "other values": (
        with_arrays(lambda arrays: arrays.update({BIAS: np.ones(1, np.float16)})),
        "its arrays are not what was saved",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_ARRAYS)
def test_hostile_arrays_are_refused_though_their_digest_agrees(variables, tmp_path, case):
    change, named = HOSTILE_ARRAYS[case]
    folder = write(tmp_path / "network", variables)
    forge(folder, change((folder / "network.safetensors").read_bytes()))
    with pytest.raises(DamagedError, match=named) as error:
        checkpoints.load_checkpoint(folder)
    assert str(error.value).startswith(f"{folder} is damaged (")
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_a_forged_folder_is_like_an_intact_one(variables, tmp_path):
    """So that it is the change that the tests here see refused."""
    folder = write(tmp_path / "network", variables)
    forge(folder, (folder / "network.safetensors").read_bytes(), figures={"more": 1})
    assert same(checkpoints.load_checkpoint(folder)[0], rounded(variables))


def test_a_file_with_the_same_arrays_is_still_not_the_file(variables, tmp_path):
    folder = write(tmp_path / "network", variables)
    path = folder / "network.safetensors"
    path.write_bytes(with_header()(path.read_bytes()))
    assert same(safetensors.numpy.load_file(path), shipped.to_float16(variables))
    with pytest.raises(DamagedError, match=r"\(network\.safetensors is not what was saved\)"):
        checkpoints.load_checkpoint(folder)


CONFIG = to_dict(TrainConfig(model=MODEL))
HOSTILE_DESCRIPTIONS = {
    "format": (99, "checkpoint format 99, this version reads 2: use the version"),
    "kind": ("encoder", "holds no whole network"),
    "model": ({"name": "vnet"}, "model.name can't be 'vnet'"),
    "image_size": ("ab", "data.image_size|image_size"),
    "config": (CONFIG | {"seed": "x"}, "config.seed can't be 'x'"),
    "progress": ({"history": [{"epoch": {}}]}, "history names no epoch"),
}


@pytest.mark.parametrize("field", HOSTILE_DESCRIPTIONS)
def test_hostile_descriptions_are_refused_though_their_digest_agrees(variables, tmp_path, field):
    value, named = HOSTILE_DESCRIPTIONS[field]
    folder = write(tmp_path / "network", variables)
    odd = (value, "left out", None, 3, [], "x", {"data": 3}, [[[]]], {"history": 5})
    for number, hostile in enumerate(odd):
        if (field, hostile) in (("config", None), ("progress", {"data": 3})):
            continue  # A converted network's, and what anyone may note.
        copy = shutil.copytree(folder, tmp_path / f"copy{number}")
        forge(copy, None, **{field: hostile})
        with pytest.raises(InputError, match=named if number == 0 else str(copy)) as error:
            checkpoints.load_checkpoint(copy)
        assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("description.json", None),
        ("description.json", b""),
        ("description.json", b"[]"),
        ("description.json", b"{}"),
        ("description.json", b'{"format": 2}'),
        ("description.json", b'{"a": ' + b"[" * 100_000),
        ("description.json", b"\xff\xfe{}"),
        ("description.json", b'"' + b"x" * 2**23 + b'"'),
        ("network.safetensors", None),
        ("network.safetensors", "folder"),
        ("network.safetensors", "pipe"),
    ],
)
def test_files_that_are_none_are_refused(variables, tmp_path, name, content):
    folder = write(tmp_path / "network", variables)
    path = folder / name
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    # Without a description, a folder is none of ours.
    named = "is damaged" if (folder / "description.json").exists() else "holds no checkpoint"
    with pytest.raises(InputError, match=rf"{folder} {named}"):
        checkpoints.load_checkpoint(folder)
