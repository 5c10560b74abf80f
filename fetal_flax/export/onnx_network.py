"""The networks in ONNX, written with `onnx.helper` alone: block by block, as they are called.

Batch norms are folded into their convolutions first. What each block does is in `models/`.
"""

import json
from typing import TYPE_CHECKING

import numpy as np
from flax import nnx

from fetal_flax.checkpoints import Checkpoint
from fetal_flax.checkpoints.integrity import digest_of_arrays
from fetal_flax.config import to_dict
from fetal_flax.export.extras import needs
from fetal_flax.export.onnx_graph import (
    Graph,
    Map,
    add,
    concatenate,
    convolve,
    expand_as,
    group_norm_of_pixel,
    max_pool,
    mean_over_pixels,
    relu,
    relu6,
    squeeze_excite,
    upsample,
)
from fetal_flax.export.settings import ExportSettings
from fetal_flax.measurement.head import OUTLINE_PX
from fetal_flax.models import folding, functional
from fetal_flax.models.aspp import ASPP
from fetal_flax.models.blocks import ConvNorm, DoubleConv, ResidualSEBlock
from fetal_flax.models.decoder import PlainStage, SEStage
from fetal_flax.models.mobilenet_aspp_se_unet import MobileNetASPPSEUNet
from fetal_flax.models.mobilenet_v2 import OUT_INDICES, InvertedResidual, MobileNetV2
from fetal_flax.models.registry import Network
from fetal_flax.models.unet import UNet

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 18, 8
"""Of the same release, ONNX 1.13: what runtimes from 2023 on read."""


def onnx_model(checkpoint: Checkpoint, settings: ExportSettings | None = None) -> "onnx.ModelProto":
    """Returns a network as an ONNX model, unquantised.

    Its input `image` is (batch, channels, height, width): float32 in [0, 1], or uint8 of 0 to 255
    which the graph scales itself. Its output `logits` is float32, (batch, 1, height, width),
    before the sigmoid. The batch is free; height and width are those of the network, or free
    multiples of its divisor. `metadata_props` tell what `metadata` does.

    Args:
        checkpoint: The network.
        settings: Of them `precision`, `input_dtype` and `free_size`.

    Raises:
        InputError: The package onnx isn't there, or float16 can't hold a weight.
    """
    needs("onnx", "onnx")
    import onnx
    from onnx import TensorProto, helper

    settings = settings or ExportSettings()
    network = functional.merge(checkpoint.config, checkpoint.variables)
    # One program; one by one, each shape of each operation would be compiled.
    nnx.jit(folding.fold_norms)(network)
    size = None if settings.free_size else checkpoint.image_size
    half = settings.precision == "float16"
    graph = Graph(np.float16 if half else np.float32)
    x = "image"
    if settings.input_dtype == "uint8":
        x = graph.node("Cast", x, name="image/float", to=TensorProto.FLOAT)
        x = graph.node("Mul", x, graph.constant("scale", 1 / 255, np.float32), name="image/scaled")
    if half:
        x = graph.node("Cast", x, name="image/half", to=TensorProto.FLOAT16)
    logits = _network(graph, Map(x, size), network)
    last = graph.nodes[-1]
    assert last.output[0] == logits.name
    if half:
        graph.node("Cast", logits.name, name="logits", to=TensorProto.FLOAT)
    else:
        last.output[0] = "logits"
    sides = size or ("height", "width")
    dtype = TensorProto.UINT8 if settings.input_dtype == "uint8" else TensorProto.FLOAT
    channels = checkpoint.config.in_channels
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "fetal_flax",
            [helper.make_tensor_value_info("image", dtype, ["batch", channels, *sides])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, *sides])],
            list(graph.constants.values()),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="fetal_flax",
    )
    helper.set_model_props(model, metadata(checkpoint))
    onnx.checker.check_model(model, full_check=True)
    return model


def metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns what an exported file says of itself, as text by name.

    `network` is its title, `model` its settings (JSON), `image_size` height and width (JSON);
    `dataset` names the data set whose way of drawing masks it has learned, and `outline_px` is how
    far the masks' edges run outside the ellipse that is measured, in pixels of the image;
    `sha256` is the digest of its parameters and batch statistics.
    """
    description = checkpoint.metadata
    return {
        "network": description.model.title,
        "model": json.dumps(to_dict(description.model)),
        "image_size": json.dumps(list(checkpoint.image_size)),
        "dataset": description.dataset,
        "outline_px": json.dumps(OUTLINE_PX[description.dataset]),
        "sha256": digest_of_arrays(checkpoint.variables._asdict()),
    }


def _network(graph: Graph, image: Map, network: Network) -> Map:
    if isinstance(network, UNet):
        return _unet(graph, image, network)
    skip = relu(graph, convolve(graph, image, network.init_conv.conv, "init_conv/conv"))
    *skips, deepest = _encoder(graph, image, network.encoder)
    if isinstance(network, MobileNetASPPSEUNet):
        x = _aspp(graph, deepest, network.aspp, "aspp")
    else:
        x = _double_conv(graph, (deepest,), network.bottleneck, "bottleneck")
    for number, below in zip((5, 4, 3, 2, 1), (*reversed(skips), skip), strict=True):
        x = _stage(graph, x, below, getattr(network, f"stage{number}"), f"stage{number}")
    assert network.head is not None
    return convolve(graph, x, network.head, "head")


def _unet(graph: Graph, x: Map, network: UNet) -> Map:
    skips = []
    for number in (1, 2, 3, 4):
        name = f"down{number}"
        skips.append(_double_conv(graph, (x,), getattr(network, name), name))
        x = max_pool(graph, skips[-1])
    x = _double_conv(graph, (x,), network.bottom, "bottom")
    for number in (4, 3, 2, 1):
        name = f"stage{number}"
        x = _stage(graph, x, skips.pop(), getattr(network, name), name)
    return convolve(graph, x, network.head, "head")


def _encoder(graph: Graph, x: Map, encoder: MobileNetV2) -> list[Map]:
    features = []
    for index, block in enumerate(encoder.blocks):
        name = f"encoder/blocks/{index}"
        if isinstance(block, InvertedResidual):
            x = _inverted_residual(graph, x, block, name)
        else:
            assert isinstance(block, ConvNorm)
            x = relu6(graph, convolve(graph, x, block.conv, f"{name}/conv"))
        if index in OUT_INDICES:
            features.append(x)
    return features


def _inverted_residual(graph: Graph, x: Map, block: InvertedResidual, name: str) -> Map:
    y = x
    if block.expand is not None:
        y = relu6(graph, convolve(graph, y, block.expand.conv, f"{name}/expand/conv"))
    y = relu6(graph, convolve(graph, y, block.depthwise.conv, f"{name}/depthwise/conv"))
    y = convolve(graph, y, block.project.conv, f"{name}/project/conv")
    return add(graph, x, y, f"{name}/sum") if block.residual else y


def _aspp(graph: Graph, x: Map, aspp: ASPP, name: str) -> Map:
    branches = [
        relu(graph, convolve(graph, x, branch.conv, f"{name}/{part}/conv"))
        for part, branch in (
            ("point", aspp.point),
            *((f"atrous/{index}", branch) for index, branch in enumerate(aspp.atrous)),
        )
    ]
    pooled = mean_over_pixels(graph, x, f"{name}/mean")
    pooled = convolve(graph, pooled, aspp.pool_conv, f"{name}/pool_conv")
    pooled = relu(graph, group_norm_of_pixel(graph, pooled, aspp.pool_norm, f"{name}/pool_norm"))
    branches.append(expand_as(graph, pooled, x, f"{name}/pooled"))
    y = concatenate(graph, (*branches,), f"{name}/branches")
    return relu(graph, convolve(graph, y, aspp.project.conv, f"{name}/project/conv"))


def _stage(graph: Graph, x: Map, skip: Map, stage: SEStage | PlainStage, name: str) -> Map:
    assert stage.up is not None
    x = upsample(graph, x, stage.up, f"{name}/up")
    if isinstance(stage, SEStage):
        skip = squeeze_excite(graph, skip, stage.skip_se, f"{name}/skip_se")
        return _residual_se_block(graph, (x, skip), stage.block, f"{name}/block")
    maps = (skip, x) if stage.skip_first else (x, skip)
    return _double_conv(graph, maps, stage.block, f"{name}/block")


def _double_conv(graph: Graph, maps: tuple[Map, ...], block: DoubleConv, name: str) -> Map:
    x = concatenate(graph, maps, f"{name}/maps")
    for part in ("first", "second"):
        x = relu(graph, convolve(graph, x, getattr(block, part).conv, f"{name}/{part}/conv"))
    return x


def _residual_se_block(
    graph: Graph, maps: tuple[Map, ...], block: ResidualSEBlock, name: str
) -> Map:
    x = concatenate(graph, maps, f"{name}/maps")
    y = relu(graph, convolve(graph, x, block.first.conv, f"{name}/first/conv"))
    y = convolve(graph, y, block.second.conv, f"{name}/second/conv")
    if not block.relu_after_sum:
        y = relu(graph, y)
    y = squeeze_excite(graph, y, block.se, f"{name}/se")
    if block.shortcut is not None:
        x = convolve(graph, x, block.shortcut.conv, f"{name}/shortcut/conv")
    y = add(graph, y, x, f"{name}/sum")
    return relu(graph, y) if block.relu_after_sum else y
