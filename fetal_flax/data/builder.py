"""What the TFDS builders of HC18 and of the phantoms share."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

SPLIT = "train"  # TFDS reserves "all"; the split into training and validation is splits.py's.


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images with their masks and measurements; names and examinations are metadata too."""

    def _info(self) -> tfds.core.DatasetInfo:
        png = functools.partial(
            tfds.features.Image, shape=(None, None, 1), dtype=np.uint8, encoding_format="png"
        )
        # As a plain feature a float64 would be stored as a float32.
        number = functools.partial(
            tfds.features.Tensor, shape=(), dtype=np.float64, encoding=tfds.features.Encoding.BYTES
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": png(doc="Native size."),
                    "mask": png(doc="Native size, 255 in the head, 0 outside."),
                    "pixel_size_mm": number(),
                    "head_circumference_mm": number(),
                    "examination": tfds.features.Text(),
                    "name": tfds.features.Text(),
                }
            ),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # Records stay in the order of their names.
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # Nothing is downloaded through TFDS.
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        metadata: Any = self.info.metadata
        metadata.update(names=[], examinations=[])
        for index, example in enumerate(self._examples()):
            metadata["names"].append(example["name"])
            metadata["examinations"].append(example["examination"])
            yield index, example

    def _examples(self) -> Iterable[dict[str, Any]]:
        """Yields the features of each record, in the order of their names."""
        raise NotImplementedError
