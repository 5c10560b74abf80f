"""Which network `fetal-flax export` takes where none is given."""

import pytest

from fetal_flax import export
from fetal_flax.commands.main import main


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--format", "web"], "hc18-compact"),
        (["--format", "onnx"], "hc18-described"),
        (["--format", "web", "--checkpoint", "runs/hc18"], "runs/hc18"),
    ],
)
def test_a_page_has_the_compact_network_by_default(flags, expected, monkeypatch):
    taken = []

    def to_file(checkpoint, output, **settings):
        taken.append(str(checkpoint))
        return export.ExportReport(0, {})

    monkeypatch.setattr(export, "to_file", to_file)
    assert main(["export", "--output", "file", *flags]) == 0
    assert taken == [expected]
