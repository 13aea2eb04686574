"""Seconds and memory of conversions of Stable Diffusion 1 or XL in their real shapes.

    python -m benchmarks.conversion                  # 13 GB of temporary files
    python -m benchmarks.conversion --model=sdxl     # 28 GB

Writes a folder of diffusers' with random weights (4.26 GB in float32; 6.94 GB in float16), sends it
through the command `python -m latent_diffusion.convert` to a single file and back, and to a workdir
and back, each in a separate process, and prints a table. Both folders that come back must equal the
first bitwise. Last, the first folder is loaded in its dtype.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from configs import sd_v1, sdxl
from latent_diffusion.convert import Bundle, Part, autoencoder, clip_text, unet, write
from latent_diffusion.convert.bundle import flat
from latent_diffusion.core.types import Params
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.files.tensors import open_tensors

MODEL = flags.DEFINE_enum("model", "sd_v1", ["sd_v1", "sdxl"], "Whose shape.")
FOLDER = flags.DEFINE_string("folder", None, "For the temporary files; default: the system's.")
CONVERSIONS = (  # from, to, format
    ("first", "single.safetensors", "compvis"),
    ("single.safetensors", "through_compvis", "diffusers"),
    ("first", "workdir", "orbax"),
    ("workdir", "through_orbax", "diffusers"),
)


def random_part(fields: dict, shapes: Params, dtype: str) -> Part:
    """Parameters that are drawn when they are read, with equal values each time."""

    def tensor(seed: int, shape: tuple[int, ...]) -> Tensor:
        def read() -> np.ndarray:
            return np.random.default_rng(seed).random(shape, np.float32).astype(dtype)

        return Tensor(shape, np.dtype(dtype), read)

    leaves = flat(shapes).items()
    return Part(fields, {path: tensor(i, leaf.shape) for i, (path, leaf) in enumerate(leaves)})


def stable_diffusion(xl: bool, dtype: str) -> Bundle:
    """The U-Net, the first stage and the text encoders of configs/sd_v1.py or configs/sdxl.py."""
    config = sdxl.get_config() if xl else sd_v1.get_config()
    unet_fields = {**config.unet.to_dict(), "out_channels": 4, "dtype": None}
    first_stage = config.autoencoder.to_dict()
    texts = config.conditioners.to_dict() if xl else {"clip_text": {}}
    conditioners = {
        name: random_part(fields, clip_text.shapes(fields), dtype)
        for name, fields in texts.items()
        if name != "sizes"
    }
    if xl:
        conditioners["sizes"] = Part({}, {})
    widths = (2048, 2816) if xl else (768, None)  # of the context and of the vector
    return Bundle(
        autoencoder=random_part(first_stage, autoencoder.shapes(first_stage), dtype),
        scale_factor=0.13025 if xl else 0.18215,
        unet=random_part(unet_fields, unet.shapes(unet_fields, 4, *widths), dtype),
        conditioners=conditioners,
        diffusion=config.diffusion.to_dict(),
        sampling={k: v for k, v in config.sampling.to_dict().items() if v is not None},
        image_size=config.data.image_size,
        notes={"linear_projections": xl},
    )


def measure(*arguments: object) -> str:
    """Seconds, those of a processor, and peak memory of one Python command, as cells of a table."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"failed: {arguments}")
    seconds, busy = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    return f"{seconds:.0f} | {busy:.0f} | {usage.ru_maxrss / 2**20:.2f} GiB"  # KiB, on Linux


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
    xl = MODEL.value == "sdxl"
    dtype = "float16" if xl else "float32"
    with tempfile.TemporaryDirectory(dir=FOLDER.value) as folder:
        root = Path(folder)
        write(stable_diffusion(xl, dtype), root / "first", "diffusers")
        print("| from | to | seconds | of a processor | peak memory |\n|---|---|---|---|---|")
        for source, target, to in CONVERSIONS:
            command = ["-m", "latent_diffusion.convert", root / source, root / target]
            if to == "diffusers":
                command.append(f"--dtype={dtype}")  # a workdir is float32
            cells = measure(*command, f"--to={to}")
            kind = {"first": "diffusers", "workdir": "orbax"}.get(source, "compvis")
            print(f"| {kind} | {to} | {cells} |", flush=True)
            if to == "diffusers":
                check_equal(root / "first", root / target)
                shutil.rmtree(root / target)
                (shutil.rmtree if (root / source).is_dir() else os.remove)(root / source)
        size = sum(file.stat().st_size for file in (root / "first").glob("*/*.safetensors"))
        load = f"load({str(root / 'first')!r}, dtype={dtype!r})"
        load = f"from latent_diffusion import load; {load}"
        print(f"| diffusers, {size / 2**30:.2f} GiB | in memory | {measure('-c', load)} |")
    print("Both folders that came back equal the first bitwise.")


if __name__ == "__main__":
    app.run(main)
