"""What float16 and 8 bits cost an exported network, on images that it was validated with.

    python benchmarks/exported.py --data-dir HC18 [--checkpoint NAME]

Exports the network as float32, float16 and int8 (calibrated with images that it was trained with),
runs the files in onnxruntime on the validation images of its split, and measures their masks.
"""

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import fetal_flax as ff
from fetal_flax.checkpoints import locate, shipped
from fetal_flax.config import DataConfig
from fetal_flax.data import splits
from fetal_flax.data.datasets import Dataset, open_dataset
from fetal_flax.data.hc18 import IMAGES
from fetal_flax.data.images import resize_image
from fetal_flax.export.runtimes import onnx_runtime
from fetal_flax.export.settings import ExportSettings
from fetal_flax.inference.assessment import Measurement, assess
from fetal_flax.measurement.head import OUTLINE_PX
from fetal_flax.measurement.overlap import segmentation_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="HC18 folder")
    parser.add_argument("--checkpoint", default="hc18-compact", help="as of ff.load_checkpoint")
    options = parser.parse_args()
    checkpoint = ff.load_checkpoint(options.checkpoint)
    dataset, sides = open_split(options.checkpoint, options.data_dir)
    records = [dataset.record(index) for index in sides.validation]
    measured: dict[str, list[Measurement]] = {}
    print(
        "| file | MB | Dice | ADF, mm | Dice with float32's: mean, lowest |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "calibration"
        calibration.mkdir()
        for index in sides.train:
            image = options.data_dir / IMAGES / f"{dataset.names[index]}.png"
            (calibration / image.name).symlink_to(image.resolve())
        settings = {
            "float32": ExportSettings(),
            "float16": ExportSettings(precision="float16"),
            "int8": ExportSettings(quantize="int8", calibration=calibration),
        }
        for name, setting in settings.items():
            file = Path(folder) / f"{name}.onnx"
            report = ff.export.to_file(
                checkpoint, file, settings=setting, data_dir=options.data_dir
            )
            run = onnx_runtime(file, checkpoint.config.in_channels, setting.input_dtype)
            measured[name] = [
                assess(
                    run(resize_image(record.image, checkpoint.image_size)[None])[0],
                    record.image.shape,
                    outline_px=OUTLINE_PX[checkpoint.metadata.dataset],
                    pixel_size_mm=record.pixel_size_mm,
                )
                for record in records
            ]
            masks = [measurement.mask for measurement in measured[name]]
            annotated = dices(masks, [record.mask > 0 for record in records])
            with_float32 = dices(masks, [measurement.mask for measurement in measured["float32"]])
            errors = [
                abs((measurement.hc_mm or 0.0) - record.head_circumference_mm)
                for measurement, record in zip(measured[name], records, strict=True)
            ]
            print(
                f"| {name} | {report.size_bytes / 1e6:.2f} | {annotated.mean():.4f} | "
                f"{np.mean(errors):.2f} | {with_float32.mean():.4f}, {with_float32.min():.3f} |",
                flush=True,
            )


def open_split(checkpoint: str, data_dir: Path) -> tuple[Dataset, splits.Split]:
    """Opens HC18, and the split that a network was trained with."""
    dataset = open_dataset(DataConfig(data_dir=str(data_dir)), seed=0)
    return dataset, splits.read_manifest(locate(checkpoint) / shipped.SPLIT, dataset.names)


def dices(masks: Iterable[np.ndarray], others: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the Dice coefficient of each pair."""
    return np.array(
        [segmentation_metrics(*pair)["dice"] for pair in zip(masks, others, strict=True)]
    )


if __name__ == "__main__":
    main()
