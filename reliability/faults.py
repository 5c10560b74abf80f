"""Faults of every kind against real trainings: does each end as the undisturbed run does?

    python reliability/faults.py --output faults.md

Each fault hits a training of its own process; then the training is resumed, hit again, and in the
end let through. A run is lost if it can't be resumed, and changed if any metric or any bit of its
last checkpoint differs from the undisturbed run's. Needs Linux; full and read-only disks need root,
for a small tmpfs. docs/reliability.md has the table of a whole campaign.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fetal_flax.errors import Interrupted

TIMINGS = {"seconds", "images_per_second", "waiting"}
PHASES = ("start", "step", "validation", "saving")
INTERRUPTED = Interrupted.exit_code
DEVICE_SETTINGS = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
PATIENCE = 600
"""Seconds after which a process counts as hanging."""
PHANTOMS = (
    'dataset="fetal_phantom", cache_dir={cache!r}, image_size=(32, 32), phantom_count=60, '
    "phantom_size=(64, 96), workers=0"
)
# The recipe of the shipped networks has all that a run can carry on: averages, a cosine, varied
# grey levels, soft masks.
CONFIGS = {
    "small": """
from fetal_flax.config import *
def config():
    return TrainConfig(
        name="small", model=ModelConfig(name="unet", base_width=4),
        encoder=EncoderConfig(weights="none"),
        data=DataConfig({phantoms}),
        schedule=ScheduleConfig(epochs={epochs}, batch_size=4),
    )
""",
    "described": """
from dataclasses import replace
from fetal_flax import presets
from fetal_flax.config import *
def config():
    recipe = presets.load("hc18_shipped")
    return replace(
        recipe, name="described", encoder=EncoderConfig(weights="none"),
        data=replace(recipe.data, {phantoms}),
        schedule=replace(recipe.schedule, epochs={epochs}, batch_size=8),
    )
""",
}


def child(arguments: list[str]) -> int:
    """Trains as `fetal-flax train` does, and says on stdout which phase it enters."""
    from fetal_flax._util.compilation_cache import keep_compilations
    from fetal_flax.config import DataConfig

    keep_compilations(DataConfig.cache_dir)  # Before anything imports JAX.
    from fetal_flax.commands import main as command_line
    from fetal_flax.training import events, run

    phases = {
        events.CallDone: "step",
        events.ValidationBegan: "validation",
        events.CheckpointBegan: "saving",
    }

    def announce(event: events.Event) -> None:
        if type(event) in phases:
            print(f"PHASE {phases[type(event)]}", flush=True)

    run.train = functools.partial(run.train, listeners=[announce])
    print("PHASE start", flush=True)
    return command_line.main(["train", *arguments])


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    output: str
    seconds: float
    """From the fault to the end."""

    @property
    def named(self) -> bool:
        """Whether it says what happened in a sentence and shows no traceback."""
        return "fetal-flax train: " in self.output and "Traceback" not in self.output


@dataclasses.dataclass
class Row:
    """One line of the table."""

    fault: str
    faults: int = 0
    runs: int = 0
    lost: int = 0
    changed: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)


class Campaign:
    """Trainings in a folder, and the undisturbed ones that they are compared with."""

    def __init__(self, folder: Path, seed: int, epochs: int):
        self.folder = folder
        self.seed = seed
        phantoms = PHANTOMS.format(cache=str(folder / "cache"))
        for name, text in CONFIGS.items():
            (folder / f"{name}.py").write_text(text.format(phantoms=phantoms, epochs=epochs))

    def start(self, config: str, workdir: Path, *flags: str, **environment: str) -> "Process":
        """Starts a training, or goes on with the one that has begun in `workdir`."""
        command = [sys.executable, __file__, "--child", "--workdir", str(workdir), *flags]
        begun = (workdir / "config.json").exists()
        command += ["--resume"] if begun else ["--config", str(self.folder / f"{config}.py")]
        return Process(command, environment)

    def undisturbed(self, config: str) -> Path:
        """Returns the workdir of the run that nothing disturbs, after it has run."""
        workdir = self.folder / f"undisturbed-{config}"
        if not workdir.exists():
            ended = self.start(config, workdir).wait()
            if ended.code:
                raise SystemExit(f"the undisturbed run failed:\n{ended.output}")
        return workdir

    def judge(self, row: Row, config: str, workdir: Path, ended: Ended) -> None:
        """Counts a run that has been let through, and removes it if nothing is wrong."""
        row.runs += 1
        if "Traceback" in ended.output:
            row.notes.append(f"a traceback: {ended.output[-300:]}")
        if ended.code:
            row.lost += 1
            row.notes.append(f"{workdir.name} ended with {ended.code}: {ended.output[-300:]}")
        elif result(workdir) != result(self.undisturbed(config)):
            row.changed += 1
            row.notes.append(f"{workdir.name} differs")
        else:
            shutil.rmtree(workdir)

    def random(self, name: str) -> random.Random:
        """Returns random numbers of their own for a part of the campaign."""
        return random.Random(f"{self.seed} {name}")


class Process:
    """A training under way, followed through what it prints."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        # One device unless told otherwise, also where pytest has set eight.
        inherited = {n: v for n, v in os.environ.items() if n not in DEVICE_SETTINGS}
        environment = {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | environment
        self._process = subprocess.Popen(
            command,
            env=inherited | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid = self._process.pid
        self._lines: list[str] = []
        self._printed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._hit_at = time.monotonic()

    def reach(self, phase: str, times: int = 1) -> bool:
        """Waits for a phase; False if the process ends before."""

        def done() -> bool:
            return self._lines.count(f"PHASE {phase}\n") >= times or not self._reader.is_alive()

        with self._printed:
            if not self._printed.wait_for(done, PATIENCE):
                self._process.kill()
        return self._process.poll() is None

    def hit(self, number: int) -> None:
        """Sends a signal; 0 sends none, and only starts the clock."""
        self._hit_at = time.monotonic()
        self._process.send_signal(number)

    def wait(self) -> Ended:
        """Waits for the end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        seconds = time.monotonic() - self._hit_at
        self._process.kill()
        self._process.wait()
        self._reader.join()
        lines = [line for line in self._lines if not line.startswith("PHASE ")]
        return Ended(self._process.returncode, "".join(lines), seconds)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._printed:
                self._lines.append(line)
                self._printed.notify_all()
        with self._printed:
            self._printed.notify_all()


def result(workdir: Path) -> Any:
    """Returns all metrics of a run but times, and the digests of its last state."""
    with (workdir / "metrics.csv").open(newline="") as file:
        rows = [
            {name: value for name, value in row.items() if name not in TIMINGS}
            for row in csv.DictReader(file)
        ]
    description = json.loads((latest(workdir) / "description" / "metadata").read_text())
    digests = description["sha256"]
    return rows, digests["variables"], digests["training"]


def latest(workdir: Path) -> Path:
    """Returns the folder of a run's last checkpoint."""
    folders = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    return max(folders, key=lambda path: int(path.name))


def signals(
    campaign: Campaign, config: str, number: signal.Signals, faults: int, per_run: int, jobs: int
) -> list[Row]:
    """Hits runs with a signal in every phase, up to `per_run` times each."""
    per_run = min(per_run, faults)
    rows = {phase: Row(f"{number.name} in {phase}, {config} network") for phase in PHASES}
    longest = 0.0
    lock = threading.Lock()

    def one_run(index: int) -> None:
        nonlocal longest
        workdir = campaign.folder / f"{number.name}-{config}-{index}"
        rng = campaign.random(workdir.name)
        hit: list[str] = []
        for fault in range(per_run):
            phase = PHASES[(index * per_run + fault) % len(PHASES)]
            process = campaign.start(config, workdir)
            if process.reach(phase, 1 if phase == "start" else rng.randint(1, 3)):
                time.sleep(rng.uniform(0, 0.25))
                process.hit(number)
            ended = process.wait()
            expected = {-number} if number == signal.SIGKILL else {INTERRUPTED}
            if phase == "start":
                expected.add(-number)  # Before the run listens there is nothing to put away.
            if ended.code not in expected:
                # The run was over before the signal came, or the signal was not answered.
                assert ended.code == 0, f"{phase}: {ended.code} {ended.output}"
                break
            hit.append(phase)
            longest = max(longest, ended.seconds)
        ended = campaign.start(config, workdir).wait()
        with lock:
            for phase in hit:
                rows[phase].faults += 1
            campaign.judge(rows[hit[-1]] if hit else rows["step"], config, workdir, ended)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one_run, range(-(-faults // per_run))))
    if number != signal.SIGKILL:
        rows["step"].notes.append(f"at most {longest:.1f} s from signal to exit with {INTERRUPTED}")
    return list(rows.values())


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """Mounts a tmpfs, and yields a function that changes its options."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def full_disk(campaign: Campaign, count: int) -> Row:
    """Lets the disk fill up at ever later writes, then makes room and goes on."""
    row = Row("disk full")
    pages = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 384, 512, 768, 1024, 1200]
    codes = set()
    for number in pages[:: -(-len(pages) // count)]:
        disk = campaign.folder / "disk"
        workdir = disk / "run"
        with small_disk(disk) as remount:
            remount(f"size={4 * number}k")
            ended = campaign.start("small", workdir).wait()
            codes.add(ended.code)
            row.faults += ended.code != 0
            if ended.code and not ended.named:
                row.notes.append(f"no mere sentence at {4 * number} KB: {ended.output[-500:]}")
            remount("size=1g")
            campaign.judge(row, "small", workdir, campaign.start("small", workdir).wait())
    row.notes.append(f"exit codes {sorted(codes)}")
    return row


def read_only_disk(campaign: Campaign) -> Row:
    """Takes the right to write away before a run starts, and before it is resumed."""
    row = Row("disk read-only")
    disk = campaign.folder / "disk"
    workdir = disk / "run"
    codes = []
    with small_disk(disk) as remount:
        for resumes in (False, True):
            if resumes:
                process = campaign.start("small", workdir)
                process.reach("saving", 2)
                process.hit(signal.SIGTERM)
                assert process.wait().code == INTERRUPTED
            before = contents(disk)
            remount("ro")
            ended = campaign.start("small", workdir).wait()
            remount("rw")
            row.faults += ended.code != 0
            codes.append(ended.code)
            if not ended.named or contents(disk) != before:
                row.notes.append(f"no mere sentence: {ended.output[-500:]}")
        campaign.judge(row, "small", workdir, campaign.start("small", workdir).wait())
    row.notes.append(f"exit codes {codes}")
    return row


def contents(folder: Path) -> dict[Path, bytes]:
    """Returns all files in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(campaign: Campaign, count: int, jobs: int) -> list[Row]:
    """Truncates a file of the last checkpoint, or flips a byte in it, and goes on."""
    rows = {kind: Row(f"checkpoint file {kind}") for kind in ("truncated", "with a byte flipped")}
    origin = campaign.folder / "origin"
    process = campaign.start("small", origin)
    process.reach("saving", 4)
    process.hit(signal.SIGTERM)
    assert process.wait().code == INTERRUPTED
    lock = threading.Lock()
    noticed = dict.fromkeys(rows, 0)

    def one(index: int) -> None:
        kind = list(rows)[index % 2]
        workdir = campaign.folder / f"damaged-{index}"
        rng = campaign.random(workdir.name)
        shutil.copytree(origin, workdir)
        files = sorted(p for p in latest(workdir).rglob("*") if p.is_file() and p.stat().st_size)
        # Large files first: most bytes are in them.
        file = rng.choices(files, [path.stat().st_size ** 0.5 for path in files])[0]
        content = bytearray(file.read_bytes())
        position = rng.randrange(len(content))
        if kind == "truncated":
            del content[position:]
        else:
            content[position] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        ended = campaign.start("small", workdir).wait()
        with lock:
            rows[kind].faults += 1
            noticed[kind] += " is damaged " in ended.output
            if ended.code:
                rows[kind].notes.append(f"{file.relative_to(workdir)} at {position}")
            campaign.judge(rows[kind], "small", workdir, ended)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, range(count)))
    for kind, row in rows.items():
        row.notes.append(
            f"{noticed[kind]} noticed, the rest in what is read over or what is not read"
        )
    return list(rows.values())


def killed_worker(campaign: Campaign, count: int) -> Row:
    """Kills the data worker of a run, which has to go on by itself."""
    row = Row("data worker killed")
    for index in range(count):
        workdir = campaign.folder / f"worker-{index}"
        process = campaign.start("small", workdir, "--data.workers", "1")
        if process.reach("step", 3 + index):
            tasks = Path(f"/proc/{process.pid}/task").iterdir()
            for pid in " ".join((task / "children").read_text() for task in tasks).split():
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)
                    row.faults += 1
        ended = process.wait()
        if "starting new ones" in ended.output:
            row.notes.append("new ones started")
        campaign.judge(row, "small", workdir, ended)
    row.notes = [f"{len(row.notes)} times new ones were started; else all batches were there"]
    return row


def together(campaign: Campaign, workdir: Path, count: int) -> list[Process]:
    """Starts processes of a device each that train as one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    flags = ("--distributed", "--coordinator", coordinator, "--process-count", str(count))
    return [
        campaign.start("small", workdir, *flags, "--process-id", str(i), JAX_NUM_CPU_DEVICES="1")
        for i in range(count)
    ]


def processes_against_one(campaign: Campaign, count: int) -> Row:
    """Compares processes of a device each with one process that has all the devices."""
    row = Row(f"none: {count} processes against one with {count} devices", runs=1)
    one, many = (campaign.folder / f"{name}-{count}" for name in ("devices", "processes"))
    ended = [campaign.start("small", one, JAX_NUM_CPU_DEVICES=str(count)).wait()]
    ended += [process.wait() for process in together(campaign, many, count)]
    if any(process.code for process in ended):
        row.lost = 1
        row.notes.append(str(ended))
        return row
    rows = [result(workdir)[0] for workdir in (one, many)]
    largest = [
        max(abs(float(ours[name]) - float(theirs[name])) for name in theirs)
        for ours, theirs in zip(*rows, strict=True)
    ]
    same = result(one) == result(many)
    row.notes.append(
        "bit for bit"
        if same
        else f"metrics of the first epoch differ by at most {largest[0]:.1e}, of all by "
        f"{max(largest):.1e}"
    )
    # Sums of four and more are taken in another order, and training amplifies the rounding.
    row.changed = int(largest[0] > 1e-5)
    return row


def one_of_two(campaign: Campaign, number: signal.Signals, count: int) -> Row:
    """Sends a signal to one of two processes; the other one has to end, too."""
    row = Row(f"{number.name} to one of two processes")
    reference = campaign.folder / "undisturbed-two"
    if not reference.exists():
        for process in together(campaign, reference, 2):
            assert process.wait().code == 0
    waited = []
    for index in range(count):
        workdir = campaign.folder / f"{number.name}-two-{index}"
        processes = together(campaign, workdir, 2)
        processes[0].reach("step", 5)
        for position, process in enumerate(processes):
            process.hit(number if position == index % 2 else 0)
        ended = [process.wait() for process in processes]
        waited += [process.seconds for process in ended]
        if number != signal.SIGKILL and {process.code for process in ended} != {INTERRUPTED}:
            row.notes.append(f"exit codes {[process.code for process in ended]}")
        row.faults += 1
        codes = [process.wait().code for process in together(campaign, workdir, 2)]
        row.runs += 1
        row.lost += any(codes)
        row.changed += not any(codes) and result(workdir) != result(reference)
    row.notes.append(f"both ended after at most {max(waited):.0f} s")
    return row


def memory(campaign: Campaign, epochs: int) -> Row:
    """Follows the memory of a run, which should not grow."""
    row = Row(f"none: memory over {epochs} epochs, described network", runs=1)
    flags = ("--schedule.epochs", str(epochs))
    process = campaign.start("described", campaign.folder / "memory", *flags)
    resident = {}
    for epoch in range(epochs // 10, epochs + 1, epochs // 10):
        if process.reach("saving", epoch):
            status = Path(f"/proc/{process.pid}/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
            resident[epoch] = int(line.split()[1]) // 1024
    row.lost = int(process.wait().code != 0)
    row.notes.append(", ".join(f"{mb} MB after {epoch}" for epoch, mb in resident.items()))
    return row


def table(rows: list[Row]) -> str:
    """Returns the campaign as Markdown."""
    lines = ["| fault | faults | runs | lost | changed | remarks |", "|---|---|---|---|---|---|"]
    for row in rows:
        notes = "; ".join(note.replace("\n", " ") for note in row.notes)
        lines.append(
            f"| {row.fault} | {row.faults} | {row.runs} | {row.lost} | {row.changed} | {notes} |"
        )
    sums = [sum(getattr(row, name) for row in rows) for name in ("faults", "runs")]
    bad = [sum(getattr(row, name) for row in rows) for name in ("lost", "changed")]
    lines.append(f"| **all** | {sums[0]} | {sums[1]} | **{bad[0]}** | **{bad[1]}** | |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Runs the campaign; 1 if a run was lost or changed."""
    parser = argparse.ArgumentParser(description="Faults of every kind against real trainings.")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs of the small network")
    parser.add_argument("--described-kills", type=int, default=8)
    parser.add_argument("--terms", type=int, default=20, help="SIGTERMs")
    parser.add_argument("--damages", type=int, default=40, help="damaged checkpoint files")
    parser.add_argument("--full-disks", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4, help="data workers killed")
    parser.add_argument(
        "--processes", type=int, default=2, help="of two processes, stopped and killed"
    )
    parser.add_argument("--memory-epochs", type=int, default=50, help="a multiple of 10")
    parser.add_argument("--epochs", type=int, default=12, help="of a run; 5 or more")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    options = parser.parse_args(arguments)

    rows: list[Row] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        campaign = Campaign(Path(folder), options.seed, options.epochs)

        def note(*new: Row) -> None:
            rows.extend(new)
            print(table(list(new)), f"{time.monotonic() - start:.0f} s", flush=True)

        campaign.undisturbed("small")
        if options.kills:
            note(*signals(campaign, "small", signal.SIGKILL, options.kills, 10, options.jobs))
        if options.terms:
            note(*signals(campaign, "small", signal.SIGTERM, options.terms, 5, options.jobs))
        if options.damages:
            note(*damage(campaign, options.damages, options.jobs))
        if os.geteuid() == 0 and options.full_disks:
            note(full_disk(campaign, options.full_disks), read_only_disk(campaign))
        if options.workers:
            note(killed_worker(campaign, options.workers))
        if options.processes:
            note(*(processes_against_one(campaign, count) for count in (2, 4)))
            note(one_of_two(campaign, signal.SIGTERM, options.processes))
            note(one_of_two(campaign, signal.SIGKILL, options.processes))
        if options.described_kills:
            kills = options.described_kills
            campaign.undisturbed("described")
            note(*signals(campaign, "described", signal.SIGKILL, kills, 4, options.jobs))
        if options.memory_epochs:
            note(memory(campaign, options.memory_epochs))
    text = table(rows)
    print(f"\n{text}\n{time.monotonic() - start:.0f} s")
    if options.output:
        options.output.write_text(text)
    return int(any(row.lost or row.changed for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(sys.argv[2:]))
    sys.exit(main(sys.argv[1:]))
