"""Pictures of an evaluation and of a training run, written as PNG files.

Figures are built with matplotlib's objects and never through pyplot, whose global state would
leak between callers and need a display. It is imported where it is used: it wants a folder for its
settings, which a container may not have, and outlines need none of it.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from fetal_flax._util.files import write_atomically
from fetal_flax._util.png import encode_png
from fetal_flax.measurement.ellipse import Ellipse

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Green and magenta stay far apart for every common kind of colour blindness, and both stand out
# from every grey.
TRUTH_COLOUR = (40, 220, 60)
"""RGB of the annotated outline."""
PREDICTION_COLOUR = (255, 0, 255)
"""RGB of the predicted outline."""
ELLIPSE_COLOUR = (255, 200, 0)
"""RGB of the ellipse of the predicted mask."""
_SHIFT = 4
TRAIN_COLOUR = "#0072b2"
VALIDATION_COLOUR = "#d55e00"
THICK_OUTLINE_FROM = 512
"""Longest side, in pixels, from which outlines are 2 pixels wide instead of 1."""
SHEET_COLUMNS = 4
SHEET_PANEL_INCHES = 2.9
SHEET_CAPTION_INCHES = 0.37
SHEET_DPI = 130


def overlay(
    image: UInt8[np.ndarray, "height width"],
    *,
    prediction: Bool[np.ndarray, "height width"] | None = None,
    truth: Bool[np.ndarray, "height width"] | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws the outlines of masks on a grey image, anti-aliased.

    Each runs around every part and hole of its mask. The prediction is drawn last, so the
    annotation shows where the two differ.

    Args:
        image: Grey values.
        prediction: The predicted mask, outlined in `PREDICTION_COLOUR`.
        truth: The annotated mask, outlined in `TRUTH_COLOUR`.

    Returns:
        A new RGB image; pixels away from the outlines keep their grey value.

    Raises:
        ValueError: A mask's shape is not the image's.
    """
    rgb = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    thickness = 2 if max(image.shape) >= THICK_OUTLINE_FROM else 1
    for mask, colour in ((truth, TRUTH_COLOUR), (prediction, PREDICTION_COLOUR)):
        if mask is None:
            continue
        if mask.shape != image.shape:
            raise ValueError(f"the mask is {mask.shape} and its image {image.shape}")
        outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(rgb, outlines, -1, colour, thickness, cv2.LINE_AA)
    return rgb


def draw_ellipse(
    rgb: UInt8[np.ndarray, "height width 3"],
    ellipse: Ellipse,
    *,
    scale: tuple[float, float] = (1.0, 1.0),
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws an ellipse and its axes in `ELLIPSE_COLOUR`, anti-aliased.

    Args:
        rgb: The picture.
        ellipse: In pixels of the image.
        scale: Width and height of the picture as shares of the image's.

    Returns:
        A new picture.
    """
    turn = np.linspace(0, 2 * np.pi, 361)
    one, zero = np.array([-1.0, 1.0]), np.zeros(2)
    lines = (
        ellipse.points(np.cos(turn), np.sin(turn)),
        ellipse.points(one, zero),
        ellipse.points(zero, one),
    )
    # The image's corner stays where it is, half a pixel before the first pixel's centre.
    factor = np.array(scale)
    scaled = [factor * line + (factor - 1) / 2 for line in lines]
    # OpenCV draws fixed-point coordinates.
    fixed = [np.round(line * 2**_SHIFT).astype(np.int32) for line in scaled]
    return cv2.polylines(rgb.copy(), fixed, False, ELLIPSE_COLOUR, 1, cv2.LINE_AA, _SHIFT)


def write_png(path: str | Path, rgb: UInt8[np.ndarray, "height width 3"]) -> None:
    """Writes an RGB image as PNG; creates its folder if needed.

    Raises:
        InputError: The file can't be written.
    """
    write_atomically(path, encode_png(rgb))


class SheetImage(NamedTuple):
    """An image of a sheet, and what a network sees in it."""

    name: str
    image: UInt8[np.ndarray, "height width"]
    prediction: Bool[np.ndarray, "height width"]
    truth: Bool[np.ndarray, "height width"]
    ellipse: Ellipse | None
    """That of the prediction, in pixels of the image; None where no head was found."""
    ellipse_dice: float
    """Dice of the ellipse, in [0, 1]."""
    dice: float
    """Dice of the predicted mask, in [0, 1]."""


def overlay_sheet(path: str | Path, images: Sequence[SheetImage]) -> None:
    """Writes a sheet of overlays, four to a row, each with its name and both Dice above it.

    Args:
        path: The PNG file; its folder is created if needed.
        images: In the order of the sheet; their sizes may differ.

    Raises:
        InputError: The file can't be written.
        ValueError: There are no images.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not images:
        raise ValueError("a sheet needs at least one image")
    columns = min(SHEET_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    aspect = max(entry.image.shape[0] / entry.image.shape[1] for entry in images)
    figure = Figure(
        figsize=(
            columns * SHEET_PANEL_INCHES,
            rows * (SHEET_PANEL_INCHES * aspect + SHEET_CAPTION_INCHES) + 0.3,
        ),
        dpi=SHEET_DPI,
        layout="constrained",
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, entry in zip(panels, images, strict=False):
        panel.imshow(_shrunk_overlay(entry))
        dices = f"Dice: ellipse {entry.ellipse_dice:.3f}, raw mask {entry.dice:.3f}"
        panel.set_title(f"{entry.name}\n{dices}", fontsize=9, pad=3)
    colours = {
        "annotation": TRUTH_COLOUR,
        "prediction": PREDICTION_COLOUR,
        "ellipse of its largest region": ELLIPSE_COLOUR,
    }
    figure.legend(
        handles=[
            Line2D([], [], color="#" + bytes(colour).hex(), linewidth=2.5, label=label)
            for label, colour in colours.items()
        ],
        loc="outside lower center",
        ncols=len(colours),
        frameon=False,
        fontsize=10,
    )
    _save(figure, path)


def _shrunk_overlay(entry: SheetImage) -> UInt8[np.ndarray, "height width 3"]:
    """Draws the outlines at the panel's size: drawn before shrinking, they would fade."""
    height, width = entry.image.shape
    shrunk_width = min(width, round(SHEET_PANEL_INCHES * SHEET_DPI))
    size = (shrunk_width, max(1, round(height * shrunk_width / width)))
    rgb = overlay(
        cv2.resize(entry.image, size, interpolation=cv2.INTER_AREA),
        prediction=_shrink_mask(entry.prediction, size),
        truth=_shrink_mask(entry.truth, size),
    )
    if entry.ellipse is None:
        return rgb
    return draw_ellipse(rgb, entry.ellipse, scale=(size[0] / width, size[1] / height))


def _shrink_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    shares = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return shares >= 0.5


def training_curves(path: str | Path, history: Sequence[Mapping[str, float]]) -> None:
    """Writes loss, Dice and learning rate over the epochs as one figure of three panels.

    The first epoch with the highest validation Dice is marked.

    Args:
        path: The PNG file; its folder is created if needed.
        history: One entry per finished epoch with `epoch`, `train_loss`, `validation_loss`,
            `train_dice`, `validation_dice` and `learning_rate`.

    Raises:
        InputError: The file can't be written.
        ValueError: The history is empty.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not history:
        raise ValueError("training curves need at least one epoch")
    figure = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    loss, dice, rate = figure.subplots(1, 3)
    _draw_loss(loss, history)
    _draw_dice(dice, history)
    _draw_learning_rate(rate, history)
    for panel in (loss, dice, rate):
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _draw_loss(panel: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    _curve(panel, history, "train_loss", "train", TRAIN_COLOUR)
    _curve(panel, history, "validation_loss", "validation", VALIDATION_COLOUR)
    panel.set_title("Loss")
    panel.legend(frameon=False, fontsize=9)


def _draw_dice(panel: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    best = max(history, key=lambda entry: entry["validation_dice"])
    _curve(panel, history, "train_dice", "train", TRAIN_COLOUR)
    _curve(panel, history, "validation_dice", "validation", VALIDATION_COLOUR)
    panel.plot(
        best["epoch"],
        best["validation_dice"],
        "o",
        color="black",
        fillstyle="none",
        markersize=10,
        label=f"best: {best['validation_dice']:.4f} in epoch {best['epoch']:.0f}",
    )
    panel.set_title("Dice")
    panel.legend(frameon=False, fontsize=9)


def _draw_learning_rate(panel: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    rates = [entry["learning_rate"] for entry in history]
    _curve(panel, history, "learning_rate", "learning rate", "black")
    panel.set_yscale("log")
    # Wide enough that a constant rate, too, has two labelled ticks.
    panel.set_ylim(min(rates) / 4, max(rates) * 4)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:.0e}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_title("Learning rate")


def _curve(
    panel: "Axes", history: Sequence[Mapping[str, float]], key: str, label: str, colour: str
) -> None:
    panel.plot(
        [entry["epoch"] for entry in history],
        [entry[key] for entry in history],
        label=label,
        color=colour,
        linewidth=1.6,
        # A line through a single epoch would be invisible.
        marker="o" if len(history) <= 20 else None,
        markersize=4,
    )


def _save(figure: "Figure", path: str | Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())
