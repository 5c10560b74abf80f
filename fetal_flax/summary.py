"""`fetal-flax summary`: every network's parts, beside the description's own figures."""

from collections.abc import Sequence

import rich.console
import rich.table

from fetal_flax._util import console
from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.models.complexity import DESCRIPTION, Part, Summary, summarize
from fetal_flax.models.registry import NETWORKS

CONFIGS = (
    (ModelConfig(variant="described"), False),
    (ModelConfig(variant="published"), False),
    (ModelConfig(variant="compact"), False),
    (ModelConfig(name="mobilenet_unet"), True),
    (ModelConfig(name="unet"), False),
)
"""Every network and variant, and whether its encoder learns by default."""
_PARAMETER_BYTES = 4
_COLUMNS = ("part", "parameters", "trainable", "frozen", "MB", "MACs", "GFLOPs")
_NOTE = (
    "MACs: multiply-accumulates of one image's forward pass in convolutions and dense layers, "
    "every tap of every kernel counted. A MAC is two FLOPs; MB are 10⁶ bytes of float32 "
    "parameters."
)


def summaries(name: str | None = None) -> list[Summary]:
    """Summarizes a network's variants with the default settings, or those of every network.

    Args:
        name: A network's name in `ModelConfig`; None takes them all.

    Raises:
        InputError: There is no such network.
    """
    chosen = [(config, trains) for config, trains in CONFIGS if name in (None, config.name)]
    if not chosen:
        raise InputError(f"there is no network {name}: choose one of {', '.join(NETWORKS)}")
    return [summarize(config, encoder_trainable) for config, encoder_trainable in chosen]


def render(summaries: Sequence[Summary]) -> rich.console.Group:
    """Returns a table per summary, and a note on what is counted, for `rich` to print."""
    return rich.console.Group(*map(_table, summaries), _NOTE)


def _table(summary: Summary) -> rich.table.Table:
    """Returns one row per part and the total, numbers exact."""
    table = console.table(_COLUMNS, title=_title(summary))
    for part in summary.parts:
        table.add_row(*_row(part))
    table.add_section()
    table.add_row(*_row(summary.total), style="bold")
    if summary.config.name == "mobilenet_aspp_se_unet":
        table.add_row(*_description_row(), style="dim")
    return table


def _title(summary: Summary) -> str:
    config = summary.config
    height, width = summary.image_size
    encoder = [part for part in summary.parts if part.name == "encoder"]
    state = ", encoder " + ("frozen" if encoder[0].frozen else "trainable") if encoder else ""
    return f"{config.title}, {height}×{width}×{config.in_channels}{state}"


def _row(part: Part) -> tuple[str, ...]:
    return (
        part.name,
        f"{part.parameters:,}",
        f"{part.trainable:,}",
        f"{part.frozen:,}",
        f"{part.parameters * _PARAMETER_BYTES / 1e6:.1f}",
        f"{part.macs:,}",
        f"{2 * part.macs / 1e9:.2f}",
    )


def _description_row() -> tuple[str, ...]:
    return (
        "description",
        f"{DESCRIPTION['parameters']:,}",
        f"{DESCRIPTION['trainable']:,}",
        f"{DESCRIPTION['frozen']:,}",
        f"{DESCRIPTION['megabytes']:.1f}",
        "",
        f"{DESCRIPTION['gflops']:.2f}",
    )
