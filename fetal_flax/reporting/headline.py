"""What a terminal shows of an evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def headline(metrics: Mapping[str, Any], output: Path) -> str:
    """Returns what an evaluation measured, and where the rest is.

    Args:
        metrics: What `metrics.json` holds.
        output: The folder that has it.
    """
    lines: list[str] = []
    for title, of_ellipse in (
        ("ellipse of the mask's largest region:", True),
        ("raw mask:", False),
    ):
        lines.append(title)
        for name, values in metrics.items():
            is_metric = name not in ("n", "by", "run")
            if is_metric and name.startswith(("ellipse_", "hc_")) == of_ellipse:
                lines.append(f"  {name:22s} {values['mean']:8.4f} ± {values['std']:.4f}")
    missed = metrics["run"]["missed"]
    lines += [
        f"no head was found in {len(missed)} images" + f": {', '.join(missed)}" * bool(missed),
        f"{metrics['n']} images; report.html, metrics.json, per_image.csv and masks are in "
        f"{output}",
    ]
    return "\n".join(lines)
