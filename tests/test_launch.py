"""The scripts in examples/launch, beside stand-ins for what launches: which process gets what."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fetal_flax.commands.main import parse
from fetal_flax.training.distributed import local_gpus

LAUNCH = Path(__file__).parents[1] / "examples" / "launch"
GPUS = 8

# What a process is started with, line by line.
FETAL_FLAX = """\
import json, os, sys
with open(os.environ["STARTED"], "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
sys.exit(int(os.environ["EXIT_CODE"]))
"""
SRUN = """\
import os, subprocess, sys
nodes, tasks = int(os.environ["NODES"]), int(os.environ["TASKS"])
codes = [
    subprocess.run(sys.argv[1:], env=os.environ | {
        "SLURM_NTASKS": str(nodes * tasks), "SLURM_PROCID": str(node * tasks + task),
        "SLURM_NODEID": str(node), "SLURM_LOCALID": str(task), "SLURM_STEP_NODELIST": "n[0-1]",
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x{nodes})", "SLURM_GPUS_ON_NODE": "8",
    }).returncode
    for node in range(nodes) for task in range(tasks)
]
sys.exit(max(codes))
"""
MPIRUN = """\
import os, subprocess, sys
assert sys.argv[1] == "--hostfile" and sys.argv[3:5] == ["--map-by", "ppr:1:node"]
hosts = [line for line in open(sys.argv[2]) if line.strip() and line[0] != "#"]
command = sys.argv[sys.argv.index("bash"):]
for rank, host in enumerate(hosts):
    subprocess.run(command, check=True, env=os.environ | {
        "OMPI_COMM_WORLD_SIZE": str(len(hosts)), "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    })
"""
SCONTROL = 'import os, sys; open(os.environ["REQUEUED"], "w").write(" ".join(sys.argv[1:]))'


class Launched:
    """Runs a script and keeps the arguments and environments of all processes that it starts."""

    def __init__(self, folder: Path):
        self.folder, self.workdir = folder, folder / "run"
        self.requeued = folder / "requeued"
        for name, code in (
            ("fetal-flax", FETAL_FLAX),
            ("srun", SRUN),
            ("mpirun", MPIRUN),
            ("scontrol", SCONTROL),
        ):
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!{sys.executable}\n{code}")
            program.chmod(0o755)

    def __call__(self, *command: str, exit_code: int = 0, **environment: str) -> list[Any]:
        started = self.folder / "started"
        started.unlink(missing_ok=True)
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "OMPI_"))}
        kept |= {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "STARTED": str(started),
            "REQUEUED": str(self.requeued),
            "EXIT_CODE": str(exit_code),
            "WORKDIR": str(self.workdir),
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(GPUS))),
        }
        self.code = subprocess.run(["bash", *command], env=kept | environment).returncode
        return [json.loads(line) for line in started.read_text().splitlines()]


@pytest.fixture
def launched(tmp_path) -> Launched:
    return Launched(tmp_path)


def slurm(launched: Launched, name: str, exit_code: int = 0) -> list[Any]:
    """Starts a batch script as its own `#SBATCH` lines tell SLURM to."""
    script = (LAUNCH / name).read_text()
    counts = {}
    for variable, option in (("NODES", "nodes"), ("TASKS", "ntasks-per-node")):
        found = re.search(rf"^#SBATCH .*--{option}=(\d+)", script, re.MULTILINE)
        assert found
        counts[variable] = found[1]
    assert f"--gpus-per-node={GPUS}" in script
    path = str(LAUNCH / name)
    return launched(path, exit_code=exit_code, SLURM_JOB_ID="70001", **counts)


@pytest.mark.parametrize(("name", "processes"), [("slurm_node.sh", 2), ("slurm_gpu.sh", 16)])
def test_the_processes_of_a_slurm_job_take_all_gpus_of_both_nodes(launched, name, processes):
    started = slurm(launched, name)
    taken = []
    for _, environment in started:
        own = local_gpus(environment)
        assert own is not None
        taken += [(environment["SLURM_NODEID"], gpu) for gpu in own or range(GPUS)]
    assert len(started) == processes
    assert sorted(taken) == [(node, gpu) for node in "01" for gpu in range(GPUS)]


def test_a_slurm_job_that_was_stopped_is_queued_again_and_resumes(launched):
    (arguments, _), *_ = slurm(launched, "slurm_node.sh", exit_code=75)
    assert launched.code == 75
    assert launched.requeued.read_text() == "requeue 70001"
    assert "--resume" not in arguments
    launched.requeued.unlink()
    launched.workdir.mkdir()
    (launched.workdir / "config.json").touch()
    (arguments, _), *_ = slurm(launched, "slurm_node.sh")
    assert arguments[-1] == "--resume"
    assert not launched.requeued.exists() and launched.code == 0


def test_open_mpi_tells_each_process_its_number_and_where_the_first_one_is(launched, tmp_path):
    (tmp_path / "hosts").write_text("# two hosts\nhost-a slots=8\nhost-b slots=8\n")
    started = launched(str(LAUNCH / "open_mpi.sh"), str(tmp_path / "hosts"))
    assert [local_gpus(environment) for _, environment in started] == [[], []]
    for number, (arguments, _) in enumerate(started):
        told = dict(itertools.pairwise(arguments))
        assert told["--coordinator"] == "host-a:7777"
        assert (told["--process-count"], told["--process-id"]) == ("2", str(number))


def test_kubernetes_gives_each_pod_its_number_and_a_name_for_the_first(launched):
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # A pod of an Indexed Job is called JOB-NUMBER, and found where a headless service has the
    # pods' subdomain.
    assert spec["completionMode"] == "Indexed"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == GPUS
    bash, *command = container["command"]
    assert bash == "bash"
    ((arguments, environment),) = launched(*command, JOB_COMPLETION_INDEX="1")
    assert local_gpus(environment) == []
    told = dict(itertools.pairwise(arguments))
    assert told["--coordinator"] == f"{job['metadata']['name']}-0.{pod['subdomain']}:7777"
    assert told["--process-count"] == str(spec["completions"]) == str(spec["parallelism"])
    assert told["--process-id"] == "1"
    # To be stopped costs no try.
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "Ignore" and rule["onExitCodes"]["values"] == [75]
    assert rule["onExitCodes"]["containerName"] == container["name"]


@pytest.mark.parametrize("name", ["slurm_node.sh", "open_mpi.sh"])
def test_the_command_line_knows_what_a_script_says(launched, tmp_path, name):
    (tmp_path / "hosts").write_text("host-a\n")
    if name == "open_mpi.sh":
        (arguments, _), *_ = launched(str(LAUNCH / name), str(tmp_path / "hosts"))
    else:
        (arguments, _), *_ = slurm(launched, name)
    command, *flags = arguments
    assert parse(command, flags).distributed
