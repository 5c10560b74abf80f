"""Where a pre-trained encoder comes from: torchvision's files, a path, a network, or nowhere."""

import os
from pathlib import Path

from fetal_flax import checkpoints
from fetal_flax._util.download import fetch
from fetal_flax.checkpoints import shipped
from fetal_flax.config import ModelConfig
from fetal_flax.conversion.recognition import read_network
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables

TORCHVISION = {
    "imagenet1k_v1": "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
    "imagenet1k_v2": "7ebf99e03e254b273379b23edca7ec0da9f48273b23a332b93c1c99d49e86e8f",
}
"""The files' SHA-256, of which torchvision's names carry the first eight digits:
mobilenet_v2-b0353104.pth and mobilenet_v2-7ebf99e0.pth. All digits are in Renesas' recipe
`python3-pytorch_%.bbappend` (github.com/renesas-rz/meta-renesas-ai) and in Arm's learning path
"Build the dual-NPU application", which check their downloads by them."""
TORCHVISION_URL = "https://download.pytorch.org/models/mobilenet_v2-{}.pth"


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
    path = Path(os.path.expanduser(weights))
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
    sha256 = TORCHVISION[weights]
    url = TORCHVISION_URL.format(sha256[:8])
    return fetch(url, cache_dir / "weights" / url.rpartition("/")[2], sha256=sha256)
