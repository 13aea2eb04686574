"""Convert a checkpoint from one format to another.

    python -m latent_diffusion.convert SRC DST --to=diffusers|compvis|orbax [--dtype=float16]
    python -m latent_diffusion.convert SRC DST --to=lora|kohya|textual_inversion|a1111
    python -m latent_diffusion.convert SRC --dry_run

SRC is anything that `latent_diffusion.load` reads. DST is a folder for diffusers and orbax, else a
.safetensors file. Tensors are converted one by one, so that the largest determines the memory. The
formats of the second line are for the workdir of a LoRA or of a new word, and hold nothing else.
"""

import contextlib
import ctypes
import sys
from pathlib import Path

from absl import app, flags

from latent_diffusion.runtime import flags as shared_flags

WITHOUT_MODEL = ["lora", "kohya", "textual_inversion", "a1111"]
FORMATS = ["diffusers", "compvis", "orbax", *WITHOUT_MODEL]
TO = flags.DEFINE_enum(
    "to",
    None,
    FORMATS,
    "The format of DST.",
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "float16", "bfloat16"], "Dtype of parameters; default: SRC's."
)
CONFIG = flags.DEFINE_string("config", None, "The yaml of a single file of the original.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer's folder or file; see load.")
LORA = flags.DEFINE_multi_string("lora", [], "A LoRA to merge, FILE or FILE:WEIGHT; repeatable.")
VARIANT = flags.DEFINE_string("variant", None, "Read the fp16 or non_ema files of a folder.")
EMA = flags.DEFINE_bool(
    "ema", None, "Averaged parameters, if SRC also has live ones (--noema); default: averaged."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the contents of SRC, then stop.")


def main(argv: list[str]) -> None:
    """Read the flags, then convert."""
    from latent_diffusion.runtime.checkpoint import CheckpointError
    from latent_diffusion.runtime.startup import quiet_and_cached

    quiet_and_cached()
    _give_back_freed_arrays()
    paths = [Path(path) for path in argv[1:]]
    if len(paths) != (1 if DRY_RUN.value else 2):
        raise app.UsageError("give SRC and DST and --to=FORMAT, or SRC and --dry_run")
    if not DRY_RUN.value and TO.value is None:
        raise app.UsageError(f"give --to=FORMAT: {', '.join(FORMATS)}")
    try:
        convert(paths[0], None if DRY_RUN.value else paths[1], TO.value or "")
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"error: {error}")


def _give_back_freed_arrays() -> None:
    """Return the memory of each freed array of 1 MiB or more to the system at once.

    The C library of Linux otherwise reserves it for the thread that used it, and Orbax reads a
    workdir in many threads. Where the library has no such setting, nothing happens.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD, mallopt(3)
    with contextlib.suppress(AttributeError, TypeError, OSError):
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)


def convert(source: Path, target: Path | None = None, to: str = "") -> None:
    """Print the contents of `source`, and write them to `target`, if there is a target."""
    from tqdm import tqdm

    from latent_diffusion.convert import read, with_loras, write
    from latent_diffusion.convert.adapters import read_weights
    from latent_diffusion.convert.describe import describe

    if LORA.value and to in WITHOUT_MODEL:
        raise ValueError(f"--lora is merged into a model, and --to={to} writes none")
    yaml, tokenizer = CONFIG.value, TOKENIZER.value
    bundle = read(source, config=yaml, ema=EMA.value, variant=VARIANT.value, tokenizer=tokenizer)
    bundle = with_loras(bundle, read_weights(LORA.value))
    print(describe(bundle))
    if target is None:
        return
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists; remove it first")
    total = sum(t.size for _, part in bundle.parts() for t in part.params.values())
    with tqdm(total=total, unit="", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        write(bundle, target, to, DTYPE.value, bar.update)
    print(f"written: {target}")


def run() -> None:
    """Run the command."""
    shared_flags.run(main, config=False, positional=True)


if __name__ == "__main__":
    run()
