"""`fetal-flax parity`: PyTorch side by side."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from fetal_flax.config import DataConfig
from fetal_flax.errors import InputError
from fetal_flax.parity.settings import ParitySettings


@dataclasses.dataclass(frozen=True)
class Parity:
    """Measure how well a network agrees with PyTorch's; needs the extra `parity`."""

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
