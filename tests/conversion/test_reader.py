"""Checkpoints as PyTorch writes them, and as an attacker or a broken download would."""

import argparse
import datetime
import gzip
import os
import pickle
import random
import re
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from fetal_flax.conversion.reader import (
    CheckpointError,
    Opaque,
    read_state_dicts,
    read_torch_file,
)
from fetal_flax.errors import InputError


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    return read_state_dicts(path)[0].tensors


FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])


# Files built by hand, for what torch does not write (any more).


def plain(value) -> bytes:
    """The instructions that leave `value` on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def storage(key, count, kind="FloatStorage", view: tuple = ()) -> bytes:
    head = plain("storage") + global_("torch", kind) + plain(key) + plain("cpu") + plain(count)
    return b"(" + head + b"".join(map(plain, view)) + b"tQ"


def tensor(key="0", count=6, offset=0, shape=(2, 3), strides=(3, 1), **more) -> bytes:
    arguments = storage(key, count, **more) + plain(offset) + plain(shape) + plain(strides)
    hooks = global_("collections", "OrderedDict") + b")R"
    return (
        global_("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"\x89" + hooks + b"tR"
    )


def state(**tensors: bytes) -> bytes:
    items = b"".join(plain(name) + code for name, code in tensors.items())
    return b"\x80\x02}(" + items + b"u."


def zip_file(path: Path, code: bytes, root="archive", order: bytes | None = b"little", **storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", code)
        archive.writestr(f"{root}/version", b"3\n")
        if order is not None:
            archive.writestr(f"{root}/byteorder", order)
        for key, data in storages.items():
            archive.writestr(f"{root}/data/{key.removeprefix('_')}", data)
    return path


def stream_file(path: Path, code: bytes, keys=("0",), *storages: np.ndarray) -> Path:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    data = b"".join(pickle.dumps(part, 2) for part in head) + code + pickle.dumps(list(keys), 2)
    for values in storages:
        data += struct.pack("<q", values.size) + values.tobytes()
    path.write_bytes(data)
    return path


SIX = np.arange(6, dtype="<f4")
SMALL = state(weight=tensor(), bias=tensor("1", 1, 0, (), (), kind="LongStorage"))
# In the stream, references to storages have one element more.
SMALL_STREAM = SMALL.replace(b"tQ", b"NtQ")
SEVEN = np.array([7], "<i8")


def small(path: Path, legacy: bool, code: bytes | None = None) -> Path:
    if legacy:
        return stream_file(path, code or SMALL_STREAM, ("0", "1"), SIX, SEVEN)
    return zip_file(path, code or SMALL, _0=SIX.tobytes(), _1=SEVEN.tobytes())


def save(value, path: Path, legacy: bool) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def check(array: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(array, expected, strict=True)
    assert array.flags.c_contiguous and array.flags.owndata and array.flags.writeable
    assert array.dtype.isnative


def reason(path: Path, read=read_torch_file) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600
    return message


# What PyTorch writes.


def test_real_encoder_equals_torch_load(shared_dir, tmp_path):
    path = shared_dir / "weights" / "mobilenet_v2_imagenet_dequantised.pth"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    expected = torch.load(path, weights_only=True)
    for each in (path, save(expected, tmp_path / "stream.pth", legacy=True)):
        state_dict = read_state_dict(each)
        assert list(state_dict) == list(expected) and len(state_dict) == 314
        for name, value in expected.items():
            check(state_dict[name], value.numpy())


@FORMATS
def test_every_dtype(tmp_path, legacy):
    names = ["float64", "float32", "float16", "bfloat16"]
    names += ["int64", "int32", "int16", "int8", "uint8", "bool"]
    values = {name: torch.tensor([[0, 1, 2], [3, 4, 5]]).to(getattr(torch, name)) for name in names}
    loaded = read_state_dict(save(values, tmp_path / "a.pth", legacy))
    for name, array in loaded.items():
        expected = (
            np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        )
        check(array, expected)


@FORMATS
def test_views_of_one_storage(tmp_path, legacy):
    base = torch.arange(24.0).reshape(2, 3, 4)
    views = {
        "base": base,
        "transposed": base.transpose(0, 2),
        "part": base[1:, ::2, 1:3],
        "repeated": base[0, 0, :1].expand(5),
        "scalar": base[1, 2, 3],
        "none": base[:0],
        "same": base,
    }
    loaded = read_state_dict(save(views, tmp_path / "a.pth", legacy))
    for name, value in views.items():
        check(loaded[name], value.numpy().copy(order="C"))
    loaded["base"][:] = -1
    assert loaded["part"].min() >= 0


@FORMATS
def test_state_dict_with_attributes_and_counter(tmp_path, legacy):
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    path = save(module.state_dict(), tmp_path / "a.pth", legacy)
    loaded = read_torch_file(path)
    assert type(loaded) is OrderedDict and not hasattr(loaded, "_metadata")
    assert loaded["1.num_batches_tracked"].shape == ()
    for name, value in module.state_dict().items():
        check(loaded[name], value.numpy())


@FORMATS
@pytest.mark.parametrize("wrapper", ["model_state_dict", "state_dict", "model"])
def test_training_checkpoint(tmp_path, legacy, wrapper):
    module = torch.nn.DataParallel(torch.nn.Linear(2, 3))
    optimizer = torch.optim.AdamW(module.parameters())
    module.module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = {
        "epoch": 3,
        "best": (0.5, None, True, [torch.Size([2, 3]), "x", -(2**40)]),
        wrapper: module.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
    }
    path = save(saved, tmp_path / "a.pth", legacy)

    whole = read_torch_file(path)
    assert whole["epoch"] == 3 and whole["best"] == (0.5, None, True, [(2, 3), "x", -(2**40)])
    check(
        whole["optimizer_state_dict"]["state"][0]["exp_avg"],
        optimizer.state_dict()["state"][0]["exp_avg"].numpy(),
    )
    assert whole["optimizer_state_dict"]["param_groups"][0]["betas"] == (0.9, 0.999)

    loaded = read_state_dict(path)
    assert list(loaded) == ["module.weight", "module.bias"]
    check(loaded["module.weight"], module.module.weight.detach().numpy())


@FORMATS
def test_parameters(tmp_path, legacy):
    parameter = torch.nn.Parameter(torch.ones(2))
    check(
        read_state_dict(save({"a": parameter}, tmp_path / "a.pth", legacy))["a"], np.ones(2, "f4")
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_pickle_protocol(tmp_path, protocol):
    for new in (False, True):
        torch.save(
            torch.nn.Linear(2, 3).state_dict(),
            tmp_path / "a.pth",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=new,
        )
        assert list(read_state_dict(tmp_path / "a.pth")) == ["weight", "bias"]


def test_handmade_files_are_read(tmp_path):
    for legacy in (False, True):
        loaded = read_state_dict(small(tmp_path / "a", legacy))
        check(loaded["weight"], np.arange(6, dtype=np.float32).reshape(2, 3))
        check(loaded["bias"], np.array(7))


def test_handmade_files_are_what_torch_reads(tmp_path):
    for path in (
        small(tmp_path / "zip", legacy=False),
        small(tmp_path / "stream", legacy=True),
        zip_file(
            tmp_path / "big",
            SMALL,
            order=b"big",
            _0=SIX.astype(">f4").tobytes(),
            _1=SEVEN.astype(">i8").tobytes(),
        ),
    ):
        expected = torch.load(path, weights_only=True)
        loaded = read_state_dict(path)
        assert list(loaded) == list(expected) == ["weight", "bias"]
        for name, value in expected.items():
            check(loaded[name], value.numpy())


def test_byte_orders(tmp_path):
    code = state(a=tensor(), b=tensor("1", kind="BFloat16Storage"))
    values = np.arange(6).reshape(2, 3)
    for order, mark in ((b"big", ">"), (b"little", "<"), (None, "<")):
        brain = np.arange(6).astype(ml_dtypes.bfloat16).view("u2").astype(f"{mark}u2").tobytes()
        path = zip_file(
            tmp_path / "a", code, order=order, _0=SIX.astype(f"{mark}f4").tobytes(), _1=brain
        )
        loaded = read_state_dict(path)
        check(loaded["a"], values.astype("f4"))
        check(loaded["b"], values.astype(ml_dtypes.bfloat16))
    assert "byte order" in reason(zip_file(tmp_path / "a", code, order=b"odd"))


def test_stream_of_python_2_and_early_torch(tmp_path):
    # Byte strings, the items inside OrderedDict's arguments, no hooks, and a view of a storage.
    rebuild = global_("torch._utils", "_rebuild_tensor")
    view = storage("0", 6, view=(("9", 2, 4),)).replace(plain("storage"), b"U\x07storage")
    first = rebuild + b"(" + view + plain(1) + plain((2,)) + plain((2,)) + b"tR"
    items = b"]]" + b"U\x06weighta" + first + b"aa\x85R"
    code = b"\x80\x02" + global_("collections", "OrderedDict") + items + b"."
    loaded = read_state_dict(stream_file(tmp_path / "a.pth", code, ("0",), SIX))
    check(loaded["weight"], np.array([3, 5], "f4"))

    outside = code.replace(plain(("9", 2, 4)), plain(("9", 3, 4)))
    assert "view outside" in reason(stream_file(tmp_path / "a.pth", outside, ("0",), SIX))


def test_safetensors_by_content(tmp_path):
    arrays = {
        "module.a": np.arange(6, dtype="f4").reshape(2, 3),
        "module.b": np.array(7),
        "module.c": np.arange(3).astype(ml_dtypes.bfloat16),
    }
    path = tmp_path / "model.pth"
    safetensors.numpy.save_file(arrays, path)
    loaded = read_state_dict(path)
    assert sorted(loaded) == sorted(arrays)
    for name, array in loaded.items():
        check(array, arrays[name])


# What is refused, and how.


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@FORMATS
def test_no_code_runs(tmp_path, legacy):
    ran = tmp_path / "ran"
    for function, argument in (
        (os.system, f"touch {ran}"),
        (eval, f"open({str(ran)!r}, 'w')"),
        (exec, f"open({str(ran)!r}, 'w')"),
        (getattr, "x"),
    ):
        for protocol in (2, 4):
            code = pickle.dumps({"a": Call(function, argument)}, protocol)
            path = small(tmp_path / "a.pth", legacy, code)
            message = reason(path, read_state_dict)
            # The stream lists storages that nothing uses then, which is said first.
            assert legacy or (function.__name__ in message and "torch.save(model.sta" in message)
    code = b"\x80\x02cos\nsystem\n" + plain((f"touch {ran}",)) + b"R."
    (tmp_path / "b.pth").write_bytes(code)  # in place of the magic number
    assert "not one of torch.save" in reason(tmp_path / "b.pth")
    # Instructions that import, or build of what is no class.
    for instruction in (b"(ios\nsystem\n", b"(oos", b"))\x81", b"\x82\x01", b"}}\x81", b"\x97"):
        reason(small(tmp_path / "a.pth", legacy, b"\x80\x02" + instruction + b"."))
    assert not ran.exists()


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_objects_beside_the_weights_are_ignored(tmp_path, legacy, protocol):
    beside = {
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(a={1, 2})),
        "score": np.float64(0.5),
        "losses": np.arange(3.0),
        "path": Path("x"),
        "when": datetime.datetime(2024, 1, 1),
        "random": (random.getstate(), np.random.default_rng(0).bit_generator.state),
        "torch_rng": torch.get_rng_state(),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "names": {"a", "b"},
        "fixed": frozenset({1}),
        "counts": Counter("aab"),
        "history": defaultdict(list, {"loss": [1.0]}),
        "complex": 1j,
        "big": 2**3000,
        "bytes": bytearray(b"x"),
        "wave": torch.ones(2, dtype=torch.complex64),
        ("a", "tuple"): 1,
    }
    weights = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    path = tmp_path / "a.pth"
    torch.save(
        {**beside, "weights": weights},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    (found,) = read_state_dicts(path)
    assert found.keys == ("weights",) and list(found.tensors) == ["weight", "bias"]
    check(found.tensors["weight"], np.ones((2, 3), "f4"))
    saved = read_torch_file(path)
    assert isinstance(saved["args"], Opaque) and saved["args"].name == "argparse.Namespace"
    assert saved["history"] == {"loss": [1.0]}


@FORMATS
def test_other_objects_alone_are_named(tmp_path, legacy):
    message = reason(
        save({"epoch": 1, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth", legacy),
        read_state_dict,
    )
    assert "argparse.Namespace" in message and "torch.save(model.state_dict()" in message


@pytest.mark.filterwarnings("ignore")
@FORMATS
def test_whole_module_is_refused(tmp_path, legacy):
    message = reason(save(torch.nn.Linear(2, 3), tmp_path / "a.pth", legacy), read_state_dict)
    assert "torch.nn.modules.linear.Linear" in message


def test_unknown_storage_types_are_named(tmp_path):
    path = save({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "a.pth", False)
    message = reason(path, read_state_dict)
    assert "torch.ComplexFloatStorage" in message


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"epoch": 1, "lr": 0.1}, "'epoch', 'lr' must be tensors"),
        (dict.fromkeys("abcde", 1), "'a', 'b', 'c' and 2 more"),
        ({"state_dict": {}}, "no named tensors"),
        ([1, 2], "no named tensors"),
        ({}, "no named tensors"),
    ],
)
def test_state_dict_must_be_tensors(tmp_path, value, words):
    path = zip_file(tmp_path / "a.pth", pickle.dumps(value, 2))
    assert words in reason(path, read_state_dict)
    assert read_torch_file(path) == value


def test_items_whose_keys_are_no_scalars_are_left_out(tmp_path):
    path = zip_file(tmp_path / "a.pth", pickle.dumps({(1, 2): 3, "a": 4}, 2))
    assert read_torch_file(path) == {"a": 4}


def test_names_must_be_strings(tmp_path):
    code = b"\x80\x02}" + plain(1) + tensor() + b"s."
    path = zip_file(tmp_path / "a.pth", code, _0=SIX.tobytes())
    assert "1 must be strings" in reason(path, read_state_dict)


def test_not_a_checkpoint(tmp_path):
    assert issubclass(CheckpointError, InputError)
    path = tmp_path / "a.pth"
    assert "no such file" in reason(path, read_state_dict)
    assert "is a directory" in reason(tmp_path, read_state_dict)
    for content in (
        b"",
        b"P",
        b"epoch,loss\n1,0.5\n",
        b"<html>not found</html>",
        b"\x80",
        b"PK\3\4",
    ):
        path.write_bytes(content)
        reason(path)
        reason(path, read_state_dict)
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    assert "not one of torch.save" in reason(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    assert "not one of torch.save" in reason(path)
    for content, words in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>403</html>", "is an HTML or XML page"),
        (b"\n <html>\n", "is an HTML or XML page"),
        (gzip.compress(b"x"), "is a gzip archive"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    ):
        path.write_bytes(content)
        assert words in reason(path, read_state_dict)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))
    assert "is a tar archive" in reason(path, read_state_dict)
    with warnings.catch_warnings(action="ignore"):  # PyTorch's own, of TorchScript's end.
        torch.jit.script(torch.nn.Linear(2, 3)).save(path)
    assert "TorchScript" in reason(path, read_state_dict)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.pth", "x")
    assert "it holds 'model.pth': unpack it" in reason(path, read_state_dict)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    assert "not one of torch.save" in reason(path)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_8_bits_are_named(tmp_path, kind):
    weights = {"weight": torch.ones(2, 3).to(kind), "bias": torch.zeros(2).to(kind)}
    message = reason(save({"model": weights}, tmp_path / "a.pth", False), read_state_dict)
    assert str(kind) in message
    safetensors.torch.save_file(weights, tmp_path / "a.safetensors")
    message = reason(tmp_path / "a.safetensors", read_state_dict)
    assert re.search("holds F8_E[45]M[23], floats of 8 bits", message)


@FORMATS
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offset": 1}, "'weight' reaches to element 6 of a storage with 6"),
        ({"shape": (3, 3)}, "'weight' reaches"),
        ({"strides": (4, 1)}, "'weight' reaches"),
        ({"strides": (2**62, 1)}, "'weight' reaches"),
        ({"shape": (2**62, 4)}, "'weight' reaches"),
        ({"count": 5}, "'weight' reaches"),
        ({"shape": (2, 2**40), "strides": (0, 0)}, "'weight' makes"),
        ({"count": 7}, "storage '0' claims"),
        ({"count": 10 * 2**30}, "storage '0' claims 42949672960 bytes"),
        ({"kind": "DoubleStorage"}, "storage '0' claims"),
        ({"count": -6}, "no storage"),
        ({"count": 2**70}, "no storage"),
        ({"key": ("0",)}, "no storage"),
        ({"offset": -1}, "no natural number"),
        ({"strides": (-3, 1)}, "no natural number"),
        ({"shape": (-2, 3)}, "no natural number"),
        ({"shape": (2**64, 0)}, "no natural number"),
        ({"shape": (True, 3)}, "no natural number"),
        ({"shape": (2.0, 3)}, "no natural number"),
        ({"shape": (2, 3, 1)}, "cannot be read"),
        ({"shape": 6}, "no tuple"),
        ({"shape": (1,) * 10_000, "strides": (1,) * 10_000}, "too long"),
        ({"key": "missing"}, "storage"),
        ({"key": "../data.pkl"}, "storage"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_tensors_outside_their_storage(tmp_path, legacy, change, words):
    code = state(weight=tensor(**change))
    path = tmp_path / "a.pth"
    if legacy:
        stream_file(path, code, ("0",), SIX)
    else:
        zip_file(path, code, _0=SIX.tobytes())
    tracemalloc.start()
    assert words in reason(path)
    assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    tracemalloc.stop()


def test_storage_sizes_must_agree(tmp_path):
    code = state(a=tensor(), b=tensor(count=5, shape=(1,), strides=(1,)))
    assert "two sizes" in reason(zip_file(tmp_path / "a.pth", code, _0=SIX.tobytes()))
    path = stream_file(tmp_path / "a.pth", SMALL_STREAM, ("0",), SIX)
    assert "other storages" in reason(path)
    path = stream_file(tmp_path / "a.pth", SMALL_STREAM, ("0", "1"), SIX[:5], SEVEN)
    assert "storage '0' claims 6 elements, but the file holds 5" in reason(path)


# Few bytes that ask for much.


def test_copies_of_one_storage_have_a_limit(tmp_path):
    one = tensor(count=2**18, shape=(2**18,), strides=(1,))
    megabyte = np.zeros(2**18, "<f4").tobytes()
    path = zip_file(tmp_path / "a.pth", b"\x80\x02](" + one * 1000 + b"e.", _0=megabyte)
    assert "far larger than the file" in reason(path)


NESTED = b")" + b"q\x00h\x00\x86" * 60  # t = (t, t), sixty times: quick to build, not to hash
DEEP = b")" + b"\x85" * 200_000  # ((((...)))): hashing overflows the C stack


@pytest.mark.parametrize(
    ("bomb", "legacy"),
    [(NESTED, False), (NESTED, True), (DEEP, False)],  # What unpickles is the same for both.
    ids=["doubled zip", "doubled stream", "deep"],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda bomb: b"}" + bomb + b"Ns",  # key
        lambda bomb: bomb + b"\x8c\x01a\x93",  # module
        lambda bomb: b"\x8c\x01a" + bomb + b"\x93",  # name
        lambda bomb: b"(" + plain("storage") + bomb + plain("0") + b"NK\x06tQ",  # storage type
        lambda bomb: storage("KEY", 6).replace(plain("KEY"), bomb),
        lambda bomb: tensor().replace(plain((2, 3)), bomb),
        lambda bomb: bomb + b")R",
        lambda bomb: bomb + b"Q",
    ],
)
def test_nested_tuples_are_never_hashed_or_printed(tmp_path, legacy, bomb, use):
    reason(small(tmp_path / "a.pth", legacy, b"\x80\x02" + use(bomb) + b"."), read_state_dict)


@FORMATS
def test_memo_index_reserves_nothing(tmp_path, legacy):
    code = b"\x80\x02" + SMALL[2:-1] + b"r\xff\xff\xff\xff."
    path = small(tmp_path / "a.pth", legacy, code)
    tracemalloc.start()
    assert list(read_state_dict(path)) == ["weight", "bias"]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@FORMATS
def test_lengths_reserve_nothing(tmp_path, legacy):
    tracemalloc.start()
    for instruction in (
        b"X\xff\xff\xff\xff",
        b"B\xff\xff\xff\x7f",
        b"T\xff\xff\xff\x7f",
        b"T\xff" * 4,
    ):
        assert "ends early" in reason(small(tmp_path / "a.pth", legacy, b"\x80\x02" + instruction))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_zip_tricks(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", SMALL)
        archive.writestr("a/data/0", bytes(50 * 2**20))
    tracemalloc.start()
    assert "compressed" in reason(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", SMALL)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/data.pkl", SMALL)
    assert "twice" in reason(path)

    # Many entries of the directory that share the bytes of one member.
    small(path, legacy=False)
    with zipfile.ZipFile(path, "a") as archive:
        info = archive.getinfo("archive/data.pkl")
        info.file_size = info.compress_size = 2**33
        archive.writestr("touch", b"")
    assert "larger than it" in reason(path)

    small(path, legacy=False)
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("../../evil", "/evil", "archive/../evil", "C:\\evil"):
            archive.writestr(name, b"x")
    assert list(read_state_dict(path)) == ["weight", "bias"]
    assert [each.name for each in tmp_path.iterdir()] == ["a.pth"]
    zip_file(path, SMALL, root="..", _0=SIX.tobytes(), _1=SEVEN.tobytes())
    assert list(read_state_dict(path)) == ["weight", "bias"]

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", SMALL)
        archive.writestr("b/data.pkl", SMALL)
    assert "not one of torch.save" in reason(path)


# Damage.


def safetensors_bytes() -> bytes:
    return safetensors.numpy.save({"weight": SIX.reshape(2, 3), "bias": SEVEN})


@pytest.mark.parametrize("kind", ["zip", "stream", "safetensors"])
def test_every_truncation_is_refused(tmp_path, kind):
    path = tmp_path / "a.pth"
    if kind == "safetensors":
        path.write_bytes(safetensors_bytes())
    else:
        small(path, kind == "stream")
    content = path.read_bytes()
    read_state_dict(path)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        reason(path, read_state_dict)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "a.pth"


@hypothesis.settings(max_examples=400, deadline=None, database=None)
@hypothesis.given(
    kind=st.sampled_from(["zip", "stream", "safetensors", "pickle in zip"]),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_flipped_bytes_are_read_or_refused(damaged, kind, places):
    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        for place, value in places:
            changed[int(place * len(changed))] = value
        return bytes(changed)

    if kind == "safetensors":
        damaged.write_bytes(flip(safetensors_bytes()))
    elif kind == "pickle in zip":
        small(damaged, legacy=False, code=flip(SMALL))
    else:
        damaged.write_bytes(flip(small(damaged, kind == "stream").read_bytes()))
    try:
        loaded = read_state_dict(damaged)
    except CheckpointError as error:
        assert str(damaged) in str(error)
    else:
        assert all(isinstance(value, np.ndarray) for value in loaded.values())
        assert sum(value.nbytes for value in loaded.values()) <= 64 * 2**20
