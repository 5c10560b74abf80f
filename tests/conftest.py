"""Eight CPU devices, strict JAX, and the data that tests share."""

import contextlib
import csv
import dataclasses
import functools
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

# Before anything imports jax. A GPU is used only by who asks for it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Beside XLA's threads on few cores, torch's wait for each other many times as long as they work.
# Told by the environment, since pytest-xdist's controller would wait for torch to be imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
from jaxtyping import install_import_hook

# Shapes and types that these rooms' annotations give are checked at every call, in tests alone.
install_import_hook(
    ["fetal_flax.measurement", "fetal_flax.reporting", "fetal_flax.data", "fetal_flax.inference"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src import compiler

from fetal_flax._util.backend import programs_for
from fetal_flax._util.compilation_cache import keep_compilations
from fetal_flax.checkpoints import Checkpoint, Description, shipped
from fetal_flax.config import DataConfig, EncoderConfig, ModelConfig, ScheduleConfig, TrainConfig
from fetal_flax.data import hc18
from fetal_flax.data.batch import Batch
from fetal_flax.data.phantoms import phantom
from fetal_flax.data.phantoms.canvas import Canvas
from fetal_flax.inference import segmenter
from fetal_flax.models import functional
from fetal_flax.models.blocks import ConvNorm
from fetal_flax.models.functional import Variables, init
from fetal_flax.models.init import HostRngs
from fetal_flax.models.interface import as_input, as_logits
from fetal_flax.models.layers import Conv
from fetal_flax.reporting import html

ROOT = Path(__file__).resolve().parents[1]

# Most of the time would go to XLA. pytest-xdist's workers, children that run train.py and the next
# run find what one of them compiled, however small; `pytest --cache-clear` empties the folder.
keep_compilations(str(ROOT / ".pytest_cache" / "d"))
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR"))
# The lines that operations come from take a thirtieth of the time, and no test looks at them.
jax.config.update("jax_traceback_in_locations_limit", 0)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Without optimizations, these two take XLA three quarters of its time.
_QUICK_OPTIONS = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}

# name, (height, width), center, semi-axes, angle in degrees; 002 leaves its image at the top.
_TINY_HEADS = (
    ("000_HC", (108, 160), (80, 54), (50, 38), 20),
    ("001_2HC", (108, 160), (70, 50), (40, 30), -10),
    ("001_HC", (108, 160), (75, 52), (42, 31), 0),
    ("002_HC", (108, 160), (80, 36), (55, 42), 5),
    ("003_2HC", (110, 158), (90, 60), (35, 28), 40),
    ("003_HC", (110, 158), (85, 60), (36, 28), 35),
)
_PHANTOMS_CHECKED = 4
_TINY_PIXEL_SIZE_MM = 0.691358041432  # No float32 has this value.


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Python looks for garbage less often, and never in what the tests import, which stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000)
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers keep to tests that follow each other: most fixtures of a module are made once."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data: images and weights that are no part of the project."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("FETAL_FLAX_SHARED", beside))
    if not (folder / "hc18").is_dir():
        reason = f"no real data in {folder}: set FETAL_FLAX_SHARED to the folder that holds hc18/"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(params=["cpu", "gpu"])
def made_for(request) -> Iterator[str]:
    """Traces programs as for either backend; what a GPU is given runs on a CPU too."""
    with programs_for(request.param):
        yield request.param


@pytest.fixture(scope="session")
def hc18_sample(shared_dir, tmp_path_factory) -> tuple[hc18.HC18Record, ...]:
    """Every 16th image of HC18; to find all means to read them all, for ten seconds."""
    folder, csv_name = tmp_path_factory.mktemp("hc18"), "training_set_pixel_size_and_HC.csv"
    (folder / "training_set").mkdir()
    (folder / csv_name).symlink_to(shared_dir / "hc18" / csv_name)
    for image in sorted((shared_dir / "hc18" / "training_set").glob("*HC.png"))[::16]:
        for path in (image, image.with_name(f"{image.stem}_Annotation.png")):
            (folder / "training_set" / path.name).symlink_to(path)
    return hc18.find_records(folder)


@pytest.fixture(scope="session", autouse=True)
def shapes_of_few_phantoms_checked() -> Iterator[None]:
    """A phantom is painted by a thousand small calls: to check them all takes longer than they."""
    paint, painted = phantom.paint_anatomy, itertools.count()

    def paint_anatomy(*arguments: Any) -> Canvas:
        with pytest.MonkeyPatch.context() as patched:
            if next(painted) >= _PHANTOMS_CHECKED:
                patched.setattr(jaxtyping.config, "jaxtyping_disable", True)
            return paint(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(phantom, "paint_anatomy", paint_anatomy)
        yield


@pytest.fixture
def shapes_unchecked(monkeypatch) -> None:
    """For a test that gives what an annotation rules out, to see how it is answered."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@contextlib.contextmanager
def _compiled_quickly() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    compile_options = compiler.get_compile_options
    fold: Any = functional.fold  # JAX's types lack `clear_cache`.

    def forget_programs() -> None:
        """They would stay as compiled in another module."""
        fold.clear_cache()
        segmenter._shared_program.cache_clear()

    def quick_options(*arguments: Any, env_options_overrides: Any = None, **keywords: Any) -> Any:
        overrides = _QUICK_OPTIONS | dict(env_options_overrides or {})
        return compile_options(*arguments, env_options_overrides=overrides, **keywords)

    jax.config.update("jax_disable_most_optimizations", True)
    # `jit` takes compiler options for one function; no setting of JAX's gives them to all.
    compiler.get_compile_options = quick_options
    forget_programs()
    try:
        yield
    finally:
        forget_programs()
        compiler.get_compile_options = compile_options
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def compiled_quickly() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Makes a context with XLA without most optimizations, for what outlives a module."""
    return _compiled_quickly


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """XLA without most optimizations; off again after the module, since others must round alike."""
    with _compiled_quickly():
        yield


@pytest.fixture(scope="session")
def compiled_alike() -> dict[str, str]:
    """The environment of a child that compiles as a module with `quick_compilation` does."""
    options = [f"--{name}={str(value).lower()}" for name, value in _QUICK_OPTIONS.items()]
    flags = " ".join([os.environ["XLA_FLAGS"], *options])
    return {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags}


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Makes a batch of noise with a bright rectangle in each image, and the rectangles."""

    def make(count: int, height: int, width: int, seed: int = 0, *, channels: int = 1) -> Batch:
        rng = np.random.default_rng(seed)
        image = rng.integers(0, 120, (count, height, width, channels), np.uint8)
        mask = np.zeros((count, height, width, 1), np.uint8)
        for row in mask:
            top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
            row[top : top + height // 2, left : left + width // 2] = 1
        valid, record = np.ones(count, bool), np.arange(count, dtype=np.int32)
        return Batch(image + 120 * mask, mask, valid, record)

    return make


class TinyEncoder(nnx.Module):
    """Gives one map of features, of the image's size."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.conv = ConvNorm(config.in_channels, config.base_width, 3, rngs=rngs)

    def __call__(self, x, *, train: bool | None = None):
        return (nnx.relu(self.conv(x, train=train)),)


class TinyNetwork(nnx.Module):
    """A convolution each as encoder, decoder and head: all that steps and runs tell apart."""

    divisor = 1

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = TinyEncoder(config, rngs=rngs)
        self.bottleneck = ConvNorm(config.base_width, config.base_width, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5 if config.name == "mobilenet_aspp_se_unet" else 0.0)
        self.head = Conv(config.base_width, 1, 1, bias=True, rngs=rngs)

    def __call__(self, images, *, train=None, train_encoder=None, dropout_key=None, features=None):
        x = as_input(images, self.config, self.divisor)
        (x,) = features or self.encoder(x, train=train_encoder)
        x = nnx.relu(self.bottleneck(x, train=train))
        rngs = None if dropout_key is None else nnx.Rngs(dropout=dropout_key)
        return as_logits(self.head(self.dropout(x, deterministic=not train, rngs=rngs)))


@contextlib.contextmanager
def _tiny_networks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        structure = functools.lru_cache(functional._structure.__wrapped__)
        patch.setattr(functional, "_structure", structure)

        def create(config: ModelConfig, seed: int | None) -> nnx.Module:
            return TinyNetwork(config, rngs=cast(nnx.Rngs, HostRngs(seed)))

        patch.setattr(functional, "create", create)
        yield


@pytest.fixture(scope="session")
def tiny_networks() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Makes a context in which every network is a tiny one, for what outlives a test."""
    return _tiny_networks


@pytest.fixture
def tiny_network() -> Iterator[None]:
    """Every network is a tiny one: to trace and compile a U-Net's step takes ten times as long."""
    with _tiny_networks():
        yield


@pytest.fixture(scope="module")
def tiny_network_all_along() -> Iterator[None]:
    """The same for all that a module makes: Orbax takes its time for each array of a network."""
    with _tiny_networks():
        yield


@pytest.fixture(scope="session")
def threshold_network() -> Checkpoint:
    """A network that finds what is brighter than a half; float16 holds its weights."""
    config = ModelConfig(name="unet", base_width=2)
    variables = init(config, seed=0)
    kernels = {name: 0 * array for name, array in variables.params.items() if "kernel" in name}
    for name in ("down1/first", "down1/second", "stage1/block/first", "stage1/block/second"):
        kernels[f"{name}/conv/kernel"] = kernels[f"{name}/conv/kernel"].at[1, 1, 0, 0].set(1.0)
    kernels["head/kernel"] = kernels["head/kernel"].at[0, 0, 0, 0].set(40.0)
    biases = {name: 0 * array for name, array in variables.params.items() if "bias" in name}
    biases["head/bias"] = jnp.full(1, -20.0)
    variables = Variables(variables.params | kernels | biases, variables.batch_stats)
    return Checkpoint(variables, Description("network", config, (64, 96)))


@pytest.fixture(scope="session")
def save_network() -> Callable[[Path, Checkpoint], None]:
    """Saves a network as shipped ones are, rounded to float16: loaded in a tenth of the time."""

    def save(folder: Path, checkpoint: Checkpoint) -> None:
        arrays = shipped.to_float16(checkpoint.variables)
        shipped.save(folder, shipped.contents(arrays, checkpoint.metadata, {}))

    return save


@pytest.fixture
def empty_charts(monkeypatch) -> None:
    """Reports have their charts, and nobody waits for them to be drawn."""
    monkeypatch.setattr(html, "_drawn", lambda figure, alternative: html._png(b"", alternative))


@pytest.fixture
def tiny_hc18(tmp_path: Path) -> Path:
    """A folder in HC18's layout: six images of four examinations."""
    folder = tmp_path / "tiny_hc18"
    images = folder / "training_set"
    images.mkdir(parents=True)
    rows = []
    rng = np.random.default_rng(0)
    for name, size, center, axes, angle in _TINY_HEADS:
        image = rng.integers(0, 60, size, np.uint8)
        cv2.ellipse(image, center, axes, angle, 0, 360, 200, thickness=4)
        outline = np.zeros(size, np.uint8)
        cv2.ellipse(outline, center, axes, angle, 0, 360, 255, thickness=1)
        cv2.imwrite(str(images / f"{name}.png"), image)
        cv2.imwrite(str(images / f"{name}_Annotation.png"), outline)
        a, b = axes
        circumference = np.pi * (3 * (a + b) - np.sqrt((3 * a + b) * (a + 3 * b)))
        rows.append(
            (f"{name}.png", _TINY_PIXEL_SIZE_MM, round(circumference * _TINY_PIXEL_SIZE_MM, 2))
        )
    with (folder / "training_set_pixel_size_and_HC.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(("filename", "pixel size(mm)", "head circumference (mm)"))
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="session")
def small_config(tmp_path_factory) -> Callable[..., TrainConfig]:
    """Four steps an epoch; the arguments are settings of the schedule."""
    cache_dir = tmp_path_factory.mktemp("cache")

    def make(**schedule: Any) -> TrainConfig:
        return TrainConfig(
            name="small",
            model=ModelConfig(name="unet", base_width=4),
            encoder=EncoderConfig(weights="none"),
            data=DataConfig(
                dataset="fetal_phantom",
                cache_dir=str(cache_dir),
                image_size=(32, 32),
                phantom_count=45,
                phantom_size=(64, 96),
                workers=0,
            ),
            schedule=dataclasses.replace(ScheduleConfig(epochs=2, batch_size=8), **schedule),
        )

    return make
