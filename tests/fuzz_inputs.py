"""What is done to good files: crafted damage, settings and programs, and random damage."""

import functools
import gzip
import io
import json
import math
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import yaml

HUGE = 10**9
JSON_VALUES = [
    None, True, False, 0, -1, HUGE, -HUGE, 10**30, 0.5, 1e308, float("nan"), "", "x" * 1000, "4",
    [], [[]], [HUGE], [None], [8] * 100_000, {}, {"a": 1},
]  # fmt: skip

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
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".yaml":
        return json.loads(text)
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def save(path, tree):
    text = json.dumps(tree)  # JSON is yaml, too, and writes every value
    if path.suffix == ".yaml":
        text = yaml.dump(tree, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    path.write_text(text)


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
WEIGHT_FILES = (".safetensors", ".ckpt", ".pt")
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


def crafted(seeds):
    """(name, seed, place, change of that file of a copy) of every crafted input."""
    for name, seed in seeds.items():
        for place in seed.places:
            for target in LINKS[-2:] if seed.brief else LINKS:
                yield f"{name} {place} link {target}", name, place, _with(linked, target)
            brief = seed.brief or (name != "compvis" and place.endswith(WEIGHT_FILES))
            for kind, content in contents(Path(place).suffix, brief).items():
                yield f"{name} {place} {kind}", name, place, _with(replaced, content)
        values = (HUGE,) if seed.brief else (HUGE, "x", [8] * 1000, {}, None)
        for place in seed.settings:
            for setting in settings_of(seed.root / place):
                for value in values:
                    what = f"{name} {place} {'.'.join(map(str, setting))}={str(value)[:20]}"
                    yield what, name, place, _with(with_setting, setting, value)
    if "shards" in seeds:
        place = seeds["shards"].places[0]
        for name, shards in {
            "itself": place, "a number": 7, "outside": "../part0.safetensors",
            "a folder": ".", "a device": "/dev/zero", "absent": "part9.safetensors",
        }.items():  # fmt: skip
            yield f"shards name {name}", "shards", place, _with(_shard, shards)
    bomb = gzip.compress(b"a b\n" * 25_000_000, 9)
    for seed in (name for name in ("compvis", "ckpt") if name in seeds):
        place = "bpe_simple_vocab_16e6.txt.gz"
        yield f"{seed} gzip bomb", seed, place, _with(replaced, bomb)
        yield f"{seed} gzip cut", seed, place, _with(replaced, bomb[:100])


def contents(suffix, brief):
    """What replaces a file. brief: some, since the same functions open the files of all formats."""
    if suffix in WEIGHT_FILES:
        some, kinds = ("no-tensors", "many-names", "entries-of-a-zip", "a-side-of-1e9"), WEIGHTS
    elif suffix == ".yaml":
        some, kinds = ("a-list", "lists", "an-alias-of-itself", "no-model"), {**TEXTS, **YAMLS}
    else:
        some, kinds = ("empty", "a-byte-order-mark", "a-list", "lists", "deep-objects"), TEXTS
    return {name: kinds[name] for name in some} if brief else kinds


def _shard(path, name):
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    path.write_text(json.dumps(index))


def _with(change, *args):
    return lambda path: change(path, *args)


# -------------------------------------------------------------------------------- fuzzed inputs


def fuzzed(seeds, count, seed):
    """(name, seed, place, change of that file of a copy) of random inputs."""
    draw = random.Random(seed)
    files = {
        name: sorted(
            file.relative_to(one.root) for file in one.root.rglob("*")
            if file.is_file() and "checkpoints" not in file.parts
        )
        for name, one in seeds.items()
    }  # fmt: skip
    for i in range(count):
        name = draw.choice(list(seeds))
        root = seeds[name].root
        file, own = draw.choice(files[name]), draw.randrange(1 << 60)
        kinds = [flip, cut, swap, insert]
        if file.suffix in (".json", ".yaml") and (root / file).stat().st_size < 20_000:
            kinds = [retype, retype, retype, flip, cut]
        elif file.suffix == ".safetensors":
            kinds = [*kinds, reshape, reshape, reshape, reshape]
        kind = draw.choice(kinds)
        yield f"{i} {name} {file} {kind.__name__} {own}", name, file, _with(kind, own)


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


def reshape(path, seed):
    """Change what the header of a safetensors file says of one tensor, or of its settings."""
    data, draw = path.read_bytes(), random.Random(seed)
    length = int.from_bytes(data[:8], "little")
    told = json.loads(data[8 : 8 + length])
    name = draw.choice([name for name in told if name != "__metadata__"])
    one, rest = told[name], data[8 + length :]
    settings = told.get("__metadata__", {}).get("lora_adapter_metadata")
    change = draw.choice(["name", "absent", "shape", "rank", "dtype", "size", "settings"])
    if change == "settings" and settings:
        said = json.loads(settings)
        said[draw.choice([*said, "unet.other"])] = draw.choice(JSON_VALUES)
        told["__metadata__"]["lora_adapter_metadata"] = json.dumps(said)
    elif change == "name":
        told[draw.choice([name + "x", name[1:], name.replace("weight", "bias"), "x"])] = told.pop(
            name
        )
    elif change == "shape":
        one["shape"] = one["shape"][::-1]
    elif change == "rank":
        sides = one["shape"]
        one["shape"] = draw.choice([[*sides, 1], [1, *sides], [math.prod(sides)]])
    elif change == "dtype":
        one["dtype"] = "I32" if one["dtype"] == "F32" else "F32"
    else:  # its bytes are another one's, or none are left of it
        start, stop = one["data_offsets"]
        rest = rest[:start] + rest[stop:]
        for other in told.values():
            if "data_offsets" in other and other["data_offsets"][0] >= stop:
                other["data_offsets"] = [at - (stop - start) for at in other["data_offsets"]]
        one["data_offsets"] = [start, start]
        one["shape"] = draw.choice([[0], [0, HUGE], [1 << 20, 0], [*one["shape"][:-1], 0]])
        if change == "absent":
            del told[name]
    path.write_bytes(header(told) + rest)
