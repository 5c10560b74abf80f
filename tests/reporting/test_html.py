import base64
import html.parser
import re

import cv2
import numpy as np
import pytest

from fetal_flax.reporting.html import PUBLISHED, WorstCase, write_report
from fetal_flax.reporting.tables import Row, write_metrics

NAMES = ("dice", "iou", "hausdorff_mm", "hausdorff95_mm", "assd_mm")


class Page(html.parser.HTMLParser):
    """Collects tags and checks that they are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def make(tmp_path):
    def make(
        count: int = 5,
        *,
        missed: tuple[str, ...] = (),
        curves: tuple[bytes, ...] = (),
        dataset: str = "hc18",
        folds: int = 1,
    ) -> str:
        rng = np.random.default_rng(0)
        references = rng.uniform(60, 300, count)
        errors = rng.normal(0, 2, count)
        rows = [
            Row(
                f"{index:03d}_HC",
                dict.fromkeys(NAMES, 0.9 + 0.01 * index)
                | {"hc_error_mm": error, "hc_abs_error_mm": abs(error)},
                {
                    "hc_mm": reference + error,
                    "hc_reference_mm": reference,
                    "trimester": "second",
                    "flags": "several_components low_confidence" if index == 1 else "",
                }
                | ({"fold": index % folds} if folds > 1 else {}),
            )
            for index, (reference, error) in enumerate(zip(references, errors, strict=True))
        ]
        run = {
            "model": {"name": "unet"},
            "dataset": dataset,
            "split": "all",
            "checkpoint": "runs/<b>",
            "image_size": [64, 96],
            "tta": "none",
            "missed": list(missed),
        }
        picture = np.zeros((30, 40, 3), np.uint8)
        picture[..., 0] = 255
        worst = [WorstCase("001_HC & co", 0.5, -3.25, picture)]
        path = tmp_path / "report.html"
        write_report(path, write_metrics(tmp_path, rows, run=run), rows, worst, curves=curves)
        return path.read_text()

    return make


def test_the_page_is_whole_and_needs_no_network(make):
    text = make()
    page = Page(text)
    assert not page.open
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 5 and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?:|url\(|<script|<link", text)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    viewport = next(a for tag, a in page.tags if a.get("name") == "viewport")
    assert "width=device-width" in viewport["content"]


def test_names_from_outside_are_escaped(make):
    text = make(missed=("<script>",))
    assert "runs/&lt;b&gt;" in text and "001_HC &amp; co: Dice 50.0 %, DF -3.2 mm" in text
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_the_headline_has_the_metrics_in_percent_and_millimetres(make):
    text = make(2)
    assert "<td>Dice, %</td><td>90.50 ± 0.71</td><td>90.50</td>" in text
    assert "<td>ADF, mm</td>" in text


def test_missed_heads_are_said(make):
    assert "A head was found in every image" in make()
    assert "No head was found in 2 images" in make(missed=("a", "b"))


def test_the_worst_case_is_the_picture(make):
    source = re.search(r"data:image/jpeg;base64,([^\"]+)", make())
    assert source
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(source[1]), np.uint8), 1)
    assert picture is not None and picture.shape == (30, 40, 3)
    np.testing.assert_allclose(picture.mean((0, 1)), (0, 0, 255), atol=3)  # BGR


def test_training_curves_are_shown_where_there_are_any(make):
    assert "<h2>Training</h2>" not in make()
    text = make(curves=(b"curves", b"and more"))
    assert all(base64.b64encode(png).decode() in text for png in (b"curves", b"and more"))


def test_a_row_stands_beside_published_ones_where_the_data_set_is_theirs(make):
    text = make(2)
    assert "<td>This network, 2 images</td><td>90.50 ± 0.71</td>" in text
    for method, numbers in PUBLISHED:
        assert f"<td>{method}</td>" in text and f"<td>{numbers[0]}</td>" in text
    assert PUBLISHED[0][0] not in make(dataset="fetal_phantom")


def test_trimesters_and_folds_have_their_rows(make):
    text = make(5, folds=2)
    assert "<tr><td>second</td><td>5</td><td>92.00 ± 1.58</td>" in text
    assert "<tr><td>0</td><td>3</td>" in text and "<tr><td>1</td><td>2</td>" in text
    assert "By fold" not in make(5)


def test_flags_have_their_images_counted(make):
    text = make(4)
    for flag, count, dice in (("none", 3, 91.67), ("several components", 1, 91.0)):
        assert f"<tr><td>{flag}</td><td>{count}</td><td>{dice:.2f}</td>" in text
    assert "low ellipse agreement" not in text


def test_a_single_image_makes_a_page(make):
    assert not Page(make(1)).open
