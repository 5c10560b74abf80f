"""Whole networks from PyTorch's files and back: recognised, bit-exact, or refused."""

import copy
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor, nn

from fetal_flax.checkpoints import load_checkpoint
from fetal_flax.commands.main import main
from fetal_flax.config import ModelConfig
from fetal_flax.conversion.convert import from_torch_file, to_torch_file
from fetal_flax.conversion.names import ENCODER, IGNORED, TABLES, find, find_inverse
from fetal_flax.conversion.recognition import Network, read_network
from fetal_flax.conversion.transfer import from_state_dict, to_state_dict
from fetal_flax.conversion.writer import state_dict_bytes
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables
from fetal_flax.parity.reference import Encoder, create_reference, randomise_norms

SMALL = ModelConfig(name="unet", base_width=8)
MODELS = {
    "described": ModelConfig(),
    "published": ModelConfig(variant="published"),
    "mobilenet_unet": ModelConfig(name="mobilenet_unet"),
    "unet": SMALL,
    "compact": ModelConfig(variant="compact"),
    "aspp_width": ModelConfig(variant="published", aspp_width=64),
    "compact_aspp_width": ModelConfig(variant="compact", aspp_width=32),
    "rgb": ModelConfig(in_channels=3, aspp_width=32),
}


class Case(NamedTuple):
    model: ModelConfig
    reference: nn.Module
    state_dict: dict[str, Tensor]
    path: Path
    network: Network
    """What `path` was read as."""


def make_case(model: ModelConfig, folder: Path) -> Case:
    reference = create_reference(model)
    randomise_norms(reference, seed=0)
    state_dict = reference.state_dict()
    # Negative zero, a denormal and an almost infinite number, which arithmetic would change.
    strange = torch.tensor([-0.0, 1e-42, 3e38])
    next(t for name, t in state_dict.items() if name.endswith(".running_mean"))[:3] = strange
    torch.save(state_dict, folder / "network.pth")
    return Case(
        model, reference, state_dict, folder / "network.pth", read_network(folder / "network.pth")
    )


# The published network is the largest, and the command below converts it among the fast tests.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name == "published" else name
        for name in MODELS
    ],
)
def case(request, tmp_path_factory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    yield make_case(MODELS[request.param], folder)
    shutil.rmtree(folder)  # 0.1 GB a file, which pytest would keep


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Case:
    return make_case(SMALL, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def small_directory(small, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "unet"
    from_torch_file(small.path, output)
    return output


def assert_same_bits(arrays: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """In values, -0 would be 0."""
    assert arrays.keys() == others.keys() and arrays
    for name in arrays:
        ours, theirs = np.asarray(arrays[name]), np.asarray(others[name])
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        # Not as an assertion on the bytes, which pytest would print.
        same = ours.tobytes() == theirs.tobytes()
        assert same, name


def assert_same_variables(ours: Variables, theirs: Variables) -> None:
    assert_same_bits(ours.params, theirs.params)
    assert_same_bits(ours.batch_stats, theirs.batch_stats)


def assert_same_state_dict(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """The counters of batch norms are not written."""
    assert_same_bits(
        written, {n: t for n, t in read.items() if not n.endswith("num_batches_tracked")}
    )


def load_with_torch(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True, mmap=True)


def refusal(tensors: dict[str, Tensor], path: Path, **settings) -> str:
    torch.save(tensors, path)
    with pytest.raises(InputError) as error:
        read_network(path, **settings)
    message = str(error.value)
    assert str(path) in message and message.isprintable()
    return message


# Recognised.


def test_variant_widths_and_channels_are_read_off_the_tensors(case):
    assert case.network.kind == "network"
    assert case.network.model == case.model


def test_a_safetensors_file_of_data_parallel_holds_the_same_network(case):
    path = case.path.with_name("parallel.safetensors")
    safetensors.torch.save_file({f"module.{n}": t for n, t in case.state_dict.items()}, path)
    read = read_network(path)
    assert read.model == case.model
    assert_same_variables(read.variables, case.network.variables)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", ["model_state_dict", "state_dict", "model"])
def test_a_training_checkpoint_holds_the_same_network(small, tmp_path, wrapper, prefix):
    state_dict = {f"{prefix}{name}": tensor for name, tensor in small.state_dict.items()}
    torch.save({"epoch": 7, wrapper: state_dict, "best": 0.9}, tmp_path / "a.pth")
    read = read_network(tmp_path / "a.pth")
    assert read.model == SMALL
    assert_same_variables(read.variables, small.network.variables)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_encoder_is_recognised_with_its_channels(encoder_file, channels):
    read = read_network(encoder_file, channels=channels)
    assert (read.kind, read.model.in_channels) == ("encoder", channels)


def test_the_head_of_a_unet_has_a_second_name(small, tmp_path):
    renamed = {n.replace("outc.", "outc.conv."): t for n, t in small.state_dict.items()}
    assert renamed.keys() != small.state_dict.keys()
    torch.save(renamed, tmp_path / "a.pth")
    assert_same_variables(read_network(tmp_path / "a.pth").variables, small.network.variables)


# There and back.


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_both_round_trips_are_bit_exact(case, suffix):
    path = case.path.with_name(f"back{suffix}")
    tensors = to_state_dict(case.network.variables, TABLES[case.model.name])
    if suffix == ".safetensors":
        safetensors.numpy.save_file(tensors, path)
    else:
        path.write_bytes(state_dict_bytes(tensors))

    written = load_with_torch(path)
    assert_same_state_dict(written, case.state_dict)
    case.reference.load_state_dict(written, strict=True)

    again = read_network(path)
    assert again.model == case.model
    assert_same_variables(again.variables, case.network.variables)


def test_the_command_converts_the_published_network_and_back(tmp_path, capsys):
    model = MODELS["published"]
    state_dict = create_reference(model).state_dict()
    torch.save({"model_state_dict": state_dict}, tmp_path / "a.pth")
    directory, back = tmp_path / "directory", tmp_path / "back.pth"
    assert main(["convert", "--source", f"{tmp_path}/a.pth", "--output", f"{directory}"]) == 0
    flags = ["--source", f"{directory}", "--output", f"{back}", "--to-torch"]
    assert main(["convert", *flags]) == 0
    assert capsys.readouterr().out.count("a mobilenet_aspp_se_unet (published)") == 2
    assert_same_state_dict(load_with_torch(back), state_dict)
    shutil.rmtree(tmp_path)  # 0.3 GB, which pytest would keep


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_checkpoint_becomes_the_file_that_it_came_from(small, small_directory, tmp_path, suffix):
    description = to_torch_file(small_directory, tmp_path / f"back{suffix}")
    assert description.model == SMALL
    assert_same_state_dict(load_with_torch(tmp_path / f"back{suffix}"), small.state_dict)


def test_an_encoder_goes_back_to_torchvisions_names(encoder_file, encoder_state_dict, tmp_path):
    from_torch_file(encoder_file, tmp_path / "encoder", channels=3)
    assert to_torch_file(tmp_path / "encoder", tmp_path / "back.pth").kind == "encoder"
    written = load_with_torch(tmp_path / "back.pth")
    features = {n: t for n, t in encoder_state_dict.items() if n.startswith("features.")}
    assert_same_state_dict(written, features)
    Encoder(3).load_state_dict(written)


def test_torch_can_map_every_storage_from_disk(small, tmp_path):
    tensors = to_state_dict(small.network.variables, TABLES["unet"])
    path = tmp_path / "a.pth"
    path.write_bytes(state_dict_bytes(tensors))
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    assert len(entries) == len(tensors)
    for entry, array in zip(entries, tensors.values(), strict=True):
        # The local header ends with the lengths of the name and the extra field.
        lengths = np.frombuffer(content, "<u2", count=2, offset=entry.header_offset + 26)
        start = entry.header_offset + 30 + int(lengths.sum())
        assert start % 64 == 0
        assert content[start : start + array.nbytes] == array.tobytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_equal_tensors_make_equal_files(small_directory, tmp_path, monkeypatch, suffix):
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    to_torch_file(small_directory, first)
    # Years later: what a zip archive notes by default.
    monkeypatch.setattr("time.time", lambda: 2e9)
    to_torch_file(small_directory, second)
    assert first.read_bytes() == second.read_bytes()


# The tables.


def test_names_are_inverse_and_every_rule_is_used():
    unused = {name: {rule.torch for rule in table} for name, table in TABLES.items()}
    networks: list[tuple[str, torch.nn.Module]] = [(ENCODER, Encoder(3))]
    for model in (*MODELS.values(), ModelConfig(name="unet")):
        with torch.device("meta"):  # only names
            networks.append((model.name, create_reference(model)))
    for name, network in networks:
        names = {n for n in network.state_dict() if not IGNORED.fullmatch(n)}
        for torch_name in names:
            ours = find(torch_name, TABLES[name])
            assert ours is not None
            assert find_inverse(ours[0], TABLES[name]) == (torch_name, ours[1])
        unused[name] -= names
    assert unused == {
        ENCODER: set(),
        "mobilenet_unet": set(),
        "mobilenet_aspp_se_unet": set(),
        "unet": {"outc.conv.weight", "outc.conv.bias"},
    }


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_variable_has_a_torch_name_of_its_own(model):
    names = [name for arrays in functional.shapes(model) for name in arrays]
    back = [find_inverse(name, TABLES[model.name]) for name in names]
    assert [(find(b[0], TABLES[model.name]) or [""])[0] for b in back if b] == names


PLACES: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "convolution": (
        "dec3.conv1.weight",
        "stage3/block/first/conv/kernel",
        lambda t: torch.einsum("oihw->hwio", t),
    ),
    "dilated convolution": (
        "bottleneck_aspp.atrous_convs.2.0.weight",
        "aspp/atrous/2/conv/kernel",
        lambda t: torch.einsum("oihw->hwio", t),
    ),
    "depthwise convolution": (
        "encoder.4.conv.1.0.weight",
        "encoder/blocks/4/depthwise/conv/kernel",
        lambda t: torch.stack([t[c, 0] for c in range(len(t))], -1)[:, :, None],
    ),
    "transposed convolution, not flipped": (
        "up4.weight",
        "stage4/up/kernel",
        lambda t: torch.stack([t[:, :, 0], t[:, :, 1]], 1).movedim(2, 3),
    ),
    "squeeze": (
        "dec5.se.excitation.0.weight",
        "stage5/block/se/squeeze/kernel",
        lambda t: t[:, :, 0, 0].T,
    ),
    "excite": (
        "skip5_se.excitation.2.weight",
        "stage5/skip_se/excite/kernel",
        lambda t: t[:, :, 0, 0].T,
    ),
    "excite bias": ("dec2.se.excitation.2.bias", "stage2/block/se/excite/bias", torch.clone),
    "norm scale": ("dec1.bn2.weight", "stage1/block/second/norm/scale", torch.clone),
    "norm shift": ("dec1.bn2.bias", "stage1/block/second/norm/bias", torch.clone),
    "norm mean": ("dec1.bn2.running_mean", "stage1/block/second/norm/mean", torch.clone),
    "norm variance": ("dec1.bn2.running_var", "stage1/block/second/norm/var", torch.clone),
    "group norm": ("bottleneck_aspp.global_avg_pool.2.bias", "aspp/pool_norm/bias", torch.clone),
    "first block": (
        "encoder.1.conv.1.weight",
        "encoder/blocks/1/project/conv/kernel",
        lambda t: t[:, :, 0, 0].T[None, None],
    ),
    "head": ("out_conv.weight", "head/kernel", lambda t: t[:, :, 0, 0].T[None, None]),
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Case:
    """Of the published network, all kinds of layers."""
    model = ModelConfig(variant="published", aspp_width=32)
    return make_case(model, tmp_path_factory.mktemp("narrow"))


@pytest.mark.parametrize(("torch_name", "ours", "expected"), PLACES.values(), ids=PLACES)
def test_values_land_where_they_should(narrow, torch_name, ours, expected):
    variables = narrow.network.variables.params | narrow.network.variables.batch_stats
    np.testing.assert_array_equal(
        variables[ours], expected(narrow.state_dict[torch_name]).numpy(), strict=True
    )


@pytest.mark.parametrize(
    ("torch_name", "ours"),
    [
        ("inc.double_conv.0.weight", "down1/first/conv/kernel"),
        ("down1.maxpool_conv.1.double_conv.3.weight", "down2/second/conv/kernel"),
        ("down4.maxpool_conv.1.double_conv.0.weight", "bottom/first/conv/kernel"),
        ("up1.conv.double_conv.0.weight", "stage4/block/first/conv/kernel"),
        ("up4.conv.double_conv.3.weight", "stage1/block/second/conv/kernel"),
    ],
)
def test_the_stages_of_a_unet_count_from_the_other_end(small, torch_name, ours):
    expected = torch.einsum("oihw->hwio", small.state_dict[torch_name]).numpy()
    np.testing.assert_array_equal(small.network.variables.params[ours], expected, strict=True)


# Refused.


def test_missing_surplus_and_misshaped_names_are_listed_at_once(small, tmp_path):
    tensors = dict(small.state_dict)
    del tensors["up1.up.bias"], tensors["down2.maxpool_conv.1.double_conv.1.running_var"]
    tensors["ema.outc.weight"] = torch.zeros(2, 2)
    tensors["outc.weight"] = torch.zeros(1, 9, 1, 1)
    tensors["up4.up.weight"] = tensors["up4.up.weight"][0]
    message = refusal(tensors, tmp_path / "a.pth")
    assert message == (
        f"{tmp_path / 'a.pth'} doesn't fit unet: "
        "missing down2.maxpool_conv.1.double_conv.1.running_var; missing up1.up.bias; "
        "surplus ema.outc.weight with shape (2, 2); "
        "outc.weight has shape (1, 9, 1, 1), not (1, 8, 1, 1); "
        "up4.up.weight has shape (8, 2, 2), not (16, 8, 2, 2): "
        "give a state dict of exactly this network"
    )


@pytest.mark.parametrize(
    "names",
    [
        ("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "fc.bias"),
        ("classifier.1.weight",),  # of a torchvision file without its features
    ],
    ids=["resnet", "classifier"],
)
def test_an_unknown_network_is_named_by_some_of_its_tensors(tmp_path, names):
    message = refusal({name: torch.zeros(2) for name in names}, tmp_path / "a.pth")
    assert "is of no known network" in message and min(names) in message
    for known in TABLES:
        assert known in message


def test_a_network_of_other_channels_is_not_changed(small):
    with pytest.raises(InputError, match=r"network\.pth holds a .* 1 channels, not 3"):
        read_network(small.path, channels=3)
    assert read_network(small.path, channels=1).model == SMALL


def test_a_head_under_both_names_is_refused(small, tmp_path):
    tensors = {**small.state_dict, "outc.conv.weight": small.state_dict["outc.weight"] + 1}
    assert "outc.conv.weight is a second head/kernel" in refusal(tensors, tmp_path / "a.pth")


def test_a_variant_with_half_of_its_biases_lacks_the_others(narrow, tmp_path):
    tensors = dict(narrow.state_dict)
    for n in range(1, 6):
        del tensors[f"skip{n}_se.excitation.0.bias"]
    message = refusal(tensors, tmp_path / "a.pth")
    assert "doesn't fit mobilenet_aspp_se_unet (published)" in message
    assert message.count("missing ") == 5


def test_a_compact_network_with_a_dense_convolution_is_listed_as_compact(tmp_path):
    model = MODELS["compact"]
    tensors = dict(create_reference(model).state_dict())
    del tensors["dec2.conv1.0.weight"], tensors["dec2.conv1.1.weight"]
    tensors["dec2.conv1.weight"] = torch.zeros(32, 48, 3, 3)
    message = refusal(tensors, tmp_path / "a.pth")
    assert "doesn't fit mobilenet_aspp_se_unet (compact)" in message
    assert message.count("missing dec2.conv1.") == 2
    assert "surplus dec2.conv1.weight with" in message


@pytest.mark.parametrize("width", [0, 48, 5000])
def test_an_impossible_aspp_width_is_listed_and_not_a_crash(narrow, tmp_path, width):
    name = "bottleneck_aspp.conv1x1.0.weight"
    tensors = {**narrow.state_dict, name: torch.zeros(width, 1280, 1, 1)}
    shape = f"{name} has shape ({width}, 1280, 1, 1), not (512,"
    assert shape in refusal(tensors, tmp_path / "a.pth")


@pytest.mark.parametrize(
    "name",
    [
        "dec6.bn1.weight",
        "dec03.bn1.weight",
        "dec3.bn1.weight.0",
        "x.dec3.bn1.weight",
        "encoder.0.conv.2.weight",
        "encoder.18.conv.2.weight",
        "bottleneck_aspp.atrous_convs.3.0.weight",
        "dec{n}.bn1.weight",
    ],
)
def test_names_beside_a_rule_are_surplus(name):
    model = ModelConfig()
    tensors = {name: np.zeros(1, np.float32)}
    with pytest.raises(InputError) as error:
        from_state_dict(
            tensors, TABLES[model.name], functional.shapes(model), source="FILE", network="NET"
        )
    assert f"surplus {name} with" in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["a\nb", "a\x1b[2Jb", "a\u202eb", "a" * 10_000],
    ids=["newline", "escape", "right to left", "endless"],
)
def test_names_cant_draw_on_the_terminal(small, tmp_path, name):
    for tensors in ({**small.state_dict, name: torch.zeros(1)}, {name: torch.zeros(1)}):
        assert len(refusal(tensors, tmp_path / "a.pth")) < 1000


def test_a_directory_that_holds_a_checkpoint_is_not_overwritten(small, small_directory):
    with pytest.raises(InputError, match="already holds a checkpoint: choose another --output"):
        from_torch_file(small.path, small_directory)


# Wrapped as people wrap them.


PREFIXES = (
    *("_orig_mod.", "module.", "module.module.", "module._orig_mod.", "_orig_mod.module."),
    *("model.", "net.", "ema_model.module.", "student.backbone."),
)
WRAPPERS = ("net", "weights", "params", "model_state", "ema_state_dict", "state_dict", "network")


@pytest.fixture(scope="module")
def small_case(tmp_path_factory) -> Case:
    return make_case(SMALL, tmp_path_factory.mktemp("small"))


def assert_read_alike(path: Path, case: Case) -> None:
    found = read_network(path)
    assert found.model == case.model
    for ours, theirs in zip(found.variables, case.network.variables, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_common_prefix_is_taken_off(small_case, tmp_path, prefix):
    wrapped = {prefix + name: tensor for name, tensor in small_case.state_dict.items()}
    torch.save(wrapped, tmp_path / "a.pth")
    assert_read_alike(tmp_path / "a.pth", small_case)
    # Of Lightning: the loss has a buffer; of SWA: a counter.
    torch.save({"state_dict": {**wrapped, "loss_fn.pos_weight": torch.ones(1)}}, tmp_path / "a.pth")
    assert_read_alike(tmp_path / "a.pth", small_case)
    torch.save({**wrapped, "n_averaged": torch.tensor(3)}, tmp_path / "a.pth")
    assert_read_alike(tmp_path / "a.pth", small_case)
    safetensors.torch.save_file(wrapped, tmp_path / "a.safetensors")
    assert_read_alike(tmp_path / "a.safetensors", small_case)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_any_wrapper_is_opened(small_case, tmp_path, wrapper):
    trained = copy.deepcopy(small_case.reference)
    optimizer = torch.optim.Adam(trained.parameters())
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {"epoch": 3, "optimizer": optimizer.state_dict(), wrapper: small_case.state_dict}
    for saved in (state, {"checkpoint": state}, [small_case.state_dict]):
        torch.save(saved, tmp_path / "a.pth")
        assert_read_alike(tmp_path / "a.pth", small_case)


def test_of_two_networks_it_is_said_which_was_taken(small_case, tmp_path, capsys):
    ema = {f"module.{name}": tensor + 1 for name, tensor in small_case.state_dict.items()}
    torch.save({"ema": ema, "model": small_case.state_dict}, tmp_path / "a.pth")
    flags = ["convert", "--source", str(tmp_path / "a.pth"), "--output"]
    assert main([*flags, str(tmp_path / "first")]) == 0
    said = capsys.readouterr().err
    assert "holds several networks: model was taken, not ema.module; choose with --entry" in said
    assert main([*flags, str(tmp_path / "ema"), "--entry", "ema"]) == 0
    assert "several" not in capsys.readouterr().err
    head = {
        name: load_checkpoint(tmp_path / name).variables.params["head/bias"]
        for name in ("first", "ema")
    }
    np.testing.assert_array_equal(head["ema"], head["first"] + 1)
    assert main([*flags, str(tmp_path / "other"), "--entry", "teacher"]) == 2
    assert "no network as its entry teacher: give model, ema.module" in capsys.readouterr().err
