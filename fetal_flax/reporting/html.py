"""`report.html`: an evaluation on one page that needs nothing but a browser.

The page's text and style are in `report.html.jinja`; figures and pictures are in the page itself.
What the ellipse of a mask's largest region measures comes first, what the raw mask does beside it.
Worst cases are those of the lowest ellipse Dice.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jinja2
import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fetal_flax._util.files import write_atomically
from fetal_flax.reporting.tables import Row

WORST_CASES = 12

# Names on the page, and names in metrics.json.
_HEADLINE = {
    "Ellipse of the largest region": {
        "Dice, %": "ellipse_dice",
        "Hausdorff, mm": "ellipse_hausdorff_mm",
        "HD95, mm": "ellipse_hausdorff95_mm",
        "ASSD, mm": "ellipse_assd_mm",
        "DF, mm": "hc_error_mm",
        "ADF, mm": "hc_abs_error_mm",
    },
    "Raw mask": {
        "Dice, %": "dice",
        "Hausdorff, mm": "hausdorff_mm",
        "HD95, mm": "hausdorff95_mm",
        "ASSD, mm": "assd_mm",
        "IoU, %": "iou",
    },
}
_COLUMNS = list(dict.fromkeys(label for names in _HEADLINE.values() for label in names))
_PUBLISHED_COLUMNS = ["Dice, %", "Hausdorff, mm", "DF, mm", "ADF, mm"]
# What was measured on HC18's official test set of 335 images, as the papers' abstracts give it:
# Dice in %, Hausdorff, DF and ADF in mm.
PUBLISHED = (
    (
        "DAG V-Net (Zeng et al. 2021, doi:10.1007/s10278-020-00410-5)",
        ("97.93", "1.29 ± 0.79", "0.09 ± 2.45", "1.77 ± 1.69"),
    ),
    (
        "Regression CNN (Fiorentino et al. 2021, doi:10.1016/j.cmpb.2020.105771)",
        ("97.75 ± 1.32", "", "", "1.90 ± 1.76"),
    ),
    (
        "FCN and ellipse (Al-Bander et al. 2020, doi:10.1007/978-3-030-39343-4_12)",
        ("97.73 ± 1.32", "", "", ""),
    ),
)
_GROUP_TITLES = {"trimester": "By trimester", "fold": "By fold"}
_TEMPLATE = "report.html.jinja"


class WorstCase(NamedTuple):
    """A picture of an image that the network got wrong, and what it got wrong."""

    row: Row
    picture: UInt8[np.ndarray, "height width 3"]


class _Picture(NamedTuple):
    """A picture as the page has it."""

    kind: str
    """`png` or `jpeg`."""
    base64: str
    alternative: str


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    rows: Sequence[Row],
    worst: Sequence[WorstCase],
    *,
    curves: Sequence[bytes] = (),
) -> None:
    """Writes the page.

    Args:
        path: The HTML file.
        metrics: What `metrics.json` holds.
        rows: The images, with the columns that `evaluate` gives them.
        worst: The worst cases, worst first.
        curves: Training curves as PNG, where there are any.

    Raises:
        InputError: The file can't be written.
    """
    run = metrics["run"]
    predicted, reference = (
        np.array([row.columns[name] for row in rows]) for name in ("hc_mm", "hc_reference_mm")
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template(_TEMPLATE).render(
        title=f"{run['model']['name']} on {run['dataset']}",
        run=run,
        count=metrics["n"],
        headline=_headline(metrics),
        published_columns=_PUBLISHED_COLUMNS,
        published=_published(metrics) if run["dataset"] == "hc18" else [],
        columns=_COLUMNS,
        grouped=[(_GROUP_TITLES[name], _groups(groups)) for name, groups in metrics["by"].items()],
        distributions=[
            _histogram("ellipse Dice", [row.metrics["ellipse_dice"] for row in rows], "#0072b2"),
            _histogram("ADF, mm", [row.metrics["hc_abs_error_mm"] for row in rows], "#d55e00"),
        ],
        circumference=[
            _predicted_against_reference(predicted, reference),
            _bland_altman(predicted, reference),
        ],
        flags=_flags(rows),
        worst=[(_shown(case), _caption(case.row)) for case in worst],
        curves=[_png(png, "Loss, Dice and learning rate over epochs") for png in curves],
    )
    write_atomically(path, page.encode())


def _headline(metrics: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for compared, names in _HEADLINE.items():
        rows.append([compared])
        for label, name in names.items():
            values, factor = metrics[name], _factor(label)
            low, high = (factor * value for value in values["ci95"])
            rows.append(
                [
                    label,
                    _mean_and_std(metrics, compared, label),
                    f"{factor * values['median']:.2f}",
                    f"{low:.2f} – {high:.2f}",
                ]
            )
    return rows


def _published(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Puts this evaluation beside what others have published."""
    ours = [
        [
            f"This network, {metrics['n']} images: {compared.lower()}",
            *(_mean_and_std(metrics, compared, label) for label in _PUBLISHED_COLUMNS),
        ]
        for compared in _HEADLINE
    ]
    return ours + [[method, *numbers] for method, numbers in PUBLISHED]


def _groups(groups: Mapping[str, Any]) -> list[list[str]]:
    """Shows the headline of each group of images: all groups' ellipses, then their raw masks."""
    rows = []
    for compared in _HEADLINE:
        rows.append([compared])
        for name, group in groups.items():
            numbers = [_mean_and_std(group, compared, label) for label in _COLUMNS]
            rows.append([name, str(group["n"]), *numbers])
    return rows


def _flags(rows: Sequence[Row]) -> list[list[str]]:
    """Tells how many images each flag marks, and how good those are."""
    flagged: dict[str, list[Row]] = {"none": []}
    for row in rows:
        for flag in row.columns["flags"].split() or ["none"]:
            flagged.setdefault(flag, []).append(row)
    table = []
    for flag, members in flagged.items():
        if members:
            ellipse, mask, adf = (
                np.array([row.metrics[name] for row in members])
                for name in ("ellipse_dice", "dice", "hc_abs_error_mm")
            )
            table.append(
                [
                    flag.replace("_", " "),
                    str(len(members)),
                    f"{100 * ellipse.mean():.2f}",
                    f"{100 * ellipse.min():.2f}",
                    f"{100 * mask.mean():.2f}",
                    f"{100 * mask.min():.2f}",
                    f"{adf.mean():.2f}",
                    f"{adf.max():.2f}",
                ]
            )
    return table


def _mean_and_std(metrics: Mapping[str, Any], compared: str, label: str) -> str:
    """Returns an entry of a table; empty where that isn't measured."""
    if label not in _HEADLINE[compared]:
        return ""
    values, factor = metrics[_HEADLINE[compared][label]], _factor(label)
    return f"{factor * values['mean']:.2f} ± {factor * values['std']:.2f}"


def _factor(label: str) -> int:
    return 100 if label.endswith("%") else 1


def _caption(row: Row) -> str:
    ellipse, mask = 100 * row.metrics["ellipse_dice"], 100 * row.metrics["dice"]
    return (
        f"{row.name}: ellipse Dice {ellipse:.1f} %, raw mask Dice {mask:.1f} %, "
        f"DF {row.metrics['hc_error_mm']:+.1f} mm"
    )


def _shown(case: WorstCase) -> _Picture:
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(case.picture, cv2.COLOR_RGB2BGR))
    return _Picture("jpeg", base64.b64encode(jpeg.tobytes()).decode(), case.row.name)


def _png(png: bytes, alternative: str) -> _Picture:
    return _Picture("png", base64.b64encode(png).decode(), alternative)


def _histogram(label: str, values: Sequence[float], colour: str) -> _Picture:
    figure, panel = _panel(label, "images")
    panel.hist(values, bins=40, color=colour)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _drawn(figure, f"Distribution of {label}")


def _predicted_against_reference(predicted: np.ndarray, reference: np.ndarray) -> _Picture:
    figure, panel = _panel("reference HC, mm", "predicted HC, mm")
    panel.scatter(reference, predicted, s=9, alpha=0.6, color="#0072b2", linewidths=0)
    ends = [min(reference.min(), predicted.min()), max(reference.max(), predicted.max())]
    panel.plot(ends, ends, color="black", linewidth=0.8)
    return _drawn(figure, "Predicted against reference head circumference")


def _bland_altman(predicted: np.ndarray, reference: np.ndarray) -> _Picture:
    """Difference against mean, with lines at the mean difference and 1.96 deviations from it.

    Bland & Altman, Lancet 1986; 327: 307-310.
    """
    difference = predicted - reference
    figure, panel = _panel("mean of predicted and reference HC, mm", "predicted − reference, mm")
    panel.scatter(
        (predicted + reference) / 2, difference, s=9, alpha=0.6, color="#0072b2", linewidths=0
    )
    mean, std = difference.mean(), difference.std(ddof=1) if len(difference) > 1 else 0.0
    for value, style in ((mean, "-"), (mean - 1.96 * std, "--"), (mean + 1.96 * std, "--")):
        panel.axhline(value, color="black", linewidth=0.8, linestyle=style)
        panel.annotate(
            f"{value:+.1f}", (1, value), xycoords=("axes fraction", "data"), va="bottom", ha="right"
        )
    return _drawn(figure, "Bland–Altman plot of the head circumference")


def _panel(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 3.6), dpi=130, layout="constrained")
    panel = figure.subplots()
    panel.set(xlabel=x, ylabel=y)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel


def _drawn(figure: Figure, alternative: str) -> _Picture:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return _png(png.getvalue(), alternative)
