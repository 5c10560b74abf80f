import base64
import functools
import html.parser
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from fetal_flax.reporting.html import PUBLISHED, WorstCase, write_report
from fetal_flax.reporting.tables import Row, write_metrics

OF_MASK = ("dice", "iou", "hausdorff_mm", "hausdorff95_mm", "assd_mm")
OF_ELLIPSE = tuple(f"ellipse_{name}" for name in OF_MASK if name != "iou")


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


def make_report(
    folder: Path,
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
            dict.fromkeys(OF_ELLIPSE, 0.9 + 0.01 * index)
            | dict.fromkeys(OF_MASK, 0.8 + 0.01 * index)
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
    numbers = {"ellipse_dice": 0.5, "dice": 0.25, "hc_error_mm": -3.25}
    worst = [WorstCase(Row("001_HC & co", numbers, {}), picture)]
    path = folder / "report.html"
    write_report(path, write_metrics(folder, rows, run=run), rows, worst, curves=curves)
    return path.read_text()


@pytest.fixture
def make(tmp_path, empty_charts):
    return functools.partial(make_report, tmp_path)


def test_the_page_is_whole_and_needs_no_network(tmp_path):
    text = make_report(tmp_path)
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
    assert "runs/&lt;b&gt;" in text
    assert "001_HC &amp; co: ellipse Dice 50.0 %, raw mask Dice 25.0 %, DF -3.2 mm" in text
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_the_headline_has_the_ellipse_then_the_mask_in_percent_and_millimetres(make):
    text = make(2)
    places = [
        text.index(part)
        for part in (
            '<tr><th colspan="4">Ellipse of the largest region</th></tr>',
            "<td>Dice, %</td><td>90.50 ± 0.71</td><td>90.50</td>",
            "<td>Hausdorff, mm</td><td>0.91 ± 0.01</td>",
            "<td>ADF, mm</td>",
            '<tr><th colspan="4">Raw mask</th></tr>',
            "<td>Dice, %</td><td>80.50 ± 0.71</td><td>80.50</td>",
            "<td>IoU, %</td><td>80.50 ± 0.71</td>",
        )
    ]
    assert places == sorted(places)


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
    ours = "<td>This network, 2 images: ellipse of the largest region</td><td>90.50 ± 0.71</td>"
    mask = "<td>This network, 2 images: raw mask</td><td>80.50 ± 0.71</td><td>0.81 ± 0.01</td>"
    assert text.index(ours) < text.index(f"{mask}<td></td><td></td>") < text.index(PUBLISHED[0][0])
    for method, numbers in PUBLISHED:
        assert f"<td>{method}</td>" in text and f"<td>{numbers[0]}</td>" in text
    assert PUBLISHED[0][0] not in make(dataset="fetal_phantom")


def test_trimesters_and_folds_have_their_rows(make):
    text = make(5, folds=2)
    trimester, fold = (text.index(f"<h2>By {name}</h2>") for name in ("trimester", "fold"))
    ellipses = text.index("<tr><td>second</td><td>5</td><td>92.00 ± 1.58</td>")
    masks = text.index("<tr><td>second</td><td>5</td><td>82.00 ± 1.58</td>")
    assert trimester < ellipses < masks < fold
    for dice in (92, 82):
        assert f"<tr><td>0</td><td>3</td><td>{dice}.00 ± 2.00</td>" in text
        assert f"<tr><td>1</td><td>2</td><td>{dice}.00 ± 1.41</td>" in text
    assert "By fold" not in make(5)


def test_flags_have_their_images_counted(make):
    text = make(4)
    for flag, count, dice, lowest in (("none", 3, 91.67, 90), ("several components", 1, 91, 91)):
        of_ellipse = f"<td>{dice:.2f}</td><td>{lowest:.2f}</td>"
        of_mask = f"<td>{dice - 10:.2f}</td><td>{lowest - 10:.2f}</td>"
        assert f"<tr><td>{flag}</td><td>{count}</td>{of_ellipse}{of_mask}" in text
    assert "low ellipse agreement" not in text


def test_a_single_image_makes_a_page(make):
    assert not Page(make(1)).open
