"""What XLA makes of the networks for H100s that need not be there: kernels, bytes, collectives.

    pip install -e '.[gpu-plan]'
    python benchmarks/gpu_plan.py --devices 8 --batch 128 --dtype bfloat16

compiles the program of a training that has its data on the devices, or with `--inference` what
`predict` and `evaluate` run, for so many GPUs, down to their machine code; no GPU, no driver and no
CUDA library is needed. Then it prints what one step, or call, does on each GPU. A minute or more of
two cores for each program; `--hlo FILE` keeps it, `--json FILE` the figures.

The ceiling is what the machine's limits allow: memory read and written, operations, data between
GPUs and the number of kernels, each alone. A real GPU stays below it. Nothing is autotuned, which
needs the GPU: which of a library's kernels is the fastest is left open, and so are the sizes of
XLA's own. The extra is best installed in an environment of its own: beside it, `fetal-flax` wants a
GPU, or `JAX_PLATFORMS=cpu`.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

# A GPU that is there isn't needed.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from gpu_program import Kernel, Program
from jax.experimental import topologies

import fetal_flax
from fetal_flax._util.backend import programs_for
from fetal_flax.config import DataConfig, EncoderConfig, ModelConfig, ScheduleConfig, TrainConfig
from fetal_flax.inference.segmenter import create_program
from fetal_flax.models import functional
from fetal_flax.training.compile import chunk_arguments, create_programs
from fetal_flax.training.sharding import create_mesh

H100 = Path(__file__).parent / "h100_sxm.txtpb"
"""What XLA asks a GPU that is there: NVIDIA's figures of an H100 SXM in XLA's format."""
MEMORY_BYTES_PER_S = 3.35e12
FLOPS_PER_S = {"bfloat16": 989e12, "float32": 494e12}
"""Dense, on tensor cores; float32 in TF32."""
LINK_BYTES_PER_S = 450e9
"""NVLink, in each direction."""
KERNEL_S = 2e-6
"""From the begin of a kernel that does next to nothing to that of the next one, about."""
RECORDS, STEPS = 999, 6
"""Images on the devices, as HC18 has; steps of a call, of which one is looked at."""
VARIANTS = ("described", "published", "compact")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step, or a call of inference, does on each GPU."""

    network: str
    inference: bool
    devices: int
    batch: int
    """Over all GPUs together."""
    dtype: str
    image_size: tuple[int, int]
    kernels: int
    bytes_per_image: float
    flops_per_image: float
    """Of convolutions and matrix products."""
    temp_bytes: int
    peak_bytes: int
    collectives: int
    collective_bytes: int
    ceiling_images_per_s: float
    """Of all GPUs together."""
    limited_by: str
    seconds: dict[str, float]
    """What each limit allows a step at best."""
    top: tuple[Kernel, ...]
    """The kernels that move most bytes."""
    jax: str


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="over all devices together")
    parser.add_argument("--dtype", choices=tuple(FLOPS_PER_S), default="float32")
    networks = (*VARIANTS, "mobilenet_unet", "unet")
    parser.add_argument("--network", choices=networks, default="described")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--hlo", type=Path, help="file for the optimised program")
    parser.add_argument("--top", type=int, default=10, help="kernels to list")
    options = parser.parse_args()
    if options.batch % options.devices:
        parser.error(f"--batch {options.batch} is no multiple of --devices {options.devices}")
    try:
        gpus = describe_gpus(options.devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        sys.exit(f"no compiler for GPUs ({error}): pip install -e '.[gpu-plan]'")
    compiled = compile_for(gpus, options)
    if options.hlo:
        options.hlo.write_text(program_text(compiled))
    plan = weigh(compiled, options)
    print(table(plan))
    if options.json:
        options.json.write_text(json.dumps(dataclasses.asdict(plan), indent=1) + "\n")


def describe_gpus(count: int) -> Any:
    """Returns so many H100s of one machine that need not be there, for a mesh."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=H100.read_text(),
        # Hosts, processes of each, GPUs of each.
        topology=f"1x1x{count}",
    )
    return topology.devices


def compile_for(gpus: Any, options: argparse.Namespace) -> jax.stages.Compiled:
    """Compiles what `options` ask for."""
    is_variant = options.network in VARIANTS
    model = ModelConfig(
        name="mobilenet_aspp_se_unet" if is_variant else options.network,
        variant=options.network if is_variant else "described",
        dtype=options.dtype,
    )
    size = (options.size, options.size)
    with programs_for("gpu"):
        if options.inference:
            fold = functools.partial(functional.fold, model)
            images = jax.ShapeDtypeStruct((options.batch, *size, model.in_channels), np.uint8)
            function, _, _ = create_program(model, gpus)
            folded = jax.eval_shape(fold, functional.shapes(model))
            return function.lower(folded, images).compile()
        config = TrainConfig(
            model=model,
            encoder=EncoderConfig(weights="none"),
            data=DataConfig(backend="device", image_size=size),
            schedule=ScheduleConfig(batch_size=options.batch),
        )
        arguments = chunk_arguments(config, records=RECORDS, steps=STEPS)
        return create_programs(config, create_mesh(gpus)).train_chunk.lower(*arguments).compile()


def program_text(compiled: jax.stages.Compiled) -> str:
    """Returns the optimised program."""
    text = compiled.as_text()
    assert text is not None
    return text


def weigh(compiled: jax.stages.Compiled, options: argparse.Namespace) -> Plan:
    """Counts what a compiled program does."""
    kernels = Program(program_text(compiled), str(Path(fetal_flax.__file__).parent)).step()
    collectives = [kernel for kernel in kernels if kernel.collective]
    moved, flops = (sum(getattr(k, name) for k in kernels) for name in ("bytes", "flops"))
    between = sum(kernel.bytes for kernel in collectives)
    # A ring all-reduce sends and receives every byte almost twice.
    sent = 2 * between * (options.devices - 1) / options.devices
    seconds = {
        "memory": moved / MEMORY_BYTES_PER_S,
        "operations": flops / FLOPS_PER_S[options.dtype],
        "kernels": len(kernels) * KERNEL_S,
        "links": sent / LINK_BYTES_PER_S,
    }
    limited_by = max(seconds, key=lambda name: seconds[name])
    memory = compiled.memory_analysis()
    assert memory is not None
    share = options.batch / options.devices
    return Plan(
        network=options.network,
        inference=options.inference,
        devices=options.devices,
        batch=options.batch,
        dtype=options.dtype,
        image_size=(options.size, options.size),
        kernels=len(kernels),
        bytes_per_image=moved / share,
        flops_per_image=flops / share,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        collectives=len(collectives),
        collective_bytes=between,
        ceiling_images_per_s=options.batch / seconds[limited_by],
        limited_by=limited_by,
        seconds=seconds,
        top=tuple(sorted(kernels, key=lambda k: k.bytes, reverse=True)[: options.top]),
        jax=jax.__version__,
    )


def table(plan: Plan) -> str:
    """Returns a plan as text."""
    what = "inference" if plan.inference else "training step"
    limits = ", ".join(f"{name} {1e3 * least:.2f} ms" for name, least in plan.seconds.items())
    lines = [
        f"{plan.network}, {what} of {plan.batch} on {plan.devices} × H100, {plan.dtype}, "
        f"{plan.image_size[0]}×{plan.image_size[1]}, jax {plan.jax}",
        f"kernels               {plan.kernels}",
        f"bytes_per_image       {plan.bytes_per_image / 1e9:.3f} GB",
        f"flops_per_image       {plan.flops_per_image / 1e9:.1f} G",
        f"temp_bytes            {plan.temp_bytes / 1e9:.2f} GB",
        f"peak_bytes            {plan.peak_bytes / 1e9:.2f} GB",
        f"collectives           {plan.collectives}",
        f"collective_bytes      {plan.collective_bytes / 1e6:.1f} MB",
        f"ceiling_images_per_s  {plan.ceiling_images_per_s:.0f}, by {plan.limited_by} ({limits})",
        "kernels that move most bytes, and the lines they come from:",
    ]
    for each in plan.top:
        lines.append(f"  {each.bytes / 1e6:8.1f} MB  {each.name}  {each.result}")
        lines.append(f"               {' < '.join(each.lines[:4])}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
