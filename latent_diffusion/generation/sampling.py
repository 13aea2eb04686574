"""Checkpoint-based sampling to disk: the work of `sample.py`."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from latent_diffusion.generation.adapters import load_adapter
from latent_diffusion.generation.loading import load
from latent_diffusion.rng import seed_key
from latent_diffusion.runtime import processes
from latent_diffusion.runtime.metrics import image_grid, to_uint8


def read_prompts(prompts: str | None, prompts_file: str | None) -> list[str] | None:
    """Prompts from "a;b" or from the lines of a file; None where neither is given."""
    if prompts is not None and prompts_file is not None:
        raise ValueError("give --prompts or --prompts_file, not both")
    if prompts is not None:
        return [prompt.strip() for prompt in prompts.split(";")]
    if prompts_file is not None:
        return Path(prompts_file).read_text(encoding="utf-8").splitlines()
    return None


def read_integers(flag: str, values: Sequence[str] | None) -> list[int] | None:
    """The integers behind a flag, such as class ids or a height and a width."""
    try:
        return None if values is None else [int(value) for value in values]
    except ValueError as error:
        raise ValueError(f"--{flag}={','.join(values or ())}: expected integers") from error


def read_weighted(prompts: str | None) -> list[tuple[str, float]] | None:
    """(text, weight) pairs from "a:0.5;b:-0.3"."""
    if prompts is None:
        return None
    pairs = [prompt.rpartition(":") for prompt in prompts.split(";")]
    try:
        return [(text.strip(), float(weight)) for text, _, weight in pairs]
    except ValueError as error:
        raise ValueError(f'--more_prompts={prompts}: write "text:weight;text:weight"') from error


def read_picture(path: str | None, mode: str) -> np.ndarray | None:
    """[1 H W 3] in [-1, 1] from a picture ("RGB"), or [1 H W 1] of 0 and 1 from a mask ("L")."""
    if path is None:
        return None
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert(mode), np.float32)[None]
    return pixels / 127.5 - 1 if mode == "RGB" else (pixels[..., None] > 127).astype(np.float32)


def progress_bar() -> Callable[[Any], None]:
    """A bar that counts the network's evaluations (of every device), for option `progress`."""
    from tqdm import tqdm

    bar = tqdm(unit=" evaluations", disable=False)  # asked for, whatever the environment

    def advance(t: Any) -> None:
        bar.update()

    return advance


def read_levels(path: str | None, channel: bool = False) -> np.ndarray | None:
    """[1 H W] of the levels in a picture (palettes by their indices); with a last axis if asked."""
    if path is None:
        return None
    with Image.open(path) as picture:
        levels = np.asarray(picture if picture.mode in ("P", "L", "I") else picture.convert("L"))
    return levels.astype(np.int32)[None, ..., None] if channel else levels.astype(np.int32)[None]


def read_json(path: str | None) -> Any:
    """The content of a JSON file."""
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def read_array(path: str | None) -> np.ndarray | None:
    """The array in an .npy file."""
    if path is None:
        return None
    try:
        return np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: no NumPy array: {error}") from error


def sample_to_disk(
    path: str | Path,
    out: Path,
    *,
    prompts: list[str] | None = None,
    class_labels: list[int] | None = None,
    num_images: int = 4,
    seed: int = 0,
    tokenizer: str | None = None,
    lora: Mapping[str, float] | None = None,
    adapters: Sequence[tuple[str, float]] = (),
    **options: Any,
) -> np.ndarray:
    """Sample, write NNNNN.png, grid.png, samples.npz and prompts.txt; returns uint8 [N H W C].

    tokenizer, lora: see `load`. adapters: paths and weights, see `Model.sample`.
    Process 0 alone writes and prints.
    """
    asked = {"prompts": prompts, "class_labels": class_labels, "num_images": num_images}
    own = {name: value for name, value in options.items() if not callable(value)}
    own |= {"adapters": [list(entry) for entry in adapters]}
    own |= {"tokenizer": tokenizer, "lora": {str(k): v for k, v in (lora or {}).items()}}
    processes.check_same({"model": str(path), "seed": seed, **asked, **own}, "set of options")
    rng = seed_key(seed)
    model = load(path, tokenizer=tokenizer, lora=lora)
    options["adapters"] = [(load_adapter(file), weight) for file, weight in adapters]
    start = time.perf_counter()
    images = to_uint8(model.sample(rng, prompts, class_labels, num_images=num_images, **options))
    seconds = time.perf_counter() - start
    if jax.process_index() != 0:
        return images
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(out / f"{i:05d}.png")
    Image.fromarray(image_grid(images, columns=num_images)).save(out / "grid.png")
    np.savez(out / "samples.npz", images)  # key arr_0, as ADM's evaluation reads it
    rows = len(images) // num_images
    labels = [""] * rows if class_labels is None else [str(label) for label in class_labels]
    names = labels if prompts is None else prompts
    lines = [name for name in names for _ in range(num_images)]
    (out / "prompts.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(
        f"{len(images)} images in {seconds:.1f} s on {jax.device_count()} devices "
        f"({len(images) / seconds:.1f} images/s, compilation included): {out / 'grid.png'}"
    )
    return images
