import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Sharding, SingleDeviceSharding

from fetal_flax import checkpoints
from fetal_flax.checkpoints import Checkpoint, Description, TrainingCheckpoints
from fetal_flax.checkpoints import description as format_module
from fetal_flax.config import ModelConfig, TrainConfig, to_dict
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables
from fetal_flax.training.compile import create_state
from fetal_flax.training.sharding import create_mesh, replicated

pytestmark = pytest.mark.usefixtures("quick_compilation", "tiny_network_all_along")

MODEL = ModelConfig(name="unet", base_width=2)
CONFIG = TrainConfig(model=MODEL)
DESCRIPTION = Description(
    kind="network",
    model=MODEL,
    image_size=(64, 96),
    config=json.loads(json.dumps(to_dict(CONFIG))),
    progress={"epoch": 3, "history": [{"validation_dice": 0.1 + 0.2}]},
)


@pytest.fixture(scope="module")
def variables() -> Variables:
    """Random numbers, negative zeros among them."""
    rng = np.random.default_rng(0)

    def random(shape: jax.ShapeDtypeStruct) -> jax.Array:
        array = rng.normal(size=shape.shape).astype(np.float32)
        array.flat[0] = -0.0
        return jnp.asarray(array)

    return jax.tree.map(random, functional.shapes(MODEL))


def _bytes(tree: Any) -> dict[str, bytes]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def _abstract(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def _epochs(workdir: Path) -> set[int]:
    folders = [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert all(int(name) % checkpoints.PER_EPOCH == 0 for name in folders)
    return {int(name) // checkpoints.PER_EPOCH for name in folders}


def _train(workdir: Path, dices: list[float]) -> None:
    """Saves epochs that hold nothing but their own number."""
    shapes = functional.shapes(MODEL)
    saved = TrainingCheckpoints(workdir)
    for epoch, dice in enumerate(dices, 1):
        arrays = jax.tree.map(lambda a, epoch=epoch: jnp.full(a.shape, epoch, a.dtype), shapes)
        description = dataclasses.replace(DESCRIPTION, progress={"epoch": epoch})
        saved.save(epoch, arrays, {"step": jnp.int32(epoch)}, description, dice)
    saved.close()


def test_a_saved_network_comes_back_bit_for_bit_with_its_description(variables, tmp_path):
    checkpoints.save_checkpoint(tmp_path / "network", Checkpoint(variables, DESCRIPTION))
    loaded, description = checkpoints.load_checkpoint(tmp_path / "network")
    assert _bytes(loaded) == _bytes(variables)
    assert description == DESCRIPTION


@pytest.mark.parametrize(
    "description",
    [
        Description(kind="network", model=MODEL),
        dataclasses.replace(DESCRIPTION, progress={"best": -float("inf"), "name": "Schädel"}),
    ],
    ids=["defaults", "odd values"],
)
def test_descriptions_come_back(variables, tmp_path, description):
    checkpoints.save_checkpoint(tmp_path / "network", Checkpoint(variables, description))
    assert checkpoints.load_checkpoint(tmp_path / "network")[1] == description


def test_saving_refuses_to_overwrite(variables, tmp_path):
    checkpoints.save_checkpoint(tmp_path / "network", Checkpoint(variables, DESCRIPTION))
    with pytest.raises(InputError, match="already holds a checkpoint"):
        checkpoints.save_checkpoint(tmp_path / "network", Checkpoint(variables, DESCRIPTION))


@pytest.mark.parametrize(
    ("dices", "kept", "best"),
    [
        ([0.1, 0.9, 0.2, 0.3, 0.4], {2, 4, 5}, 2),
        ([0.1, 0.2, 0.3], {2, 3}, 3),
        ([0.4, 0.3, 0.2, 0.1], {1, 3, 4}, 1),
        ([0.5], {1}, 1),
    ],
)
def test_training_keeps_the_best_and_the_last_two(tmp_path, dices, kept, best):
    _train(tmp_path, dices)
    assert _epochs(tmp_path) == kept
    loaded, description = checkpoints.load_checkpoint(tmp_path)
    assert description.progress == {"epoch": best}
    assert {float(array.max()) for array in loaded.params.values()} == {best}
    loaded, description = checkpoints.load_checkpoint(tmp_path, last=True)
    assert description.progress == {"epoch": len(dices)}
    assert {float(array.max()) for array in loaded.params.values()} == {len(dices)}


def test_training_resumes_from_the_last_epoch_not_the_best(tmp_path):
    _train(tmp_path, [0.9, 0.2, 0.3])
    device = SingleDeviceSharding(jax.devices()[0])
    saved = TrainingCheckpoints(tmp_path)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=device)
    restored = saved.restore_latest(_abstract(functional.shapes(MODEL), device), {"step": step})
    saved.close()
    assert restored is not None
    variables, training, description, damages = restored
    assert not damages
    assert (int(training["step"]), description.progress) == (3, {"epoch": 3})
    assert float(variables.params["head/bias"][0]) == 3


def test_there_is_nothing_to_restore_before_the_first_epoch(variables, tmp_path):
    saved = TrainingCheckpoints(tmp_path)
    assert saved.restore_latest(variables, {"step": jnp.int32(0)}) is None
    saved.close()


@pytest.mark.parametrize(
    ("devices_before", "devices_after"),
    [(8, 2), *(pytest.param(*devices, marks=pytest.mark.slow) for devices in ((8, 1), (1, 8)))],
)
def test_training_goes_on_with_other_devices(variables, tmp_path, devices_before, devices_after):
    state = create_state(CONFIG, variables, create_mesh(jax.devices()[:devices_before]))
    expected = _bytes(state)
    sharding = replicated(create_mesh(jax.devices()[:devices_after]))
    saved = TrainingCheckpoints(tmp_path)
    of_training = ("step", "opt_state", "learning_rates")
    saved.save(
        1,
        Variables(state.params, state.batch_stats),
        {name: getattr(state, name) for name in of_training},
        DESCRIPTION,
        0.5,
    )
    abstract = _abstract(state, sharding)
    restored = saved.restore_latest(
        Variables(abstract.params, abstract.batch_stats),
        {name: getattr(abstract, name) for name in of_training},
    )
    saved.close()
    assert restored is not None
    variables, training, description, _ = restored
    back = state._replace(**variables._asdict(), **training)
    assert _bytes(back) == expected
    assert jax.tree.structure(back) == jax.tree.structure(state)
    restored = jax.tree.leaves((variables, training))
    assert all(leaf.sharding == sharding for leaf in restored)
    assert description == DESCRIPTION


def _donating_step(sharding: Sharding) -> Callable[[Any], Any]:
    """A step that overwrites every array in place."""
    return jax.jit(
        lambda tree: jax.tree.map(lambda a: a * -3 + 1, tree),
        donate_argnums=0,
        in_shardings=sharding,
        out_shardings=sharding,
    )


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path, devices):
    sharding = replicated(create_mesh(jax.devices()[:devices]))
    step = _donating_step(sharding)
    rng = np.random.default_rng(0)
    # Large enough that writing goes on for long behind save's return.
    values = {f"array{i}": rng.normal(size=(1024, 512)).astype(np.float32) for i in range(8)}
    training = {"moments": rng.normal(size=(2048, 512)).astype(np.float32)}
    expected = _bytes((values, training))
    state = jax.device_put((values, training), sharding)
    state = jax.tree.map(jnp.copy, state)  # XLA's own memory, as of a step's output.
    abstract = _abstract(state, sharding)

    saved = TrainingCheckpoints(tmp_path)
    for epoch in range(1, 4):
        if epoch > 1:
            expected = _bytes(jax.tree.map(jnp.copy, state))  # Reading would pin the memory.
        params, moments = state
        saved.save(epoch, Variables(params, {}), moments, DESCRIPTION, 0.5)
        for _ in range(3):
            state = step(state)
        # On a single CPU device, Orbax holds on to the memory and JAX donates none of it.
        deleted = [leaf.is_deleted() for leaf in jax.tree.leaves((params, moments))]
        assert all(deleted) or devices == 1
        jax.block_until_ready(state)
        restored = saved.restore_latest(Variables(abstract[0], {}), abstract[1])
        assert restored is not None
        assert _bytes((restored[0].params, restored[1])) == expected
    saved.close()


@pytest.mark.parametrize(
    "load",
    [checkpoints.load_checkpoint, lambda path: checkpoints.load_encoder(path, Variables({}, {}))],
)
def test_a_folder_without_checkpoint_is_named_and_left_as_it_is(tmp_path, load):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match=rf"{folder} holds no checkpoint"):
            load(folder)
    assert not list(tmp_path.iterdir())


def test_what_is_near_a_checkpoint_is_told_the_way(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "3000000" / "variables").mkdir(parents=True)
    for path in ("checkpoints", "checkpoints/3000000", "checkpoints/3000000/variables"):
        with pytest.raises(InputError, match=rf"give the run's folder, {run}$"):
            checkpoints.load_checkpoint(run / path)
    for name in ("best_model.pth", "last.ckpt", "network.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match=rf"fetal-flax convert --source {tmp_path / name}"):
            checkpoints.load_checkpoint(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="is a file, not a checkpoint's folder: give a training"):
        checkpoints.load_checkpoint(tmp_path / "notes.txt")


def test_a_run_that_never_finished_an_epoch_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        checkpoints.load_checkpoint(tmp_path)


def test_an_encoder_is_no_network(variables, tmp_path):
    description = dataclasses.replace(DESCRIPTION, kind="encoder")
    checkpoints.save_checkpoint(tmp_path / "encoder", Checkpoint(variables, description))
    with pytest.raises(InputError, match=r"holds an encoder alone.*--encoder\.weights"):
        checkpoints.load_checkpoint(tmp_path / "encoder")


def test_a_newer_format_is_refused_with_the_way_out(monkeypatch, variables, tmp_path):
    monkeypatch.setattr(format_module, "FORMAT", 2)
    checkpoints.save_checkpoint(tmp_path / "network", Checkpoint(variables, DESCRIPTION))
    monkeypatch.setattr(format_module, "FORMAT", 1)
    with pytest.raises(InputError, match="has checkpoint format 2, this version reads 1"):
        checkpoints.load_checkpoint(tmp_path / "network")


@pytest.mark.parametrize("item", ["variables", "description"])
def test_a_damaged_checkpoint_is_bad_input(variables, tmp_path, item):
    checkpoints.save_checkpoint(tmp_path / "network", Checkpoint(variables, DESCRIPTION))
    for path in (tmp_path / "network" / "checkpoints" / "0" / item).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="network"):
        checkpoints.load_checkpoint(tmp_path / "network")


def test_exists_tells_whether_there_are_checkpoints(variables, tmp_path):
    assert not checkpoints.exists(tmp_path / "network")
    checkpoints.save_checkpoint(tmp_path / "network", Checkpoint(variables, DESCRIPTION))
    assert checkpoints.exists(tmp_path / "network")


def test_a_newer_format_is_not_taken_for_damage(variables, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(format_module, "FORMAT", 99)
        _train(tmp_path, [0.5, 0.6])
    saved = TrainingCheckpoints(tmp_path)
    with pytest.raises(InputError, match=r"has checkpoint format 99") as error:
        saved.restore_latest(variables, {"step": jnp.int32(0)})
    saved.close()
    assert not isinstance(error.value, checkpoints.DamagedError)
    assert _epochs(tmp_path) == {1, 2}


def _files(workdir: Path) -> list[Path]:
    folder = workdir / "checkpoints" / str(2 * checkpoints.PER_EPOCH)
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def test_no_flipped_byte_gives_other_arrays(tmp_path):
    """One in each file of the last checkpoint: it comes back as it was, or the one before does."""
    _train(tmp_path / "run", [0.9, 0.6])
    device = SingleDeviceSharding(jax.devices()[0])
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=device)
    abstract = _abstract(functional.shapes(MODEL), device)
    rng = np.random.default_rng(0)
    passed_over = 0
    for index in range(len(_files(tmp_path / "run"))):
        workdir = tmp_path / f"flipped{index}"
        shutil.copytree(tmp_path / "run", workdir)
        file = _files(workdir)[index]
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        saved = TrainingCheckpoints(workdir)
        restored = saved.restore_latest(abstract, {"step": step})
        saved.close()
        assert restored is not None, file
        variables, training, description, damages = restored
        epoch = 1 if damages else 2
        assert all((np.asarray(array) == epoch).all() for array in jax.tree.leaves(variables))
        assert (int(training["step"]), description.progress) == (epoch, {"epoch": epoch})
        assert (workdir / "damaged").exists() == bool(damages)
        passed_over += bool(damages)
    assert passed_over >= 5


def test_a_dice_that_was_changed_does_not_choose_the_best(tmp_path):
    _train(tmp_path, [0.9, 0.6])
    file = tmp_path / "checkpoints" / str(2 * checkpoints.PER_EPOCH) / "metrics" / "metrics"
    file.write_text(file.read_text().replace("0.6", "0.96"))
    with pytest.raises(InputError, match="validation Dice is not what was saved"):
        checkpoints.load_checkpoint(tmp_path)
