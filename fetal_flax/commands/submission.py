"""`fetal-flax submission`: the HC18 challenge."""

import dataclasses
import sys
from pathlib import Path

from fetal_flax.config import TestTimeAugmentation
from fetal_flax.errors import one_line


@dataclasses.dataclass(frozen=True)
class Submission:
    """Measure the HC18 challenge's test images and write the CSV that it takes."""

    checkpoint: Path
    """Training workdir (its best checkpoint), converted directory, or a shipped network's name."""
    input: Path
    """The challenge's test_set folder."""
    pixel_size_csv: Path
    """Its test_set_pixel_size.csv."""
    output: Path = Path("submission.csv")
    """The CSV to write."""
    tta: TestTimeAugmentation = "none"
    """Test-time augmentation: `flip` averages each image with its mirror image."""

    def run(self) -> int:
        """Measures; 2 if an image has no row."""
        from fetal_flax.inference.submission import submission

        report = submission(
            self.checkpoint, self.input, self.pixel_size_csv, self.output, tta=self.tta
        )
        for problem in report.problems:
            print(f"fetal-flax submission: {one_line(problem)}", file=sys.stderr)
        if report.measured:
            print(f"{report.measured} heads are in {self.output}")
        else:
            print(f"no head could be measured: {self.output} was not written")
        return 2 if report.problems else 0
