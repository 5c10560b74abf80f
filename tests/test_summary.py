import functools
import io

import pytest
from rich.console import Console

from fetal_flax import summary
from fetal_flax.errors import InputError
from fetal_flax.models.complexity import summarize
from fetal_flax.summary import render, summaries

summarize_once = functools.cache(summarize)


@pytest.fixture(autouse=True)
def networks_are_traced_once(monkeypatch) -> None:
    monkeypatch.setattr(summary, "summarize", summarize_once)


def printed(name: str | None = None, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(summaries(name)))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_every_network_and_variant_is_printed_with_exact_totals():
    text = printed()
    for title in ("(described)", "(published)", "(compact)", "mobilenet_unet,", "unet,"):
        assert title in text
    for total in ("10,012,177", "25,253,893", "3,340,305", "13,057,089", "7,762,465"):
        assert total in text
    for trainable in ("23,030,597", "1,117,009"):
        assert trainable in text
    assert "…" not in text


def test_the_descriptions_figures_stand_below_those_of_its_network_alone():
    rows = [line.split() for line in printed("mobilenet_aspp_se_unet").splitlines()]
    described = [row for row in rows if row[:1] == ["description"]]
    assert described == 3 * [["description", "3,403,809", "1,192,737", "2,211,072", "13.0", "2.80"]]
    assert "description" not in printed("unet")


def test_rows_hold_megabytes_and_twice_the_macs():
    rows = [line.split() for line in printed("unet").splitlines()]
    total = next(row for row in rows if row[:1] == ["total"])
    assert total == ["total", "7,762,465", "7,762,465", "0", "31.0", "12,033,458,176", "24.07"]


def test_an_unknown_network_is_an_input_error():
    with pytest.raises(InputError, match="no network vgg: choose one of mobilenet_aspp_se_unet"):
        summaries("vgg")
