"""Validation, with everything loaded and computed anew and with what is kept between epochs."""

import dataclasses

import numpy as np
import pytest

from fetal_flax.config import EncoderConfig, ModelConfig, TrainConfig
from fetal_flax.data.batch import Batch
from fetal_flax.data.datasets import Dataset
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables
from fetal_flax.training.setup import Setup, prepare
from fetal_flax.training.validation import Validation

NO_WEIGHTS = EncoderConfig(weights="none")
WITH_ENCODER = ModelConfig(name="mobilenet_unet", base_width=16)

pytestmark = pytest.mark.usefixtures("tiny_network", "never_trained")


def with_encoder(config: TrainConfig, keep_mb: int, encoder: EncoderConfig = NO_WEIGHTS) -> Setup:
    """A run whose validation images take 0.1 MB on each of eight devices, their maps 2 MB."""
    data = dataclasses.replace(config.data, image_size=(128, 128), keep_validation_mb=keep_mb)
    return prepare(dataclasses.replace(config, model=WITH_ENCODER, encoder=encoder, data=data))


def counted(run: Setup) -> tuple[Setup, list[Batch]]:
    """The run, and the batches that its encoder is given."""
    encoded: list[Batch] = []

    def encode(variables, batch):
        encoded.append(batch)
        return run.programs.encode_step(variables, batch)

    programs = run.programs._replace(encode_step=encode)
    return dataclasses.replace(run, programs=programs), encoded


def learned(variables: Variables, *, encoder: bool) -> Variables:
    """Other values for the decoder, or for the encoder."""
    other = functional.init(WITH_ENCODER, 1)
    return Variables(
        *(
            {name: (new if name.startswith("encoder/") == encoder else old)[name] for name in old}
            for old, new in zip(variables, other, strict=True)
        )
    )


@pytest.fixture
def records_read(monkeypatch) -> list[int]:
    """Which records the data set was asked for."""
    read: list[int] = []
    original = Dataset.record

    def record(self, index):
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(Dataset, "record", record)
    return read


@pytest.mark.parametrize("backend", ["host", "device"])
def test_every_image_is_counted_once_and_read_once(small_config, records_read, backend):
    config = small_config()
    run = prepare(
        dataclasses.replace(config, data=dataclasses.replace(config.data, backend=backend))
    )
    images = run.split.validation
    assert len(images) % config.schedule.batch_size, "no padding would be tested"
    validation = Validation(run)
    whole = validation.measure(run.variables)
    singly = [
        Validation(
            dataclasses.replace(run, split=dataclasses.replace(run.split, validation=(index,)))
        ).measure(run.variables)
        for index in images
    ]
    for name, value in whole.items():
        assert value == pytest.approx(np.mean([one[name] for one in singly]), rel=1e-5)
    records_read.clear()
    assert validation.measure(run.variables) == whole
    assert validation.measure(functional.init(config.model, 1)) != whole
    assert not records_read


def test_what_does_not_fit_is_read_again(small_config, records_read):
    config = small_config()
    data = dataclasses.replace(config.data, keep_validation_mb=0)
    run = prepare(dataclasses.replace(config, data=data))
    validation = Validation(run)
    records_read.clear()
    assert validation.measure(run.variables) == validation.measure(run.variables)
    assert sorted(records_read) == sorted(2 * run.split.validation)


def test_what_is_kept_of_a_frozen_encoder_changes_no_bit(small_config, records_read):
    results = []
    for keep_mb, reads, encodes in ((0, 2, 2), (1, 1, 2), (1024, 1, 1)):
        run, encoded = counted(with_encoder(small_config(), keep_mb))
        validation = Validation(run)
        records_read.clear()
        first = validation.measure(run.variables)
        results.append((first, validation.measure(learned(run.variables, encoder=False))))
        assert first != results[-1][1]
        assert len(records_read) == reads * len(run.split.validation)
        assert len(encoded) == encodes * 2
    assert results[0] == results[1] == results[2]


def test_an_encoder_that_moves_is_asked_every_time(small_config):
    for encoder in (
        dataclasses.replace(NO_WEIGHTS, trainable=True),
        dataclasses.replace(NO_WEIGHTS, frozen_batch_norm="batch"),
    ):
        run, encoded = counted(with_encoder(small_config(), 1024, encoder))
        validation = Validation(run)
        moved = learned(run.variables, encoder=True)
        assert validation.measure(run.variables) != validation.measure(moved)
        assert validation.measure(moved) == Validation(run).measure(moved)
        assert not encoded
