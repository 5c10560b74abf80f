"""Which GPUs a process takes, by what its launcher tells in the environment."""

import os
import subprocess
import sys

import pytest

from fetal_flax.errors import InputError
from fetal_flax.training.distributed import local_gpus

EIGHT = ",".join(map(str, range(8)))
SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_NODEID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "1",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.mark.parametrize("launcher", [SLURM, OPEN_MPI], ids=["slurm", "open_mpi"])
def test_one_process_of_a_host_joins_with_all_gpus(launcher):
    """As JAX understands it, in a process of its own."""
    code = """
import jax
from fetal_flax.training import distributed
distributed.initialize()
print(jax.process_count(), jax.config.read("jax_cuda_visible_devices"))
"""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "JAX_LOCAL_DEVICE"))
    }
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | launcher | {"JAX_COORDINATOR_PORT": str(50000 + os.getpid() % 10000)},
        capture_output=True,
        text=True,
    )
    assert ran.stdout.split() == ["1", "all"], ran.stderr


@pytest.mark.parametrize(
    ("tasks", "node", "position", "seen", "gpus"),
    [
        ("8(x2)", "1", "3", EIGHT, [3]),
        ("2", "0", "1", EIGHT, [4, 5, 6, 7]),
        ("1,2", "0", "0", EIGHT, []),
        ("1,2", "1", "0", EIGHT, [0, 1, 2, 3]),
        ("8", "0", "5", "5", []),
        ("2", "0", "1", "4,5,6,7", []),
        ("2", "0", "1", "", None),
    ],
)
def test_tasks_of_a_slurm_node_share_its_gpus(tasks, node, position, seen, gpus):
    environment = SLURM | {
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_NODEID": node,
        "SLURM_LOCALID": position,
        "SLURM_GPUS_ON_NODE": "8",
        "CUDA_VISIBLE_DEVICES": seen,
    }
    assert local_gpus(environment) == gpus


def test_processes_of_an_open_mpi_host_share_its_gpus():
    four = {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}
    assert local_gpus(OPEN_MPI | four | {"CUDA_VISIBLE_DEVICES": EIGHT}) == [4, 5]
    assert local_gpus(OPEN_MPI | four | {"CUDA_VISIBLE_DEVICES": "2"}) == []


def test_gpus_that_processes_cannot_share_are_one_sentence():
    three = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "3", "CUDA_VISIBLE_DEVICES": EIGHT}
    with pytest.raises(InputError, match="3 processes on this host, which can't share its 8 GPUs"):
        local_gpus(three)


def test_the_environments_own_choice_of_gpus_is_left_to_jax():
    assert local_gpus(SLURM | {"JAX_LOCAL_DEVICE_IDS": "2,3"}) is None


def test_processes_that_nobody_launched_take_what_they_see():
    assert local_gpus({"CUDA_VISIBLE_DEVICES": EIGHT}) == []
