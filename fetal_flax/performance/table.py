"""A benchmark's figures on a terminal."""

import rich.console

from fetal_flax._util import console
from fetal_flax.performance.benchmark import Report


def render(report: Report) -> rich.console.Group:
    """Returns the report for `rich` to print."""
    machine = report.machine
    height, width = report.image_size
    table = console.table(
        ("", "batch", "devices", "ms", "quartiles", "images/s", "compile", "MB", "roof")
    )
    for timing in report.timings:
        low, high = (1e3 * second for second in timing.quartiles)
        temporaries = timing.temporaries_bytes
        table.add_row(
            timing.name,
            str(timing.batch_size),
            str(timing.devices),
            f"{1e3 * timing.seconds:.1f}",
            f"{low:.0f}–{high:.0f}",
            f"{timing.images_per_second:.1f}",
            f"{timing.compile_seconds:.1f} s",
            "" if temporaries is None else f"{temporaries / 1e6:.0f}",
            f"{timing.roofline_share:.0%}",
        )
    peak = "" if report.peak_bytes is None else f"; peak memory {report.peak_bytes / 1e6:,.0f} MB"
    return rich.console.Group(
        f"{report.network}, {height}×{width}, on {machine.devices} × {machine.device}; "
        f"jax {machine.jax}, Python {machine.python}",
        f"matrix product {machine.product_flops / 1e9:,.0f} GFLOP/s, copy "
        f"{machine.copy_bytes / 1e9:,.1f} GB/s{peak}",
        table,
        "MB: temporaries on each device, XLA's plan. Roof: the least time that the network's "
        "operations need at the rates above (the roofline), as a share of the time taken.",
    )
