"""`report.html`: an evaluation on one page that needs nothing but a browser.

Figures and pictures are in the page itself. Worst cases are those of the lowest Dice.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fetal_flax.files import write_atomically

WORST_CASES = 12

# Name in metrics.json, name on the page, unit, factor, digits.
_HEADLINE = (
    ("dice", "Dice", "%", 100, 2),
    ("iou", "IoU", "%", 100, 2),
    ("hausdorff_mm", "Hausdorff", "mm", 1, 2),
    ("hausdorff95_mm", "HD95", "mm", 1, 2),
    ("assd_mm", "ASSD", "mm", 1, 2),
    ("hc_error_mm", "DF", "mm", 1, 2),
    ("hc_abs_error_mm", "ADF", "mm", 1, 2),
)
_LEGEND = (
    "Hausdorff, HD95, ASSD: largest, 95th percentile and mean distance between the boundaries "
    "of the masks. DF, ADF: signed and absolute difference of the head circumference (HC). "
    "Interval: 95 % bootstrap interval of the mean."
)
_STYLE = """
body { margin: 0 auto; max-width: 68rem; padding: 1rem; color: #222; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem .3rem 0; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
td + td { white-space: nowrap; }
@media (max-width: 30rem) { table { font-size: .85rem; } }
figure { margin: 0; } figcaption { font-size: .85rem; color: #555; }
.key span { padding: 0 .4em; margin-right: .4em; border-radius: .2em; background: #333; }
"""


class WorstCase(NamedTuple):
    """A picture of an image that the network got wrong, and what it got wrong."""

    name: str
    dice: float
    hc_error_mm: float
    picture: UInt8[np.ndarray, "height width 3"]


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    per_image: Sequence[Mapping[str, float]],
    circumferences: Sequence[tuple[float, float]],
    worst: Sequence[WorstCase],
    *,
    curves: bytes | None = None,
) -> None:
    """Writes the page.

    Args:
        path: The HTML file.
        metrics: What `metrics.json` holds.
        per_image: The metrics of each image.
        circumferences: Predicted and reference head circumference of each image, in mm.
        worst: The worst cases, worst first.
        curves: The training curves as PNG, where there are any.

    Raises:
        InputError: The file can't be written.
    """
    run = metrics["run"]
    title = f"{run['model']['name']} on {run['dataset']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{metrics['n']} images, split “{html.escape(run['split'])}”, checkpoint "
        f"<code>{html.escape(str(run['checkpoint']))}</code>. Network input "
        f"{run['image_size'][0]}×{run['image_size'][1]}; measured at each image's own size.</p>",
        _missed(run["missed"]),
        "<h2>Metrics</h2>",
        _headline(metrics),
        f"<p><small>{_LEGEND}</small></p>",
        "<h2>Distributions</h2>",
        '<div class="wide grid">',
        _histogram("Dice", [metrics["dice"] for metrics in per_image], "#0072b2"),
        _histogram("ADF, mm", [metrics["hc_abs_error_mm"] for metrics in per_image], "#d55e00"),
        "</div>",
        "<h2>Head circumference</h2>",
        '<div class="wide grid">',
        _predicted_against_reference(*np.array(circumferences).T),
        _bland_altman(*np.array(circumferences).T),
        "</div>",
        "<h2>Worst cases</h2>",
        '<p class="key"><span style="color:#28dc3c">annotation</span>'
        '<span style="color:#ff00ff">prediction</span>'
        '<span style="color:#ffc800">measured ellipse</span></p>',
        '<div class="grid">' + "".join(map(_case, worst)) + "</div>",
    ]
    if curves:
        parts += ["<h2>Training</h2>", _image(curves, "Loss, Dice and learning rate over epochs")]
    parts.append("<p>For research. Not a medical device.</p>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    write_atomically(path, page.encode())


def _missed(names: Sequence[str]) -> str:
    if not names:
        return "<p>A head was found in every image.</p>"
    listed = html.escape(", ".join(names))
    return (
        f"<p><strong>No head was found in {len(names)} images</strong>, which count with the "
        f"worst value of every metric: {listed}.</p>"
    )


def _headline(metrics: Mapping[str, Any]) -> str:
    rows = ["<tr><th></th><th>mean ± std</th><th>median</th><th>interval</th></tr>"]
    for name, label, unit, factor, digits in _HEADLINE:
        values = metrics[name]
        mean, std, median = (factor * values[key] for key in ("mean", "std", "median"))
        low, high = (factor * value for value in values["ci95"])
        rows.append(
            f"<tr><td>{label}, {unit}</td><td>{mean:.{digits}f} ± {std:.{digits}f}</td>"
            f"<td>{median:.{digits}f}</td><td>{low:.{digits}f} – {high:.{digits}f}</td></tr>"
        )
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _case(case: WorstCase) -> str:
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(case.picture, cv2.COLOR_RGB2BGR))
    caption = f"{case.name}: Dice {100 * case.dice:.1f} %, DF {case.hc_error_mm:+.1f} mm"
    source = base64.b64encode(jpeg.tobytes()).decode()
    return (
        f'<figure><img alt="{html.escape(case.name)}" src="data:image/jpeg;base64,{source}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _image(png: bytes, alternative: str) -> str:
    source = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{source}">'


def _histogram(label: str, values: Sequence[float], colour: str) -> str:
    figure, panel = _panel(label, "images")
    panel.hist(values, bins=40, color=colour)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _drawn(figure, f"Distribution of {label}")


def _predicted_against_reference(predicted: np.ndarray, reference: np.ndarray) -> str:
    figure, panel = _panel("reference HC, mm", "predicted HC, mm")
    panel.scatter(reference, predicted, s=9, alpha=0.6, color="#0072b2", linewidths=0)
    ends = [min(reference.min(), predicted.min()), max(reference.max(), predicted.max())]
    panel.plot(ends, ends, color="black", linewidth=0.8)
    return _drawn(figure, "Predicted against reference head circumference")


def _bland_altman(predicted: np.ndarray, reference: np.ndarray) -> str:
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


def _drawn(figure: Figure, alternative: str) -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return _image(png.getvalue(), alternative)
