"""`fetal-flax benchmark`: this machine with a network."""

import dataclasses
from pathlib import Path

from fetal_flax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Measure inference and training on this machine, and compare with its limits."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    checkpoint: Path | None = None
    """Training workdir, converted directory or shipped network's name, whose network to take;
    without it, --model with random weights."""
    image_size: tuple[int, int] | None = None
    """Height and width of the images; by default what the checkpoint was trained at, or 256×256."""
    inference_batches: tuple[int, ...] = (1, 16)
    """Images per call of inference."""
    training_batch: int = 16
    """Images per training step, over all devices together."""
    repeats: int = 10
    """Timed repetitions; the median counts."""
    output: Path | None = None
    """JSON file to write the figures to."""

    def run(self) -> int:
        """Measures, and prints a table."""
        import rich.console

        from fetal_flax._util.files import json_bytes, write_atomically
        from fetal_flax.performance import benchmark, table

        report = benchmark.benchmark(
            *benchmark.network(self.model, self.checkpoint, self.image_size),
            inference_batches=self.inference_batches,
            training_batch=self.training_batch,
            repeats=self.repeats,
        )
        rich.console.Console().print(table.render(report), highlight=False)
        if self.output:
            write_atomically(self.output, json_bytes(dataclasses.asdict(report)))
        return 0
