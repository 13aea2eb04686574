"""Tiled encoding and decoding: peak memory, seams, and distance from the untiled result.

    python -m benchmarks.tiled_first_stage --workdir=runs/demo/first_stage

Encodes and decodes mosaics of held-out pictures. Each size runs in a separate process, whose peak
resident memory is printed. Sides in --whole also run without tiles; at the first of them, tiled and
untiled reconstructions are compared: PSNR, and the step across seams. --crop=FILE writes a piece
around the corner of four tiles: original, untiled, tiled.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import app, flags

WORKDIR = flags.DEFINE_string("workdir", "runs/demo/first_stage", "A trained first stage.")
TILED = flags.DEFINE_list("tiled", ["512", "1024", "2048"], "Sides to run in tiles.")
WHOLE = flags.DEFINE_list("whole", ["512", "1024"], "Sides to run untiled.")
TILE = flags.DEFINE_integer("tile", 256, "Side of a tile, in pixels.")
CROP = flags.DEFINE_string("crop", None, "A PNG to write.")
ONE = flags.DEFINE_list("one", None, "side,tile: measure this alone, in this process.")


def mosaic(side: int, piece: int = 64) -> np.ndarray:
    """Held-out pictures of piece×piece pixels, edge to edge: [1 side side 3] in [-1, 1]."""
    from latent_diffusion import data
    from latent_diffusion.runtime import workdir

    config = workdir.load_config(Path(WORKDIR.value)).data
    config.image_size = piece
    source = data.make_source(config, "test")
    count = side // piece
    rows = [
        np.concatenate([source[(r * count + c) % len(source)]["image"] for c in range(count)], 1)
        for r in range(count)
    ]
    return np.concatenate(rows)[None].astype(np.float32) / 127.5 - 1


def reconstruct(model, image: np.ndarray, tile: int | None) -> np.ndarray:
    """Encode and decode."""
    latents = model.encode(image, tile_size=tile)
    return np.asarray(model.decode(latents, tile_size=tile))


def peak_memory() -> float:
    """The peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(side: int, tile: int | None) -> dict[str, float]:
    """Peak memory of this process before and after a reconstruction."""
    import latent_diffusion as ldm

    model, image = ldm.load(WORKDIR.value), mosaic(side)
    before = peak_memory()
    reconstruct(model, image, tile)
    return {"before": before, "after": peak_memory()}


def in_own_process(side: int, tile: int | None) -> dict[str, float]:
    """`measure` in a fresh process."""
    flags_ = [f"--workdir={WORKDIR.value}", f"--one={side},{tile or 0}"]
    out = subprocess.run(
        [sys.executable, "-m", __spec__.name, *flags_], stdout=subprocess.PIPE, check=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of two images [1 H W C], clipped to [-1, 1]."""
    from latent_diffusion.nets.losses import similarity

    return float(similarity.psnr(np.clip(a, -1, 1), np.clip(b, -1, 1))[0])


def compare(side: int, tile: int) -> None:
    """Compare tiled and untiled reconstructions of one image, and print the result."""
    from PIL import Image

    import latent_diffusion as ldm

    model, image = ldm.load(WORKDIR.value), mosaic(side)
    whole, tiles = (reconstruct(model, image, t) for t in (None, tile))
    print(
        f"{side}×{side} in tiles of {tile}: PSNR to untiled {psnr(tiles, whole):.1f} dB; "
        f"to the original {psnr(tiles, image):.2f} dB, untiled {psnr(whole, image):.2f} dB"
    )
    # Tiles begin every tile − tile // 4 pixels; a seam is a column where one begins or ends.
    starts = np.minimum(np.arange(0, side - tile // 4, tile - tile // 4), side - tile)
    seams = [x for x in sorted({*starts, *(starts + tile)}) if 0 < x < side]
    steps = [np.abs(np.diff(x, axis=2)).mean((0, 1, 3)) for x in (tiles, whole)]
    ratio = [step[np.array(seams) - 1].mean() for step in steps]
    print(f"mean step across {len(seams)} seams {ratio[0]:.4f}, untiled there {ratio[1]:.4f}")
    if CROP.value:
        x = seams[0]
        window = slice(max(x - 96, 0), x + 96)
        parts = [image, whole, tiles]
        strip = np.concatenate([p[0, window, window] for p in parts], 1)
        strip = np.clip((strip + 1) * 127.5, 0, 255).astype(np.uint8)
        Image.fromarray(strip).resize((strip.shape[1] * 2, strip.shape[0] * 2), 0).save(CROP.value)


def main(argv: list[str]) -> None:
    """Measure in separate processes, then compare."""
    from latent_diffusion.runtime.startup import quiet_and_cached

    quiet_and_cached()
    if ONE.value:
        side, tile = map(int, ONE.value)
        print(json.dumps(measure(side, tile or None)))
        return
    print("| image | tile | peak memory of the process | of which before the call |")
    print("|---|---|---|---|")
    for tile, sides in ((TILE.value, TILED.value), (None, WHOLE.value)):
        for side in sides:
            memory = in_own_process(int(side), tile)
            print(
                f"| {side}×{side} | {tile or 'none'} | {memory['after']:,.0f} MB | "
                f"{memory['before']:,.0f} MB |",
                flush=True,
            )
    compare(int(WHOLE.value[0]), TILE.value)


if __name__ == "__main__":
    app.run(main)
