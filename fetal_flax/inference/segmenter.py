"""A trained network applied to images of any size."""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, UInt8

from fetal_flax._util.backend import target_backend
from fetal_flax._util.pipeline import begin_ahead, map_in_threads
from fetal_flax.checkpoints import Checkpoint, load_checkpoint
from fetal_flax.config import ModelConfig, TestTimeAugmentation
from fetal_flax.data.images import resize_image
from fetal_flax.errors import InputError
from fetal_flax.inference.assessment import (
    Measurement,
    NetworkLogits,
    Views,
    assess,
    mean_logits,
    native_mask,
)
from fetal_flax.inference.sources import Image, check_image, check_pixel_size, read_image
from fetal_flax.measurement.head import OUTLINE_PX
from fetal_flax.models import functional
from fetal_flax.models.convolution import compiler_options
from fetal_flax.models.functional import Arrays

Item = TypeVar("Item")
Result = TypeVar("Result")
_MISSING: Any = object()


class Segmenter:
    """A trained network that segments and measures grey images of any size.

    Images are resized to the network's size, and its logits back to each image's own.

    Args:
        checkpoint: The network: what `load_checkpoint` or `from_torch` returned.
        batch_size: Images per call of the network, for each device.
        tta: Test-time augmentation: `flip` shows the network each image's mirror image too.
        devices: Share the images; all devices of this process, if not given.
        workers: Threads that read and resize images, and as many that measure them; None takes one
            for each processor, at most 16.

    Raises:
        InputError: `workers` is less than 1.

    Example:
        >>> segmenter = ff.Segmenter(ff.load_checkpoint("runs/hc18"), batch_size=4)
        >>> [mask] = segmenter.masks([image])
        >>> mask.shape == image.shape, mask.dtype
        (True, dtype('bool'))
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        batch_size: int = 16,
        tta: TestTimeAugmentation = "none",
        devices: Sequence[Any] | None = None,
        workers: int | None = None,
    ):
        if workers is not None and workers < 1:
            raise InputError(f"workers must be at least 1, not {workers}")
        config = checkpoint.config
        folded = functional.fold(config, checkpoint.variables)
        self._image_size = checkpoint.image_size
        self._outline_px = OUTLINE_PX[checkpoint.metadata.dataset]
        self._devices = devices or jax.local_devices()
        self._batch_size = batch_size * len(self._devices)
        self._channels = config.in_channels
        self.workers = workers

        @functools.cache
        def program(count: int) -> _Program:
            devices = tuple(self._devices[:count])
            function, whole, shared = _shared_program(config, devices, tta, target_backend())
            return _Program(function, jax.device_put(folded, whole), shared)

        self._program = program

    def measure(self, image: Image, pixel_size_mm: float | None = None) -> Measurement:
        """Segments an image and measures the head in it.

        Args:
            image: Grey, uint8, (height, width), any size.
            pixel_size_mm: Side of a (square) pixel in mm; None measures in pixels alone.

        Raises:
            InputError: The image or the pixel size is none.

        Example:
            >>> result = ff.load("hc18-described").measure(image, pixel_size_mm=0.5)
            >>> f"{result.hc_mm:.0f} mm"
            '178 mm'
        """
        (result,) = self.measure_all([image], pixel_sizes_mm=pixel_size_mm)
        return result

    def measure_all(
        self,
        images: Iterable[Image | str | os.PathLike[str]],
        *,
        pixel_sizes_mm: float | Iterable[float | None] | None = None,
    ) -> Iterator[Measurement]:
        """Yields the measurement of each image, in order, holding little more than two batches.

        The network works on a batch while the one before it is measured and the next is read.

        Args:
            images: Grey images, uint8, (height, width), of any sizes, or files as of `read_image`.
            pixel_sizes_mm: Side of a pixel in mm: one for all images, or one for each (None where
                it isn't known); without it, what the files tell.

        Raises:
            InputError: An image or a pixel size is none, or there are not as many sizes as images;
                raised when its turn comes.

        Example:
            >>> segmenter = ff.load("hc18-described")
            >>> for result in segmenter.measure_all(["scan.png", "scan.png"], pixel_sizes_mm=0.5):
            ...     print(f"{result.hc_mm:.0f} mm", result.flags)
            178 mm ()
            178 mm ()
        """
        pairs = self._map(_read_pair, _with_pixel_sizes(images, pixel_sizes_mm))
        measured = self.measure_each(pairs, lambda pair: pair[0], lambda pair: pair[1])
        return (measurement for _, measurement in measured)

    def measure_each(
        self,
        items: Iterable[Item],
        image: Callable[[Item], Image],
        pixel_size_mm: Callable[[Item], float | None],
        *,
        assess_views: bool = True,
    ) -> Iterator[tuple[Item, Measurement]]:
        """Yields each item with the measurement of its image, as `measure_all` does.

        Args:
            items: Whatever comes with the images: records, names and images.
            image: Returns an item's image.
            pixel_size_mm: Returns the side of its pixels, or None.
            assess_views: With `flip`, whether image and mirror image are also assessed each by
                itself, as `Measurement.views`.
        """

        def measure(segmented: tuple[Item, Views]) -> tuple[Item, Measurement]:
            item, views = segmented
            view = functools.partial(
                assess,
                shape=image(item).shape,
                outline_px=self._outline_px,
                pixel_size_mm=pixel_size_mm(item),
            )
            each = tuple(map(view, views)) if assess_views and len(views) > 1 else ()
            return item, view(mean_logits(views), views=each)

        return self._map(measure, self.segment(items, image))

    def masks(self, images: Iterable[Image]) -> list[Bool[np.ndarray, "_height _width"]]:
        """Returns each image's mask at its own size: True where the head is.

        Args:
            images: Grey, uint8, (height, width), of any sizes.

        Example:
            >>> [mask] = ff.load("hc18-described").masks([image])
            >>> bool(mask[90, 120]), bool(mask[0, 0])
            (True, False)
        """
        return [
            native_mask(mean_logits(views), image.shape)
            for image, views in self.segment(images, lambda image: image)
        ]

    def logits(self, images: Iterable[Image]) -> Iterator[NetworkLogits]:
        """Yields each image's logits, those of the mean probability where there are two views.

        Args:
            images: Grey, uint8, (height, width), of any sizes.

        Returns:
            float32 at the network's size, before the sigmoid.

        Example:
            >>> [logits] = ff.load("hc18-described").logits([image])
            >>> logits.shape
            (64, 96)
        """
        return map(mean_logits, self.views(images))

    def segment(
        self, items: Iterable[Item], image: Callable[[Item], Image]
    ) -> Iterator[tuple[Item, Views]]:
        """Yields each item with the views of its image, holding little more than two batches.

        Args:
            items: Whatever comes with the images: records, names and images.
            image: Returns an item's image.
        """
        kept, taken = itertools.tee(items)
        return zip(kept, self.views(image(item) for item in taken), strict=True)

    def views(self, images: Iterable[Image]) -> Iterator[Views]:
        """Yields each image's logits at the network's size, before the sigmoid.

        Images are taken a batch ahead: the network works on it while the logits of the one before
        are used.
        """
        resized = self._map(
            lambda image: resize_image(check_image(image), self._image_size), images
        )
        devices = size = 0

        def begin(part: list[Image]) -> tuple[jax.Array, int]:
            nonlocal devices, size
            # One shape for all calls, so that the network compiles once.
            devices = devices or min(len(part), len(self._devices))
            size = size or -(-len(part) // devices) * devices
            padding = [np.zeros_like(part[0])] * (size - len(part))
            batch = np.stack(part + padding)[..., None].repeat(self._channels, axis=-1)
            function, arrays, sharding = self._program(devices)
            return function(arrays, jax.device_put(batch, sharding)), len(part)

        for views, count in begin_ahead(begin, _batches(resized, self._batch_size), 1):
            yield from np.asarray(views)[:count]

    def _map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        return map_in_threads(function, items, self.workers)

    def call(
        self, images: UInt8[jax.Array, "batch height width channels"]
    ) -> tuple[jax.stages.Wrapped, tuple[Arrays, jax.Array]]:
        """Returns the function and the arguments that images of the network's size are run with.

        On one device; for measuring what the network alone takes.
        """
        function, arrays, sharding = self._program(1)
        return function, (arrays, jax.device_put(images, sharding))


def create_program(
    config: ModelConfig, devices: Sequence[Any], *, tta: TestTimeAugmentation = "none"
) -> tuple[jax.stages.Wrapped, NamedSharding, NamedSharding]:
    """Returns a network as a function of what `functional.fold` returned, and of uint8 images.

    It returns the logits (images, views, height, width); each device runs its own images as if it
    were alone.

    Args:
        config: The network.
        devices: Share the images, which are a multiple of their number.
        tta: Test-time augmentation, as of `Segmenter`.

    Returns:
        The function, and where it has its arrays and its images.
    """

    def logits(arrays: Arrays, images: jax.Array) -> jax.Array:
        scaled = images.astype(jnp.float32) / 255
        return functional.infer(config, arrays, scaled)[..., 0]

    def views(arrays: Arrays, images: jax.Array) -> jax.Array:
        seen = [logits(arrays, images)]
        if tta == "flip":
            seen.append(logits(arrays, images[:, :, ::-1])[:, :, ::-1])
        return jnp.stack(seen, axis=1)

    mesh = jax.sharding.Mesh(np.array(devices), ("images",))
    whole, shared = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("images"))
    )
    of_share = jax.shard_map(
        views, mesh=mesh, in_specs=(whole.spec, shared.spec), out_specs=shared.spec
    )
    return jax.jit(of_share, compiler_options=compiler_options()), whole, shared


@functools.lru_cache(8)
def _shared_program(
    config: ModelConfig, devices: tuple[Any, ...], tta: TestTimeAugmentation, backend: str
) -> tuple[jax.stages.Wrapped, NamedSharding, NamedSharding]:
    """Networks that differ in their weights alone are traced and compiled once."""
    del backend  # It's in the key, since `create_program` asks for it.
    return create_program(config, devices, tta=tta)


class _Program(NamedTuple):
    """The network on some of the devices."""

    function: jax.stages.Wrapped
    arrays: Arrays
    """Whole on each."""
    sharding: NamedSharding
    """Splits the images."""


def load(
    source: Path | str,
    *,
    batch_size: int = 16,
    tta: TestTimeAugmentation = "none",
    workers: int | None = None,
) -> Segmenter:
    """Loads a trained network, ready to measure.

    Args:
        source: A shipped network's name (`list_networks`), a training workdir (its best
            checkpoint), or a converted directory.
        batch_size: Images per call of the network, for each device.
        tta: Test-time augmentation: `flip` averages each image's probabilities with those of its
            mirror image.
        workers: As of `Segmenter`.

    Raises:
        InputError: There is no network, or it can't be read, or `workers` is less than 1.

    Example:
        >>> image, pixel_size_mm = ff.read_image("scan.png")
        >>> result = ff.load("hc18-described").measure(image, pixel_size_mm or 0.5)
        >>> f"{result.hc_mm:.0f} mm"
        '178 mm'
    """
    checkpoint = load_checkpoint(source)
    return Segmenter(checkpoint, batch_size=batch_size, tta=tta, workers=workers)


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of `size`, the last one shorter; also where the items end in an error."""
    batch: list[Item] = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _with_pixel_sizes(
    images: Iterable[Image | str | os.PathLike[str]],
    pixel_sizes_mm: float | Iterable[float | None] | None,
) -> Iterator[tuple[Image | str | os.PathLike[str], float | None]]:
    """Yields images, or their files, with the pixel sizes that were given for them."""
    if not isinstance(pixel_sizes_mm, Iterable):
        yield from ((image, pixel_sizes_mm) for image in images)
        return
    for image, given in itertools.zip_longest(images, pixel_sizes_mm, fillvalue=_MISSING):
        if image is _MISSING or given is _MISSING:
            raise InputError("there are not as many pixel_sizes_mm as images: give one for each")
        yield image, given


def _read_pair(
    pair: tuple[Image | str | os.PathLike[str], float | None],
) -> tuple[Image, float | None]:
    """Returns an image, read where it is a file, with its pixel size."""
    image, given = pair
    told = None
    if isinstance(image, (str, os.PathLike)):
        image, told = read_image(image)
    return image, told if given is None else check_pixel_size(given)
