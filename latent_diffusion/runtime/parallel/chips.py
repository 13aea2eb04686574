"""Accelerators that may be absent: their peak rates, and compiling for them."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from latent_diffusion.core.types import lookup


class Chip(NamedTuple):
    """Published peaks: dense bfloat16 TFLOP/s, GiB of memory, GB/s of memory, GB/s of the network.

    The network's rate is that of one direction, of all the chip's links together.
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
# Facts that XLA would query of a present GPU: compute capability, number of cores, bytes of the L2
# cache, bytes of shared memory per block.
_GPUS = {
    "a100": ((8, 0), 108, 41943040, 166912),
    "h100": ((9, 0), 132, 52428800, 232448),
    "h200": ((9, 0), 132, 62914560, 232448),
}


def parse_topology(text: str) -> tuple[str, Chip, str]:
    """("v5e", its peaks, "4x4") from "v5e:4x4"; ValueError for anything else."""
    name, _, shape = text.partition(":")
    chip = lookup(CHIPS, name, "chip")
    pattern = r"\d+" if chip.platform == "cuda" else r"\d+x\d+(x\d+)?"
    if not re.fullmatch(pattern, shape):
        example = f"{name}:8" if chip.platform == "cuda" else f"{name}:2x2"
        raise ValueError(f"--topology={text} must look like {example}")
    return name, chip, shape


def num_chips(text: str) -> int:
    """The number of chips in "v5e:4x4"."""
    return math.prod(map(int, parse_topology(text)[2].split("x")))


def topology_devices(text: str) -> list[Any]:
    """The chips of a topology, as JAX devices for compilation; they can't run programs.

    Raises a ValueError of one line where the compiler is absent or doesn't know the topology.
    """
    name, chip, shape = parse_topology(text)
    # With these, libtpu queries no metadata server, and several processes may load it at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    alone = {"SKIP_MDS_QUERY": "1", "WORKER_ID": "0", "WORKER_HOSTNAMES": "localhost"}
    for key, value in {**alone, "ACCELERATOR_TYPE": "v5litepod-4"}.items():
        os.environ.setdefault(f"TPU_{key}", value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"topology_name": f"{name}:{shape}"}
    if name == "v4":  # one device per chip, since both cores share the memory
        options["chip_config_name"] = "megacore"
    if chip.platform == "cuda":
        options = {
            "topology_name": name,
            "topology": f"1x1x{shape}",  # partitions, hosts, devices per host
            "target_config": _gpu_target(name, chip),
        }
    try:
        return list(topologies.get_topology_desc(platform=chip.platform, **options).devices)
    except Exception as error:
        tpu = chip.platform == "tpu"
        compiler = "libtpu" if tpu else "jax_cuda12_plugin"
        extra = f"; needs latent_diffusion[{'aot' if tpu else 'aot-cuda'}]"
        reason = str(error).strip().partition("\n")[0]
        installed = importlib.util.find_spec(compiler) is not None
        raise ValueError(
            f"can't compile for {text}: {reason}{'' if installed else extra}"
        ) from error


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
        "device_memory_size": round(chip.memory * 2**30),
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
