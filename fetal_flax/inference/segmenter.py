"""A trained network applied to images of any size."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from scipy.special import log_expit

from fetal_flax import checkpoints
from fetal_flax.config import ModelConfig, TestTimeAugmentation
from fetal_flax.data.images import resize_image
from fetal_flax.models import functional
from fetal_flax.models.convolution import compiler_options
from fetal_flax.models.functional import Arrays, Variables

Image = UInt8[np.ndarray, "height width"]
NetworkLogits = Float32[np.ndarray, "network_height network_width"]
Views = Float32[np.ndarray, "views network_height network_width"]
"""An image's logits, one map for each way that the network saw it; mirror images mirrored back."""
Item = TypeVar("Item")


class Predictor:
    """Segments grey images: resize, network, back to each image's own size.

    Args:
        model: The network.
        variables: Its parameters and batch statistics.
        image_size: Height and width that the network sees.
        batch_size: Images per call of the network.
        tta: Test-time augmentation: `flip` shows the network each image's mirror image too.
    """

    def __init__(
        self,
        model: ModelConfig,
        variables: Variables,
        image_size: tuple[int, int],
        *,
        batch_size: int = 16,
        tta: TestTimeAugmentation = "none",
    ):
        self._arrays = functional.fold(model, variables)
        self._image_size = image_size
        self._batch_size = batch_size
        self._channels = model.in_channels

        def logits(arrays: Arrays, images: jax.Array) -> jax.Array:
            scaled = images.astype(jnp.float32) / 255
            return functional.infer(model, arrays, scaled)[..., 0]

        def views(arrays: Arrays, images: jax.Array) -> jax.Array:
            seen = [logits(arrays, images)]
            if tta == "flip":
                seen.append(logits(arrays, images[:, :, ::-1])[:, :, ::-1])
            return jnp.stack(seen, axis=1)

        self._views = jax.jit(views, compiler_options=compiler_options())

    def call(
        self, images: UInt8[jax.Array, "batch height width channels"]
    ) -> tuple[jax.stages.Wrapped, tuple[Arrays, jax.Array]]:
        """Returns the function and the arguments that images of the network's size are run with.

        For measuring what the network alone takes.
        """
        return self._views, (self._arrays, images)

    @classmethod
    def from_checkpoint(cls, directory: Path | str, *, batch_size: int = 16) -> "Predictor":
        """Loads a training workdir's best checkpoint, a converted or a shipped network.

        Raises:
            InputError: There is no network in `directory`.
        """
        variables, description = checkpoints.load(directory)
        return cls(description.model, variables, description.image_size, batch_size=batch_size)

    def views(self, images: Iterable[Image]) -> Iterator[Views]:
        """Yields each image's logits at the network's size, before the sigmoid.

        Images are taken a batch at a time, when the first logits of the batch are asked for.
        """
        resized = (resize_image(image, self._image_size) for image in images)
        size = 0
        while part := list(itertools.islice(resized, self._batch_size)):
            # One shape for all calls, so that the network compiles once.
            size = size or len(part)
            padding = [np.zeros_like(part[0])] * (size - len(part))
            batch = np.stack(part + padding)[..., None].repeat(self._channels, axis=-1)
            yield from np.asarray(self._views(self._arrays, batch))[: len(part)]

    def logits(self, images: Iterable[Image]) -> Iterator[NetworkLogits]:
        """Yields each image's logits, those of the mean probability where there are two views."""
        return map(mean_logits, self.views(images))

    def segment(
        self, items: Iterable[Item], image: Callable[[Item], Image]
    ) -> Iterator[tuple[Item, Views]]:
        """Yields each item with the views of its image, holding no more than a batch of items.

        Args:
            items: Whatever comes with the images: records, names and images.
            image: Returns an item's image.
        """
        kept, taken = itertools.tee(items)
        return zip(kept, self.views(image(item) for item in taken), strict=True)

    def masks(self, images: Iterable[Image]) -> list[Bool[np.ndarray, "height width"]]:
        """Returns each image's mask at its own size."""
        return [
            native_mask(mean_logits(views), image.shape)
            for image, views in self.segment(images, lambda image: image)
        ]


def mean_logits(views: Views) -> NetworkLogits:
    """Returns the logits of the views' mean probability.

    Without a detour through probabilities, which round to 0 or 1 where the network is sure.
    """
    if len(views) == 1:
        return views[0]
    # The divisor of both means cancels.
    return np.logaddexp.reduce(log_expit(views)) - np.logaddexp.reduce(log_expit(-views))


def native_mask(logits: NetworkLogits, shape: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """Returns the mask at `shape`, height and width, that logits at the network's size give.

    The head is where the probability is above 0.5. The logits are resized, bilinearly, and then
    thresholded: a mask resized after the threshold would have steps as large as the network's
    pixels.
    """
    height, width = shape
    return cv2.resize(logits, (width, height), interpolation=cv2.INTER_LINEAR) > 0
