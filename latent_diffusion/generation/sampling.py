"""Samples from a trained model to disk, for `sample.py`."""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_diffusion.core.rng import seed_key
from latent_diffusion.data import pictures
from latent_diffusion.data.captions import read_lines
from latent_diffusion.data.transforms import to_float
from latent_diffusion.files.arrays import read_npy
from latent_diffusion.generation.adapters import load_adapter
from latent_diffusion.generation.loading import load
from latent_diffusion.generation.start_picture import fitted, usual_size
from latent_diffusion.runtime import processes
from latent_diffusion.runtime.metrics import as_picture, image_grid, to_uint8


def read_prompts(prompts: str | None, prompts_file: str | None) -> list[str] | None:
    """Prompts from "a;b" or from the lines of a file; None without both."""
    if prompts is not None and prompts_file is not None:
        raise ValueError("give --prompts or --prompts_file, not both")
    if prompts is not None:
        try:
            prompts.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{prompts!r} has bytes that aren't UTF-8") from None
        return [prompt.strip() for prompt in prompts.split(";")]
    if prompts_file is not None:
        return read_lines(Path(prompts_file))
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


def read_refiner(entry: str | None) -> tuple[str, float] | None:
    """The path and the share of the noise in "PATH:0.2"."""
    if entry is None:
        return None
    path, _, share = entry.rpartition(":")
    try:
        return path, float(share)
    except ValueError:
        raise ValueError(
            f"--refiner={entry}: write PATH:SHARE, such as refiner:0.2, where SHARE of the noise "
            "is left"
        ) from None


def read_picture(path: str | None) -> np.ndarray | None:
    """[1 H W 3] in [-1, 1] from the file of a picture."""
    return None if path is None else to_float(pictures.read_image(path))[None]


def read_hint(path: pictures.Source) -> np.ndarray:
    """[1 H W 3] in [0, 1] from a picture, which determines the size of the samples."""
    return pictures.read_image(path)[None].astype(np.float32) / 255


def read_map(path: str | None, kind: str) -> np.ndarray | None:
    """[1 H W 1] from the file of a "mask" or "depth", [1 H W] from a file of classes ("levels")."""
    read = {"mask": pictures.read_mask, "depth": pictures.read_depth}.get(
        kind, pictures.read_levels
    )
    return None if path is None else read(path)[None]


class ProgressBar:
    """A bar that counts the network's evaluations, for option `progress`."""

    def __init__(self) -> None:
        from tqdm import tqdm

        # The user chose it, so it is shown in any environment.
        self._bar = tqdm(unit=" evaluations", disable=False)

    @property
    def total(self) -> int | None:
        """The number of evaluations, which `Model.sample` sets."""
        return self._bar.total

    @total.setter
    def total(self, total: int) -> None:
        self._bar.total = total
        self._bar.refresh()

    def __call__(self, t: Any) -> None:
        """Count one evaluation."""
        self._bar.update()


def read_json(path: str | None) -> Any:
    """The content of a JSON file."""
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def read_array(path: str | None) -> np.ndarray | None:
    """The array in an .npy file."""
    return None if path is None else read_npy(path)


def _fitted(
    keys: Sequence[str], size: tuple[int, int], options: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """See `fitted`; process 0 prints how the picture is changed."""
    image = options.get("image")
    entries = fitted(keys, size, image, options.get("mask"), options.get("strength"))
    if image is not None and entries and image.shape[1:3] != size and jax.process_index() == 0:
        height, width = image.shape[1:3]
        print(
            f"--image has {width}×{height} pixels: its middle is resized to "
            f"{size[1]}×{size[0]} (--width, --height)"
        )
    return entries


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
    height: int | None = None,
    width: int | None = None,
    controls: Sequence[tuple[str, str, float]] = (),
    refiner: tuple[str, float] | None = None,
    dtype: str | None = None,
    scan: bool | None = None,
    image_prompts: Sequence[tuple[str, str, float]] = (),
    image_encoder: str | None = None,
    **options: Any,
) -> np.ndarray:
    """Sample, write NNNNN.png, grid.png, samples.npz and prompts.txt; returns uint8 [N H W C].

    tokenizer, lora, dtype, scan: see `load`. adapters: paths and weights, see `Model.sample`.
    height, width: size of the images, by default that of a hint, of `segmentation` or of the
    enlarged `low_res`, or as in training. An `image` to start from, and its `mask`, are cropped to
    their middle and resized to this size. controls: paths of nets, pictures of hints, which have
    the size of the images, and weights. refiner: path and share of the noise, see `Model.sample`.
    image_prompts: paths of IP-Adapters, pictures and weights; image_encoder: see `load_adapter`.
    Only process 0 writes and prints.
    """
    if options.get("mask") is not None and options.get("image") is None:
        raise ValueError("--mask says where a picture is made anew: give --image, too")
    if image_encoder is not None and not image_prompts:
        raise ValueError("--image_encoder is that of --image_prompt: give --image_prompt, too")
    record = {name: value for name, value in options.items() if not callable(value)}
    record |= {"prompts": prompts, "class_labels": class_labels, "num_images": num_images}
    record |= {"adapters": [list(entry) for entry in adapters]}
    record |= {
        "height": height,
        "width": width,
        "tokenizer": tokenizer,
        "dtype": dtype,
        "scan": scan,
        "lora": {str(k): v for k, v in (lora or {}).items()},
    }
    record |= {"controls": [list(entry) for entry in controls], "refiner": refiner}
    record |= {"image_prompts": [list(entry) for entry in image_prompts]}
    processes.check_same({"model": str(path), "seed": seed, **record}, "set of options")
    rng = seed_key(seed)
    loading: dict[str, Any] = {"tokenizer": tokenizer, "dtype": dtype, "scan": scan}
    model = load(path, lora=lora, **loading)
    options["adapters"] = [(load_adapter(file), weight) for file, weight in adapters]
    if refiner is not None:
        options["refiner"] = (load(refiner[0], **loading), refiner[1])
    options["controls"] = [
        (load_adapter(file), read_hint(hint), weight) for file, hint, weight in controls
    ]
    options["image_prompts"] = [
        (load_adapter(file, image_encoder=image_encoder), read_picture(picture), weight)
        for file, picture, weight in image_prompts
    ]
    usual = usual_size(model, options)
    size = (height or usual[0], width or usual[1])
    if height or width:
        options["image_size"] = size
    options |= _fitted(model.conditioner.keys, size, options)
    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # better an error now than after the sampling
    start = time.perf_counter()
    images = to_uint8(model.sample(rng, prompts, class_labels, num_images=num_images, **options))
    seconds = time.perf_counter() - start
    if jax.process_index() != 0:
        return images
    if (out / "prompts.txt").is_file():  # a line for each picture of an earlier call
        for i in range(len(images), (out / "prompts.txt").read_bytes().count(b"\n")):
            (out / f"{i:05d}.png").unlink(missing_ok=True)
    for i, image in enumerate(images):
        as_picture(image).save(out / f"{i:05d}.png")
    as_picture(image_grid(images, columns=num_images)).save(out / "grid.png")
    np.savez(out / "samples.npz", images)  # key arr_0, as ADM's evaluation reads it
    rows = len(images) // num_images
    labels = [""] * rows if class_labels is None else [str(label) for label in class_labels]
    names = [name.replace("\n", " ") for name in (labels if prompts is None else prompts)]
    names *= rows // len(names)  # of another condition there may be several for one prompt
    lines = [name for name in names for _ in range(num_images)]
    (out / "prompts.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(
        f"{len(images)} images in {seconds:.1f} s on {jax.device_count()} devices "
        f"({len(images) / seconds:.1f} images/s, compilation included): {out / 'grid.png'}"
    )
    return images
