"""The `fetal-flax` command.

Commands import what they need when they run: `--help` should not wait for JAX.
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import absl.logging
import tyro

from fetal_flax._util.compilation_cache import keep_compilations
from fetal_flax.config import DataConfig, ModelConfig, TestTimeAugmentation, TrainConfig
from fetal_flax.errors import InputError, Interrupted, RunError, printable
from fetal_flax.parity.settings import ParitySettings

CONFIGS = Path(__file__).parents[1] / "configs"
MAX_FLAGGED_SHOWN = 10
"""How many flagged images are named before the rest is counted."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a network; --section.field VALUE overrides any setting of the config."""

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config: Path = CONFIGS / "phantom.py"
    """File whose `config()` gives the settings; a resumed run takes its workdir's."""
    workdir: Path | None = None
    """Where everything goes; by default runs/NAME, or runs/NAME-folds/fold-K with --fold K."""
    fold: int | None = None
    """Train one fold of a cross-validation, counted from 0 (data.folds, or 5); the command
    cross-validate trains those that are missing and reports on all."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on where the run in the workdir stopped."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Build everything, run one step, print the plan and write nothing."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Trace a few steps into the workdir's profile/, for TensorBoard or Perfetto."""
    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train together with other processes; SLURM, Open MPI and the next three flags tell which."""
    coordinator: str | None = None
    """HOST:PORT of process 0, with --distributed."""
    process_count: int | None = None
    """Number of processes, with --distributed."""
    process_id: int | None = None
    """This process's position among them, from 0, with --distributed."""

    def run(self) -> int:
        """Trains, or prints the plan."""
        from fetal_flax.training import distributed, dry_run, run

        distributed_flags = self.coordinator, self.process_count, self.process_id
        if self.distributed:
            distributed.initialize(*distributed_flags)
        elif any(flag is not None for flag in distributed_flags):
            raise InputError(
                "--coordinator, --process-count and --process-id are for --distributed"
            )
        settings, workdir = self.settings, Path("runs", self.settings.name)
        if self.fold is not None:
            from fetal_flax.evaluation import cross_validation

            settings = cross_validation.with_fold(settings, self.fold)
            workdir = cross_validation.fold_folder(_folds_workdir(settings), self.fold)
        if self.dry_run:
            dry_run.dry_run(settings)
        else:
            run.train(settings, self.workdir or workdir, resume=self.resume, profile=self.profile)
        return 0


@dataclasses.dataclass(frozen=True)
class CrossValidate:
    """Train every fold and report on all images, each held out once; goes on where it stopped."""

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config: Path = CONFIGS / "phantom.py"
    """File whose `config()` gives the settings."""
    workdir: Path | None = None
    """Where everything goes; runs/NAME-folds by default."""

    def run(self) -> int:
        """Trains and evaluates, and prints the headline."""
        from fetal_flax.evaluation.cross_validation import cross_validate

        workdir = self.workdir or _folds_workdir(self.settings)
        _print_headline(cross_validate(self.settings, workdir), workdir)
        return 0


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turn a PyTorch checkpoint into a self-describing one, or back, without PyTorch."""

    source: Path
    """A .pth or .safetensors file with torchvision's MobileNetV2 or a published network; with
    --to-torch, a training workdir, a converted directory or a shipped network's name."""
    output: Path
    """Directory to make; with --to-torch, a .pth or .safetensors file."""
    to_torch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The way back: write a PyTorch state dict with the published names."""
    channels: Literal[1, 3] | None = None
    """Image channels of a MobileNetV2; 1 takes the mean of its RGB stem, and is the default."""

    def run(self) -> int:
        """Converts."""
        from fetal_flax.conversion import convert

        if self.to_torch and self.channels:
            raise InputError("--channels is for reading torchvision's file, not for --to-torch")
        if self.to_torch:
            description = convert.to_torch_file(self.source, self.output)
        else:
            description = convert.from_torch_file(self.source, self.output, channels=self.channels)
        print(f"converted {self.source}, {description.title}, to {self.output}")
        return 0


@dataclasses.dataclass(frozen=True)
class PrepareData:
    """Check an HC18 folder and build the data set from it, or download HC18 first."""

    source: Path | None = None
    """Folder in the official layout, complete or a subset; without it, HC18 from Zenodo."""
    cache_dir: str = DataConfig.cache_dir
    """Where the data set is built; the setting data.cache_dir."""

    def run(self) -> int:
        """Prepares."""
        from fetal_flax.data.datasets import open_dataset

        source = None if self.source is None else str(self.source)
        dataset = open_dataset(DataConfig(data_dir=source, cache_dir=self.cache_dir), seed=0)
        examinations = len(set(dataset.examinations))
        print(f"{len(dataset)} images of {examinations} examinations are ready")
        return 0


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure a network on annotated images: report.html, metrics.json, per_image.csv, masks."""

    checkpoint: Path
    """Training workdir (its best checkpoint), converted directory, or a shipped network's name."""
    output: Path
    """Folder for the results."""
    data_dir: Path | None = None
    """HC18 folder in the official layout; without it, the data that the run was trained on."""
    split: Literal["train", "validation", "all"] = "all"
    """Which side of the run's split."""
    tta: TestTimeAugmentation = "none"
    """Test-time augmentation: `flip` averages each image with its mirror image."""

    def run(self) -> int:
        """Evaluates, and prints the headline."""
        from fetal_flax.evaluation.evaluate import evaluate

        metrics = evaluate(
            self.checkpoint, self.data_dir, output=self.output, split=self.split, tta=self.tta
        )
        _print_headline(metrics, self.output)
        return 0


@dataclasses.dataclass(frozen=True)
class Predict:
    """Segment an image or a folder of images: masks, overlays and measurements of the head."""

    input: Path
    """Image (PNG, JPEG, BMP, TIFF, DICOM), or folder of images."""
    output: Path
    """Folder for the results."""
    checkpoint: Path | None = None
    """Training workdir (its best checkpoint), converted directory, or a shipped network's name; by
    default a shipped network."""
    pixel_size: float | None = None
    """Size of a pixel in mm, the same for all images. Without it and the next flag, heads are
    measured in pixels alone, but for DICOM files, which tell."""
    pixel_size_csv: Path | None = None
    """CSV with the columns `filename` and `pixel size(mm)`, as HC18 has it."""
    tta: TestTimeAugmentation = "none"
    """Test-time augmentation: `flip` averages each image with its mirror image, and
    measurements.csv has how far the two are apart."""
    save_logits: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write logits/NAME.npy too: float32 at the network's size, before the sigmoid."""

    def run(self) -> int:
        """Segments what can be read; 2 if something could not be."""
        from fetal_flax.checkpoints import shipped
        from fetal_flax.inference.predict import predict

        report = predict(
            self.checkpoint or shipped.default(),
            self.input,
            self.output,
            pixel_size_csv=self.pixel_size_csv,
            pixel_size_mm=self.pixel_size,
            save_logits=self.save_logits,
            tta=self.tta,
        )
        for problem in report.failed:
            print(f"fetal-flax predict: {problem}", file=sys.stderr)
        print(
            f"{len(report.predicted)} images segmented; masks, overlays and measurements.csv are "
            f"in {self.output}"
        )
        if report.flagged:
            named = ", ".join(report.flagged[:MAX_FLAGGED_SHOWN])
            more = len(report.flagged) - MAX_FLAGGED_SHOWN
            print(
                f"look at {len(report.flagged)} of them (column flags): {named}"
                + (f" and {more} more" if more > 0 else "")
            )
        return 2 if report.failed else 0


@dataclasses.dataclass(frozen=True)
class Submission:
    """Measure the HC18 challenge's test images and write the CSV that it takes."""

    checkpoint: Path
    """Training workdir (its best checkpoint), converted directory, or a shipped network's name."""
    input: Path
    """The challenge's test_set folder."""
    pixel_size_csv: Path
    """Its test_set_pixel_size.csv."""
    output: Path = Path("submission.csv")
    """The CSV to write."""
    tta: TestTimeAugmentation = "none"
    """Test-time augmentation: `flip` averages each image with its mirror image."""

    def run(self) -> int:
        """Measures; 2 if an image has no row."""
        from fetal_flax.inference.submission import submission

        report = submission(
            self.checkpoint, self.input, self.pixel_size_csv, self.output, tta=self.tta
        )
        for problem in report.problems:
            print(f"fetal-flax submission: {problem}", file=sys.stderr)
        print(f"{report.measured} heads are in {self.output}")
        return 2 if report.problems else 0


@dataclasses.dataclass(frozen=True)
class Parity:
    """Measure how well the Flax network agrees with PyTorch's; needs the extra `parity`."""

    settings: Annotated[ParitySettings, tyro.conf.arg(name="")]
    reference: Path
    """PyTorch file, .pth or .safetensors, with a published network or torchvision's MobileNetV2."""
    checkpoint: Path | None = None
    """Converted directory, training workdir or shipped network's name to compare; without it, the
    reference is converted anew."""
    data_dir: Path | None = None
    """HC18 folder whose images to take; without it, phantoms."""
    cache_dir: str = DataConfig.cache_dir
    """Where the prepared images are kept."""
    output: Path = Path("parity")
    """Folder for parity.md and parity.json."""

    def run(self) -> int:
        """Compares, and prints the report; 1 if something is beyond its limit."""
        try:
            from fetal_flax.parity import report, run
        except ModuleNotFoundError as error:
            raise InputError(
                f"parity needs {error.name}: install it with pip install 'fetal_flax[parity]'"
            ) from None
        result = run.run(
            self.reference,
            self.output,
            self.settings,
            checkpoint=self.checkpoint,
            data_dir=self.data_dir,
            cache_dir=self.cache_dir,
        )
        print(report.markdown(result))
        print(f"parity.md and parity.json are in {self.output}")
        for problem in result.failures:
            print(f"fetal-flax parity: {problem}", file=sys.stderr)
        return 1 if result.failures else 0


@dataclasses.dataclass(frozen=True)
class Summarize:
    """Print parameters and multiply-accumulates of every network, by part."""

    model: str | None = None
    """One network's name; without it, all."""

    def run(self) -> int:
        """Prints."""
        import rich.console

        from fetal_flax import summary

        rich.console.Console().print(summary.render(summary.summaries(self.model)))
        return 0


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Measure inference and training on this machine, and how near they are to its limits."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    checkpoint: Path | None = None
    """Training workdir, converted directory or shipped network's name, whose network to take;
    without it, --model with random weights."""
    image_size: tuple[int, int] | None = None
    """Height and width of the images; by default what the checkpoint was trained at, or 256×256."""
    inference_batches: tuple[int, ...] = (1, 16)
    """Images per call of inference."""
    training_batch: int = 16
    """Images per training step, over all devices distributed_flags."""
    repeats: int = 10
    """Timed repetitions; the median counts."""
    output: Path | None = None
    """JSON file to write the figures to."""

    def run(self) -> int:
        """Measures, and prints a table."""
        import rich.console

        from fetal_flax import benchmark
        from fetal_flax._util.files import json_bytes, write_atomically

        report = benchmark.benchmark(
            *benchmark.network(self.model, self.checkpoint, self.image_size),
            inference_batches=self.inference_batches,
            training_batch=self.training_batch,
            repeats=self.repeats,
        )
        rich.console.Console().print(benchmark.render(report), highlight=False)
        if self.output:
            write_atomically(self.output, json_bytes(dataclasses.asdict(report)))
        return 0


COMMANDS: dict[str, Any] = {
    "train": Train,
    "cross-validate": CrossValidate,
    "convert": Convert,
    "evaluate": Evaluate,
    "predict": Predict,
    "submission": Submission,
    "parity": Parity,
    "summary": Summarize,
    "benchmark": Benchmark,
    "data prepare": PrepareData,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Command and flags; None takes the process's.

    Returns:
        The exit code: 0 done; 1 a run that can't go on, 2 bad input, 75 a training that was asked
        to stop and can be resumed, all with a sentence on stderr; 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Orbax and Grain warn of their own settings, which no user can act on, and log errors that they
    # raise as well; OpenCV warns of broken files, which our own sentences name.
    absl.logging.set_verbosity(absl.logging.FATAL)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    name = next((name for name in COMMANDS if arguments[: name.count(" ") + 1] == name.split()), "")
    if not name:
        print(_usage(), file=sys.stderr if arguments not in (["-h"], ["--help"]) else sys.stdout)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    keep_compilations(DataConfig.cache_dir)
    flags = arguments[name.count(" ") + 1 :]
    try:
        return _parse(name, flags).run()
    except (InputError, RunError, Interrupted) as error:
        print(f"fetal-flax {name}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        # A name that is too long, a folder that may not be entered, a disk that is full.
        print(
            f"fetal-flax {name}: can't use {error.filename} ({error.strerror}): choose another "
            "path or make this one usable",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def load_config(path: Path) -> TrainConfig:
    """Returns what the `config()` of a file such as `configs/hc18.py` gives.

    Raises:
        InputError: There is no such file, or it has no `config()` that returns a TrainConfig.
    """
    if not path.is_file():
        raise InputError(f"--config {path} is no file: give one such as configs/hc18.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"--config {path} is no Python file: give one such as configs/hc18.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make: Callable[[], object] | None = getattr(module, "config", None)
        config = make() if callable(make) else None
    except InputError:
        raise
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f" in line {line}" if line else ""
        reason = printable(f"{type(error).__name__}: {error}")
        raise InputError(f"--config {path} fails{where} ({reason}): correct it") from error
    if not isinstance(config, TrainConfig):
        raise InputError(f"--config {path} has no function config() that returns a TrainConfig")
    return config


def _parse(name: str, flags: list[str]) -> Any:
    command = COMMANDS[name]
    has_settings = command in (Train, CrossValidate)
    default = command(_settings(flags)) if has_settings else tyro.MISSING_NONPROP
    return tyro.cli(command, prog=f"fetal-flax {name}", args=flags, default=default)


def _settings(flags: list[str]) -> TrainConfig:
    """Returns the settings of a run before the flags override single ones."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args(flags)
    if known.resume and known.workdir and not known.config:
        from fetal_flax.training.workdir import read_config

        return read_config(known.workdir)
    return load_config(known.config or Train.config)


def _folds_workdir(settings: TrainConfig) -> Path:
    return Path("runs", f"{settings.name}-folds")


def _print_headline(metrics: Mapping[str, Any], output: Path) -> None:
    """Prints what an evaluation measured, and where the rest is."""
    for title, of_ellipse in (
        ("ellipse of the mask's largest region:", True),
        ("raw mask:", False),
    ):
        print(title)
        for name, values in metrics.items():
            is_metric = name not in ("n", "by", "run")
            if is_metric and name.startswith(("ellipse_", "hc_")) == of_ellipse:
                print(f"  {name:22s} {values['mean']:8.4f} ± {values['std']:.4f}")
    missed = metrics["run"]["missed"]
    print(f"no head was found in {len(missed)} images" + f": {', '.join(missed)}" * bool(missed))
    print(
        f"{metrics['n']} images; report.html, metrics.json, per_image.csv and masks are in {output}"
    )


def _usage() -> str:
    lines = ["usage: fetal-flax COMMAND [FLAGS]; fetal-flax COMMAND --help tells its flags", ""]
    lines += [f"  {name:14s} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(lines)
