"""Compile an experiment for machines that may be absent: does it fit, and how fast could it be?

    python -m latent_diffusion.compile_check --config=configs/X.py --topology=v5e:4x4
    python -m latent_diffusion.compile_check --config=configs/X.py --topology=h100:8

Compiles the real train step and, for latent denoising, the sampler, for all chips of the topology,
on any machine: `pip install latent_diffusion[aot]` for TPUs, `[aot-cuda]` for GPUs. Nothing runs.
The compiler plans the memory; FLOPs and bytes on the network are counted; the time is a lower bound
from published peaks. The config decides the parallel mode and the mesh. With --quick the compiler
doesn't search for the fastest program, which takes most of its time: the counts are the same, and
the memory changes by a few percent. --params=bfloat16 samples with the parameters of
`load(dtype="bfloat16")`. --json=FILE adds the numbers to a list in that file.
"""

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from latent_diffusion.runtime import flags as shared_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment config.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:4x4, v5p:2x2x2, v6e:2x4, h100:8 ...")
PROGRAMS = flags.DEFINE_list("programs", ["train", "sample"], "Programs to compile.")
COMPILE = flags.DEFINE_bool("compile", True, "False: count bytes and FLOPs only.")
QUICK = flags.DEFINE_bool("quick", False, "Compile in an eighth of the time.")
PARAMS = flags.DEFINE_enum(
    "params",
    "float32",
    ["float32", "bfloat16", "int8"],
    "Type of the sampler's networks, except for the first stage, as in `load`.",
)
JSON = flags.DEFINE_string("json", None, "Add the numbers to this file.")

GIB = 2**30
LOWEST_LEVEL = 9  # XLA's number for O0


class Checked(NamedTuple):
    """Numbers of a program, per chip: bytes, FLOPs, seconds; and a `problem` if it doesn't fit.

    arguments: bytes of its inputs, mostly of the state. network: bytes of each kind of collective
    per run.
    """

    program: str
    mode: str
    arguments: int
    flops: float
    seconds: float = 0.0  # to compile
    peak: int = 0
    network: dict[str, int] | None = None
    problem: str = ""


def check(
    config: Any,
    topology: str,
    programs: Sequence[str],
    compile: bool = True,
    quick: bool = False,
    params: str = "float32",
) -> list[Checked]:
    """Compile the programs of an experiment for a topology; or only count, without `compile`.

    quick: the compiler doesn't search for the fastest program. params: the dtype of the sampler's
    parameters, except those of the first stage.
    Raises ValueError, in one line, for bad input and if the compiler is missing.
    """
    import jax

    from latent_diffusion.core.types import lookup
    from latent_diffusion.nets.dot_product_attention import Machine, traced_for
    from latent_diffusion.runtime import parallel
    from latent_diffusion.runtime.parallel.chips import parse_topology, topology_devices
    from latent_diffusion.tasks import DENOISERS, TASKS
    from latent_diffusion.training.batch_spec import batch_spec

    for program in programs:
        lookup(dict.fromkeys(["train", "sample"]), program, "program")
    if config.task not in DENOISERS and "train" not in programs:
        raise ValueError(
            f"the program sample is for {' and '.join(DENOISERS)}, not for task {config.task!r}"
        )
    _, chip, _ = parse_topology(topology)
    memory = int(chip.memory * GIB)
    options = {"optimization_level": LOWEST_LEVEL} if quick else {}
    if chip.platform == "cuda":
        options["xla_gpu_enable_triton_gemm"] = False  # XLA would need a GPU to choose tiles
    devices = topology_devices(topology)
    config = config.copy_and_resolve_references().unlock()
    plain = config.copy_and_resolve_references()
    for part in (plain.get(plain.backbone, {}), plain.autoencoder):
        if "attention" in part:
            part.attention = "xla"  # it has no loops or kernels, which are hard to count
    if chip.platform == "cuda":
        config = plain  # JAX lowers cuDNN's attention only on machines with cuDNN
    mode, mesh = parallel.devices(config.parallel, devices)
    parallel.check_batch_size(config.batch_size, mode, mesh, config.grad_accumulation, devices)
    if mode == "single":  # pmap over a single device
        mode, devices = "pmap", devices[:1]
    task, counted = (lookup(TASKS, config.task, "task")(x) for x in (config, plain))
    batch, rng = batch_spec(config), jax.eval_shape(lambda: jax.random.key(0))
    state, constants = jax.eval_shape(task.init, rng, batch)
    layout = {"mesh": mesh, "rules": config.parallel.rules}
    checked = []
    for program in programs:
        train = program == "train"
        if not train and config.task not in DENOISERS:
            continue
        read = (state, constants) if train else _in_dtype(params, state, constants)
        shardings = parallel.infer_shardings(read[0], **layout) if mesh else None
        step, args = task.train_step if train else task.show, (*read, batch, rng)
        countable = counted.train_step if train else counted.show
        used = [tree if train or tree is None else tree.ema_params for tree in (read[0], shardings)]
        row = Checked(
            program,
            "pmap" if mesh is None else " × ".join(f"{k} {n}" for k, n in mesh.shape.items()),
            parallel.num_bytes(*used) + parallel.num_bytes(read[1]),
            parallel.count_flops(countable, *args) / len(devices),
        )
        if row.arguments > memory:
            problem = f"state and constants alone take {row.arguments / GIB:.1f} GiB"
            row = row._replace(problem=problem)
        if row.problem or not compile:
            checked.append(row)
            continue
        start = time.perf_counter()
        with traced_for(Machine("tpu" if chip.platform == "tpu" else "gpu")):
            lowered = parallel.lower_for(devices, step, mode, args, evaluate=not train, **layout)
        row = _compile(lowered, row, memory, options)
        checked.append(row._replace(seconds=round(time.perf_counter() - start, 1)))
    return checked


def _in_dtype(dtype: str, state: Any, constants: Any) -> tuple[Any, Any]:
    """The shapes of a sampler's parameters in a dtype; the first stage stays in float32."""
    import jax
    import jax.numpy as jnp

    from latent_diffusion.core.trees import path_string
    from latent_diffusion.nets.eight_bits import in_eight_bits

    def cast(path: Any, leaf: Any) -> Any:
        if dtype == "int8":
            return jax.eval_shape(lambda x: in_eight_bits(path_string(path), x), leaf)
        unchanged = dtype == "float32" or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf if unchanged else jax.ShapeDtypeStruct(leaf.shape, dtype)

    state = state.replace(ema_params=jax.tree_util.tree_map_with_path(cast, state.ema_params))
    others = jax.tree_util.tree_map_with_path(cast, constants)
    return state, others.replace(first_stage=constants.first_stage)


def _compile(lowered: Any, row: Checked, memory: int, options: dict[str, Any]) -> Checked:
    """Add the compiler's plan to a row. Compilers for TPUs refuse programs that don't fit."""
    import jax

    from latent_diffusion.runtime.parallel import hlo

    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row._replace(problem=_needed_memory(str(error)))
    planned = compiled.memory_analysis()
    peak = planned.peak_memory_in_bytes
    return row._replace(
        peak=peak,
        arguments=planned.argument_size_in_bytes,
        network=hlo.total_bytes(compiled.as_text()),
        problem=f"needs {peak / GIB:.1f} GiB" if peak > memory else "",
    )


def _needed_memory(error: str) -> str:
    """The memory that a program needs, from the compiler's error; or the error's first line."""
    line = error.partition("RESOURCE_EXHAUSTED: ")[2].partition("\n")[0].strip()
    size = r"([\d.]+[KMGT])"
    match = re.search(f"[Uu]sed {size} of {size} hbm", error) or re.search(
        rf"\({size}\) exceeds available HBM \({size}\)", error
    )
    return f"needs {match[1]}iB of {match[2]}iB" if match else line


def least_seconds(row: Checked, topology: str) -> dict[str, float]:
    """Lower bounds of a program's seconds at published peaks, for compute, memory and network.

    memory: every argument is read once; those of a train step include the state.
    """
    from latent_diffusion.runtime.parallel.chips import parse_topology

    _, chip, _ = parse_topology(topology)
    # An all-reduce sends every byte about twice, the others about once.
    sent = sum((2 if k == "all-reduce" else 1) * n for k, n in (row.network or {}).items())
    return {
        "compute": row.flops / (chip.tflops * 1e12),
        "memory": row.arguments / (chip.memory_rate * 1e9),
        "network": sent / (chip.network_rate * 1e9),
    }


def report(checked: Sequence[Checked], topology: str, batch_size: int) -> str:
    """A paragraph for each program: its memory and the chip's, its FLOPs, and the least time."""
    from latent_diffusion.runtime.parallel.chips import parse_topology

    _, chip, _ = parse_topology(topology)
    lines = []
    for row in checked:
        line = "  {:<22s}{}".format
        lines.append(f"{row.program} on {topology}, {row.mode}, global batch {batch_size}")
        if row.problem:
            lines.append(line("memory", f"DOES NOT FIT: {row.problem}"))
        elif not row.peak:
            lines.append(line("state and constants", f"{row.arguments / GIB:.3g} GiB a chip"))
        else:
            share = 100 * row.peak / (chip.memory * GIB)
            planned = f"{row.peak / GIB:.3g} of {chip.memory:g} GiB a chip ({share:.0f} %)"
            lines.append(line("memory at peak", f"{planned}, arguments {row.arguments / GIB:.3g}"))
        for kind, num_bytes in sorted((row.network or {}).items()):
            lines.append(line(kind, f"{num_bytes / 1e6:,.2f} MB a chip"))
        least = least_seconds(row, topology)
        lines.append(line("work", f"{row.flops / 1e9:,.1f} GFLOP a chip"))
        for what, seconds in least.items():
            lines.append(line(f"{what} takes", f"{1e3 * seconds:,.2f} ms at published peaks"))
        rate = batch_size / max(least.values())
        lines.append(
            line(
                "so at most", f"{rate:.4g} images/s, bound by {max(least, key=lambda k: least[k])}"
            )
        )
        lines.append(line("compiled in", f"{row.seconds:.0f} s"))
    return "\n".join(lines)


def write_json(
    path: str | Path, config: Any, name: str, topology: str, checked: Any, params: str = "float32"
) -> None:
    """Add rows to the list in a file; they replace the rows of the same programs."""
    path = Path(path)
    rows = json.loads(path.read_text()) if path.exists() else []
    for row in checked:
        same = {"config": name, "topology": topology, "batch_size": config.batch_size}
        same |= {
            "micro_batches": config.grad_accumulation,
            "dtype": config[config.backbone].dtype or "float32",
        }
        same |= {"program": row.program, "mode": row.mode}
        same |= {"params": params if row.program == "sample" else "float32"}
        others = [row for row in rows if {key: row[key] for key in same} != same]
        if row.peak or row.problem or len(others) == len(rows):  # prefer compiled rows to counts
            rows = [*others, {**same, **row._asdict()}]
    rows.sort(key=lambda row: [str(row[k]) for k in ("config", "topology", "program", "mode")])
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


def main(argv: list[str]) -> None:
    """Read the flags, compile, print."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # compilation needs no accelerator here
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    config, topology = CONFIG.value, str(TOPOLOGY.value)
    try:
        checked = check(config, topology, PROGRAMS.value, COMPILE.value, QUICK.value, PARAMS.value)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(report(checked, topology, config.batch_size))
    if JSON.value:
        file = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
        name = file.name.replace(".py", "", 1)  # with the variant
        write_json(JSON.value, config, name, topology, checked, PARAMS.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    shared_flags.run(main)
