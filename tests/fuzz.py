"""Damaged and hostile files: each is read, or refused with one error that begins with its path.

    PYTHONPATH=. python tests/fuzz.py --count=2000 --seed=0       (`make fuzz`: more)

Good models of several kinds are written once. A crafted input replaces one of their files, or one
setting, by something that somebody thought of; a fuzzed one by something random. Each input may
take ten seconds of computing, and twice its size and 200 MB of memory.
"""

import argparse
import contextlib
import functools
import gzip
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from pathlib import Path

SECONDS, MEGABYTES = 10, 200
HUGE = 10**9
JSON_VALUES = [
    None, True, False, 0, -1, HUGE, -HUGE, 10**30, 0.5, 1e308, float("nan"), "", "x" * 1000, "4",
    [], [[]], [HUGE], [None], [8] * 100_000, {}, {"a": 1},
]  # fmt: skip


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


# ------------------------------------------------------------------------------- good models


def write_seeds(folder):
    """Good models of several kinds: {name: path to read}, each in a folder of its own."""
    import test_convert_round_trips as models
    import test_tokenizers as tokenizers
    from safetensors.numpy import load_file, save_file

    from latent_diffusion import convert
    from latent_diffusion.data.tokenizers import ClipTokenizer

    bundle = models.make_bundle("clip")
    words = ClipTokenizer(tokenizers.CLIP, tokenizers.MERGES, max_length=5)
    paths = {}
    for name, form, file in (
        ("compvis", "compvis", "model.safetensors"),
        ("pipeline", "diffusers", ""),
    ):
        paths[name] = folder / name / file
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        convert.write(bundle, paths[name], form)
    tensors = load_file(paths["compvis"])
    shutil.rmtree(paths["pipeline"] / "tokenizer", ignore_errors=True)
    from latent_diffusion.convert.tokenizers import write_tokenizer

    write_tokenizer(words, paths["pipeline"] / "tokenizer")
    # The same tensors in torch's zip file, as training writes it.
    paths["ckpt"] = folder / "ckpt" / "model.ckpt"
    paths["ckpt"].parent.mkdir()
    shutil.copy(folder / "compvis" / "model.yaml", folder / "ckpt" / "model.yaml")
    write_torch_zip(paths["ckpt"], tensors)
    # A component in shards.
    paths["shards"] = folder / "shards"
    shutil.copytree(paths["pipeline"] / "vae", paths["shards"])
    (weights,) = paths["shards"].glob("*.safetensors")
    arrays = load_file(weights)
    weights.unlink()
    index = {}
    for i in range(2):
        part = {n: a for n, a in arrays.items() if hash_of(n) % 2 == i}
        save_file(part, paths["shards"] / f"part{i}.safetensors")
        index |= {n: f"part{i}.safetensors" for n in part}
    (paths["shards"] / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    paths["unet"] = folder / "unet"
    shutil.copytree(paths["pipeline"] / "unet", paths["unet"])
    paths["text_encoder"] = folder / "text_encoder"
    shutil.copytree(paths["pipeline"] / "text_encoder", paths["text_encoder"])
    # A workdir, of which only the files beside the checkpoints are damaged.
    paths["workdir"] = folder / "workdir"
    convert.write(convert.Bundle(autoencoder=bundle.autoencoder), paths["workdir"], "orbax")
    return paths


def hash_of(name):
    """A number of a name that is the same in every process."""
    return sum(name.encode())


def write_torch_zip(path, tensors):
    """Write float32 tensors as torch.save does."""
    from collections import OrderedDict

    import test_convert_files as files

    tree, storages = OrderedDict(), {}
    for i, (name, array) in enumerate(tensors.items()):
        steps, strides = 1, []
        for side in reversed(array.shape):
            strides.insert(0, steps)
            steps *= side
        kind = "FloatStorage" if array.dtype.kind == "f" else "LongStorage"
        tree[name] = files.tensor(kind, str(i), array.size, array.shape, tuple(strides))
        storages[str(i)] = array
    files.torch_zip(path, {"state_dict": tree, "global_step": 3}, storages)


def cached_shapes():
    """Trace a network once, not once for each damaged copy of it."""
    from latent_diffusion.convert import autoencoder, bundle, encoders, unet

    for module, name in (
        (autoencoder, "shapes"), (unet, "shapes"), (encoders, "conditioner_shapes"),
    ):  # fmt: skip
        setattr(module, name, remembering(getattr(module, name)))
    return bundle


def remembering(function):
    known = {}

    @functools.wraps(function)
    def call(*args):
        key = repr(args)
        if key not in known:
            known[key] = function(*args)
        return known[key]

    return call


# ------------------------------------------------------------------------------- crafted inputs


def settings_of(path):
    """The places of a tree of JSON or yaml that hold a value: paths of keys."""

    def walk(tree, place):
        if isinstance(tree, dict):
            for key, value in tree.items():
                yield (*place, key)
                yield from walk(value, (*place, key))

    return list(walk(load(path), ()))


def load(path):
    import yaml

    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)


def save(path, tree):
    import yaml

    # JSON is yaml, too, and writes every value.
    path.write_text(json.dumps(tree) if path.suffix != ".yaml" else yaml.safe_dump(tree))


def with_setting(path, place, value):
    tree = inner = load(path)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    save(path, tree)


def raw_pickle(program):
    """A torch zip file of one program."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    return buffer.getvalue()


def many_entries(count):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(count):
            archive.writestr(f"archive/data/{i}", b"")
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    return buffer.getvalue()


def header(text, length=None):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def spec(shape, start=0, stop=0, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def doubling(start, step, count):
    """A program that makes an object of two copies of the one before, again and again."""
    return b"\x80\x02" + start + b"".join(step(i) for i in range(count))


TUPLES = doubling(b"K\x01q\x00", lambda i: b"h%ch%c\x86q%c" % (i, i, i + 1), 60)
ENCODE = b"c_codecs\nencode\nq\x00X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + b"\x85q\x01"
PROGRAMS = {
    "tuples-as-a-key": b"\x80\x02}" + TUPLES[2:] + b"N" + b"s.",
    "tuples-as-the-tree": TUPLES + b".",
    "tuples-as-a-reference": TUPLES + b"Q.",
    "tuples-in-the-state": b"\x80\x02}X\x01\x00\x00\x00a" + TUPLES[2:] + b"s.",
    "lists-without-end": b"\x80\x02" + b"]" * 8_000_000 + b".",
    "lists-remembered": b"\x80\x02" + b"".join(b"]r" + struct.pack("<I", i) for i in range(10**6)),
    "a-list-in-itself": b"\x80\x02]q\x00h\x00a.",
    "a-state-in-itself": b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s.",
    "encoded-again-and-again": b"\x80\x02" + ENCODE + b"h\x00h\x01R" * 5000 + b".",
    "sizes-of-a-long-list": b"\x80\x02(" + b"K\x01" * 300_000 + b"lq\x00ctorch\nSize\nq\x01"
    + b"h\x01h\x00\x85R" * 2000 + b".",
    "a-long-number": b"\x80\x02\x8b" + struct.pack("<i", 4_000_000) + b"\x7f" * 4_000_000 + b".",
    "decimals": b"L" + b"9" * 1_000_000 + b"L\n.",
    "marks": b"(" * 900_000 + b"t.",
    "an-index-of-2e31": b"\x80\x02]r\xff\xff\xff\x7f.",
    "code": b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
    "a-set": b"\x80\x04\x8f.",
    "an-instance": b"(ios\nsystem\n.",
    "an-extension": b"\x80\x02\x82\x01.",
    "a-dtype": b"\x80\x02cnumpy\ndtype\nX\x0b\x00\x00\x00V1000000000\x85R.",
    "a-dtype-of-fields": b"\x80\x02cnumpy\ndtype\nX\xff\xff\x00\x00" + b"f4," * 21845 + b"\x85R.",
    "empty": b"",
    "only-an-end": b".",
}  # fmt: skip
WEIGHTS = {
    "empty": b"",
    "eight-bytes": b"\x00" * 8,
    "header-of-lists": header(b'{"a":[' + b"[]," * 2_600_000 + b"[]]}"),
    "header-of-2e63": header(b"{}", 1 << 63),
    "header-of-9-MB": header(b'{"__metadata__":{"a":"' + b"x" * (9 << 20) + b'"}}'),
    "deep-header": header(b'{"x":' + b"[" * 500_000),
    "header-is-a-list": header(b"[]" + b" " * 10),
    "no-tensors": header({}),
    "metadata-is-a-list": header({"__metadata__": []}),
    "a-side-of-1e9": header({"encoder.conv_in.weight": spec([HUGE, 0])}),
    "sides-of-1e30": header({"encoder.conv_in.weight": spec([10**30, 0])}),
    "a-hundred-sides": header({"encoder.conv_in.weight": spec([0] * 100)}),
    "a-scalar": header({"encoder.conv_in.weight": spec([])}),
    "sides-are-texts": header({"encoder.conv_in.weight": spec(["1"])}),
    "a-shape-is-a-number": header({"encoder.conv_in.weight": spec(3)}),
    "offsets-are-a-text": header({"x": {"dtype": "F32", "shape": [], "data_offsets": "ab"}}),
    "a-dtype-is-a-list": header({"x": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}),
    "not-utf-8": header(b'{"\xff\xfe":1}'),
    "many-names": header({f"t{i}": spec([0]) for i in range(60_000)}),
    "entries-of-a-zip": many_entries(30_000),
    "a-zip-cut": many_entries(10)[:-10],
    "a-zip-header": b"PK\x03\x04" + b"\x00" * 100,
    "old-pickle": pickle.dumps({"a": 1}),
    "text": b"hello\n" * 1000,
    **{f"pickle-{name}": raw_pickle(program) for name, program in PROGRAMS.items()},
}
ALIASES = "a0: &a0 [x,x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1},*a{i - 1}]\n" for i in range(1, 60))
TEXTS = {
    "empty": b"",
    "deep": b"[" * 200_000,
    "deep-objects": b'{"a":' * 100_000,
    "not-utf-8": b'{"a": "\xff"}',
    "a-byte-order-mark": b"\xef\xbb\xbf{}",
    "a-list": b"[]",
    "a-number": b"3",
    "a-number-of-a-million-digits": b'{"a": ' + b"9" * 1_000_000 + b"}",
    "lists": b'{"a": [' + b"[]," * 2_500_000 + b"[]]}",
    "nine-megabytes": b'{"a": "' + b"x" * (9 << 20) + b'"}',
    "zeros": b"\x00" * 1000,
}
YAMLS = {
    "aliases": (ALIASES + "model: {target: x, params: {unet_config: *a59}}").encode(),
    "aliases-in-a-setting": (ALIASES + "model: {params: {image_size: *a59}}").encode(),
    "an-alias-of-itself": b"model: &a {target: x, params: *a}",
    "code": b"model: !!python/object/apply:os.system [true]",
    "a-date": b"model: 2020-01-01",
    "deep-yaml": b"model: " + b"[" * 3000,
    "deep-blocks": b"".join(b" " * i + b"a:\n" for i in range(600)),
    "keys-that-are-lists": b"model: {? [1, 2] : 3}",
    "no-model": b"data: 3",
    "a-megabyte": b"model: {params: {a: [" + b"1," * 500_000 + b"]}}",
    "merged": b"a: &a {b: 1}\nmodel: {<<: *a}",
    "floats": b"model: {target: .nan, params: {scale_factor: .inf}}",
}  # fmt: skip
LINKS = ["/dev/zero", "/dev/urandom", "/dev/stdin", "nowhere", "itself", "pipe", "folder"]


def replaced(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def linked(path, target):
    """A link to a device, to itself, to nothing, a pipe, or a folder in the place of a file."""
    path.unlink()
    if target == "pipe":
        os.mkfifo(path)
    elif target == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name if target == "itself" else target)


PLACES = {  # the files of each seed that inputs replace
    "compvis": ("model.safetensors", "model.yaml"),
    "ckpt": ("model.ckpt",),
    "shards": ("diffusion_pytorch_model.safetensors.index.json", "part0.safetensors"),
    "unet": ("config.json",),
    "text_encoder": ("config.json", "model.safetensors"),
    "pipeline": (
        "model_index.json", "scheduler/scheduler_config.json", "vae/config.json",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
    ),
    "workdir": ("config.json", "first_stage.safetensors"),
}  # fmt: skip


def crafted(seeds):
    """(name, seed, change of a copy) of every crafted input."""
    for seed, places in PLACES.items():
        for place in places if seed in seeds else ():
            file = seeds[seed] / place if seeds[seed].is_dir() else seeds[seed].parent / place
            if not file.exists():
                continue
            for target in LINKS:
                yield f"{seed} {place} link {target}", seed, _on(place, linked, target)
            kinds = TEXTS
            if file.suffix in (".safetensors", ".ckpt"):
                kinds = WEIGHTS
            elif file.suffix == ".yaml":
                kinds = {**TEXTS, **YAMLS}
            for name, content in kinds.items():
                yield f"{seed} {place} {name}", seed, _on(place, replaced, content)
    for seed, place in (
        ("unet", "config.json"), ("shards", "config.json"), ("text_encoder", "config.json"),
        ("pipeline", "model_index.json"), ("pipeline", "scheduler/scheduler_config.json"),
        ("pipeline", "tokenizer/tokenizer_config.json"), ("compvis", "model.yaml"),
        ("workdir", "config.json"),
    ):  # fmt: skip
        if seed not in seeds:
            continue
        root = seeds[seed] if seeds[seed].is_dir() else seeds[seed].parent
        for setting in settings_of(root / place):
            for value in (HUGE, "x", [8] * 1000, {}, None):
                name = f"{seed} {place} {'.'.join(setting)}={str(value)[:20]}"
                yield name, seed, _on(place, with_setting, setting, value)
    for name, shards in {
        "itself": PLACES["shards"][0], "a number": 7, "outside": "../part0.safetensors",
        "a folder": ".", "a device": "/dev/zero", "absent": "part9.safetensors",
    }.items():  # fmt: skip
        place = PLACES["shards"][0]
        if "shards" not in seeds:
            break
        yield f"shards name {name}", "shards", _on(place, _shard, shards)
    bomb = gzip.compress(b"a b\n" * 25_000_000, 9)
    for seed in (name for name in ("compvis", "ckpt") if name in seeds):
        place = "bpe_simple_vocab_16e6.txt.gz"
        yield f"{seed} gzip bomb", seed, _on(place, replaced, bomb)
        yield f"{seed} gzip cut", seed, _on(place, replaced, bomb[:100])


def _shard(path, name):
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    path.write_text(json.dumps(index))


def _on(place, change, *args):
    return lambda root: change(root / place, *args)


# -------------------------------------------------------------------------------- fuzzed inputs


def fuzzed(seeds, count, seed):
    """(name, seed, change of a copy) of random inputs."""
    draw = random.Random(seed)
    for i in range(count):
        name = draw.choice(list(seeds))
        root = seeds[name] if seeds[name].is_dir() else seeds[name].parent
        files = sorted(
            file.relative_to(root) for file in root.rglob("*")
            if file.is_file() and "checkpoints" not in file.parts
        )  # fmt: skip
        file, own = draw.choice(files), draw.randrange(1 << 60)
        kinds = [flip, cut, swap, insert]
        if file.suffix in (".json", ".yaml") and (root / file).stat().st_size < 20_000:
            kinds = [retype, retype, retype, flip, cut]
        kind = draw.choice(kinds)
        yield f"{i} {name} {file} {kind.__name__} {own}", name, _on(file, kind, own)


def _bytes(change):
    @functools.wraps(change)
    def apply(path, seed):
        data, draw = bytearray(path.read_bytes()), random.Random(seed)
        path.write_bytes(bytes(change(data, draw)) if data else b"x")

    return apply


@_bytes
def flip(data, draw):
    # Most often in the first bytes, where the structure of a file is.
    for _ in range(draw.choice([1, 1, 4, 30])):
        end = len(data) if draw.random() < 0.5 else min(len(data), 4000)
        data[draw.randrange(end)] = draw.randrange(256)
    return data


@_bytes
def cut(data, draw):
    return (
        data[: draw.randrange(len(data))]
        if draw.random() < 0.7
        else data[draw.randrange(len(data)) :]
    )


@_bytes
def swap(data, draw):
    at, other, size = (draw.randrange(len(data)) for _ in range(3))
    size = size % 64
    data[at : at + size], data[other : other + size] = (
        data[other : other + size],
        data[at : at + size],
    )
    return data


@_bytes
def insert(data, draw):
    at = draw.randrange(len(data))
    return data[:at] + bytes(draw.randrange(256) for _ in range(draw.randrange(20))) + data[at:]


def retype(path, seed):
    draw = random.Random(seed)
    try:
        places = settings_of(path)
        with_setting(path, draw.choice(places), draw.choice(JSON_VALUES))
    except (ValueError, IndexError, OverflowError):
        path.write_text("{}")


# ------------------------------------------------------------------------------------- the run


def run(inputs, seeds, read, folder):
    """Read every input; returns the numbers of inputs and of refusals, and the faults by name."""
    count = refusals = 0
    faults = {}
    for name, seed, change in inputs:
        print(name, file=sys.stderr, flush=True)  # the last one, if the process dies of it
        root = seeds[seed] if seeds[seed].is_dir() else seeds[seed].parent
        copy = folder / "copy"
        shutil.copytree(root, copy, symlinks=True)
        change(copy)
        path = copy if seeds[seed].is_dir() else copy / seeds[seed].name
        wrong, refused = fault(read, path)
        count, refusals = count + 1, refusals + refused
        if wrong:
            faults[name] = wrong
        shutil.rmtree(copy)
    return count, refusals, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", default="", help="some of the good models, e.g. unet,ckpt")
    options = parser.parse_args()
    import logging

    from latent_diffusion import convert

    logging.disable(logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    summary = {}
    try:
        seeds = write_seeds(folder / "seeds")
        chosen = options.models.split(",") if options.models else list(seeds)
        seeds = {name: seeds[name] for name in chosen}
        cached_shapes()
        for path in seeds.values():
            convert.read(path)  # the good ones; a network is traced once
        for kind, inputs in (
            ("crafted", crafted(seeds)),
            ("fuzzed", fuzzed(seeds, options.count, options.seed)),
        ):
            count, refused, faults = run(inputs, seeds, convert.read, folder)
            summary[kind] = {"count": count, "refused": refused, "faults": faults}
    finally:
        shutil.rmtree(folder)
    print(json.dumps(summary, indent=1))
    sys.exit(any(part["faults"] for part in summary.values()))


if __name__ == "__main__":
    main()
