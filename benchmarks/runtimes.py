"""Our inference beside exported files in onnxruntime and PyTorch's best, on this machine's CPU.

    python benchmarks/runtimes.py [--checkpoint NAME] [--batch 1 16] [--repeats 15] [--quick]

The same network and phantoms, in turn, each run once unmeasured and then measured. Milliseconds are
medians with quartiles, of the clock and of the processor (all threads of this process, on which
other programs of a busy machine weigh less); a ratio is the median of the clock's ratios to ours of
the same round. int8 is calibrated on two phantoms, which is enough for its speed. PyTorch, where it
is installed, runs in channels_last: eagerly, and frozen and compiled by torch.compile's inductor,
in float32 and with autocast to bfloat16. One of these is its best; what can't be compiled is named.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import onnxruntime
from timing import median_with_quartiles, normalised_max_difference

import fetal_flax as ff
from fetal_flax.data.images import resize_image
from fetal_flax.export.quantization import quantize
from fetal_flax.export.runtimes import onnx_runtime, to_onnx_input
from fetal_flax.models import functional
from fetal_flax.models.convolution import compiler_options

Call = Callable[[], np.ndarray]
OURS = "ours"
INT8, BFLOAT16 = "onnxruntime, int8", "PyTorch, compiled, bfloat16"
TOLERANCES = {INT8: 0.5, BFLOAT16: 0.5}
"""Of a logit, as a share of their deviation; of all others 1e-3."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="hc18-compact", help="as of ff.load_checkpoint")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    parser.add_argument("--quick", action="store_true", help="few, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.repeats, options.no_torch = [1], 2, True
    checkpoint = ff.load_checkpoint(options.checkpoint)
    height, width = checkpoint.image_size
    print(
        f"{options.checkpoint} at {height}×{width}, jax {jax.__version__}, onnxruntime "
        f"{onnxruntime.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} processors"
    )
    if not options.no_torch:
        import torch

        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        for batch in options.batch:
            phantoms = [ff.make_phantom(0, index).image for index in range(batch)]
            images = np.stack([resize_image(image, (height, width)) for image in phantoms])
            calls = {OURS: ours(checkpoint, images)} | exported(checkpoint, images, Path(folder))
            if not options.no_torch:
                calls |= pytorch(checkpoint, images, Path(folder))
            print_table(f"batch {batch}", calls, options.repeats)


def ours(checkpoint: ff.Checkpoint, images: np.ndarray) -> Call:
    config = checkpoint.config
    arrays = functional.fold(config, checkpoint.variables)
    run = jax.jit(
        lambda arrays, images: functional.infer(config, arrays, images),
        compiler_options=compiler_options(),
    )
    prepared = to_onnx_input(config.in_channels, "float32")(images)
    scaled = jax.device_put(np.moveaxis(prepared, 1, -1))
    return lambda: np.asarray(run(arrays, scaled))[..., 0]


def exported(checkpoint: ff.Checkpoint, images: np.ndarray, folder: Path) -> dict[str, Call]:
    model = ff.export.onnx_model(checkpoint)
    channels = checkpoint.config.in_channels
    files = {kind: folder / f"{kind}.onnx" for kind in ("float32", "int8")}
    files["float32"].write_bytes(model.SerializeToString())
    if not files["int8"].exists():
        phantoms = [ff.make_phantom(1, index).image for index in range(2)]
        resized = [resize_image(image, checkpoint.image_size)[None] for image in phantoms]
        prepare = to_onnx_input(channels, "float32")
        quantize(model, [prepare(image) for image in resized], files["int8"])

    def call(path: Path) -> Call:
        run = onnx_runtime(path, channels, "float32")
        return lambda: run(images)

    return {f"onnxruntime, {kind}": call(path) for kind, path in files.items()}


def pytorch(checkpoint: ff.Checkpoint, images: np.ndarray, folder: Path) -> dict[str, Call]:
    import torch

    from fetal_flax.parity import reference

    path = folder / "network.pth"
    if not path.exists():
        ff.to_torch(checkpoint, path)
    network = reference.create_reference(checkpoint.config)
    network.load_state_dict(torch.load(path, weights_only=True))
    network = network.eval().to(memory_format=torch.channels_last)
    scaled = torch.from_numpy(to_onnx_input(checkpoint.config.in_channels, "float32")(images))
    scaled = scaled.contiguous(memory_format=torch.channels_last)

    def call(*, compiled: bool, rough: bool) -> Call:
        run = torch.compile(network, options={"freezing": True}) if compiled else network

        def logits() -> np.ndarray:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=rough):
                return run(scaled)[:, 0].float().numpy()

        return logits

    calls = {"PyTorch, eager": call(compiled=False, rough=False)}
    for name, rough in (("PyTorch, compiled", False), (BFLOAT16, True)):
        run = call(compiled=True, rough=rough)
        try:
            run()
        except Exception as error:  # torch.compile fails in many ways where there is no compiler.
            print(f"{name} didn't run: {type(error).__name__}: {str(error)[:200]}")
        else:
            calls[name] = run
    return calls


def print_table(title: str, calls: dict[str, Call], repeats: int) -> None:
    clock: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    expected = calls[OURS]()
    for name, call in calls.items():
        error = normalised_max_difference(call(), expected)
        assert error < TOLERANCES.get(name, 1e-3), f"{name} differs by {error:.1e}"
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            before, worked = time.perf_counter(), time.process_time()
            call()
            processor[name].append(time.process_time() - worked)
            clock[name].append(time.perf_counter() - before)
    print(f"\n| {title} | ms | processor's ms | ratio |\n|---|---|---|---|")
    for name in calls:
        ratios = [own / base for own, base in zip(clock[name], clock[OURS], strict=True)]
        own, worked = ([1e3 * s for s in seconds[name]] for seconds in (clock, processor))
        print(
            f"| {name} | {median_with_quartiles(own, 1)} | {median_with_quartiles(worked, 1)} "
            f"| {median_with_quartiles(ratios, 2)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
