"""What a run settles before its first step."""

from types import SimpleNamespace

import pytest

from fetal_flax.training import setup
from fetal_flax.training.setup import describe, fits_accelerator, prepare


@pytest.mark.parametrize(
    ("platform", "memory", "fits"),
    [
        ("gpu", {"bytes_limit": 4000}, True),
        ("gpu", {"bytes_limit": 3999}, False),
        ("gpu", None, False),
        ("cpu", {"bytes_limit": 4000}, False),
    ],
)
def test_data_go_to_accelerators_with_four_times_their_memory(platform, memory, fits):
    device = SimpleNamespace(platform=platform, memory_stats=lambda: memory)
    assert fits_accelerator(device, 1000) == fits


@pytest.mark.usefixtures("tiny_network", "never_trained")
def test_batches_are_the_hosts_on_a_cpu_and_the_devices_where_data_fit(small_config, monkeypatch):
    on_cpu = prepare(small_config())
    assert on_cpu.device_dataset is None and "batches by the host" in describe(on_cpu)
    asked = []
    monkeypatch.setattr(setup, "fits_accelerator", lambda _, size: asked.append(size) or True)
    on_accelerator = prepare(small_config())
    assert on_accelerator.device_dataset is not None
    assert asked == [on_accelerator.device_dataset.image.nbytes * 2]
    assert "batches by the devices" in describe(on_accelerator)
