"""What stops a run costs it nothing; reliability/faults.py does the same to real processes."""

import dataclasses
import errno
import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fetal_flax import checkpoints
from fetal_flax._util.locks import locked
from fetal_flax.commands.main import main
from fetal_flax.data.host_loader import DeviceBatches, WorkerDiedError
from fetal_flax.errors import InputError, Interrupted, RunError
from fetal_flax.training import epoch, run, setup, workdir
from fetal_flax.training.distributed import run_on_all_processes
from fetal_flax.training.events import (
    CallDone,
    CheckpointBegan,
    Event,
    Listener,
    StepDone,
    ValidationBegan,
)
from fetal_flax.training.interruption import Interruption
from fetal_flax.training.run import train

pytestmark = pytest.mark.usefixtures("tiny_network")


def at_call(monkeypatch, owner, name: str, number: int, do) -> None:
    """Does something before a function is called for the n-th time."""
    function, calls = getattr(owner, name), []

    def replacement(*arguments, **keywords):
        calls.append(None)
        if len(calls) == number:
            do()
        return function(*arguments, **keywords)

    monkeypatch.setattr(owner, name, replacement)


def raise_(error: Exception) -> None:
    raise error


def at_event(kind: type, number: int, do: Callable[[], None]) -> Listener:
    """Returns a listener that does something at the n-th event of a kind."""
    seen = itertools.count(1)

    def listen(event: Event) -> None:
        if isinstance(event, kind) and next(seen) == number:
            do()

    return listen


# A call does two of an epoch's four steps, and is finished before the signal is seen.
MOMENTS = {
    "in the first step": (CallDone, 1, "2"),
    "in a step": (CallDone, 3, "1000002"),
    "in validation": (ValidationBegan, 2, "1000004"),
    "while saving": (CheckpointBegan, 1, "1000002"),
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *((moment, signal.SIGTERM) for moment in MOMENTS),
        pytest.param("in a step", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_asked_to_stop_goes_on_exactly(
    moment, number, finished, small_config, tmp_path, read_rows, same_state
):
    kind, nth, expected = MOMENTS[moment]
    workdir = tmp_path / "run"
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    stop = at_event(kind, nth, lambda: signal.raise_signal(number))
    with pytest.raises(Interrupted, match="--resume"):
        train(small_config(), workdir, listeners=[stop])
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert (workdir / "checkpoints" / expected).is_dir()
    train(small_config(), workdir, resume=True)
    assert read_rows(workdir) == read_rows(finished)
    assert same_state(workdir, finished)


def test_a_signal_before_the_first_step_stops_at_once(small_config, tmp_path, monkeypatch):
    at_call(monkeypatch, setup, "open_dataset", 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_second_signal_is_not_waited_for():
    with Interruption() as interruption:
        interruption.defer()
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize(("error", "code"), [(Interrupted("a"), 75), (RunError("a"), 1)])
def test_a_scheduler_can_tell_a_stop_from_a_failure(error, code, monkeypatch, capsys):
    monkeypatch.setattr(run, "train", lambda *_, **__: raise_(error))
    assert main(["train"]) == code
    assert capsys.readouterr().err == "fetal-flax train: a\n"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(finished, small_config, tmp_path, read_rows, same_state):
    workdir = tmp_path / "run"
    train(small_config(), workdir)
    assert read_rows(workdir) == read_rows(finished)
    assert same_state(workdir, finished)
    other = tmp_path / "other"
    train(dataclasses.replace(small_config(), seed=1), other)
    assert not same_state(other, finished)


def test_a_workdir_in_use_is_named(small_config, tmp_path):
    with (
        locked(tmp_path / "run" / ".lock", wait=False),
        pytest.raises(InputError, match=rf"in use by process {os.getpid()}"),
    ):
        train(small_config(), tmp_path / "run")


def test_a_workdir_that_cannot_be_made_is_named(small_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--workdir"):
        train(small_config(), tmp_path / "file" / "run")


def test_a_full_disk_loses_nothing(finished, small_config, tmp_path, read_rows):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    disk = at_event(StepDone, 6, lambda: raise_(full))
    with pytest.raises(RunError, match=r"No space left.*--resume"):
        train(small_config(), tmp_path / "run", listeners=[disk])
    train(small_config(), tmp_path / "run", resume=True)
    assert read_rows(tmp_path / "run") == read_rows(finished)


def test_dead_data_workers_are_replaced_once_per_step(
    finished, small_config, tmp_path, monkeypatch, read_rows
):
    dead = WorkerDiedError("killed")
    with monkeypatch.context() as patched:
        at_call(patched, DeviceBatches, "__next__", 3, lambda: raise_(dead))
        train(small_config(), tmp_path / "once")
    assert read_rows(tmp_path / "once") == read_rows(finished)
    monkeypatch.setattr(epoch, "prefetch_to_device", lambda *_, **__: raise_(dead))
    with pytest.raises(RunError, match=r"--data\.workers 0"):
        train(small_config(), tmp_path / "ever")


def diverging(config):
    return dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30)
    )


def test_a_step_that_is_not_finite_stops_the_run_before_it(small_config, tmp_path):
    workdir = tmp_path / "run"
    config = diverging(small_config())
    for resume in (False, True):
        with pytest.raises(RunError, match=r"step 2 are not finite.*phantom_0000"):
            train(config, workdir, resume=resume)
    batch = np.load(workdir / "non_finite" / "step_2.npz")
    assert batch["image"].shape == (8, 32, 32, 1)
    assert set(batch["name"]) < {f"phantom_{index:06d}" for index in range(45)}
    variables, description = checkpoints.load_checkpoint(workdir)
    assert len(description.progress["begun"]) == 1
    assert all(np.isfinite(array).all() for array in variables.params.values())


def test_steps_that_are_not_finite_can_be_skipped(small_config, tmp_path, read_rows, monkeypatch):
    config = diverging(small_config(non_finite="skip"))
    with pytest.raises(RunError, match="no step of epoch 2"):
        train(config, tmp_path / "run")
    (row,) = read_rows(tmp_path / "run")
    assert row["skipped"] == "3"


def test_a_damaged_checkpoint_is_passed_over(
    finished, small_config, tmp_path, read_rows, same_state, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for file in (workdir / "checkpoints" / "2000000").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1])
    train(small_config(), workdir, resume=True)
    assert "2000000 is damaged" in capsys.readouterr().out.replace("\n", "")
    assert (workdir / "damaged" / "2000000").is_dir()
    assert read_rows(workdir) == read_rows(finished)
    assert same_state(workdir, finished)


def test_without_a_whole_checkpoint_nothing_is_overwritten(finished, small_config, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for file in (workdir / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    before = sorted((workdir / "checkpoints").rglob("*"))
    with pytest.raises(InputError, match="damaged"):
        train(small_config(), workdir, resume=True)
    assert sorted((workdir / "checkpoints").rglob("*")) == before


def test_one_process_is_everywhere():
    assert run_on_all_processes(lambda: 3) == 3
    with pytest.raises(InputError, match="wrong"):
        run_on_all_processes(lambda: raise_(InputError("wrong")))


def test_flags_of_several_processes_need_distributed(capsys):
    assert main(["train", "--process-id", "1"]) == 2
    assert "--distributed" in capsys.readouterr().err


def test_a_coordinator_is_asked_for(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(
        "jax.distributed.initialize", lambda *_, **__: raise_(ValueError("no address"))
    )
    assert main(["train", "--distributed"]) == 2
    assert "--coordinator HOST:PORT" in capsys.readouterr().err


def test_a_disk_full_at_the_first_write_leaves_a_workdir_to_begin_in(
    small_config, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        at_call(patched, workdir, "write_atomically", 1, lambda: raise_(InputError("disk full")))
        with pytest.raises(InputError, match="disk full"):
            train(small_config(epochs=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(small_config(epochs=1), tmp_path / "run")
