"""Will it fit, and how fast could it be: compile an experiment for machines that aren't there.

    python -m latent_diffusion.compile_check --config=configs/X.py --topology=v5e:4x4
    python -m latent_diffusion.compile_check --config=configs/X.py --topology=h100:8

Compiles the real train step and, for latent denoising, the sampler, for all chips of the topology,
on any machine: `pip install latent_diffusion[aot]` for TPUs, `[aot-cuda]` for GPUs. Nothing runs:
memory is what the compiler plans, FLOPs and bytes on the network are counted, and the time is the
least that the published peaks allow. The parallel mode and mesh are those of the config.
"""

import os
import re
import sys
import time
from typing import Any, NamedTuple

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment config.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:4x4, v5p:2x2x2, v6e:2x4, h100:8 ...")
PROGRAMS = flags.DEFINE_list("programs", ["train", "sample"], "Which to compile.")


class Chip(NamedTuple):
    """Published peaks: dense bfloat16 TFLOP/s, GB of memory, GB/s of memory, GB/s out of the chip.

    The last is one direction of all links together.
    """

    platform: str
    tflops: float
    memory: float
    memory_rate: float
    network_rate: float


CHIPS = {
    "v4": Chip("tpu", 275, 32, 1228, 150),
    "v5e": Chip("tpu", 197, 16, 819, 200),
    "v5p": Chip("tpu", 459, 95, 2765, 600),
    "v6e": Chip("tpu", 918, 32, 1638, 400),
    "a100": Chip("cuda", 312, 80, 2039, 300),
    "h100": Chip("cuda", 989, 80, 3350, 450),
    "h200": Chip("cuda", 989, 141, 4800, 450),
}
# What XLA must know of a GPU it can't ask: (compute capability, cores, L2, shared memory a block).
_GPUS = {
    "a100": ((8, 0), 108, 41943040, 166912),
    "h100": ((9, 0), 132, 52428800, 232448),
    "h200": ((9, 0), 132, 62914560, 232448),
}


class Checked(NamedTuple):
    """What is known of one program, per chip: bytes, FLOPs, seconds; `problem` if it won't fit."""

    name: str
    seconds_to_compile: float
    peak_bytes: int = 0
    state_bytes: int = 0
    flops: float = 0.0
    network: dict[str, int] | None = None
    problem: str = ""


def parse_topology(text: str) -> tuple[str, Chip, str]:
    """("v5e", its peaks, "4x4") from "v5e:4x4"; ValueError for anything else."""
    from latent_diffusion.types import lookup

    name, _, shape = text.partition(":")
    chip = lookup(CHIPS, name, "chip")
    wanted = r"\d+" if chip.platform == "cuda" else r"\d+x\d+(x\d+)?"
    if not re.fullmatch(wanted, shape):
        example = f"{name}:8" if chip.platform == "cuda" else f"{name}:2x2"
        raise ValueError(f"--topology={text} must look like {example}")
    return name, chip, shape


def topology_devices(name: str, chip: Chip, shape: str) -> list[Any]:
    """The chips of a topology, as JAX devices that can be compiled for."""
    # Without a TPU there is nobody to ask.
    alone = {"SKIP_MDS_QUERY": "1", "WORKER_ID": "0", "WORKER_HOSTNAMES": "localhost"}
    for key, value in {**alone, "ACCELERATOR_TYPE": "v5litepod-4"}.items():
        os.environ.setdefault(f"TPU_{key}", value)
    from jax.experimental import topologies

    try:
        if chip.platform == "tpu":
            return topologies.get_topology_desc(
                platform="tpu", topology_name=f"{name}:{shape}"
            ).devices
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            topology=f"1x1x{shape}",  # partitions, hosts, devices a host
            target_config=_gpu_target(name, chip),
        ).devices
    except Exception as error:
        extra = "aot" if chip.platform == "tpu" else "aot-cuda"
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"can't compile for {name}:{shape}: {reason}; needs latent_diffusion[{extra}]"
        ) from error


def check(config: Any, topology: str, programs: list[str]) -> list[Checked]:
    """Compile the programs of an experiment for a topology."""
    import jax

    from latent_diffusion import parallel
    from latent_diffusion.loop import batch_spec
    from latent_diffusion.tasks import TASKS

    name, chip, shape = parse_topology(topology)
    devices = topology_devices(name, chip, shape)
    config = config.copy_and_resolve_references().unlock()
    # Both "auto" and a CPU's own kernels are chosen for the machine that traces.
    config.unet.attention = config.autoencoder.attention = "xla"
    task: Any = TASKS[config.task](config)
    batch, rng = batch_spec(config), jax.eval_shape(lambda: jax.random.key(0))
    state, constants = jax.eval_shape(task.init, rng, batch)
    mode = "pmap" if config.parallel.mode in ("auto", "pmap") else "mesh"
    mesh = parallel.make_mesh(dict(config.parallel.mesh), devices) if mode == "mesh" else None
    layout = {"mesh": mesh, "rules": config.parallel.rules}
    checked = []
    for program in programs:
        if program == "sample" and config.task != "denoising":
            continue
        step = task.train_step if program == "train" else task.show
        args = (state, constants, batch, rng)
        start = time.perf_counter()
        lowered = parallel.lower_for(
            devices, step, mode, args, evaluate=program == "sample", **layout
        )
        flops = parallel.count_flops(step, *args) / len(devices)
        checked.append(_compile(program, lowered, flops, start))
    return checked


def _compile(program: str, lowered: Any, flops: float, start: float) -> Checked:
    import jax

    from latent_diffusion.parallel import hlo

    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem = str(error).strip().partition("\n")[0].partition("RESOURCE_EXHAUSTED: ")[2]
        return Checked(program, time.perf_counter() - start, flops=flops, problem=problem)
    memory = compiled.memory_analysis()
    return Checked(
        program,
        time.perf_counter() - start,
        memory.peak_memory_in_bytes,
        memory.argument_size_in_bytes,
        flops,
        hlo.total_bytes(compiled.as_text()),
    )


def report(checked: list[Checked], topology: str, batch_size: int) -> str:
    """One paragraph a program: memory against what the chip has, work, and the least time."""
    _, chip, _ = parse_topology(topology)
    lines = []
    for one in checked:
        lines.append(f"{one.name} on {topology}, global batch {batch_size}")
        row = "  {:<22s}{}".format
        if one.problem:
            lines.append(row("memory", f"DOES NOT FIT: {one.problem}"))
        else:
            share = 100 * one.peak_bytes / (chip.memory * 1e9)
            lines.append(
                row(
                    "memory at peak",
                    f"{one.peak_bytes / 1e9:.3g} of {chip.memory:g} GB a chip ({share:.0f} %), "
                    f"arguments {one.state_bytes / 1e9:.3g} GB",
                )
            )
        compute = one.flops / (chip.tflops * 1e12)
        lines.append(row("work", f"{one.flops / 1e9:,.1f} GFLOP a chip, {_ms(compute)}"))
        network = 0.0
        for kind, num_bytes in (one.network or {}).items():
            # An all-reduce sends every byte about twice, the others about once.
            seconds = (2 if kind == "all-reduce" else 1) * num_bytes / (chip.network_rate * 1e9)
            network += seconds
            lines.append(row(kind, f"{num_bytes / 1e6:.2f} MB a chip, {_ms(seconds)}"))
        least = max(compute, network)
        rate = f"{batch_size / least:.0f} images/s" if least else "-"
        lines.append(row("least time", f"{_ms(least)} at published peaks: {rate} at most"))
        lines.append(row("compiled in", f"{one.seconds_to_compile:.0f} s"))
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _gpu_target(name: str, chip: Chip) -> str:
    (major, minor), cores, l2, shared = _GPUS[name]
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": shared + 1024,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": 128 if major >= 9 else 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": round(chip.memory_rate * 1e9),
        "l2_cache_size": l2,
        "clock_rate_ghz": 1.98 if major >= 9 else 1.41,
        "device_memory_size": round(chip.memory * 1e9),
        "shared_memory_per_block_optin": shared,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    fields = "\n".join(f"  {key}: {value}" for key, value in info.items())
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{\n{fields}\n{capability}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 }\n'
        f'device_description_str: "{name.upper()}"\n'
    )


def main(argv: list[str]) -> None:
    """Read the flags, compile, print."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # compile here, whatever this machine has
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    topology = str(TOPOLOGY.value)
    try:
        checked = check(CONFIG.value, topology, PROGRAMS.value)
        print(report(checked, topology, CONFIG.value.batch_size))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main)
