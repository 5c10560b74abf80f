"""`fetal-flax export`: a network for other runtimes."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fetal_flax.export.settings import ExportSettings, Format

PAGE_NETWORK = "hc18-compact"
"""Of a page, which is carried around: a third of the parameters, and faster in a browser."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a network as a file for other runtimes, and measure how well it agrees."""

    settings: Annotated[ExportSettings, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]
    output: Path
    """File to write."""
    checkpoint: Path | None = None
    """Training workdir (its best checkpoint), converted directory, or a shipped network's name; by
    default a shipped network, for a page the compact one."""
    format: Format = "onnx"
    """Of the file: onnx needs the extra of its name; stablehlo needs none, and JAX to load it."""
    data_dir: Path | None = None
    """Folder of images to compare on, or HC18 folder; without it, phantoms."""
    images: int = 20
    """How many images to compare on."""

    def run(self) -> int:
        """Writes, and prints the comparison."""
        import rich.console

        from fetal_flax.checkpoints import shipped
        from fetal_flax.export import to_file
        from fetal_flax.export.comparison import table

        by_default = PAGE_NETWORK if self.format == "web" else shipped.DEFAULT_NETWORK
        report = to_file(
            self.checkpoint or by_default,
            self.output,
            format=self.format,
            settings=self.settings,
            data_dir=self.data_dir,
            images=self.images,
        )
        on = f"{self.images} {'images' if self.data_dir else 'phantoms'}"
        for (height, width), comparison in report.comparisons.items():
            title = f"{self.output} and the network on {on} at {height}×{width}"
            rich.console.Console().print(table(comparison, title), highlight=False)
        print(f"{report.size_bytes / 1e6:.2f} MB are in {self.output}")
        return 0
