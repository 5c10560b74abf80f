"""Every setting of a training run: frozen, typed, documented, validated.

`configs/NAME.py` return a `TrainConfig`; the command line overrides single fields
(`--optimizer.learning-rate 1e-4`); the run writes the result to its workdir and into its
checkpoints as JSON. Sections refer to the written description of the network
(docs/architecture.md says where it contradicts itself). Which values a setting may take is in
`config_rules.py`.
"""

import dataclasses
from typing import Literal

from fetal_flax.config_rules import check, from_dict, to_dict

__all__ = [
    "AugmentationConfig",
    "DataConfig",
    "EncoderConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "TestTimeAugmentation",
    "TrainConfig",
    "from_dict",
    "to_dict",
]

TestTimeAugmentation = Literal["none", "flip"]
"""How often the network sees an image: once, or its mirror image too."""


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
    matmul_precision: Literal["default", "float32"] = "default"
    """How the products of float32 convolutions are computed: as the device does by default, or in
    full. By default GPUs from Ampere on round factors to TF32, 10 bits of fraction instead of 23,
    and are several times as fast; a CPU computes in full in any case."""

    def __post_init__(self) -> None:
        check(self, "model")

    @property
    def title(self) -> str:
        """The network as tables and messages name it."""
        variant = f" ({self.variant})" if self.name == "mobilenet_aspp_se_unet" else ""
        return self.name + variant


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The MobileNetV2 encoder: its weights, whether they learn (the description's 1 and 8.4)."""

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
        check(self, "encoder")


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
    backend: Literal["host", "device"] | None = None
    """Who prepares batches: the host's processors, or the device, which then holds the whole data
    set (HC18 at 256×256: 131 MB); both take the same images, varied alike. None takes the device
    where it is an accelerator and the data set fits into a quarter of its memory, else the host."""
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
        check(self, "data")


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """Random transforms of the training images (section 8.3 of the network's description)."""

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
        check(self, "augmentation")

    @property
    def photometric(self) -> bool:
        """Whether grey levels are varied, besides the geometry."""
        return self.enabled and any(
            getattr(self, field) for field in ("gain", "gamma", "blur_px", "speckle", "shadow")
        )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Dice plus binary cross-entropy (section 8.1 of the network's description)."""

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
        check(self, "loss")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam with L2 added to the gradient, as `torch.optim.Adam` has it (the description's 8.2)."""

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
        check(self, "optimizer")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How long to train, at which rates, what validation decides (the description's 8.2, 8.3)."""

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
        check(self, "schedule")


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
        check(self, "run")
