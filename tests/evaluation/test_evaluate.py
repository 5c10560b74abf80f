import csv
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from fetal_flax import checkpoints
from fetal_flax.checkpoints import Checkpoint, Description
from fetal_flax.config import DataConfig, ModelConfig, TrainConfig, to_dict
from fetal_flax.data import hc18, splits
from fetal_flax.data.images import read_gray
from fetal_flax.errors import InputError, InputWarning
from fetal_flax.evaluation import evaluate as module
from fetal_flax.evaluation.evaluate import evaluate
from fetal_flax.inference.segmenter import Segmenter, load
from fetal_flax.measurement.ellipse_overlap import ellipse_dice
from fetal_flax.measurement.gestational_age import trimester
from fetal_flax.measurement.head import OUTLINE_PX, measure_head
from fetal_flax.models import functional
from fetal_flax.reporting import pictures

pytestmark = pytest.mark.usefixtures("quick_compilation", "empty_charts")

MODEL = ModelConfig(name="unet", base_width=4)
NAMES = ("000_HC", "001_2HC", "001_HC", "002_HC", "003_2HC", "003_HC")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Keeps prepared data sets out of the user's cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def save(directory: Path, **description) -> Path:
    variables = functional.init(MODEL, 0)
    metadata = Description("network", MODEL, (64, 64), **description)
    checkpoints.save_checkpoint(directory, Checkpoint(variables, metadata))
    return directory


def rows(output: Path) -> dict[str, dict[str, str]]:
    with (output / "per_image.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_every_image_is_measured_at_native_size(tiny_hc18, tmp_path):
    checkpoint, output = save(tmp_path / "checkpoint"), tmp_path / "out"
    metrics = evaluate(checkpoint, output=output, data_dir=tiny_hc18)
    assert json.loads((output / "metrics.json").read_text()) == metrics
    page = (output / "report.html").read_text()
    assert page.count("data:image/jpeg") == len(NAMES) and "<h2>Training</h2>" not in page
    assert sorted(path.name for path in (output / "masks").iterdir()) == sorted(
        f"{name}.png" for name in NAMES
    )
    written = rows(output)
    assert tuple(written) == NAMES
    segmenter = load(checkpoint)
    dices = []
    for record in hc18.find_records(tiny_hc18):
        image, annotated = hc18.load(record)
        mask = read_gray(output / "masks" / f"{record.name}.png")
        (expected,) = segmenter.masks([image])
        np.testing.assert_array_equal(mask > 0, expected)
        both = (mask & annotated) > 0
        dices.append(2 * both.sum() / ((mask > 0).sum() + (annotated > 0).sum()))
        assert float(written[record.name]["dice"]) == pytest.approx(dices[-1], abs=1e-12)
        agree = (mask == annotated).mean()
        assert float(written[record.name]["pixel_accuracy"]) == pytest.approx(agree, abs=1e-12)
    assert len(set(dices)) > 1
    assert metrics["n"] == 6
    assert metrics["dice"]["mean"] == pytest.approx(np.mean(dices))


def test_distances_and_circumferences_are_in_millimetres(tiny_hc18, tmp_path, monkeypatch):
    truths = {}
    for record in hc18.find_records(tiny_hc18):
        truths[hc18.load(record)[0].tobytes()] = record

    def segment(self, items, image):
        for item in items:
            record = truths[image(item).tobytes()]
            mask = hc18.load(record)[1] if record.name != "002_HC" else 0 * image(item)
            yield item, np.where(mask, 9, -9).astype(np.float32)[None]

    shown = set()
    monkeypatch.setattr(Segmenter, "segment", segment)
    monkeypatch.setattr(pictures, "draw_ellipse", lambda rgb, ellipse: shown.add(ellipse) or rgb)
    metrics = evaluate(save(tmp_path / "checkpoint"), output=tmp_path / "out", data_dir=tiny_hc18)
    written = rows(tmp_path / "out")
    assert metrics["run"]["missed"] == ["002_HC"]
    for record in truths.values():
        row = {name: value for name, value in written[record.name].items() if name != "name"}
        right, reference = record.name != "002_HC", record.head_circumference_mm
        assert float(row["dice"]) == float(row["recall"]) == float(right)
        diagonal = record.pixel_size_mm * np.hypot(107, 159)
        worst = 0 if right else pytest.approx(diagonal, abs=0.01)
        assert float(row["hausdorff_mm"]) == float(row["assd_mm"]) == worst
        # An annotated mask is an ellipse but for the pixels of its rim.
        annotated = hc18.load(record)[1] > 0
        own = ellipse_dice(annotated, annotated)
        assert 0.99 < own < 1 and float(row["ellipse_dice"]) == (own if right else 0)
        head = measure_head(annotated, outline_px=OUTLINE_PX["hc18"])
        assert head and (head.edge_ellipse in shown) == right
        for name in ("hausdorff_mm", "hausdorff95_mm", "assd_mm"):
            rim = 2 * record.pixel_size_mm if right else 0
            assert float(row[f"ellipse_{name}"]) == pytest.approx(float(row[name]), abs=rim)
        assert float(row["hc_reference_mm"]) == reference
        assert float(row["hc_mm"]) - reference == pytest.approx(float(row["hc_error_mm"]))
        assert abs(float(row["hc_error_mm"])) == float(row["hc_abs_error_mm"])
        assert row["trimester"] == trimester(reference)
        assert ("no_head" in row["flags"]) == (not right)
        if right:
            # The drawn outline is four pixels of 0.69 mm wide at most.
            assert float(row["hc_mm"]) == pytest.approx(reference, abs=6)
        else:
            assert float(row["hc_mm"]) == 0 and row["components"] == "0"
    groups = metrics["by"]["trimester"]
    assert sum(group["n"] for group in groups.values()) == 6
    for name, group in groups.items():
        members = [row for row in written.values() if row["trimester"] == name]
        dices = [float(row["dice"]) for row in members]
        assert group["n"] == len(dices) and group["dice"]["mean"] == pytest.approx(np.mean(dices))
        for metric in ("ellipse_dice", "ellipse_assd_mm"):
            values = [float(row[metric]) for row in members]
            assert group[metric]["mean"] == pytest.approx(np.mean(values))
            assert set(group[metric]) == {"mean", "std", "median", "ci95"}
    page = (tmp_path / "out" / "report.html").read_text()
    captions = re.findall(r"<figcaption>(\w+): ellipse Dice ([\d.]+) %", page)
    assert captions[0] == ("002_HC", "0.0") and len(captions) == 6
    assert captions == sorted(captions, key=lambda caption: float(caption[1]))
    assert metrics["hc_abs_error_mm"]["mean"] == pytest.approx(
        np.mean([float(row["hc_abs_error_mm"]) for row in written.values()])
    )


def test_devices_that_share_images_measure_what_one_measures(tiny_hc18, tmp_path, monkeypatch):
    checkpoint = save(tmp_path / "checkpoint")
    metrics = []
    for count in (1, 5, 8):
        monkeypatch.setattr(jax, "local_devices", lambda count=count: jax.devices()[:count])
        metrics.append(evaluate(checkpoint, tiny_hc18))
    assert metrics[0] == metrics[1] == metrics[2] and metrics[0]["n"] == 6


def test_metrics_say_what_was_evaluated(tiny_hc18, tmp_path):
    checkpoint = save(tmp_path / "checkpoint")
    run = evaluate(checkpoint, output=tmp_path / "out", data_dir=tiny_hc18)["run"]
    assert run == {
        "checkpoint": str(checkpoint),
        "epoch": None,
        "split": "all",
        "dataset": "hc18",
        "data_dir": str(tiny_hc18),
        "image_size": [64, 64],
        "tta": "none",
        "outline_px": 1.4,
        "missed": list(NAMES),
        "model": to_dict(MODEL),
    }


@pytest.mark.parametrize(
    ("split", "names"),
    [("train", ("000_HC", "002_HC")), ("validation", ("001_2HC", "001_HC"))],
)
def test_a_side_of_the_split_is_the_runs_own(tiny_hc18, tmp_path, split, names):
    checkpoint = save(tmp_path / "checkpoint")
    sides = splits.Split(train=(0, 3), validation=(1, 2))
    splits.write_manifest(checkpoint / "split.json", sides, NAMES, method={})
    metrics = evaluate(checkpoint, output=tmp_path / "out", data_dir=tiny_hc18, split=split)
    assert tuple(rows(tmp_path / "out")) == names
    assert (metrics["n"], metrics["run"]["split"]) == (2, split)


def test_without_a_data_dir_the_runs_own_data_set_is_evaluated(tmp_path):
    data = DataConfig(
        dataset="fetal_phantom",
        phantom_count=2,
        phantom_size=(64, 96),
        cache_dir=str(tmp_path / "cache"),
    )
    config = to_dict(TrainConfig(seed=3, model=MODEL, data=data)) | {"pos_weight": 2.5}
    history = [{"epoch": 1}, {"epoch": 2}]
    checkpoint = save(tmp_path / "run", config=config, progress={"history": history})
    run = evaluate(checkpoint, output=tmp_path / "out")["run"]
    assert (run["dataset"], run["data_dir"], run["epoch"]) == ("fetal_phantom", None, 2)
    assert tuple(rows(tmp_path / "out")) == ("phantom_000000", "phantom_000001")
    assert read_gray(tmp_path / "out" / "masks" / "phantom_000000.png").shape == (64, 96)
    # Another seed would draw phantoms that the run never saw.
    (folder,) = (tmp_path / "cache" / "datasets").iterdir()
    assert folder.name == "phantom-64x96-2-3"


def test_a_data_dir_goes_before_the_runs_own_data_set(tiny_hc18, tmp_path):
    data = DataConfig(dataset="fetal_phantom", cache_dir=str(tmp_path / "cache"))
    checkpoint = save(tmp_path / "run", config=to_dict(TrainConfig(model=MODEL, data=data)))
    evaluate(checkpoint, output=tmp_path / "out", data_dir=tiny_hc18)
    assert tuple(rows(tmp_path / "out")) == NAMES


def test_a_converted_network_needs_a_data_dir(tmp_path):
    with pytest.raises(InputError, match="--data-dir"):
        evaluate(save(tmp_path / "checkpoint"), output=tmp_path / "out")


def test_a_side_of_a_split_needs_a_split(tiny_hc18, tmp_path):
    checkpoint = save(tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"has no split\.json, so it has no validation images"):
        evaluate(checkpoint, output=tmp_path / "out", data_dir=tiny_hc18, split="validation")
    assert not (tmp_path / "out").exists()


def test_images_of_the_split_that_the_data_set_lacks_are_an_input_error(tiny_hc18, tmp_path):
    checkpoint = save(tmp_path / "checkpoint")
    sides = splits.Split(train=(0,), validation=(1,))
    splits.write_manifest(checkpoint / "split.json", sides, ("000_HC", "805_HC"), method={})
    with pytest.raises(InputError, match="805_HC"):
        evaluate(checkpoint, output=tmp_path / "out", data_dir=tiny_hc18, split="train")
    assert not (tmp_path / "out").exists()


def test_a_split_of_other_data_is_told_the_way_out(tiny_hc18, tmp_path):
    checkpoint = save(tmp_path / "checkpoint")
    sides = splits.Split(train=(0,), validation=(1,))
    splits.write_manifest(checkpoint / "split.json", sides, ("000_HC", "805_HC"), method={})
    with pytest.raises(InputError, match=r"take --split all, or give the data .* --data-dir"):
        evaluate(checkpoint, data_dir=tiny_hc18, split="validation")


def test_an_evaluation_warns_of_what_contradicts_itself(tiny_hc18, tmp_path):
    checkpoint = save(tmp_path / "checkpoint")
    path = tiny_hc18 / hc18.CSV
    lines = path.read_text().splitlines()
    name, size, _ = lines[1].split(",")
    path.write_text("\n".join([lines[0], f"{name},{size},400", *lines[2:]]))
    for _ in range(2):  # Also where the data set is prepared already.
        with pytest.warns(
            InputWarning, match=r"in 1 image\(s\).*000_HC.* has 400\.0 mm in the CSV"
        ):
            metrics = evaluate(checkpoint, data_dir=tiny_hc18)
        assert metrics["n"] == 6


def test_rows_are_kept_when_an_evaluation_is_cut_short(tiny_hc18, tmp_path, monkeypatch):
    checkpoint, output = save(tmp_path / "checkpoint"), tmp_path / "out"
    evaluate(checkpoint, data_dir=tiny_hc18, output=output)
    whole = rows(output)
    compare, seen = module.segmentation_metrics, []

    def fails(*masks):
        seen.append(None)
        if len(seen) == 4:
            raise RuntimeError("cut")
        return compare(*masks)

    monkeypatch.setattr(module, "segmentation_metrics", fails)
    monkeypatch.setattr("fetal_flax._util.pipeline.available_cpus", lambda: 1)
    with pytest.raises(RuntimeError, match="cut"):
        evaluate(checkpoint, data_dir=tiny_hc18, output=output)
    kept = rows(output)
    assert list(kept) == list(whole)[:3] and all(kept[name] == whole[name] for name in kept)
    assert not (output / "metrics.json").exists() and not (output / "report.html").exists()


def test_a_folder_without_a_checkpoint_is_an_input_error(tiny_hc18, tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        evaluate(tmp_path, output=tmp_path / "out", data_dir=tiny_hc18)
