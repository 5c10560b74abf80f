"""`convert_weights.py`: a PyTorch file in, a self-describing checkpoint out."""

from pathlib import Path

from fetal_flax import checkpoints
from fetal_flax.config import ModelConfig
from fetal_flax.conversion.encoder_weights import read_encoder


def convert(source: Path, output: Path, *, channels: int = 1) -> None:
    """Converts a torchvision MobileNetV2 file into an encoder checkpoint.

    Args:
        source: The `.pth` or `.safetensors` file.
        output: Directory to make; it must not hold a checkpoint yet.
        channels: Image channels; 1 takes the mean of the RGB stem.

    Raises:
        InputError: The file can't be read or is no MobileNetV2, or `output` is taken.
    """
    model = ModelConfig(in_channels=channels)  # pyright: ignore[reportArgumentType]
    description = checkpoints.Description(
        kind="encoder", model=model, progress={"source": source.name}
    )
    checkpoints.save(output, read_encoder(source, model), description)
