"""Makes the photographs of the README and of the documentation from HC18's validation images.

    python docs/make_pictures.py --hc18 HC18

writes docs/pictures/measured.jpg (the image of the median ellipse Dice: scan, mask and ellipse) and
docs/pictures/validation.jpg (eight images from the lowest to the highest ellipse Dice), as
hc18-described sees them. Nobody chooses the images. They are derived from HC18 (van den Heuvel et
al. 2018, Zenodo record 1327317, CC BY 4.0): name the authors where you show them.
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import fetal_flax as ff
from fetal_flax.evaluation.evaluate import Measured, measure
from fetal_flax.reporting import pictures

NETWORK = "hc18-described"
PICTURES = Path(__file__).parent / "pictures"
SHEET_IMAGES = 8
JPEG_QUALITY = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hc18", type=Path, required=True, help="folder in HC18's layout")
    hc18 = parser.parse_args().hc18
    measured = measure(NETWORK, hc18, split="validation")
    ascending = np.argsort([row.metrics["ellipse_dice"] for row in measured.rows])
    write_measured(measured, ascending[len(ascending) // 2])
    chosen = np.linspace(0, len(ascending) - 1, SHEET_IMAGES).astype(int)
    write_sheet(measured, ascending[chosen])


def write_measured(measured: Measured, index: int) -> None:
    """Writes scan, mask, and scan with ellipse, axes and what they measure, side by side."""
    record = measured.dataset.record(measured.indices[index])
    result = ff.load(NETWORK).measure(record.image, record.pixel_size_mm)
    assert result.head is not None and result.ga_weeks is not None
    # The sides without a head go: three whole scans in a row are too small on a phone.
    height, width = record.image.shape
    kept = round(1.2 * height)
    left = round(np.clip(result.head.ellipse.center_x - kept / 2, 0, width - kept))
    columns = np.s_[:, left : left + kept]
    drawn = np.stack([record.image] * 3, axis=-1)
    # A line of one pixel would vanish where the picture is shown small.
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        moved = pictures.draw_ellipse(np.roll(drawn, (-dy, -dx), (0, 1)), result.head.ellipse)
        drawn = np.roll(moved, (dy, dx), (0, 1))
    panels = {
        "scan": record.image[columns],
        "mask": np.uint8(255) * result.mask[columns],
        f"HC {result.hc_mm:.0f} mm\nGA {result.ga_weeks:.1f} weeks": drawn[columns],
    }
    figure = Figure(figsize=(12, 4.3), dpi=100, facecolor="black")
    for column, (caption, panel) in enumerate(panels.items()):
        axes = figure.add_axes((column / 3 + 0.002, 0.01, 1 / 3 - 0.004, 0.77))
        axes.axis("off")
        axes.imshow(panel, cmap="gray", vmin=0, vmax=255)
        colour = "white" if column < 2 else "#" + bytes(pictures.ELLIPSE_COLOUR).hex()
        figure.text(
            (column + 0.5) / 3, 0.89, caption, color=colour, size=24, ha="center", va="center"
        )
    write_jpeg(figure, PICTURES / "measured.jpg")
    dice = measured.rows[index].metrics["ellipse_dice"]
    print(
        f"measured.jpg: {record.name}, ellipse Dice {dice:.4f}, HC {result.hc_mm:.1f} mm, "
        f"annotated {record.head_circumference_mm:.1f} mm"
    )


def write_sheet(measured: Measured, chosen: np.ndarray) -> None:
    """Writes the sheet that a training run draws of its validation images."""
    records = [measured.dataset.record(measured.indices[index]) for index in chosen]
    masks = ff.load(NETWORK).masks([record.image for record in records])
    images = [
        pictures.SheetImage(
            record.name,
            record.image,
            mask,
            record.mask > 0,
            head.edge_ellipse if (head := measured.heads[index]) else None,
            measured.rows[index].metrics["ellipse_dice"],
            measured.rows[index].metrics["dice"],
        )
        for index, record, mask in zip(chosen, records, masks, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        pictures.overlay_sheet(path, images)
        with Image.open(path) as sheet:
            smaller = sheet.convert("RGB").resize((1200, round(1200 * sheet.height / sheet.width)))
    smaller.save(PICTURES / "validation.jpg", quality=JPEG_QUALITY)
    print(f"validation.jpg: {', '.join(record.name for record in records)}")


def write_jpeg(figure: Figure, path: Path) -> None:
    """Writes a figure with full colour resolution: thin coloured lines would blur."""
    png = io.BytesIO()
    figure.savefig(png, facecolor=figure.get_facecolor())
    with Image.open(png) as picture:
        picture.convert("RGB").save(path, quality=JPEG_QUALITY, subsampling=0)


if __name__ == "__main__":
    main()
