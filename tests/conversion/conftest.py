"""torchvision's encoder, as tensors and as a file."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision


@pytest.fixture(scope="session")
def encoder_state_dict() -> dict[str, torch.Tensor]:
    """torchvision's, with no two arrays alike."""
    generator = torch.Generator().manual_seed(0)
    tensors = torchvision.models.mobilenet_v2().state_dict()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1, generator=generator)
    return tensors


@pytest.fixture(scope="session")
def encoder_file(encoder_state_dict, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("torchvision") / "mobilenet_v2.pth"
    torch.save(encoder_state_dict, path)
    return path


@pytest.fixture
def tensors(encoder_state_dict) -> dict[str, np.ndarray]:
    """torchvision's, as arrays to change."""
    return {name: tensor.numpy().copy() for name, tensor in encoder_state_dict.items()}
