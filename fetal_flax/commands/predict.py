"""`fetal-flax predict`: a network on images without annotations."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from fetal_flax.config import TestTimeAugmentation
from fetal_flax.errors import one_line

MAX_FLAGGED_SHOWN = 10
"""How many flagged images are named before the rest is counted."""


@dataclasses.dataclass(frozen=True)
class Predict:
    """Segment an image or a folder of images: masks, overlays, the head's measures."""

    input: Path
    """Image (PNG, JPEG, BMP, TIFF, WebP, GIF, DICOM), or folder of images."""
    output: Path
    """Folder for the results."""
    checkpoint: Path | None = None
    """Training workdir (its best checkpoint), converted directory, or a shipped network's name; by
    default a shipped network."""
    pixel_size: float | None = None
    """Size of a pixel in mm, the same for all images. Without it and the next flag, heads are
    measured in pixels alone, but for DICOM files, which tell."""
    pixel_size_csv: Path | None = None
    """CSV with the columns `filename` and `pixel size(mm)`, as HC18 has it."""
    tta: TestTimeAugmentation = "none"
    """Test-time augmentation: `flip` averages each image with its mirror image, and
    measurements.csv has how far the two are apart."""
    save_logits: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write logits/NAME.npy too: float32 at the network's size, before the sigmoid."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write measurements.json too: the rows of measurements.csv with all digits."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with what a command that was ended has left in --output: what has a row and its files
    is not measured again."""
    workers: int | None = None
    """Threads for each of reading, measuring and writing; by default one for each processor, at
    most 16."""

    def run(self) -> int:
        """Segments what can be read; 2 if something could not be."""
        from fetal_flax.checkpoints import shipped
        from fetal_flax.inference.predict import predict
        from fetal_flax.inference.sources import listed

        report = predict(
            self.checkpoint or shipped.default(),
            self.input,
            self.output,
            pixel_size_csv=self.pixel_size_csv,
            pixel_size_mm=self.pixel_size,
            save_logits=self.save_logits,
            save_json=self.json,
            tta=self.tta,
            workers=self.workers,
            resume=self.resume,
        )
        for problem in report.failed:
            print(f"fetal-flax predict: {one_line(problem)}", file=sys.stderr)
        if report.predicted:
            before = f" ({report.resumed} of them before)" if report.resumed else ""
            print(
                f"{len(report.predicted)} images segmented{before}; masks, overlays and "
                f"measurements.csv are in {self.output}"
            )
        else:
            print(f"no image could be read: nothing was written to {self.output}")
        if report.skipped:
            print(f"left out: {listed(report.skipped)}")
        if report.flagged:
            named = ", ".join(report.flagged[:MAX_FLAGGED_SHOWN])
            more = len(report.flagged) - MAX_FLAGGED_SHOWN
            print(
                f"look at {len(report.flagged)} of them (column flags): {named}"
                + (f" and {more} more" if more > 0 else "")
            )
        return 2 if report.failed else 0
