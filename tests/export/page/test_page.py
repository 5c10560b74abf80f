"""The page's JavaScript against Python: function by function in node, and whole in Chromium.

`pytest -m "slow or not slow" -rP tests/export/page` prints the figures of docs/page.md.
"""

import csv
import json
import re
import time
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest

import fetal_flax as ff
from fetal_flax.checkpoints import load_checkpoint
from fetal_flax.data.hc18 import read_pixel_sizes
from fetal_flax.data.images import decode_gray, read_gray, resize_image
from fetal_flax.data.phantoms import make_phantom
from fetal_flax.errors import InputError
from fetal_flax.export import ExportSettings, onnx_model
from fetal_flax.export.web import write_page
from fetal_flax.inference.assessment import assess, native_mask
from fetal_flax.inference.predict import predict
from fetal_flax.inference.sources import check_image
from fetal_flax.measurement.ellipse import Ellipse
from fetal_flax.measurement.gestational_age import gestational_age
from fetal_flax.measurement.head import OUTLINE_PX, measure_head
from fetal_flax.measurement.quality import size_spread

NETWORK = "hc18-compact"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def uneven_masks(count: int, seed: int = 0) -> list[np.ndarray]:
    """Ellipses with an uneven edge, further regions and holes; some leave the image."""
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(count):
        height, width = rng.integers(90, 260, 2)
        center = (int(rng.uniform(0.2, 0.8) * width), int(rng.uniform(0.2, 0.8) * height))
        axes = (int(rng.integers(15, width // 2)), int(rng.integers(15, height // 2)))
        mask = np.zeros((height, width), np.float32)
        cv2.ellipse(mask, center, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        noise = rng.normal(size=mask.shape).astype(np.float32)
        mask += 4 * cv2.GaussianBlur(noise, (0, 0), 5)
        masks.append(mask > 0.5)
    return masks


def hc18_masks(shared_dir: Path) -> list[np.ndarray]:
    """Annotated masks of HC18, filled."""
    masks = []
    for path in sorted((shared_dir / "hc18/training_set").glob("*_Annotation.png"))[::33]:
        outline = decode_gray(path.read_bytes())
        contours, _ = cv2.findContours(outline, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        mask = np.zeros_like(outline)
        cv2.drawContours(mask, contours, -1, 255, cv2.FILLED)
        masks.append(mask > 0)
    return masks


def check_heads(masks, outline_px, call_in_node) -> float:
    """Compares heads, and returns the largest difference of a circumference, in pixels."""
    largest = 0.0
    calls = [("measureHead", mask, outline_px) for mask in masks]
    for mask, found in zip(masks, call_in_node("measurement.js", calls), strict=True):
        head = measure_head(mask, outline_px=outline_px)
        if head is None:
            assert found is None
            continue
        assert found["touchesBorder"] == head.touches_border
        assert found["components"] == head.components
        assert found["ellipseAgreement"] == pytest.approx(head.ellipse_agreement, abs=1e-4)
        for name, ellipse in (("ellipse", head.ellipse), ("edgeEllipse", head.edge_ellipse)):
            theirs = Ellipse(*(found[name][key] for key in ELLIPSE))
            # Pixels; OpenCV returns float32.
            np.testing.assert_allclose(
                theirs.points(*CIRCLE), ellipse.points(*CIRCLE), rtol=0, atol=2e-3
            )
            difference = abs(theirs.circumference - ellipse.circumference)
            assert difference < 2e-3
            largest = max(largest, difference)
    return largest


ELLIPSE = ("centerX", "centerY", "semiMajor", "semiMinor", "angle")
TURN = np.linspace(0, 2 * np.pi, 16, endpoint=False)
# Half a turn brings an ellipse back to itself, and its angle from pi/2 to -pi/2.
CIRCLE = (np.cos(TURN), np.sin(TURN))


def test_images_are_resized_to_the_same_grey_levels(call_in_node):
    rng = np.random.default_rng(0)
    sizes = ((540, 800), (571, 799), (256, 384), (100, 90), (37, 301), (128, 192), (64, 900))
    images = [rng.integers(0, 256, size, np.uint8) for size in sizes]
    calls = [("resizeImage", image, 128, 192) for image in images]
    for image, resized in zip(images, call_in_node("measurement.js", calls), strict=True):
        np.testing.assert_array_equal(resized, resize_image(image, (128, 192)))


def test_colour_becomes_the_same_grey(call_in_node):
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (64, 96, 4), np.uint8)
    [gray] = call_in_node("measurement.js", [("luma", rgba.ravel().tolist(), 96, 64)])
    encoded = cv2.imencode(".png", cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA))[1].tobytes()
    np.testing.assert_array_equal(gray, decode_gray(encoded))


def test_logits_give_the_same_mask(call_in_node):
    rng = np.random.default_rng(0)
    shapes = ((540, 800), (100, 90), (256, 384), (128, 192))
    logits = [rng.normal(size=(128, 192)).astype(np.float32) for _ in shapes]
    calls = [("nativeMask", map_, *shape) for map_, shape in zip(logits, shapes, strict=True)]
    results = call_in_node("measurement.js", calls)
    for map_, shape, mask in zip(logits, shapes, results, strict=True):
        np.testing.assert_array_equal(mask, native_mask(map_, shape))


def test_heads_in_uneven_masks(call_in_node):
    check_heads(uneven_masks(40), 1.4, call_in_node)


def test_heads_in_noise_lines_and_empty_masks(call_in_node):
    rng = np.random.default_rng(0)
    masks = [rng.random((60, 80)) < share for share in (0.1, 0.3, 0.5, 0.6, 0.7, 0.9)]
    masks += [np.zeros((20, 20), bool), np.ones((20, 20), bool)]
    for thickness in range(1, 6):
        line = np.zeros((30, 30), bool)
        line[5 : 5 + thickness, 7:20] = True
        masks.append(line)
    check_heads(masks, 0.0, call_in_node)


def test_heads_of_phantoms(call_in_node):
    masks = [make_phantom(0, index, height=270, width=400).mask > 0 for index in range(12)]
    check_heads(masks, OUTLINE_PX["fetal_phantom"], call_in_node)


def test_heads_of_hc18(call_in_node, shared_dir):
    masks = hc18_masks(shared_dir)
    largest = check_heads(masks, OUTLINE_PX["hc18"], call_in_node)
    print(f"{len(masks)} annotated masks: circumferences differ by at most {largest:.1g} pixels")


def test_flags_and_confidence(call_in_node):
    rng = np.random.default_rng(1)
    logits = []
    for sharpness in (0.02, 0.1, 0.4, 3):
        for mask in uneven_masks(4, seed=int(100 * sharpness)):
            small = cv2.resize(mask.astype(np.float32), (64, 64)) - 0.5
            noise = 0.01 * rng.normal(size=small.shape)
            logits.append((20 * sharpness * (small + noise)).astype(np.float32))
    logits.append(np.full((64, 64), -3, np.float32))
    logits.append(np.full((64, 64), 3, np.float32))
    results = call_in_node("measurement.js", [("assess", map_, 135, 200, 1.4) for map_ in logits])
    sizes = (None, 0.05, 0.5, 2.0)
    both = [
        ({name: value for name, value in found.items() if name != "mask"}, size)
        for found in results
        for size in sizes
    ]
    judged = iter(call_in_node("measurement.js", [("judge", *pair) for pair in both]))
    flags = set()
    for map_, found in zip(logits, results, strict=True):
        for size in sizes:
            expected = assess(map_, (135, 200), outline_px=1.4, pixel_size_mm=size)
            assert next(judged) == list(expected.flags)
            flags |= {*expected.flags}
        assert found["confidence"] == pytest.approx(expected.quality.confidence, abs=1e-12)
        assert found["spread"] == pytest.approx(size_spread(map_), abs=1e-12)
    assert len(flags) == 8


def test_circumference_of_thin_and_round_ellipses(call_in_node):
    minors = [0.001, 0.1, 1.0, 25.0, 99.0, 100.0]
    calls = [("circumference", {"semiMajor": 100.0, "semiMinor": minor}) for minor in minors]
    expected = [Ellipse(0, 0, 100.0, minor, 0).circumference for minor in minors]
    np.testing.assert_allclose(call_in_node("measurement.js", calls), expected, rtol=1e-12)


def test_gestational_age(call_in_node):
    values = [0.0, 67.9, 68.0, 147.4, 147.5, 221.5, 300.0, 326.5, 360.0, 360.1]
    ages = call_in_node("measurement.js", [("gestationalAge", value) for value in values])
    for value, age in zip(values, ages, strict=True):
        expected = gestational_age(value)
        assert age == (expected and pytest.approx(expected._asdict()))


def test_the_outline_runs_around_the_mask(call_in_node):
    masks = [*uneven_masks(6), np.eye(5, dtype=bool), np.zeros((4, 4), bool)]
    paths = call_in_node("drawing.js", [("outlinePath", mask) for mask in masks])
    for mask, path in zip(masks, paths, strict=True):
        crossings = np.zeros((mask.shape[0], mask.shape[1] + 1), int)
        for ring in re.findall(r"M([^Z]*)Z", path):
            corners = [tuple(map(float, corner.split())) for corner in ring.split("L")]
            for (x, y), (to_x, to_y) in zip(corners, [*corners[1:], corners[0]], strict=True):
                assert abs(x - to_x) + abs(y - to_y) == 1
                if x == to_x:
                    crossings[int(min(y, to_y) + 0.5), int(x + 0.5)] += 1
        # A pixel is inside where a ray from the left has crossed the path an odd number of times.
        np.testing.assert_array_equal(np.cumsum(crossings, axis=1)[:, :-1] % 2, mask)


HEADER, TWO = "filename,pixel size(mm)\n", "a.png,0.1\nb ü.png,0.25\n"
PLAIN = HEADER + TWO
CSVS = (
    PLAIN,
    PLAIN.replace(",", ";").replace("0.", "0,"),
    PLAIN.replace(",", "\t"),
    "sep=!\n" + PLAIN.replace(",", "!"),
    "# made by hand\n#,;\n\n,,\n" + HEADER + "\n,,\n" + TWO + ";;\n\0\0",
    'id,"File Name",pixel_size_mm,\r\n0,"a.png",0.1 mm,\r\n1,"b ü.png","0,25MM",x\r\n',
    HEADER + " test_set/A.PNG , 1E-1\rC:\\scans\\b ü.png,\t+2.5e-01\r",
    unicodedata.normalize("NFD", PLAIN),
    PLAIN + "a.png,0.1\nother.png,NA\nz.png,0.1\nz.png,0.2\nshort\n",
)
NO_SIZES = ("0", "-0.1", "1000", "NaN", "inf", "1,000", "0x1", "", "0.1 px", "0.1\na.png,0.2")


def test_pixel_sizes_are_read_from_the_same_csvs_as_in_python(call_in_node, tmp_path):
    written = [text.encode() for text in CSVS]
    written += [PLAIN.encode(encoding) for encoding in ("utf-8-sig", "utf-16", "cp1252")]
    texts = call_in_node("csv.js", [("decodeText", [*data]) for data in written])
    texts += [f"{HEADER}a.png,{size}\n" for size in NO_SIZES]
    found = call_in_node("csv.js", [("readPixelSizes", text, "sizes.csv") for text in texts])
    expected = {"a.png": 0.1, "b ü.png": 0.25}
    names = [*expected]
    calls = [("findRow", {"asMap": [*rows.items()]}, name) for rows in found for name in names]
    rows = iter(call_in_node("csv.js", calls))
    for data in written:
        (tmp_path / "sizes.csv").write_bytes(data)
        assert read_pixel_sizes(tmp_path / "sizes.csv", names) == expected
        assert {name: next(rows)["size"] for name in names} == expected
    for size in NO_SIZES:
        (tmp_path / "sizes.csv").write_text(f"{HEADER}a.png,{size}\n")
        with pytest.raises(InputError):
            read_pixel_sizes(tmp_path / "sizes.csv", names)
        assert "sizes.csv" in next(rows)["problem"]
        assert next(rows) is None


@pytest.fixture(scope="module")
def page(onnxruntime_web, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "measure.html"
    checkpoint = load_checkpoint(NETWORK)
    model = onnx_model(checkpoint, ExportSettings(input_dtype="uint8")).SerializeToString()
    write_page(checkpoint, model, onnxruntime_web, path)
    return path


def hc18_in_other_files(hc18: Path, folder: Path) -> tuple[Path, Path]:
    """Writes a folder of HC18's images and a CSV of their pixel sizes.

    Some become JPEG, grey and coloured, and PNG in colour and of 16 bits.
    """
    rows = read_csv(hc18 / "training_set_pixel_size_and_HC.csv")
    by_name = {row["filename"]: row["pixel size(mm)"] for row in rows}
    images = folder / "images"
    images.mkdir()
    lines = ["filename,pixel size(mm)"]
    for index, path in enumerate(sorted((hc18 / "training_set").glob("*HC.png"))[::40]):
        gray = decode_gray(path.read_bytes())
        tinted = np.stack([gray // 2, gray, gray // 3 * 2], -1)
        as_file = {
            1: (".jpg", gray),
            2: (".jpeg", tinted),
            3: (".png", tinted),
            4: (".png", gray.astype(np.uint16) * 257),
        }
        suffix, pixels = as_file.get(index, (".png", gray))
        cv2.imwrite(str(images / f"{path.stem}{suffix}"), pixels)
        lines.append(f"{path.stem}{suffix},{by_name[path.name]}")
    sizes = folder / "sizes.csv"
    sizes.write_text("\n".join(lines))
    return images, sizes


MEASURED = "document.getElementById('status').textContent.startsWith('Measured')"


@pytest.mark.slow
def test_the_page_measures_as_python_does(page, open_page, shared_dir, tmp_path):
    images, sizes = hc18_in_other_files(shared_dir / "hc18", tmp_path)
    names = sorted(images.iterdir())
    predict(Path(NETWORK), images, tmp_path / "python", pixel_size_csv=sizes, save_json=True)
    expected = json.loads((tmp_path / "python" / "measurements.json").read_text())

    browser = open_page(page)
    browser.save_downloads(tmp_path)
    browser.wait("document.getElementById('status').textContent === 'Ready.'")
    ready = browser.evaluate("performance.now()") / 1000
    begun = time.monotonic()
    browser.choose(sizes, names[0])
    browser.wait(MEASURED)
    first = time.monotonic() - begun
    browser.choose(*names[1:])
    browser.wait(f"{MEASURED} && document.getElementById('rows').rows.length === {len(names)}")
    browser.evaluate("document.getElementById('download').click()")
    end = time.monotonic() + 30
    while not (tmp_path / "measurements.csv").exists() and time.monotonic() < end:
        time.sleep(0.1)
    found = read_csv(tmp_path / "measurements.csv")

    assert len(found) == len(expected) > 15
    print(f"page of {page.stat().st_size / 1e6:.2f} MB: ready after {ready:.1f} s, then")
    print(f"{first:.2f} s to the first result; {len(found)} images, largest differences:")
    for column in ("hc_mm", "bpd_mm", "ofd_mm", "ga_weeks", "ellipse_agreement", "confidence"):
        both = [
            (float(theirs[column]), ours[column])
            for ours, theirs in zip(expected, found, strict=True)
            if ours[column] is not None
        ]
        print(column, f"{max(abs(a - b) for a, b in both):.1g}")
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs["name"] == ours["name"]
        assert theirs["flags"] == ours["flags"], ours["name"]
        assert theirs["components"] == str(ours["components"]), ours["name"]
        assert theirs["touches_border"] == str(ours["touches_border"]), ours["name"]
        assert float(theirs["pixel_size_mm"]) == ours["pixel_size_mm"]
        for column in ("hc_mm", "bpd_mm", "ofd_mm"):
            difference = abs(float(theirs[column]) - ours[column])
            assert difference < 0.3, (ours["name"], column, difference)
    assert all(url.startswith(("file:", "blob:")) for url in browser.requests), browser.requests
    assert browser.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_at_the_width_of_a_phone_and_a_desk(page, open_page, shared_dir, tmp_path, width):
    folder = shared_dir / "hc18/training_set"
    broken = tmp_path / f"broken{'_and_with_a_long_name' * 5}.png"
    broken.write_text("no image")
    long_name = tmp_path / f"image{'_with_a_long_name' * 5}.png"
    long_name.symlink_to(folder / "000_HC.png")
    browser = open_page(page, width=width, dark=width == 390)
    browser.choose(folder / "603_HC.png", broken, long_name)
    browser.wait(MEASURED)
    text = "document.getElementById('{}').textContent"
    assert browser.evaluate(text.format("problems")) == (
        f"{broken.name} is no image that this browser can read: give PNG or JPEG."
    )
    assert browser.evaluate(text.format("hc")).endswith(" px")

    # The scale bar: two clicks, then a step by the keyboard.
    browser.evaluate("document.getElementById('use-scale').click()")
    left, top, shown = browser.evaluate(
        "(() => { const canvas = document.getElementById('canvas');"
        "canvas.scrollIntoView({block: 'center'});"
        "const box = canvas.getBoundingClientRect(); return [box.left, box.top, box.width] })()"
    )
    for share in (0.25, 0.75):
        browser.click(left + share * shown, top + 20)
    size = "document.getElementById('pixel-size').value"
    assert float(browser.evaluate(size)) == pytest.approx(10 / 400, abs=1e-4)
    browser.press("ArrowLeft", shift=True)
    assert float(browser.evaluate(size)) == pytest.approx(10 / 390, abs=1e-4)
    browser.evaluate("document.getElementById('distance').select()")
    browser.call("Input.insertText", text="50")
    assert float(browser.evaluate(size)) == pytest.approx(50 / 390, abs=1e-3)
    assert re.fullmatch(r"1\d\d\.\d mm", browser.evaluate(text.format("hc")))
    assert re.search(r"\d\dw \dd", browser.evaluate(text.format("age")))

    # Typed, it holds for all images, and a word is refused.
    browser.evaluate("document.getElementById('pixel-size').select()")
    browser.call("Input.insertText", text="0,2")
    column = "[...document.querySelectorAll('#rows tr')].map(row => row.cells[5].textContent)"
    assert browser.evaluate(column) == ["0.2000", "0.2000"]
    browser.evaluate("document.getElementById('pixel-size').select()")
    browser.call("Input.insertText", text="much")
    assert "between 0 and 1000" in browser.evaluate(text.format("pixel-size-problem"))

    # Nothing lies on another or leaves the window.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    boxes = browser.evaluate(
        "[...document.querySelectorAll('header, .choose, .card, footer')].map(part => {"
        "const box = part.getBoundingClientRect();"
        "return [box.left, box.top, box.right, box.bottom] })"
    )
    for index, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0 and right <= width
        for other in boxes[index + 1 :]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, boxes
    browser.picture(tmp_path / f"page_{width}.png")
    assert browser.complaints == []


def odd_files(scan: np.ndarray, folder: Path) -> dict[str, list[Path]]:
    """Writes files that measure as the scan does, and others, by what becomes of them."""
    opaque, transparent = (np.dstack([scan, scan, scan, scan | 255]) for _ in range(2))
    transparent[0, 0, 3] = 0
    turned = PIL.Image.Exif()
    turned[0x0112] = 6  # A quarter turn to the right shows it upright.
    PIL.Image.fromarray(np.rot90(scan)).save(folder / "turned.png", exif=turned)
    good = {"opaque.png": opaque, "wide.png": scan.astype(np.uint16) * 257}
    refused = {
        "one.png": scan[:1, :1],
        "huge.png": np.zeros((6000, 8000), np.uint8),
        "transparent.png": transparent,
        "low.png": scan.astype(np.uint16) * 16,
    }
    left_out = {"._hidden.png": scan, "scan_Annotation.png": scan}
    for name, pixels in (good | refused | left_out).items():
        cv2.imwrite(str(folder / name), pixels)
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:20_000])
    (folder / "empty.png").touch()
    return {
        "good": [folder / "turned.png", *(folder / name for name in good)],
        "refused": [folder / name for name in (*refused, "cut.png", "empty.png")],
        "left out": [folder / name for name in left_out],
    }


@pytest.mark.slow
def test_the_page_refuses_what_it_would_measure_otherwise_than_python(
    page, open_page, shared_dir, tmp_path
):
    scan = read_gray(shared_dir / "hc18/training_set/603_HC.png")
    files = odd_files(scan, tmp_path)
    sizes, bad = tmp_path / "sizes.csv", tmp_path / "bad.csv"
    sizes.write_text("filename;pixel size(mm)\nturned.png;0,2\nopaque.png;0\nwide.png;0.25 mm\n")
    bad.write_text("name,size\nturned.png,0.2\n")
    browser = open_page(page)
    browser.choose(sizes, bad, *files["refused"], *files["good"], *files["left out"])
    browser.wait(MEASURED)
    rows = "[...document.querySelectorAll('#rows tr')].map(row => [row.cells[0].textContent, "
    found = browser.evaluate(f"{rows} row.cells[1].textContent, row.cells[5].textContent])")
    head = ff.Segmenter(load_checkpoint(NETWORK)).measure(scan).head
    assert head is not None
    expected = [
        [name, f"{head.ellipse.circumference * (size or 1):.{1 if size else 0}f}", size]
        for name, size in (("turned.png", 0.2), ("opaque.png", None), ("wide.png", 0.25))
    ]
    assert [[name, hc.removesuffix(" px")] for name, hc, _ in found] == [e[:2] for e in expected]
    assert [size for _, _, size in found] == ["0.2000", "–", "0.2500"]

    # Each is refused in a sentence, and so it is by Python, but what browsers alone lose.
    problems = browser.evaluate(
        "[...document.querySelectorAll('#problems li')].map(item => item.textContent)"
    )
    unreadable = "is no image that this browser can read: give PNG or JPEG."
    assert problems == [
        "Left out as hidden or an outline of HC18: 2 files.",
        "bad.csv has no column filename and pixel size(mm): its first row is name, size.",
        "one.png has 1×1 pixels, too few to show a head: give the whole image.",
        "huge.png has more than 33,554,432 pixels: crop or shrink it.",
        "transparent.png has transparent pixels, whose grey a browser loses: save it without them.",
        "low.png holds fewer bits in 16, which a browser shows black: save it with 8 bits.",
        f"cut.png {unreadable}",
        f"empty.png {unreadable}",
        "opaque.png has 0 as its pixel size in sizes.csv: give a number of mm.",
    ]
    for path in files["refused"]:
        if path.stem not in ("transparent", "low"):
            with pytest.raises(InputError):
                check_image(read_gray(path))

    # A file that has left the disk leaves its numbers, and no other image beside them.
    files["good"][1].unlink()
    browser.evaluate("document.getElementById('next').click()")
    browser.wait("document.getElementById('problems').textContent.includes('any more')")
    hc = browser.evaluate("document.getElementById('hc').textContent")
    assert hc == f"{head.ellipse.circumference:.0f} px"
