"""From the command to the first training step: how long a start takes, the first and the next time.

python benchmarks/startup.py [--repeats 5] -- --config configs/hc18.py --data.data-dir HC18 ...

Each start is a process of its own, with the flags of `python train.py`, that is ended when its
first call of the step is done (on a CPU, two steps). The first one begins with an empty
compilation cache.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def child(flags: list[str], started: float) -> int:
    """Trains up to the end of the first call of the step."""
    import jax

    from fetal_flax.commands import main as command_line
    from fetal_flax.training.compile import BackgroundCompilation

    def timed(self, *arguments):
        # A step begins when it is compiled and its batch is there, not when it is called.
        compiled = self.compiled
        jax.block_until_ready(arguments)
        begin = time.time() - started
        jax.block_until_ready(compiled(*arguments))
        print(f"STARTED {begin} {time.time() - started}", flush=True)
        os._exit(0)

    BackgroundCompilation.__call__ = timed
    return command_line.main(["train", *flags])


def start(flags: list[str], cache: str) -> tuple[float, float]:
    """Returns the seconds to the begin and to the end of the first call."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, __file__, "--child", str(time.time())]
        command += [*flags, "--workdir", str(Path(workdir, "run"))]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    times = [line.split()[1:] for line in ran.stdout.splitlines() if line.startswith("STARTED")]
    if not times:
        raise SystemExit(ran.stdout + ran.stderr)
    return float(times[0][0]), float(times[0][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="starts behind the first")
    parser.add_argument("flags", nargs="*", help="of python train.py, behind --")
    options = parser.parse_args()
    print("| start | to the begin of the first step, s | to its call's end, s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        first, *others = [start(options.flags, cache) for _ in range(1 + options.repeats)]
    print(f"| the first | {first[0]:.1f} | {first[1]:.1f} |")
    begin, end = (statistics.median(times) for times in zip(*others, strict=True))
    print(f"| the next {len(others)}, median | {begin:.1f} | {end:.1f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(sys.argv[3:], float(sys.argv[2])))
    main()
