"""`fetal-flax parity`: from a PyTorch checkpoint to a report on how well Flax agrees with it."""

import copy
import dataclasses
import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fetal_flax import checkpoints
from fetal_flax._util.files import json_bytes, write_atomically
from fetal_flax.config import DataConfig, EncoderConfig, TrainConfig
from fetal_flax.conversion.names import ENCODER
from fetal_flax.conversion.recognition import (
    STEM,
    NamedTensors,
    Network,
    convert_state_dict,
    find_tensors,
)
from fetal_flax.data.batch import Batch
from fetal_flax.data.datasets import open_dataset
from fetal_flax.data.host_loader import evaluation_batches
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.parity import reference
from fetal_flax.parity.compare import Pair, compare
from fetal_flax.parity.report import Report, environment, markdown
from fetal_flax.parity.settings import ParitySettings


def run(
    reference_file: Path,
    output: Path,
    settings: ParitySettings,
    *,
    checkpoint: Path | None = None,
    data_dir: Path | None = None,
    cache_dir: str = DataConfig.cache_dir,
) -> Report:
    """Compares, and writes `parity.md` and `parity.json`.

    Args:
        reference_file: PyTorch file with a network or a MobileNetV2 encoder.
        output: Folder for the report.
        settings: What to compare.
        checkpoint: Converted directory, training workdir or shipped network's name to compare,
            instead of converting `reference_file` anew.
        data_dir: HC18 folder whose images to take; phantoms without it.
        cache_dir: Where the prepared images are kept.

    Raises:
        InputError: A file can't be read, `checkpoint` holds another network, or there are fewer
            images than asked for.
    """
    pair = load_pair(reference_file, settings, checkpoint=checkpoint)
    data = DataConfig(
        dataset="hc18" if data_dir else "fetal_phantom",
        data_dir=str(data_dir) if data_dir else None,
        cache_dir=cache_dir,
        image_size=settings.image_size,
        phantom_count=max(2, settings.batches * settings.batch_size),
    )
    pair = pair._replace(config=dataclasses.replace(pair.config, data=data))
    batches, images = load_batches(pair.config, settings)
    pos_weight = settings.loss.pos_weight
    if pos_weight == "auto":
        foreground = float(np.mean([batch.mask.mean() for batch in batches]))
        pos_weight = (1 - foreground) / foreground
    report = Report(
        reference=reference_file.name,
        sha256=hashlib.sha256(reference_file.read_bytes()).hexdigest(),
        network=pair.config.model.title if pair.layout != ENCODER else "MobileNetV2",
        parameters=sum(p.numel() for p in pair.network.parameters()),
        images=images,
        pos_weight=float(pos_weight),
        settings=settings,
        environment=environment(),
        comparisons=compare(
            pair, batches, settings.precisions, pos_weight=float(pos_weight), steps=settings.steps
        ),
    )
    write_atomically(output / "parity.md", markdown(report).encode())
    write_atomically(output / "parity.json", json_bytes(report.to_json()))
    return report


def load_pair(
    reference_file: Path, settings: ParitySettings, *, checkpoint: Path | None = None
) -> Pair:
    """Loads a PyTorch file into both networks, into PyTorch's by PyTorch's own reader.

    Raises:
        InputError: The file can't be read, or `checkpoint` holds another network.
    """
    found = find_tensors(reference_file)
    tensors = found.tensors
    rgb_encoder = STEM in tensors and tensors[STEM].shape[1:2] == (3,)
    converted = convert_state_dict(
        tensors, source=str(reference_file), channels=3 if rgb_encoder else None
    )
    model = dataclasses.replace(converted.model, dropout=0.0)
    state_dict = _torch_state_dict(reference_file, found)
    if converted.kind == "encoder":
        layout, network = ENCODER, reference.Encoder(model.in_channels)
        state_dict = {n: t for n, t in state_dict.items() if n.startswith("features.")}
    else:
        layout, network = model.name, reference.create_reference(model)
    network.load_state_dict({name: tensor.float() for name, tensor in state_dict.items()})

    encoder = EncoderConfig(
        weights="none",
        trainable=settings.train_encoder,
        learning_rate=settings.optimizer.learning_rate / 10,
        frozen_batch_norm=settings.frozen_batch_norm,
    )
    config = TrainConfig(
        model=model, encoder=encoder, loss=settings.loss, optimizer=settings.optimizer
    )
    if checkpoint:
        converted = _from_checkpoint(checkpoint, converted)
    pair = Pair(layout, config, network, converted.variables)
    return randomised(pair) if settings.randomise_norms else pair


def randomised(pair: Pair) -> Pair:
    """Returns the pair with every norm drawn anew, on both sides alike."""
    network = copy.deepcopy(pair.network)
    reference.randomise_norms(network, seed=0)
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    converted = convert_state_dict(
        tensors, source="the reference", channels=pair.config.model.in_channels
    )
    return pair._replace(network=network, variables=converted.variables)


def random_pair(config: TrainConfig, seed: int = 0) -> Pair:
    """Returns a network of random numbers, norms included, on both sides."""
    torch.manual_seed(seed)
    model = dataclasses.replace(config.model, dropout=0.0)
    config = dataclasses.replace(config, model=model)
    network = reference.create_reference(model)
    return randomised(Pair(model.name, config, network, functional.shapes(model)))


def load_batches(
    config: TrainConfig, settings: ParitySettings
) -> tuple[Sequence[Batch], list[str]]:
    """Returns batches of images spread evenly over the data set, and their names.

    Raises:
        InputError: There are too few images.
    """
    dataset = open_dataset(config.data, config.seed)
    count = settings.batches * settings.batch_size
    if len(dataset) < count:
        raise InputError(
            f"the data set holds {len(dataset)} images, and {count} are to be compared: take fewer "
            "--batches, or a smaller --batch-size"
        )
    indices = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
    batches = evaluation_batches(
        dataset,
        indices,
        config.data,
        channels=config.model.in_channels,
        batch_size=settings.batch_size,
    )
    return list(batches), [dataset.names[index] for index in indices]


def _torch_state_dict(path: Path, found: NamedTensors) -> Mapping[str, Tensor]:
    """Reads a state dict with PyTorch, so that our own reader is under test too.

    Raises:
        InputError: PyTorch's safe reader refuses what lies beside the weights.
    """
    try:
        saved: Any = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds objects beside the weights, which PyTorch doesn't load safely: save it "
            "again with torch.save(model.state_dict(), PATH)"
        ) from None
    for key in found.keys:
        saved = saved[int(key)] if isinstance(saved, list | tuple) else saved[key]
    return {name: saved[found.prefix + name] for name in found.tensors}


def _from_checkpoint(checkpoint: Path, converted: Network) -> Network:
    variables, description = checkpoints.load_checkpoint(checkpoint, kinds=("network", "encoder"))
    fits = description.kind == converted.kind and (
        dataclasses.replace(description.model, dropout=converted.model.dropout) == converted.model
    )
    if not fits:
        raise InputError(
            f"{checkpoint} holds {description.title}, and the reference another network: convert "
            "the reference again"
        )
    return converted._replace(variables=variables)
