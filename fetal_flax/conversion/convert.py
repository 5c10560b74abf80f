"""`convert_weights.py`: a PyTorch file to a self-describing checkpoint, and the way back."""

from pathlib import Path

import safetensors.numpy

from fetal_flax import checkpoints
from fetal_flax._util.files import write_atomically
from fetal_flax.conversion.names import ENCODER, TABLES
from fetal_flax.conversion.recognition import read_network
from fetal_flax.conversion.transfer import to_torch
from fetal_flax.conversion.writer import state_dict_bytes
from fetal_flax.errors import InputError


def from_torch_file(
    source: Path, output: Path, *, channels: int | None = None
) -> checkpoints.Description:
    """Converts a PyTorch file into a checkpoint; its layout and widths are read off the tensors.

    Args:
        source: A `.pth` or `.safetensors` file with a network or a MobileNetV2 encoder.
        output: Directory to make; it must not hold a checkpoint yet.
        channels: Image channels of an encoder; 1, the default, takes the mean of an RGB stem.

    Returns:
        What the checkpoint says of itself.

    Raises:
        InputError: The file can't be read or is none of our networks, or `output` is taken or
            can't be written.
    """
    network = read_network(source, channels=channels)
    description = checkpoints.Description(
        kind=network.kind, model=network.model, progress={"source": source.name}
    )
    checkpoints.save(output, network.variables, description)
    return description


def to_torch_file(source: Path, output: Path) -> checkpoints.Description:
    """Converts a checkpoint into a PyTorch state dict with the published names.

    An encoder alone gets torchvision's names. The described and the compact variant, which have no
    published layout, get the published one's names, and no squeeze-excite biases.

    Args:
        source: Training workdir (its best checkpoint), converted directory, or a shipped
            network's name.
        output: `.pth` or `.pt` for `torch.load`, `.safetensors` for safetensors.

    Returns:
        What the checkpoint says of itself.

    Raises:
        InputError: There is no checkpoint, the suffix is another, or `output` exists.
    """
    if output.suffix not in (".pth", ".pt", ".safetensors"):
        raise InputError(f"--output {output} must end in .pth, .pt or .safetensors")
    if output.exists():
        raise InputError(f"{output} exists: choose another --output")
    variables, description = checkpoints.load(source, kinds=("network", "encoder"))
    layout = ENCODER if description.kind == "encoder" else description.model.name
    tensors = to_torch(variables, TABLES[layout])
    if output.suffix == ".safetensors":
        content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    else:
        content = state_dict_bytes(tensors)
    write_atomically(output, content)
    return description
