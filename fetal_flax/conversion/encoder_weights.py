"""Where a pre-trained encoder comes from: torchvision's files, a path, a network, or nowhere."""

from pathlib import Path

from fetal_flax import checkpoints
from fetal_flax._util.download import fetch
from fetal_flax.checkpoints import shipped
from fetal_flax.config import ModelConfig
from fetal_flax.conversion.recognition import read_network
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables

# The hex in torchvision's names is the start of the file's SHA-256.
TORCHVISION = {
    "imagenet1k_v1": "mobilenet_v2-b0353104.pth",
    "imagenet1k_v2": "mobilenet_v2-7ebf99e0.pth",
}
TORCHVISION_URL = "https://download.pytorch.org/models/"


def load_encoder(weights: str, model: ModelConfig, cache_dir: Path) -> Variables | None:
    """Returns the encoder's variables, names beginning with `encoder/`.

    Args:
        weights: The setting `encoder.weights`.
        model: Network whose encoder is to be filled.
        cache_dir: Where torchvision's files are kept.

    Returns:
        None where `weights` is `none` or the network has no encoder.

    Raises:
        InputError: The file is missing, can't be downloaded, or doesn't fit. A run never goes on
            with a random encoder that was asked to be pre-trained.
    """
    expected = functional.encoder_part(functional.shapes(model))
    if weights == "none" or not expected.params:
        return None
    if weights in TORCHVISION:
        return read_encoder(torchvision_file(weights, cache_dir), model)
    path = Path(weights).expanduser()
    if path.is_dir() or weights in shipped.names():
        return checkpoints.load_encoder(path, expected)
    if not path.exists():
        known = ", ".join((*TORCHVISION, *shipped.names()))
        raise InputError(
            f"setting encoder.weights is {weights}, which is neither {known}, 'none', nor a file "
            "or folder that exists"
        )
    return read_encoder(path, model)


def read_encoder(path: Path, model: ModelConfig) -> Variables:
    """Reads the encoder of a PyTorch file, torchvision's or a whole network's, for `model`.

    Raises:
        InputError: The file can't be read, or holds no encoder that fits.
    """
    network = read_network(path, channels=model.in_channels)
    encoder = functional.encoder_part(network.variables)
    if not encoder.params:
        raise InputError(f"{path} holds a {network.model.name}, which has no MobileNetV2 encoder")
    return encoder


def torchvision_file(weights: str, cache_dir: Path) -> Path:
    """Returns torchvision's file, downloaded into `cache_dir/weights` unless it is there."""
    name = TORCHVISION[weights]
    digest = name.removesuffix(".pth").rpartition("-")[2]
    return fetch(TORCHVISION_URL + name, cache_dir / "weights" / name, sha256=digest)
