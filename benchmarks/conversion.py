"""Seconds and memory of conversions of Stable Diffusion 1 in its real shape.

    python -m benchmarks.conversion            # 13 GB of temporary files

Writes a folder of diffusers' with random float32 weights (4.26 GB), sends it through the command
`python -m latent_diffusion.convert` to a single file and back, and to a workdir and back, each in
a separate process, and prints a table. Both folders that come back must equal the first bitwise.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from configs import sd_v1
from latent_diffusion.convert import Bundle, Part, autoencoder, clip_text, unet, write
from latent_diffusion.convert.bundle import flat
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.files.tensors import open_tensors
from latent_diffusion.types import Params

FOLDER = flags.DEFINE_string("folder", None, "For the temporary files; default: the system's.")
CONTEXT = 768
CONVERSIONS = (  # from, to, format
    ("first", "single.safetensors", "compvis"),
    ("single.safetensors", "through_compvis", "diffusers"),
    ("first", "workdir", "orbax"),
    ("workdir", "through_orbax", "diffusers"),
)


def random_part(fields: dict, shapes: Params) -> Part:
    """Parameters that are drawn when they are read, with equal values each time."""

    def tensor(seed: int, shape: tuple[int, ...]) -> Tensor:
        def read() -> np.ndarray:
            return np.random.default_rng(seed).standard_normal(shape, np.float32)

        return Tensor(shape, np.dtype(np.float32), read)

    leaves = flat(shapes).items()
    return Part(fields, {path: tensor(i, leaf.shape) for i, (path, leaf) in enumerate(leaves)})


def stable_diffusion() -> Bundle:
    """The U-Net, the first stage and the text encoder of configs/sd_v1.py."""
    config = sd_v1.get_config()
    unet_fields = {**config.unet.to_dict(), "out_channels": 4}
    first_stage = config.autoencoder.to_dict()
    return Bundle(
        autoencoder=random_part(first_stage, autoencoder.shapes(first_stage)),
        scale_factor=0.18215,
        unet=random_part(unet_fields, unet.shapes(unet_fields, 4, CONTEXT, None)),
        conditioners={"clip_text": random_part({}, clip_text.shapes({}))},
        diffusion=config.diffusion.to_dict(),
        sampling=config.sampling.to_dict(),
        image_size=config.data.image_size,
    )


def measure(source: Path, target: Path, to: str) -> tuple[float, float]:
    """Seconds and peak GiB of one command."""
    command = [sys.executable, "-m", "latent_diffusion.convert", str(source), str(target)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, f"--to={to}"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{source} to {to} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20  # KiB, on Linux


def check_equal(one: Path, other: Path) -> None:
    """Raise ValueError where the weights of two folders differ in a bit."""
    for path in sorted(one.glob("*/*.safetensors")):
        first, second = (
            open_tensors(root / path.relative_to(one)).tensors for root in (one, other)
        )
        if first.keys() != second.keys():
            raise ValueError(f"{path.relative_to(one)} has other tensors")
        for name, tensor in first.items():
            if not np.array_equal(tensor.read(), second[name].read()):
                raise ValueError(f"{path.relative_to(one)}: {name} differs")


def main(argv: list[str]) -> None:
    """Convert and print."""
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(dir=FOLDER.value) as folder:
        root = Path(folder)
        write(stable_diffusion(), root / "first", "diffusers")
        print("| from | to | seconds | peak memory |\n|---|---|---|---|", flush=True)
        for source, target, to in CONVERSIONS:
            seconds, peak = measure(root / source, root / target, to)
            kind = {"first": "diffusers", "workdir": "orbax"}.get(source, "compvis")
            print(f"| {kind} | {to} | {seconds:.0f} | {peak:.2f} GiB |", flush=True)
            if to == "diffusers":
                check_equal(root / "first", root / target)
    print("Both folders that came back equal the first bitwise.")


if __name__ == "__main__":
    app.run(main)
