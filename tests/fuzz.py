"""Damaged and hostile files: each is read, or refused with one error that begins with its path.

    PYTHONPATH=.:tests python tests/fuzz.py --count=2000 --seed=0       (`make fuzz`: more)

Good models and adapters of all formats are written once (`fuzz_seeds`). A crafted input replaces
one of their files, or one setting, by something that somebody thought of; a fuzzed one by something
random (`fuzz_inputs`). Each input may take ten seconds of computing, and twice its size and 200 MB
of memory.
"""

import argparse
import contextlib
import functools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from fuzz_inputs import crafted, fuzzed

SECONDS, MEGABYTES = 10, 200


class TooLong(BaseException):
    """An input took more than its seconds."""


def _too_long(*_):
    raise TooLong


def peak():
    """The most memory of this process since `forget_peak`, in bytes; Linux alone says it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    return 0


def forget_peak():
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def size_of(path):
    """Bytes of a file with its neighbours, or of a folder; of a link, none."""
    folder = path if path.is_dir() else path.parent
    files = (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return sum(file.stat().st_size for file in files)


def fault(read, path):
    """What is wrong with how `read` takes `path`: None, or a text. Also whether it was refused."""
    forget_peak()
    before, allowed = peak(), (MEGABYTES << 20) + 2 * size_of(path)
    start, refused, wrong = time.process_time(), False, None
    signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        read(path)
    except ValueError as error:
        refused = True
        if not str(error).startswith(str(path)):
            wrong = f"a message without the path: {str(error)[:200]!r}"
        elif "\n" in str(error) or len(str(error)) > 5000:
            wrong = f"a message of {len(str(error))} characters"
    except TooLong:
        wrong = f"more than {SECONDS} seconds"
    except BaseException as error:
        wrong = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if wrong is None and time.process_time() - start > SECONDS:
        wrong = f"{time.process_time() - start:.0f} seconds"
    if wrong is None and peak() - before > allowed:
        wrong = f"{(peak() - before) >> 20} MB, allowed {allowed >> 20}"
    return wrong, refused


def remember_shapes():
    """Trace a network once, not once for each damaged copy of it."""
    from latent_diffusion.convert import autoencoder, bundle, dit, encoders, mmdit, taming, unet
    from latent_diffusion.convert.adapters import control

    for module, name in (
        (autoencoder, "shapes"), (unet, "shapes"), (encoders, "conditioner_shapes"),
        (bundle, "conditioner_shapes"), (dit, "shapes"), (mmdit, "shapes"), (taming, "shapes"),
        (control, "shapes"),
    ):  # fmt: skip
        setattr(module, name, remembering(getattr(module, name)))


def remembering(function):
    """The function, which computes an answer once."""
    known = {}

    @functools.wraps(function)
    def call(*args):
        key = repr(args)
        if key not in known:
            known[key] = function(*args)
        return known[key]

    return call


def run(inputs, seeds, folder):
    """Read every input; returns the numbers of inputs and of refusals, and the faults by name."""
    count = refusals = 0
    faults = {}
    for name, seed, place, change in inputs:
        print(name, file=sys.stderr, flush=True)  # the last one, if the process dies of it
        path, root, copy = seeds[seed].path, seeds[seed].root, folder / seed
        if not copy.exists():
            shutil.copytree(root, copy, symlinks=True)
        change(copy / place)
        wrong, refused = fault(seeds[seed].read, copy if path == root else copy / path.name)
        count, refusals = count + 1, refusals + refused
        if wrong:
            faults[name] = wrong
        restore(root / place, copy / place)
    return count, refusals, faults


def restore(good, damaged):
    """Put the good file back in the place of the damaged one, or remove it where there was none."""
    if damaged.is_dir() and not damaged.is_symlink():
        damaged.rmdir()
    damaged.unlink(missing_ok=True)
    if good.exists():
        shutil.copy(good, damaged)


def chosen(seeds, earlier, models, few, seed):
    """Seeds by name; without names all, or the earlier ones and a few that `seed` draws."""
    names = list(seeds)
    if models:
        names = models.split(",")
    elif few is not None:
        others = [name for name in seeds if name not in earlier]
        names = [*earlier, *random.Random(seed).sample(others, few)]
    return {name: seeds[name] for name in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="of fuzzed inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", default="", help="some of the good ones, e.g. unet,lora_peft")
    parser.add_argument("--few", type=int, help="so many, drawn by the seed, of the newer formats")
    options = parser.parse_args()
    import logging

    import fuzz_seeds

    logging.disable(logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    summary = {}
    try:
        seeds = fuzz_seeds.write_seeds(folder / "seeds")
        seeds = chosen(seeds, fuzz_seeds.EARLIER, options.models, options.few, options.seed)
        remember_shapes()
        for seed in seeds.values():
            seed.read(seed.path)  # the good ones; a network is traced once
        for kind, inputs in (
            ("crafted", crafted(seeds)),
            ("fuzzed", fuzzed(seeds, options.count, options.seed)),
        ):
            start = time.process_time()
            count, refused, faults = run(inputs, seeds, folder)
            seconds = round(time.process_time() - start)
            summary[kind] = {
                "count": count, "refused": refused, "seconds": seconds, "faults": faults
            }  # fmt: skip
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"models": list(seeds), **summary}, indent=1))
    sys.exit(any(summary[kind]["faults"] for kind in summary))


if __name__ == "__main__":
    main()
