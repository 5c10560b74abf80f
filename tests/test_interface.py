"""The public interface: its names, that they cost nothing, and that their examples are true."""

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fetal_flax as ff
from fetal_flax.checkpoints import shipped

NAMES = {
    *("load", "Segmenter", "Measurement", "read_image", "list_networks", "make_phantom"),
    *("create_model", "apply", "apply_train", "init", "subtree", "merge", "variables_of"),
    *("Variables", "ModelConfig", "TrainConfig", "Checkpoint", "Description"),
    *("load_checkpoint", "save_checkpoint", "from_torch", "to_torch", "train", "evaluate"),
    *(
        "config",
        "export",
        "losses",
        "models",
        "optimizers",
        "schedules",
        "InputError",
        "__version__",
    ),
}
"""What others build on: a name may be added, and none may go."""
IN_MODULES = {
    *("export.to_file", "losses.dice_bce", "optimizers.adam_l2", "schedules.ReduceLROnPlateau"),
    *("models.ASPP", "models.Conv", "models.ConvNorm", "models.MobileNetV2"),
    *("models.ResidualSEBlock", "models.SqueezeExcite"),
}
MODULES = {name.partition(".")[0] for name in IN_MODULES} | {"config"}
DOCUMENTED = sorted((NAMES - MODULES - {"__version__"}) | IN_MODULES)

pytestmark = pytest.mark.usefixtures("quick_compilation", "empty_charts")


def named(name: str) -> Any:
    value: Any = ff
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_the_names_are_these():
    assert set(ff.__all__) == NAMES
    assert set(dir(ff)) >= NAMES
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        ff.lode  # type: ignore[attr-defined]  # noqa: B018


def test_an_import_brings_nothing_along():
    code = "import sys, fetal_flax; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"jax", "flax", "numpy", "cv2", "scipy", "optax", "orbax"}
    assert not heavy & set(ran.stdout.split())


def test_the_version_is_the_packages():
    assert ff.__version__ == importlib.metadata.version("fetal_flax")


def test_type_checkers_see_what_is_imported():
    """The imports that only they read are those that are made at run time."""
    tree = ast.parse(Path(ff.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {name: f"fetal_flax.{home}.{name}" for name, home in ff._HOMES.items()}
    modules = {name: f"fetal_flax.{home}" for name, home in ff._MODULES.items()}
    assert seen == homes | modules
    assert (Path(ff.__file__).parent / "py.typed").is_file()


# The examples of the docstrings.


def head(angle: float) -> np.ndarray:
    """An image of a bright ellipse; HC18's masks reach 1.4 pixels beyond what is measured."""
    image = np.full((180, 240), 20, np.uint8)
    box = (120.0, 90.0), (2 * 65.4, 2 * 49.4), angle
    return cv2.ellipse(image, box, 230, -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, threshold_network, save_network) -> Iterator[Path]:
    """Where the examples run: a run, a shipped network, a scan and images in HC18's layout."""
    folder = tmp_path_factory.mktemp("interface")
    checkpoint = threshold_network
    ff.save_checkpoint(folder / "runs" / "hc18", checkpoint)
    save_network(folder / "networks" / "hc18-described", checkpoint)
    cv2.imwrite(str(folder / "scan.png"), head(0))
    (folder / "HC18" / "training_set").mkdir(parents=True)
    rows = ["filename,pixel size(mm),head circumference (mm)"]
    for index, angle in enumerate((0, 30)):
        name, outline = f"{index:03d}_HC", np.zeros((180, 240), np.uint8)
        images = folder / "HC18" / "training_set"
        cv2.imwrite(str(images / f"{name}.png"), head(angle))
        cv2.ellipse(outline, ((120.0, 90.0), (2 * 65.4, 2 * 49.4), angle), 255, 1)
        cv2.imwrite(str(images / f"{name}_Annotation.png"), outline)
        rows.append(f"{name}.png,0.5,177")
    (folder / "HC18" / "training_set_pixel_size_and_HC.csv").write_text("\r\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.setattr(shipped, "FOLDER", folder / "networks")
        yield folder


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "train" else name
        for name in DOCUMENTED
    ],
)
def test_the_example_is_true(name, folder, small_config):
    value = named(name)
    # As in a doctest of its module, and what a reader of the interface has.
    known = vars(importlib.import_module(getattr(value, "__module__", "fetal_flax")))
    known = known | {"ff": ff, "jax": jax, "jnp": jnp, "nnx": nnx, "image": head(0)}
    known["config"] = small_config(epochs=1)
    methods = [member for member in vars(value).values()] if name == "Segmenter" else []
    examples = 0
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    for member in (value, *methods):
        text = inspect.getdoc(member) or ""
        test = doctest.DocTestParser().get_doctest(text, dict(known), name, None, None)
        report: list[str] = []
        with jax.numpy_dtype_promotion("standard"):  # As people have it.
            runner.run(test, out=report.append)
        assert not runner.failures, "".join(report)
        examples += len(test.examples)
    assert examples


# What people in JAX rely on.


def test_apply_can_be_jitted_differentiated_mapped_and_sharded():
    config = ff.ModelConfig(name="unet", base_width=4)
    variables = ff.init(config, seed=0)
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    plain = ff.apply(config, variables, images)
    assert np.ptp(np.asarray(plain)) > 1e-3
    apply = jax.jit(ff.apply, static_argnums=0)
    np.testing.assert_allclose(apply(config, variables, images), plain, atol=1e-5)
    mapped = jax.jit(jax.vmap(lambda image: ff.apply(config, variables, image[None])[0]))(images)
    np.testing.assert_allclose(mapped, plain, atol=1e-5)

    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    split, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("data",), ())
    )
    sharded = apply(config, jax.device_put(variables, whole), jax.device_put(images, split))
    np.testing.assert_allclose(sharded, plain, atol=1e-5)

    def mean(variables: ff.Variables) -> jax.Array:
        return ff.apply(config, variables, images).mean()

    gradient = jax.jit(jax.grad(mean))(variables)
    step = 1e-2 * gradient.params["head/kernel"]
    moved = variables._replace(
        params=variables.params | {"head/kernel": variables.params["head/kernel"] + step}
    )
    rise = float(apply(config, moved, images).mean() - plain.mean())
    assert rise == pytest.approx(
        1e-2 * float((gradient.params["head/kernel"] ** 2).sum()), rel=0.02
    )


def test_a_part_of_a_network_fits_the_block_alone():
    """`subtree` gives the names that the lifted block has: its arrays can be put into it."""
    variables = ff.init(ff.ModelConfig(variant="compact"), seed=0)
    encoder = ff.subtree(variables, "encoder")
    alone = ff.variables_of(ff.models.MobileNetV2(1, rngs=nnx.Rngs(1)))
    assert jax.tree.map(jnp.shape, encoder) == jax.tree.map(jnp.shape, alone)
    with pytest.raises(ff.InputError, match="no part 'decoder': give one of aspp, encoder, head"):
        ff.subtree(variables, "decoder")
