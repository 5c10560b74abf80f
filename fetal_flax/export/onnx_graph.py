"""The layers as ONNX nodes, and the graph that they are collected in.

Maps are NCHW, as ONNX has them. A layer's node and weights are named as the layer is in the
network, such as `stage5/block/first/conv`.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from flax import nnx

from fetal_flax.models.blocks import SqueezeExcite
from fetal_flax.models.convolution import crop_kernel_to_input
from fetal_flax.models.layers import Conv, SeparableConv, UpConv

if TYPE_CHECKING:
    import onnx


class Map(NamedTuple):
    """A feature map: (batch, channels, height, width)."""

    name: str
    """Of the tensor."""
    size: tuple[int, int] | None
    """Height and width; None where they are free."""


class Graph:
    """Nodes and constants, in the order in which they are added.

    Args:
        dtype: Of maps and weights: float32 or float16.
    """

    def __init__(self, dtype: type[np.floating] = np.float32):
        self.dtype = np.dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, values: Any, dtype: Any = None) -> str:
        """Adds a constant, unless it is there, and returns its name.

        Args:
            name: Of the constant.
            values: What `numpy.asarray` takes.
            dtype: By default that of the maps.
        """
        import onnx

        if name not in self.constants:
            array = np.asarray(values).astype(dtype or self.dtype, order="C")
            self.constants[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def integers(self, *values: int) -> str:
        """Adds a vector of int64, such as a shape or axes, and returns its name."""
        return self.constant("integers/" + "_".join(map(str, values)), values, np.int64)

    def node(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Adds an operator and returns the name of its one output, which is the node's own."""
        import onnx

        self.nodes.append(onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name


def convolve(graph: Graph, x: Map, conv: Conv | SeparableConv, name: str) -> Map:
    """Adds a convolution, or a separable one as the two that it is.

    Where the map's size is known, taps that would read padding alone are dropped: of ASPP's dilated
    kernels at 256×256 most.
    """
    if isinstance(conv, SeparableConv):
        x = convolve(graph, x, conv.depthwise, f"{name}/depthwise")
        return convolve(graph, x, conv.pointwise, f"{name}/pointwise")
    kernel, size = conv.kernel[...], x.size
    if size and conv.stride == 1:
        kernel = crop_kernel_to_input(kernel, conv.dilation, *size)
    inputs = [x.name, graph.constant(f"{name}/kernel", kernel.transpose(3, 2, 0, 1))]
    if conv.bias is not None:
        inputs.append(graph.constant(f"{name}/bias", conv.bias[...]))
    pads = [conv.dilation * (length // 2) for length in kernel.shape[:2]]
    output = graph.node(
        "Conv",
        *inputs,
        name=name,
        kernel_shape=kernel.shape[:2],
        pads=[*pads, *pads],
        strides=[conv.stride] * 2,
        dilations=[conv.dilation] * 2,
        group=kernel.shape[3] if conv.depthwise else 1,
    )
    if size:
        size = (-(-size[0] // conv.stride), -(-size[1] // conv.stride))
    return Map(output, size)


def upsample(graph: Graph, x: Map, up: UpConv, name: str) -> Map:
    """Adds the transposed convolution that doubles height and width."""
    output = graph.node(
        "ConvTranspose",
        x.name,
        graph.constant(f"{name}/kernel", np.asarray(up.kernel[...]).transpose(0, 3, 1, 2)),
        graph.constant(f"{name}/bias", up.bias[...]),
        name=name,
        kernel_shape=[2, 2],
        strides=[2, 2],
    )
    return Map(output, x.size and (2 * x.size[0], 2 * x.size[1]))


def relu(graph: Graph, x: Map) -> Map:
    """Adds a ReLU."""
    return Map(graph.node("Relu", x.name, name=f"{x.name}/relu"), x.size)


def relu6(graph: Graph, x: Map) -> Map:
    """Adds a ReLU that ends at 6."""
    limits = graph.constant("zero", 0), graph.constant("six", 6)
    return Map(graph.node("Clip", x.name, *limits, name=f"{x.name}/relu6"), x.size)


def max_pool(graph: Graph, x: Map) -> Map:
    """Adds a 2×2 maximum with stride 2."""
    name = f"{x.name}/max_pool"
    output = graph.node("MaxPool", x.name, name=name, kernel_shape=[2, 2], strides=[2, 2])
    return Map(output, x.size and (x.size[0] // 2, x.size[1] // 2))


def add(graph: Graph, x: Map, y: Map, name: str) -> Map:
    """Adds the sum of two maps."""
    return Map(graph.node("Add", x.name, y.name, name=name), x.size)


def concatenate(graph: Graph, maps: tuple[Map, ...], name: str) -> Map:
    """Adds the concatenation of maps over channels; one map is itself."""
    if len(maps) == 1:
        return maps[0]
    output = graph.node("Concat", *(x.name for x in maps), name=name, axis=1)
    return Map(output, maps[0].size)


def mean_over_pixels(graph: Graph, x: Map, name: str) -> Map:
    """Adds each channel's mean, a map of one pixel."""
    return Map(graph.node("GlobalAveragePool", x.name, name=name), (1, 1))


def squeeze_excite(graph: Graph, x: Map, se: SqueezeExcite, name: str) -> Map:
    """Adds channel attention."""
    pooled = mean_over_pixels(graph, x, f"{name}/mean").name
    for part, activation in (("squeeze", "Relu"), ("excite", "Sigmoid")):
        dense: nnx.Linear = getattr(se, part)
        kernel = np.asarray(dense.kernel[...]).T[:, :, None, None]
        inputs = [pooled, graph.constant(f"{name}/{part}/kernel", kernel)]
        if dense.bias is not None:
            inputs.append(graph.constant(f"{name}/{part}/bias", dense.bias[...]))
        product = graph.node("Conv", *inputs, name=f"{name}/{part}", kernel_shape=[1, 1])
        pooled = graph.node(activation, product, name=f"{product}/{activation.lower()}")
    return Map(graph.node("Mul", x.name, pooled, name=name), x.size)


def group_norm_of_pixel(graph: Graph, x: Map, norm: nnx.GroupNorm, name: str) -> Map:
    """Adds a group norm of a map of one pixel."""
    assert norm.scale is not None and norm.bias is not None
    groups, channels = norm.num_groups, norm.scale.shape[0]
    ones, zeros = (graph.constant(f"{name}/{value}s", np.full(groups, value)) for value in (1, 0))
    y = graph.node("Reshape", x.name, graph.integers(0, groups, -1), name=f"{name}/groups")
    y = graph.node(
        "InstanceNormalization", y, ones, zeros, name=f"{name}/normalized", epsilon=norm.epsilon
    )
    y = graph.node("Reshape", y, graph.integers(0, channels, 1, 1), name=f"{name}/channels")
    scale, bias = (
        graph.constant(f"{name}/{part}", np.asarray(values[...]).reshape(1, -1, 1, 1))
        for part, values in (("scale", norm.scale), ("bias", norm.bias))
    )
    y = graph.node("Mul", y, scale, name=f"{name}/scaled")
    return Map(graph.node("Add", y, bias, name=name), (1, 1))


def expand_as(graph: Graph, pixel: Map, like: Map, name: str) -> Map:
    """Adds a map of one pixel repeated over the size of another map."""
    if like.size:
        shape = graph.integers(1, 1, *like.size)
    else:
        size = graph.node("Shape", like.name, name=f"{name}/size", start=2)
        shape = graph.node("Concat", graph.integers(1, 1), size, name=f"{name}/shape", axis=0)
    return Map(graph.node("Expand", pixel.name, shape, name=name), like.size)
