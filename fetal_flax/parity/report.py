"""The parity report: limits, Markdown for people, JSON for programs."""

import dataclasses
import datetime
import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from fetal_flax.parity.compare import Comparison, GroupError, StageError
from fetal_flax.parity.settings import ParitySettings

# Relative, norm-wise per tensor.
LIMIT = {"float64": 1e-10, "float32": 2e-5}
"""Of stages; in float64 also of loss, gradients and batch statistics."""
LOGITS_OVER_STD = {"float64": 1e-10, "float32": 2e-5}
"""Of the largest difference of logits over their standard deviation."""
STEPS_LIMIT = 1e-8
"""Of parameters after the optimizer steps, in float64."""

_PACKAGES = ("fetal_flax", "jax", "flax", "optax", "torch", "torchvision")


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole comparison."""

    reference: str
    sha256: str
    network: str
    parameters: int
    images: list[str]
    pos_weight: float
    settings: ParitySettings
    environment: dict[str, str]
    comparisons: list[Comparison]

    @property
    def failures(self) -> list[str]:
        """What exceeds the limits, a sentence each."""
        return [line for comparison in self.comparisons for line in failures(comparison)]

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return dataclasses.asdict(self) | {"agrees": not self.failures, "failures": self.failures}


def failures(comparison: Comparison) -> list[str]:
    """Returns a sentence for each figure beyond its limit.

    Gradients and training in float32 have none: a ReLU that rounding opens makes whole percents.
    """
    return list(_failures(comparison))


def _failures(comparison: Comparison) -> Iterator[str]:
    precision = comparison.precision

    def beyond(what: str, value: float, limit: float) -> Iterator[str]:
        # Written so that NaN is beyond every limit.
        if not value <= limit:
            yield f"{precision}: {what} is off by {value:.1e}, the limit is {limit:.0e}"

    for row in comparison.stages:
        yield from beyond(f"stage {row.stage}", row.error.rms_relative, LIMIT[precision])
    if comparison.logits_over_std is not None:
        limit = LOGITS_OVER_STD[precision]
        yield from beyond("logits over their deviation", comparison.logits_over_std, limit)
    if comparison.frozen_unchanged is False:
        yield f"{precision}: frozen parameters have changed"
    if precision == "float64":
        if comparison.loss_relative is not None:
            yield from beyond("the loss", comparison.loss_relative, LIMIT[precision])
        for what, rows in (
            ("the gradient of", comparison.gradients),
            ("the updated statistic", comparison.batch_stats),
        ):
            for row in rows:
                yield from beyond(f"{what} {row.worst}", row.worst_rms_relative, LIMIT[precision])
        for row in comparison.steps:
            what = f"{row.worst} after step {row.step}"
            yield from beyond(what, row.worst_rms_relative, STEPS_LIMIT)


def environment() -> dict[str, str]:
    """Returns versions, devices and the date."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES} | {
        "python": platform.python_version(),
        "jax device": jax.devices()[0].device_kind,
        "torch device": "cpu",
        "date": datetime.date.today().isoformat(),
    }


def markdown(report: Report) -> str:
    """Returns the report as Markdown."""
    settings = report.settings
    height, width = settings.image_size
    lines = [
        f"# Parity with PyTorch: {report.network}",
        "",
        _verdict(report),
        "",
        f"- Reference: `{report.reference}`, SHA-256 `{report.sha256[:16]}…`, "
        f"{report.parameters:,} parameters"
        + ("; norms redrawn at random" if settings.randomise_norms else ""),
        f"- Images: {len(report.images)} in batches of {settings.batch_size} at {height}×{width}: "
        + ", ".join(report.images),
    ]
    if any(comparison.gradients for comparison in report.comparisons):
        lines.append(
            f"- Training: {settings.loss.dice_weight} · Dice loss per {settings.loss.dice_over} + "
            f"{settings.loss.bce_weight} · BCE (pos_weight {report.pos_weight:.3f}), Adam at "
            f"{settings.optimizer.learning_rate} with L2 {settings.optimizer.l2}, "
            f"{_encoder_sentence(settings)}; no dropout"
        )
    lines += [
        "- " + ", ".join(f"{name} {value}" for name, value in report.environment.items()),
        "",
        "RMS relative: norm of the difference over the norm of PyTorch's tensor. Max relative: "
        "largest ratio of difference and PyTorch's element, elements below a thousandth of the "
        "tensor's RMS left out. A tensor whose norm is below a ten-thousandth of its group's is "
        "measured against that, since a gradient that cancels keeps few digits.",
    ]
    for comparison in report.comparisons:
        lines += ["", f"## {comparison.precision}", "", *_comparison(comparison)]
    return "\n".join(lines) + "\n"


def _verdict(report: Report) -> str:
    if report.failures:
        return "**Does not agree.** " + "; ".join(report.failures) + "."
    parts = []
    for comparison in report.comparisons:
        if comparison.logits_over_std is None:
            worst = max(row.error.rms_relative for row in comparison.stages)
            parts.append(f"{comparison.precision}: every stage to {worst:.1e}")
            continue
        part = (
            f"{comparison.precision}: logits to {comparison.logits_over_std:.1e} of their deviation"
        )
        if comparison.precision == "float64":
            part += (
                f", every gradient to {_worst(comparison.gradients):.1e}, every updated statistic "
                f"to {_worst(comparison.batch_stats):.1e}"
            )
            if comparison.steps:
                part += (
                    f", every parameter after {len(comparison.steps)} steps to "
                    f"{comparison.steps[-1].worst_rms_relative:.1e}"
                )
        parts.append(part)
    return f"**Agrees.** {'; '.join(parts)}."


def _encoder_sentence(settings: ParitySettings) -> str:
    if settings.train_encoder:
        return "encoder learning at a tenth of the rate"
    statistics = {"running": "running", "batch": "batch (drifting)"}[settings.frozen_batch_norm]
    return f"encoder frozen with {statistics} statistics"


def _comparison(comparison: Comparison) -> Iterator[str]:
    yield from _table(
        ("stage", "PyTorch module", "shape", "max abs", "max relative", "RMS relative"),
        [_stage_row(row) for row in comparison.stages],
    )
    yield ""
    if comparison.jump:
        yield f"The error jumps at **{comparison.jump}**, to over a hundredfold."
    else:
        yield "The error jumps nowhere: no stage has a hundredfold of what those before it have."
    if comparison.logits is None:
        return
    yield ""
    yield from _table(
        ("output", "figure"),
        [
            ("logits, max abs", f"{comparison.logits.max_abs:.1e}"),
            ("logits, max abs over their deviation", f"{comparison.logits_over_std:.1e}"),
            ("probability, max abs", f"{comparison.probability_max_abs:.1e}"),
            (
                "mask, pixels that differ",
                f"{comparison.mask_pixels_differing} of {comparison.mask_pixels}",
            ),
            ("loss, Flax", f"{comparison.loss:.15g}"),
            ("loss, PyTorch", f"{comparison.torch_loss:.15g}"),
            ("loss, relative", f"{comparison.loss_relative:.1e}"),
        ],
    )
    yield ""
    yield from _groups("gradients of", comparison.gradients)
    yield ""
    yield from _groups("updated statistics of", comparison.batch_stats)
    if comparison.steps:
        yield ""
        yield from _table(
            ("step", "loss, Flax", "loss, PyTorch", "parameters, RMS relative", "worst tensor", ""),
            [
                (
                    str(row.step),
                    f"{row.loss:.12g}",
                    f"{row.torch_loss:.12g}",
                    f"{row.parameters_rms_relative:.1e}",
                    row.worst,
                    f"{row.worst_rms_relative:.1e}",
                )
                for row in comparison.steps
            ],
        )
        yield ""
        changed = "left as they came, to the bit" if comparison.frozen_unchanged else "**changed**"
        yield f"Frozen parameters: {changed}."


def _stage_row(row: StageError) -> tuple[str, ...]:
    shape, error = "×".join(map(str, row.shape)), row.error
    numbers = (error.max_abs, error.max_relative, error.rms_relative)
    return (row.stage, f"`{row.torch}`", shape, *(f"{number:.1e}" for number in numbers))


def _groups(what: str, rows: Sequence[GroupError]) -> Iterator[str]:
    header = [what, "tensors", "RMS relative", "worst tensor", "its RMS relative"]
    exact = any(row.ours_from_exact is not None for row in rows)
    if exact:
        header += ["Flax from float64", "PyTorch from float64"]
    cells = []
    for row in rows:
        line = [row.group, str(row.tensors), f"{row.rms_relative:.1e}"]
        line += [row.worst, f"{row.worst_rms_relative:.1e}"]
        if exact:
            line += [f"{row.ours_from_exact:.1e}", f"{row.torch_from_exact:.1e}"]
        cells.append(line)
    yield from _table(header, cells)


def _worst(rows: Sequence[GroupError]) -> float:
    return max(row.worst_rms_relative for row in rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
