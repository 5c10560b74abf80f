"""PyTorch files to checkpoints, and the way back."""

import warnings
from pathlib import Path

import safetensors.numpy

from fetal_flax._util.files import write_atomically
from fetal_flax.checkpoints import Checkpoint, Description, load_checkpoint, save_checkpoint
from fetal_flax.conversion.names import ENCODER, TABLES
from fetal_flax.conversion.recognition import read_network
from fetal_flax.conversion.transfer import to_state_dict
from fetal_flax.conversion.writer import state_dict_bytes
from fetal_flax.errors import InputError, InputWarning, file_name, printable


def from_torch(
    source: Path | str, *, channels: int | None = None, entry: str | None = None
) -> Checkpoint:
    """Reads a PyTorch file, without PyTorch; layout and widths are read off the tensors.

    Args:
        source: A `.pth` or `.safetensors` file with a published network, what `to_torch` wrote, or
            torchvision's MobileNetV2, of which the encoder is taken (`metadata.kind` says which).
        channels: Image channels of an encoder, 1 or 3; 1, the default, takes the mean of an RGB
            stem.
        entry: Where the file holds several networks, such as `model` and `ema`: which to take.

    Raises:
        InputError: The file can't be read or is none of our networks.

    Example:
        >>> checkpoint = ff.load_checkpoint("runs/hc18")
        >>> ff.to_torch(checkpoint, "best_model.pth")
        >>> ff.from_torch("best_model.pth").config == checkpoint.config
        True
    """
    source = Path(source)
    network = read_network(source, channels=channels, entry=entry)
    if network.other_entries:
        others = ", ".join(map(printable, network.other_entries))
        warnings.warn(
            InputWarning(
                f"{source} holds several networks: {printable(network.entry) or 'the outermost'} "
                f"was taken, not {others}; choose with --entry"
            ),
            stacklevel=2,
        )
    progress = {"source": file_name(source.name)} | (
        {"entry": network.entry} if network.entry else {}
    )
    description = Description(kind=network.kind, model=network.model, progress=progress)
    return Checkpoint(network.variables, description)


def to_torch(checkpoint: Checkpoint, output: Path | str) -> None:
    """Writes a PyTorch state dict with the published names, without PyTorch.

    An encoder alone gets torchvision's names. The described and the compact variant, which have no
    published layout, get the published one's names, and no squeeze-excite biases.

    Args:
        checkpoint: A network, or an encoder.
        output: `.pth` or `.pt` for `torch.load`, `.safetensors` for safetensors.

    Raises:
        InputError: The suffix is another, or `output` exists or can't be written.

    Example:
        >>> ff.to_torch(ff.load_checkpoint("runs/hc18"), "network.safetensors")
    """
    output = Path(output)
    _check_new_torch_file(output)
    description = checkpoint.metadata
    layout = ENCODER if description.kind == "encoder" else description.model.name
    tensors = to_state_dict(checkpoint.variables, TABLES[layout])
    if output.suffix == ".safetensors":
        content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    else:
        content = state_dict_bytes(tensors)
    write_atomically(output, content)


def from_torch_file(
    source: Path, output: Path, *, channels: int | None = None, entry: str | None = None
) -> Description:
    """Converts a PyTorch file into a checkpoint's directory: `convert_weights.py`.

    Args:
        source: As of `from_torch`.
        output: Directory to make; it must not hold a checkpoint yet.
        channels: As of `from_torch`.
        entry: As of `from_torch`.

    Returns:
        What the checkpoint says of itself.

    Raises:
        InputError: As `from_torch` and `save_checkpoint`.
    """
    checkpoint = from_torch(source, channels=channels, entry=entry)
    save_checkpoint(output, checkpoint)
    return checkpoint.metadata


def to_torch_file(source: Path, output: Path) -> Description:
    """Converts a checkpoint's directory into a PyTorch file: `convert_weights.py --to-torch`.

    Args:
        source: Training workdir (its best checkpoint), converted directory, or a shipped
            network's name.
        output: As of `to_torch`.

    Returns:
        What the checkpoint says of itself.

    Raises:
        InputError: There is no checkpoint, or as `to_torch`.
    """
    _check_new_torch_file(output)
    checkpoint = load_checkpoint(source, kinds=("network", "encoder"))
    to_torch(checkpoint, output)
    return checkpoint.metadata


def _check_new_torch_file(output: Path) -> None:
    if output.suffix not in (".pth", ".pt", ".safetensors"):
        raise InputError(f"--output {output} must end in .pth, .pt or .safetensors")
    if output.exists():
        raise InputError(f"{output} exists: choose another --output")
