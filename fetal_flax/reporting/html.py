"""`report.html`: an evaluation on one page that needs nothing but a browser.

Figures and pictures are in the page itself. What the ellipse of a mask's largest region measures
comes first, what the raw mask does beside it. Worst cases are those of the lowest ellipse Dice.
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
_COLUMNS = tuple(dict.fromkeys(label for names in _HEADLINE.values() for label in names))
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
_LEGEND = (
    "Ellipse: fitted to the edge of the predicted mask's largest region, filled, and compared with "
    "the annotated mask. Raw mask: the prediction as it is, all its regions. Hausdorff, HD95, "
    "ASSD: largest, 95th percentile and mean distance between the boundaries. DF, ADF: signed and "
    "absolute difference of the head circumference (HC): the ellipse's, the outline of HC18's "
    "masks taken off. Interval: 95 % bootstrap interval of the mean."
)
_PUBLISHED_LEGEND = (
    "Published: on the 335 images of HC18's official test set, as the papers' abstracts give it. "
    "Its annotations are not public, so ours are other images: the rows are for orientation. The "
    "challenge compares ellipses, and so does our first row; the second is the raw mask's."
)
_GROUP_TITLES = {"trimester": "By trimester", "fold": "By fold"}
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

    row: Row
    picture: UInt8[np.ndarray, "height width 3"]


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
    title = f"{run['model']['name']} on {run['dataset']}"
    circumferences = [[row.columns[name] for row in rows] for name in ("hc_mm", "hc_reference_mm")]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _what(metrics),
        _missed(run["missed"]),
        "<h2>Metrics</h2>",
        _headline(metrics),
        f"<p><small>{_LEGEND}</small></p>",
        _published(metrics) if run["dataset"] == "hc18" else "",
        *(_groups(_GROUP_TITLES[name], groups) for name, groups in metrics["by"].items()),
        "<h2>Distributions</h2>",
        '<div class="wide grid">',
        _histogram("ellipse Dice", [row.metrics["ellipse_dice"] for row in rows], "#0072b2"),
        _histogram("ADF, mm", [row.metrics["hc_abs_error_mm"] for row in rows], "#d55e00"),
        "</div>",
        "<h2>Head circumference</h2>",
        '<div class="wide grid">',
        _predicted_against_reference(*np.array(circumferences)),
        _bland_altman(*np.array(circumferences)),
        "</div>",
        "<h2>Flags</h2>",
        _flags(rows),
        "<h2>Worst cases</h2>",
        '<p class="key"><span style="color:#28dc3c">annotation</span>'
        '<span style="color:#ff00ff">prediction</span>'
        '<span style="color:#ffc800">ellipse of its largest region</span></p>',
        '<div class="grid">' + "".join(map(_case, worst)) + "</div>",
    ]
    if curves:
        parts.append("<h2>Training</h2>")
        parts += [_image(png, "Loss, Dice and learning rate over epochs") for png in curves]
    parts.append("<p>For research. Not a medical device.</p>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    write_atomically(path, page.encode())


def _what(metrics: Mapping[str, Any]) -> str:
    run = metrics["run"]
    augmented = "; averaged over each image and its mirror image" if run["tta"] == "flip" else ""
    return (
        f"<p>{metrics['n']} images, split “{html.escape(run['split'])}”, checkpoint "
        f"<code>{html.escape(str(run['checkpoint']))}</code>. Network input "
        f"{run['image_size'][0]}×{run['image_size'][1]}{augmented}; measured at each image's own "
        "size.</p>"
    )


def _missed(names: Sequence[str]) -> str:
    if not names:
        return "<p>A head was found in every image.</p>"
    listed = html.escape(", ".join(names))
    return (
        f"<p><strong>No head was found in {len(names)} images</strong>, which count with the "
        f"worst value of every metric: {listed}.</p>"
    )


def _headline(metrics: Mapping[str, Any]) -> str:
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
    return _table(["", "mean ± std", "median", "interval"], rows)


def _published(metrics: Mapping[str, Any]) -> str:
    """Puts this evaluation beside what others have published."""
    labels = ["Dice, %", "Hausdorff, mm", "DF, mm", "ADF, mm"]
    rows = [
        [
            f"This network, {metrics['n']} images: {compared.lower()}",
            *(_mean_and_std(metrics, compared, label) for label in labels),
        ]
        for compared in _HEADLINE
    ]
    rows += [[method, *numbers] for method, numbers in PUBLISHED]
    legend = f"<p><small>{_PUBLISHED_LEGEND}</small></p>"
    return "<h2>Beside published results</h2>" + _table(["", *labels], rows) + legend


def _groups(title: str, groups: Mapping[str, Any]) -> str:
    """Shows the headline of each group of images: all groups' ellipses, then their raw masks."""
    rows = []
    for compared in _HEADLINE:
        rows.append([compared])
        for name, group in groups.items():
            numbers = [_mean_and_std(group, compared, label) for label in _COLUMNS]
            rows.append([name, str(group["n"]), *numbers])
    return f"<h2>{title}</h2>" + _table(["", "images", *_COLUMNS], rows)


def _flags(rows: Sequence[Row]) -> str:
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
    header = ["", "images", "ellipse Dice, %", "lowest", "raw mask Dice, %", "lowest"]
    return (
        _table([*header, "ADF, mm", "largest"], table)
        + "<p><small>Set without looking at the reference; an image may have several.</small></p>"
    )


def _mean_and_std(metrics: Mapping[str, Any], compared: str, label: str) -> str:
    """Returns an entry of a table; empty where that isn't measured."""
    if label not in _HEADLINE[compared]:
        return ""
    values, factor = metrics[_HEADLINE[compared][label]], _factor(label)
    return f"{factor * values['mean']:.2f} ± {factor * values['std']:.2f}"


def _factor(label: str) -> int:
    return 100 if label.endswith("%") else 1


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table; a row of one text is a heading for those below it."""
    lines = []
    for row in [header, *rows]:
        cell = "th" if row is header or len(row) == 1 else "td"
        span = f' colspan="{len(header)}"' if len(row) == 1 else ""
        cells = "".join(f"<{cell}{span}>{html.escape(text)}</{cell}>" for text in row)
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _case(case: WorstCase) -> str:
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(case.picture, cv2.COLOR_RGB2BGR))
    name, metrics = case.row.name, case.row.metrics
    caption = (
        f"{name}: ellipse Dice {100 * metrics['ellipse_dice']:.1f} %, raw mask Dice "
        f"{100 * metrics['dice']:.1f} %, DF {metrics['hc_error_mm']:+.1f} mm"
    )
    source = base64.b64encode(jpeg.tobytes()).decode()
    return (
        f'<figure><img alt="{html.escape(name)}" src="data:image/jpeg;base64,{source}">'
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
