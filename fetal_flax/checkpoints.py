"""Self-describing checkpoints: arrays by name, and a description of what they are.

The only file that knows Orbax. A training workdir and a converted directory look alike:

    DIR/checkpoints/EPOCH/variables     parameters and batch statistics, by name
    DIR/checkpoints/EPOCH/training      step, optimizer state, learning rates; training only
    DIR/checkpoints/EPOCH/description   JSON: kind, network, image size, config, progress

Saving is atomic: Orbax marks a checkpoint as complete last, and ignores one that isn't.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from fetal_flax.config import ModelConfig, from_dict, to_dict
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables

FORMAT = 1
FOLDER = "checkpoints"
Kind = Literal["network", "encoder"]
_policies = checkpoint_managers.preservation_policy


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint holds, readable without loading it."""

    kind: Kind
    """A whole network, or a MobileNetV2 encoder alone."""
    model: ModelConfig
    """The network; of an encoder, one that it fits."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width that the network was trained at."""
    config: Mapping[str, Any] | None = None
    """The training run's config, where there was one."""
    progress: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Epoch, history and schedule state of the run, or the source of a conversion."""

    @property
    def dataset(self) -> str:
        """The data set whose way of drawing masks the network has learned; HC18 if unknown."""
        return "hc18" if self.config is None else self.config["data"]["dataset"]

    @property
    def title(self) -> str:
        """What the checkpoint holds, in a few words."""
        return "a MobileNetV2 encoder" if self.kind == "encoder" else f"a {self.model.title}"


class TrainingCheckpoints:
    """The checkpoints of a run: the last two and the best by validation Dice.

    Args:
        workdir: The run's folder.
    """

    def __init__(self, workdir: Path):
        keep = _policies.AnyPreservationPolicy(
            [_policies.LatestN(2), _policies.BestN(get_metric_fn=_dice, n=1)]
        )
        self._workdir = workdir
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).resolve(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep, best_fn=_dice, best_mode="max"
            ),
        )

    def save(
        self,
        epoch: int,
        variables: Variables,
        training: Any,
        description: Description,
        validation_dice: float,
    ) -> None:
        """Saves in the background; the arrays may be donated as soon as this returns."""
        self._manager.save(
            epoch,
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(variables._asdict()),
                training=ocp.args.StandardSave(training),
                description=ocp.args.JsonSave(_to_json(description)),
            ),
            metrics={"dice": validation_dice},
        )

    def restore_latest(
        self, variables: Variables, training: Any
    ) -> tuple[Variables, Any, Description] | None:
        """Restores the last checkpoint, or returns None where there is none.

        Args:
            variables: Arrays or shapes with the shardings to restore to.
            training: The same for what `save` got as `training`.

        Raises:
            InputError: The checkpoint can't be read.
        """
        epoch = self._manager.latest_step()
        if epoch is None:
            return None
        with _damage_named(self._workdir):
            restored = self._manager.restore(
                epoch,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardRestore(variables._asdict()),
                    training=ocp.args.StandardRestore(training),
                    description=ocp.args.JsonRestore(),
                ),
            )
            description = _from_json(restored["description"], f"checkpoint {epoch}")
        return Variables(**restored["variables"]), restored["training"], description

    def close(self) -> None:
        """Waits until everything is saved."""
        self._manager.wait_until_finished()
        self._manager.close()


def save(directory: Path, variables: Variables, description: Description) -> None:
    """Saves variables that no training goes on from, such as converted ones; all or nothing.

    Raises:
        InputError: The directory already holds a checkpoint, or can't be written.
    """
    folder = directory / FOLDER
    if folder.exists():
        raise InputError(f"{directory} already holds a checkpoint: choose another --output")
    made_directory = not directory.exists()
    try:
        with ocp.CheckpointManager(folder.resolve()) as manager:
            manager.save(
                0,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(variables._asdict()),
                    description=ocp.args.JsonSave(_to_json(description)),
                ),
            )
    except BaseException as error:
        # A retry must not find half a checkpoint.
        shutil.rmtree(directory if made_directory else folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(
                f"can't write {directory} ({error.strerror or error}): choose an --output that "
                "can be written"
            ) from error
        raise


def load(directory: Path, *, kinds: Sequence[Kind] = ("network",)) -> tuple[Variables, Description]:
    """Loads a run's best checkpoint, or a converted one.

    Args:
        directory: Holds the checkpoint.
        kinds: What it may be.

    Raises:
        InputError: There is no checkpoint, it can't be read, or it holds an encoder where a
            network is wanted.
    """
    with _reader(directory) as manager:
        epoch, description = _describe(manager, directory)
        if description.kind not in kinds:
            raise InputError(
                f"{directory} holds an encoder alone: train a network on it with "
                f"--encoder.weights {directory}"
            )
        return _load(manager, epoch, _shapes(description)), description


def load_encoder(directory: Path, expected: Variables) -> Variables:
    """Loads the encoder of a converted encoder or of a whole network.

    Args:
        directory: Holds the checkpoint.
        expected: Shapes to load.

    Raises:
        InputError: There is no checkpoint, it can't be read, or the shapes differ.
    """
    with _reader(directory) as manager:
        epoch, description = _describe(manager, directory)
        loaded = functional.encoder_part(_load(manager, epoch, _shapes(description)))
    for ours, theirs in zip(expected, loaded, strict=True):
        differing = [n for n in ours if n not in theirs or ours[n].shape != theirs[n].shape]
        if differing:
            channels = expected.params[functional.STEM].shape[2]
            raise InputError(
                f"{directory} has another encoder ({differing[0]} differs): convert the "
                f"torchvision file again with --channels {channels}"
            )
    return loaded


def exists(directory: Path) -> bool:
    """Returns whether a run or a conversion has left checkpoints here."""
    return (directory / FOLDER).is_dir()


@contextlib.contextmanager
def _reader(directory: Path) -> Iterator[ocp.CheckpointManager]:
    if not exists(directory):
        raise InputError(
            f"{directory} holds no checkpoint: give a training workdir or a converted directory"
        )
    options = ocp.CheckpointManagerOptions(
        read_only=True, save_interval_steps=0, create=False, best_fn=_dice, best_mode="max"
    )
    with (
        _damage_named(directory),
        ocp.CheckpointManager((directory / FOLDER).resolve(), options=options) as manager,
    ):
        yield manager


@contextlib.contextmanager
def _damage_named(directory: Path) -> Iterator[None]:
    """Turns what Orbax says of broken files into a sentence that names their place."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Of broken files, Orbax and TensorStore raise many kinds.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{directory / FOLDER} is damaged ({reason[:200]}): restore it from a copy, or delete "
            "the damaged epoch's folder to fall back on another"
        ) from error


def _describe(manager: ocp.CheckpointManager, directory: Path) -> tuple[int, Description]:
    epoch = manager.best_step()
    if epoch is None:
        epoch = manager.latest_step()
    if epoch is None:
        raise InputError(f"{directory} holds no complete checkpoint: train or convert again")
    args = ocp.args.Composite(description=ocp.args.JsonRestore())
    return epoch, _from_json(manager.restore(epoch, args=args)["description"], str(directory))


def _shapes(description: Description) -> Variables:
    shapes = functional.shapes(description.model)
    return functional.encoder_part(shapes) if description.kind == "encoder" else shapes


def _load(manager: ocp.CheckpointManager, epoch: int, shapes: Variables) -> Variables:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes._asdict()
    )
    args = ocp.args.Composite(variables=ocp.args.StandardRestore(abstract))
    return Variables(**manager.restore(epoch, args=args)["variables"])


def _dice(metrics: Mapping[str, float]) -> float:
    return metrics["dice"]


def _to_json(description: Description) -> dict[str, Any]:
    return {"format": FORMAT, **to_dict(description)}


def _from_json(values: dict[str, Any], source: str) -> Description:
    values = dict(values)
    found = values.pop("format", None)
    if found != FORMAT:
        raise InputError(
            f"{source} has checkpoint format {found}, this version reads {FORMAT}: "
            "use the version of fetal_flax that wrote it"
        )
    return Description(
        kind=values["kind"],
        model=from_dict(ModelConfig, values["model"], path="model"),
        image_size=tuple(values["image_size"]),
        config=values["config"],
        progress=values["progress"],
    )
