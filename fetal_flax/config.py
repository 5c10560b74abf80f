"""Every setting of a training run: frozen, typed, documented, validated.

`configs/NAME.py` return a `TrainConfig`; the command line overrides single fields
(`--optimizer.learning-rate 1e-4`); the run writes the result to its workdir and into its
checkpoints as JSON. Sections refer to the written description of the network
(docs/architecture.md says where it contradicts itself).
"""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from fetal_flax.errors import InputError, printable

Config = typing.TypeVar("Config")
TestTimeAugmentation = Literal["none", "flip"]
"""How often the network sees an image: once, or its mirror image too."""


_LARGEST_COUNT = 2**31 - 1
_FLOAT32 = (1.2e-38, 3.4e38)  # Smallest normal and largest; XLA takes what is smaller for 0.
_LONGEST_TEXT = 1000
_LARGEST_SIDE = 4096  # Of an image in pixels.
_MOST_CHANNELS = 4096
_MOST_WORKERS = 1024


def _require(condition: bool, field: str, rule: str, value: object) -> None:
    if not condition:
        raise InputError(f"setting {field} must be {rule}, not {printable(repr(value))}")


def _require_home(field: str, path: str) -> None:
    """Refuses the home of a user that this machine doesn't know."""
    unknown = path.startswith("~") and path[1:2] not in ("", "/")
    unknown = unknown and os.path.expanduser(path) == path
    _require(not unknown, field, "a path in the home of a user who exists", path)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Returns `value` as the type `hint` asks for, or raises InputError naming `path`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and type(value) is hint and dataclasses.is_dataclass(hint):
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast(type, hint), value, path=path)
    # True == 1 == 1.0, so equality alone is not enough.
    if origin is Literal and any(type(value) is type(a) and value == a for a in arguments):
        return value
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(_convert(h, v, path) for h, v in zip(arguments, value, strict=True))
    if origin in (typing.Union, types.UnionType):
        for alternative in arguments:
            try:
                return _convert(alternative, value, path)
            except InputError:
                continue
    if hint is types.NoneType and value is None:
        return None
    if hint is float and type(value) is int and abs(value) < _FLOAT32[1]:
        return float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    raise InputError(f"{path} can't be {printable(repr(value))}: expected {hint}")


def _check(section: Any, path: str = "") -> None:
    """Refuses a value of another type than its field's, and one that no field can use.

    A `configs/NAME.py` may set anything, and each comparison with NaN, infinity or a number that
    float32 doesn't hold may succeed.
    """
    for name, hint in typing.get_type_hints(type(section)).items():
        value, field = getattr(section, name), path + name
        _convert(hint, value, field)
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(part, str):
                usable = part.isprintable() and len(part) <= _LONGEST_TEXT
                _require(usable, field, f"printable and up to {_LONGEST_TEXT} characters", part)
            elif isinstance(part, float):
                usable = part == 0 or _FLOAT32[0] <= abs(part) <= _FLOAT32[1]
                _require(usable, field, "a finite number that float32 holds", part)
            elif isinstance(part, int) and name != "seed":
                usable = abs(part) <= _LARGEST_COUNT
                _require(usable, field, f"at most {_LARGEST_COUNT}", part)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network, and what about it can vary.

    Example:
        >>> ff.ModelConfig(variant="published", in_channels=3).title
        'mobilenet_aspp_se_unet (published)'
    """

    name: Literal["mobilenet_aspp_se_unet", "mobilenet_unet", "unet"] = "mobilenet_aspp_se_unet"
    """The proposed network or one of the two baselines."""
    variant: Literal["described", "published", "compact"] = "described"
    """Which reading of `mobilenet_aspp_se_unet`: the written description's layers, the published
    PyTorch code, or `compact`, which keeps to the description's figures
    (docs/architecture.md lists the differences)."""
    in_channels: Literal[1, 3] = 1
    """Image channels: 1 grey, 3 RGB."""
    aspp_width: int | None = None
    """Channels of each ASPP branch; None takes the variant's (128 described, 512
    published, 64 compact)."""
    dropout: float = 0.5
    """Dropout rate after the ASPP projection."""
    base_width: int = 32
    """Channels of the first stage of `unet`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the convolutions; parameters, statistics, loss and metrics stay float32."""

    def __post_init__(self) -> None:
        _check(self, "model.")
        _require(self.in_channels in (1, 3), "model.in_channels", "1 or 3", self.in_channels)
        _require(
            self.aspp_width is None or 1 <= self.aspp_width <= _MOST_CHANNELS,
            "model.aspp_width",
            f"1 to {_MOST_CHANNELS} channels or None",
            self.aspp_width,
        )
        _require(0 <= self.dropout < 1, "model.dropout", "in [0, 1)", self.dropout)
        _require(
            1 <= self.base_width <= _MOST_CHANNELS,
            "model.base_width",
            f"1 to {_MOST_CHANNELS} channels",
            self.base_width,
        )

    @property
    def title(self) -> str:
        """The network as tables and messages name it."""
        variant = f" ({self.variant})" if self.name == "mobilenet_aspp_se_unet" else ""
        return self.name + variant


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The MobileNetV2 encoder: its weights, and whether they learn (description, 1 and 8.4)."""

    weights: str = "imagenet1k_v2"
    """`imagenet1k_v1`, `imagenet1k_v2` (torchvision's files, downloaded once), the path of a
    `.pth`/`.safetensors` file or a converted directory, or `none` for random weights."""
    float16: bool = False
    """Whether the encoder begins with the float16 values nearest to its weights. A network that is
    to be shipped as float16 then loses nothing in a frozen encoder, whose rounding afterwards
    would move a circumference by half a millimetre."""
    trainable: bool = False
    """Whether the encoder learns; a frozen one has no optimizer state and never changes."""
    learning_rate: float = 3e-5
    """Learning rate of a trainable encoder."""
    frozen_batch_norm: Literal["running", "batch"] = "running"
    """What a frozen encoder's batch norms do in training: normalise with their running
    statistics and keep them, or with the batch's and drift, as the published code does."""

    def __post_init__(self) -> None:
        _check(self, "encoder.")
        _require_home("encoder.weights", self.weights)
        _require(bool(self.weights), "encoder.weights", "a name, a path or 'none'", self.weights)
        _require(self.learning_rate > 0, "encoder.learning_rate", "positive", self.learning_rate)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, how they are split, and how they reach the device."""

    dataset: Literal["hc18", "fetal_phantom"] = "hc18"
    """HC18, or procedural phantoms that need no download."""
    data_dir: str | None = None
    """HC18 folder in the official layout, complete or a subset; None downloads it from Zenodo."""
    cache_dir: str = "~/.cache/fetal_flax"
    """Where prepared datasets and downloaded weights are kept."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width that the network sees, in pixels."""
    validation_fraction: float = 0.2
    """Share of the examinations kept for validation when `folds` is 0."""
    folds: int = 0
    """Number of cross-validation folds; 0 splits once by `validation_fraction`."""
    fold: int = 0
    """Which fold validates, counted from 0."""
    phantom_count: int = 500
    """How many phantoms `fetal_phantom` holds."""
    phantom_size: tuple[int, int] = (270, 400)
    """Height and width of a phantom, in pixels."""
    backend: Literal["host", "device"] = "host"
    """Who prepares batches: the host's processors, or the device, which then holds the whole data
    set (HC18 at 256×256: 131 MB); both take the same images, varied alike."""
    steps_per_dispatch: int | None = None
    """Training steps in one call; an epoch's last call does what is left. None takes two on a CPU;
    on an accelerator a whole epoch with `backend` device, else one."""
    workers: int | None = None
    """Grain worker processes; 0 loads in threads of this process; None picks by CPU count."""
    prefetch: int = 4
    """Batches prepared ahead of the training step."""
    soft_masks: bool = False
    """Train on the share of each pixel that the head covers, instead of 0 or 1: at the network's
    size, a mask of whole pixels can't say where in a pixel the edge runs."""
    keep_validation_mb: int = 1024
    """Megabytes on each device, at most, for validation images and a frozen encoder's maps of them
    (200 images of 256×256: 444 MB in all), which are the same in every epoch; 0 keeps none."""

    def __post_init__(self) -> None:
        _check(self, "data.")
        _require_home("data.data_dir", self.data_dir or "")
        _require_home("data.cache_dir", self.cache_dir)
        _require(
            all(32 <= side <= _LARGEST_SIDE for side in self.image_size),
            "data.image_size",
            f"a height and a width of 32 to {_LARGEST_SIDE}",
            self.image_size,
        )
        _require(
            0 < self.validation_fraction < 1,
            "data.validation_fraction",
            "between 0 and 1",
            self.validation_fraction,
        )
        _require(self.folds == 0 or self.folds >= 2, "data.folds", "0 or at least 2", self.folds)
        _require(0 <= self.fold < max(self.folds, 1), "data.fold", "below data.folds", self.fold)
        _require(self.phantom_count >= 2, "data.phantom_count", "at least 2", self.phantom_count)
        _require(
            all(64 <= side <= _LARGEST_SIDE for side in self.phantom_size),
            "data.phantom_size",
            f"a height and a width of 64 to {_LARGEST_SIDE}",
            self.phantom_size,
        )
        _require(
            self.steps_per_dispatch is None or self.steps_per_dispatch >= 1,
            "data.steps_per_dispatch",
            "at least 1",
            self.steps_per_dispatch,
        )
        _require(
            self.workers is None or 0 <= self.workers <= _MOST_WORKERS,
            "data.workers",
            f"0 to {_MOST_WORKERS} or None",
            self.workers,
        )
        _require(self.prefetch >= 1, "data.prefetch", "at least 1", self.prefetch)
        _require(
            self.keep_validation_mb >= 0,
            "data.keep_validation_mb",
            "at least 0",
            self.keep_validation_mb,
        )


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """Random transforms of the training images (description, section 8.3)."""

    enabled: bool = True
    """False trains on the images as they are."""
    flip_probability: float = 0.5
    """Share of images mirrored left to right."""
    rotation_degrees: float = 20.0
    """Largest rotation either way, in degrees."""
    scale: float = 0.1
    """Largest relative change of size either way."""
    translation: float = 0.1
    """Largest shift either way, as a share of the image's side."""
    affine_probability: float = 0.5
    """Share of images rotated; the same share, drawn independently, scaled, and shifted."""
    gain: float = 0.0
    """Largest relative change of brightness either way."""
    gamma: float = 0.0
    """Largest change of contrast: grey levels in [0, 1] are raised to a power between
    1 / (1 + gamma) and 1 + gamma."""
    blur_px: float = 0.0
    """Largest standard deviation of a Gaussian blur, in pixels of the network's size."""
    speckle: float = 0.0
    """Largest standard deviation of noise that grey levels are multiplied by."""
    shadow: float = 0.0
    """Largest share of brightness that an acoustic shadow takes: a band from the top of the image
    to its bottom."""
    photometric_probability: float = 0.5
    """Share of images changed by gain; the same share, drawn independently, by each of gamma, blur,
    speckle and shadow."""

    def __post_init__(self) -> None:
        _check(self, "augmentation.")
        for field in ("flip_probability", "affine_probability", "photometric_probability"):
            value = getattr(self, field)
            _require(0 <= value <= 1, f"augmentation.{field}", "in [0, 1]", value)
        limits = {
            "rotation_degrees": 180,
            "scale": 0.9,
            "translation": 1,
            "gain": 1,
            "gamma": 4,
            "blur_px": 3,
            "speckle": 1,
            "shadow": 1,
        }
        for field, limit in limits.items():
            value = getattr(self, field)
            _require(0 <= value <= limit, f"augmentation.{field}", f"in [0, {limit}]", value)

    @property
    def photometric(self) -> bool:
        """Whether grey levels are varied, besides the geometry."""
        return self.enabled and any(
            getattr(self, field) for field in ("gain", "gamma", "blur_px", "speckle", "shadow")
        )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Dice plus binary cross-entropy (description, section 8.1)."""

    dice_weight: float = 0.8
    """Weight of the Dice loss."""
    bce_weight: float = 0.2
    """Weight of the binary cross-entropy."""
    smoothing: float = 1e-6
    """Added to numerator and denominator of Dice."""
    pos_weight: float | Literal["auto"] = "auto"
    """Factor on the cross-entropy of foreground pixels; `auto` takes background / foreground
    over the training split. (The description's 200 is the ratio of the unfilled outline.)"""
    dice_over: Literal["image", "batch"] = "image"
    """Whether Dice is computed per image and averaged, or once over the batch."""

    def __post_init__(self) -> None:
        _check(self, "loss.")
        _require(self.dice_weight >= 0, "loss.dice_weight", "0 or more", self.dice_weight)
        _require(self.bce_weight >= 0, "loss.bce_weight", "0 or more", self.bce_weight)
        _require(
            self.dice_weight + self.bce_weight > 0,
            "loss.dice_weight + loss.bce_weight",
            "positive",
            0,
        )
        _require(self.smoothing > 0, "loss.smoothing", "positive", self.smoothing)
        _require(
            self.pos_weight == "auto"
            or (not isinstance(self.pos_weight, str) and self.pos_weight > 0),
            "loss.pos_weight",
            "a positive number or 'auto'",
            self.pos_weight,
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam with L2 added to the gradient, as `torch.optim.Adam` does it (section 8.2)."""

    learning_rate: float = 3e-4
    """Learning rate of everything but the encoder."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    l2: float = 1e-4
    """L2 coefficient, added to the gradient before the moments; this is not AdamW."""

    def __post_init__(self) -> None:
        _check(self, "optimizer.")
        _require(self.learning_rate > 0, "optimizer.learning_rate", "positive", self.learning_rate)
        _require(0 <= self.beta1 < 1, "optimizer.beta1", "in [0, 1)", self.beta1)
        _require(0 <= self.beta2 < 1, "optimizer.beta2", "in [0, 1)", self.beta2)
        _require(self.epsilon > 0, "optimizer.epsilon", "positive", self.epsilon)
        _require(self.l2 >= 0, "optimizer.l2", "0 or more", self.l2)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How long to train, at which rates, and what validation decides (sections 8.2 and 8.3)."""

    epochs: int = 100
    """Passes over the training split."""
    batch_size: int = 16
    """Images per step over all devices together."""
    decay: Literal["plateau", "cosine"] = "plateau"
    """How the learning rates fall: when validation no longer improves (`factor`, `patience`,
    `threshold`, `min_learning_rate`), or by a cosine that reaches 0 with the last epoch's last step
    (Loshchilov & Hutter, arXiv:1608.03983)."""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rates rise linearly from 0, at the beginning."""
    average_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights and batch statistics, such as
    0.99; the average is what is validated and kept as the network. 0 averages nothing."""
    select_by: Literal["dice", "ellipse_dice"] = "dice"
    """What is to rise in validation: the Dice of the raw masks, or of the ellipses fitted to their
    largest regions, as the field measures. It chooses the best checkpoint, lowers the rates at a
    plateau and stops the run."""
    factor: float = 0.5
    """What a plateau multiplies the learning rates by."""
    patience: int = 10
    """Epochs without improvement that are tolerated; the next one reduces the rates."""
    threshold: float = 1e-4
    """Relative gain of what `select_by` says that counts as improvement."""
    min_learning_rate: float = 1e-6
    """No reduction goes below this."""
    early_stopping_patience: int | None = 15
    """Epochs without a new best of what `select_by` says after which training stops; None trains
    to the last epoch, as a cosine wants."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a step does whose loss or gradients are not finite: stop the run, with the state before
    it and its batch saved, or change nothing and be counted."""

    def __post_init__(self) -> None:
        _check(self, "schedule.")
        _require(self.epochs >= 1, "schedule.epochs", "at least 1", self.epochs)
        _require(self.batch_size >= 1, "schedule.batch_size", "at least 1", self.batch_size)
        _require(
            0 <= self.warmup_epochs <= self.epochs,
            "schedule.warmup_epochs",
            "0 to schedule.epochs",
            self.warmup_epochs,
        )
        _require(
            0 <= self.average_decay < 1, "schedule.average_decay", "in [0, 1)", self.average_decay
        )
        _require(0 < self.factor < 1, "schedule.factor", "between 0 and 1", self.factor)
        _require(self.patience >= 0, "schedule.patience", "0 or more", self.patience)
        _require(self.threshold >= 0, "schedule.threshold", "0 or more", self.threshold)
        _require(
            self.min_learning_rate >= 0,
            "schedule.min_learning_rate",
            "0 or more",
            self.min_learning_rate,
        )
        _require(
            self.early_stopping_patience is None or self.early_stopping_patience >= 1,
            "schedule.early_stopping_patience",
            "at least 1 or None",
            self.early_stopping_patience,
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run, whole; its sections are the classes of `fetal_flax.config`.

    Example:
        >>> config = ff.TrainConfig(
        ...     name="mine",
        ...     model=ff.ModelConfig(name="unet"),
        ...     schedule=ff.config.ScheduleConfig(epochs=10),
        ... )
        >>> config.schedule.epochs, config.data.image_size
        (10, (256, 256))
    """

    name: str = "hc18"
    """Names the run; the default workdir is `runs/NAME`."""
    seed: int = 0
    """Seeds initialisation, split, data order, augmentation and dropout."""
    deterministic: bool = False
    """Bit-identical results on a GPU from one time to the next, at some cost; on a CPU they are."""
    init: str = "none"
    """Trained network to begin with, at any image size: a training workdir (its best checkpoint), a
    converted directory or a shipped network's name; `none` begins with `encoder.weights` and random
    weights."""
    model: ModelConfig = ModelConfig()
    encoder: EncoderConfig = EncoderConfig()
    data: DataConfig = DataConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    def __post_init__(self) -> None:
        _check(self)
        _require(bool(self.name), "name", "a non-empty name", self.name)
        _require(0 <= self.seed < 2**32, "seed", "0 or more and below 2^32", self.seed)
        _require(bool(self.init), "init", "a path or 'none'", self.init)
        _require_home("init", self.init)
        divisor = 16 if self.model.name == "unet" else 32
        _require(
            all(side % divisor == 0 for side in self.data.image_size),
            "data.image_size",
            f"multiples of {divisor} for {self.model.name}",
            self.data.image_size,
        )


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config dataclass as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: Mapping[str, Any], *, path: str = "config") -> Config:
    """Builds the config dataclass `cls` back from `to_dict`'s output or its JSON.

    Args:
        cls: A dataclass of this file.
        values: One entry per field; absent fields take their defaults.
        path: How error messages name this place.

    Raises:
        InputError: A field is unknown, or a value is not of the field's type or range.
    """
    hints = typing.get_type_hints(cls)
    if not isinstance(values, Mapping):
        raise InputError(f"{path} must hold the settings {', '.join(hints)}")
    unknown = sorted(set(values) - set(hints))
    if unknown:
        named = printable(", ".join(unknown))
        raise InputError(f"{path} has no setting {named}; it has {', '.join(hints)}")
    return cls(
        **{name: _convert(hints[name], value, f"{path}.{name}") for name, value in values.items()}
    )
