"""The networks and their training in PyTorch, to compare with.

Module names are those of the published checkpoints, so that their state dicts load as they are;
the encoder is torchvision's own MobileNetV2. Nothing here is derived from the Flax code.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fetal_flax.config import LossConfig, ModelConfig, TrainConfig

OUT_INDICES = (1, 3, 6, 13, 18)
OUT_CHANNELS = (16, 24, 32, 96, 1280)
DECODER = {5: (512, 256), 4: (256, 128), 3: (128, 64), 2: (64, 32), 1: (32, 32)}
COMPACT_DECODER = {5: (128, 96), 4: (96, 80), 3: (80, 64), 2: (64, 32), 1: (32, 16)}
SKIPS = {5: 96, 4: 32, 3: 24, 2: 16}


def create_reference(model: ModelConfig) -> nn.Module:
    """Returns the PyTorch network that a config names, in float32."""
    if model.name == "unet":
        return UNet(model)
    if model.name == "mobilenet_unet":
        return MobileNetUNet(model)
    return MobileNetASPPSEUNet(model)


class Encoder(nn.Module):
    """torchvision's MobileNetV2 for images with 1 or 3 channels, without its classifier."""

    def __init__(self, channels: int):
        super().__init__()
        self.features = torchvision.models.mobilenet_v2().features
        if channels != 3:
            stem = nn.Conv2d(channels, 32, 3, stride=2, padding=1, bias=False)
            self.features.set_submodule("0.0", stem)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


class MobileNetASPPSEUNet(nn.Module):
    """The proposed network: described, published or compact."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        published, compact = model.variant == "published", model.variant == "compact"
        width = (
            model.aspp_width or {"described": 128, "published": 512, "compact": 64}[model.variant]
        )
        decoder = COMPACT_DECODER if compact else DECODER
        first = 16 if compact else 32
        self.encoder = Encoder(model.in_channels).features
        self.init_conv = conv_norm_relu(model.in_channels, first, 3)
        self.bottleneck_aspp = ASPP(
            OUT_CHANNELS[-1], width, decoder[5][0], model.dropout, compact=compact
        )
        for n, (inputs, outputs) in decoder.items():
            skip = {1: first, **SKIPS}[n]
            block = ResidualSEBlock(outputs + skip, outputs, published, compact and n <= 2)
            self.add_module(f"up{n}", nn.ConvTranspose2d(inputs, outputs, 2, stride=2))
            self.add_module(f"skip{n}_se", SqueezeExcite(skip, bias=published))
            self.add_module(f"dec{n}", block)
        self.out_conv = nn.Conv2d(decoder[1][1], 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        skips, deepest = encode(self, images)
        x = self.bottleneck_aspp(deepest)
        for n in DECODER:
            up, skip_se, block = map(self.get_submodule, (f"up{n}", f"skip{n}_se", f"dec{n}"))
            x = block(torch.cat([up(x), skip_se(skips[n])], 1))
        return self.out_conv(x)


class MobileNetUNet(nn.Module):
    """The baseline with the same encoder and plain double convolutions."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.encoder = Encoder(model.in_channels).features
        self.init_conv = conv_norm_relu(model.in_channels, 32, 3)
        self.bottleneck = nn.Module()
        self.bottleneck.conv = double_conv(OUT_CHANNELS[-1], 512)
        for n, (inputs, outputs) in DECODER.items():
            block = nn.Module()
            block.conv = double_conv(outputs + {1: 32, **SKIPS}[n], outputs)
            self.add_module(f"up{n}", nn.ConvTranspose2d(inputs, outputs, 2, stride=2))
            self.add_module(f"dec{n}", block)
        self.out_conv = nn.Conv2d(32, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        skips, deepest = encode(self, images)
        x = self.get_submodule("bottleneck.conv")(deepest)
        for n in DECODER:
            up, block = map(self.get_submodule, (f"up{n}", f"dec{n}.conv"))
            x = block(torch.cat([up(x), skips[n]], 1))
        return self.out_conv(x)


class UNet(nn.Module):
    """The standard U-Net with batch norm; `up1` is its deepest stage, and skips come first."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        widths = [model.base_width * 2**level for level in range(5)]
        self.inc = nn.Module()
        self.inc.double_conv = double_conv(model.in_channels, widths[0])
        for n in range(1, 5):
            below, above = widths[5 - n], widths[4 - n]
            convolutions = nn.Module()
            convolutions.double_conv = double_conv(widths[n - 1], widths[n])
            down, up = nn.Module(), nn.Module()
            down.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), convolutions)
            up.up = nn.ConvTranspose2d(below, above, 2, stride=2)
            up.conv = nn.Module()
            up.conv.double_conv = double_conv(2 * above, above)
            self.add_module(f"down{n}", down)
            self.add_module(f"up{n}", up)
        self.outc = nn.Conv2d(widths[0], 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        x, skips = self.get_submodule("inc.double_conv")(images), []
        for n in range(1, 5):
            skips.append(x)
            block = self.get_submodule(f"down{n}.maxpool_conv.1.double_conv")
            x = block(F.max_pool2d(x, 2))
        for n in range(1, 5):
            up, block = map(self.get_submodule, (f"up{n}.up", f"up{n}.conv.double_conv"))
            x = block(torch.cat([skips.pop(), up(x)], 1))
        return self.outc(x)


class ASPP(nn.Module):
    """1×1, dilated and pooled branches, all of one width, concatenated and projected.

    The compact one's dilated convolutions are separable, its pooled branch has 8 groups.
    """

    def __init__(
        self, inputs: int, width: int, outputs: int, dropout: float, *, compact: bool = False
    ):
        super().__init__()
        self.conv1x1 = conv_norm_relu(inputs, width, 1)
        self.atrous_convs = nn.ModuleList(
            conv_norm_relu(inputs, width, 3, dilation, separable=compact)
            for dilation in (6, 12, 18)
        )
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.GroupNorm(8 if compact else 32, width),
            nn.ReLU(),
        )
        self.project = nn.Sequential(*conv_norm_relu(5 * width, outputs, 1), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.interpolate(
            self.global_avg_pool(x), x.shape[2:], mode="bilinear", align_corners=False
        )
        branches = [self.conv1x1(x), *(branch(x) for branch in self.atrous_convs), pooled]
        return self.project(torch.cat(branches, 1))


class SqueezeExcite(nn.Module):
    """Channel attention with dense layers as 1×1 convolutions."""

    def __init__(self, channels: int, bias: bool):
        super().__init__()
        hidden = max(channels // 16, 1)
        self.excitation = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=bias),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=bias),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excitation(F.adaptive_avg_pool2d(x, 1))


class ResidualSEBlock(nn.Module):
    """Two convolutions, squeeze-excite, shortcut; the variants put the last ReLU differently."""

    def __init__(self, inputs: int, outputs: int, published: bool, separable: bool = False):
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, separable=separable)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3, separable=separable)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.se = SqueezeExcite(outputs, bias=published)
        self.skip_connection = nn.Sequential()
        if inputs != outputs:
            self.skip_connection = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )
        self.published = published

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.published:
            return F.relu(self.se(y) + self.skip_connection(x))
        return self.se(F.relu(y)) + self.skip_connection(x)


def convolution(
    inputs: int, outputs: int, size: int, dilation: int = 1, *, separable: bool = False
) -> nn.Module:
    """Convolution without bias; a separable one is a depthwise and a 1×1 convolution."""
    settings = {"padding": dilation * (size // 2), "dilation": dilation, "bias": False}
    if not separable:
        return nn.Conv2d(inputs, outputs, size, **settings)
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, size, groups=inputs, **settings),
        nn.Conv2d(inputs, outputs, 1, bias=False),
    )


def conv_norm_relu(
    inputs: int, outputs: int, size: int, dilation: int = 1, *, separable: bool = False
) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU."""
    return nn.Sequential(
        convolution(inputs, outputs, size, dilation, separable=separable),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3×3 convolutions with batch norm and ReLU."""
    return nn.Sequential(*conv_norm_relu(inputs, outputs, 3), *conv_norm_relu(outputs, outputs, 3))


def encode(network: nn.Module, images: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """Returns the skips of stages 5 to 1, and the encoder's last map."""
    init_conv, encoder = network.get_submodule("init_conv"), network.get_submodule("encoder")
    x, taps = images, []
    for index, block in enumerate(encoder.children()):
        x = block(x)
        if index in OUT_INDICES:
            taps.append(x)
    skips = {1: init_conv(images), **dict(zip((2, 3, 4, 5), taps, strict=False))}
    return skips, taps[-1]


def set_training(network: nn.Module, config: TrainConfig) -> None:
    """Puts a network into training as a run of `config` does.

    With `frozen_batch_norm` "batch", a frozen encoder's batch norms still use the batch's
    statistics and drift: what `.train()` does to a network whose parameters were frozen by
    `requires_grad = False` alone, as in the published code.
    """
    network.train()
    if hasattr(network, "encoder"):
        encoder = network.get_submodule("encoder")
        encoder.requires_grad_(config.encoder.trainable)
        encoder.train(config.encoder.trainable or config.encoder.frozen_batch_norm == "batch")


def create_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Adam:
    """Returns Adam over what learns, the encoder at its own rate."""
    rates = {True: config.encoder.learning_rate, False: config.optimizer.learning_rate}
    learning = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in learning if name.startswith("encoder.") == encoder], "lr": r}
        for encoder, r in rates.items()
    ]
    settings = config.optimizer
    return torch.optim.Adam(
        [group for group in groups if group["params"]],
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.l2,
    )


def dice_bce_loss(logits: Tensor, masks: Tensor, config: LossConfig, pos_weight: float) -> Tensor:
    """Weighted sum of Dice loss and cross-entropy, logits and masks (batch, 1, height, width)."""
    probabilities = torch.sigmoid(logits)
    axes = (0, 1, 2, 3) if config.dice_over == "batch" else (1, 2, 3)
    overlap = (probabilities * masks).sum(axes)
    total = probabilities.sum(axes) + masks.sum(axes)
    dice = ((2 * overlap + config.smoothing) / (total + config.smoothing)).mean()
    bce = F.binary_cross_entropy_with_logits(
        logits, masks, pos_weight=torch.tensor(pos_weight, dtype=logits.dtype)
    )
    return config.dice_weight * (1 - dice) + config.bce_weight * bce


def randomise_norms(network: nn.Module, seed: int) -> None:
    """Draws every norm's scale, shift, mean and variance anew, so that none can pass for another.

    With a fresh network's (1, 0, 0, 1), a swapped mean and variance would pass unseen. Means and
    variances are drawn around what images give, so that the maps depend on the images at every
    depth, as in a trained network.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    for name, part in network.named_modules():
        if isinstance(part, (nn.BatchNorm2d, nn.GroupNorm)):
            # Large enough in the encoder that ReLU6 cuts something off.
            scale, shift = (2.5, 0.5) if name.startswith(("encoder", "features")) else (1.5, 0.3)
            nn.init.uniform_(part.weight, 0.5, scale, generator)
            nn.init.uniform_(part.bias, -shift, shift, generator)
    channels = next(network.parameters()).shape[1]
    images = F.interpolate(torch.rand(4, channels, 16, 16, generator=generator), size=(128, 128))
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(images * torch.rand(4, 1, 1, 1, generator=generator))
    for norm in norms:
        norm.momentum = 0.1
        assert norm.running_mean is not None and norm.running_var is not None
        deviation = norm.running_var.sqrt()
        norm.running_mean += deviation * torch.empty_like(deviation).uniform_(
            -0.5, 0.5, generator=generator
        )
        norm.running_var *= torch.empty_like(deviation).uniform_(0.7, 2, generator=generator)
