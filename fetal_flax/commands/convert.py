"""`fetal-flax convert`: PyTorch files, both ways."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fetal_flax.errors import InputError


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

    entry: str | None = None
    """Which network to take of a file that holds several, such as `model` and `ema`."""

    def run(self) -> int:
        """Converts."""
        from fetal_flax.conversion import convert

        if self.to_torch and self.channels:
            raise InputError("--channels is for reading torchvision's file, not for --to-torch")
        if self.to_torch and self.entry:
            raise InputError("--entry is for reading PyTorch's files, not for --to-torch")
        if self.to_torch:
            description = convert.to_torch_file(self.source, self.output)
        else:
            description = convert.from_torch_file(
                self.source, self.output, channels=self.channels, entry=self.entry
            )
        print(f"converted {self.source}, {description.title}, to {self.output}")
        return 0
