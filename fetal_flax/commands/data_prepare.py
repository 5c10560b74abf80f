"""`fetal-flax data prepare`: HC18, checked and built before anything needs it."""

import dataclasses
from pathlib import Path

from fetal_flax.config import DataConfig


@dataclasses.dataclass(frozen=True)
class PrepareData:
    """Check an HC18 folder and build the data set from it, or download HC18 first."""

    source: Path | None = None
    """Folder in the official layout, complete or a subset; without it, HC18 from Zenodo."""
    cache_dir: str = DataConfig.cache_dir
    """Where the data set is built; the setting data.cache_dir."""

    def run(self) -> int:
        """Prepares."""
        from fetal_flax.data.datasets import open_dataset

        source = None if self.source is None else str(self.source)
        dataset = open_dataset(DataConfig(data_dir=source, cache_dir=self.cache_dir), seed=0)
        examinations = len(set(dataset.examinations))
        print(f"{len(dataset)} images of {examinations} examinations are ready")
        return 0
