"""`fetal-flax evaluate`: a network against annotations."""

import dataclasses
from pathlib import Path
from typing import Literal

from fetal_flax.config import TestTimeAugmentation


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure a network on annotated images: a report, metrics, a table and masks."""

    checkpoint: Path
    """Training workdir (its best checkpoint), converted directory, or a shipped network's name."""
    output: Path
    """Folder for the results."""
    data_dir: Path | None = None
    """HC18 folder in the official layout; without it, the data that the run was trained on."""
    split: Literal["train", "validation", "all"] = "all"
    """Which side of the run's split."""
    tta: TestTimeAugmentation = "none"
    """Test-time augmentation: `flip` averages each image with its mirror image."""
    workers: int | None = None
    """Threads for each of reading, measuring and writing; by default one for each processor, at
    most 16."""

    def run(self) -> int:
        """Evaluates, and prints the headline."""
        from fetal_flax.evaluation.evaluate import evaluate
        from fetal_flax.reporting.headline import headline

        metrics = evaluate(
            self.checkpoint,
            self.data_dir,
            output=self.output,
            split=self.split,
            tta=self.tta,
            workers=self.workers,
        )
        print(headline(metrics, self.output))
        return 0
