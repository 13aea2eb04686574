"""Weight files: read lazily, and refused with the reason where they aren't what they claim."""

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.files.tensors import find_weights, open_tensors, write_safetensors

ARRAYS = {
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b.half": np.arange(5, dtype=np.float16),
    "c": np.array(3, dtype=np.int64),
    "empty": np.zeros((0, 4), np.float32),
}


# ------------------------------------------------------------------------------- safetensors


def raw_safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def spec(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_safetensors_of_the_library_are_read_and_ours_are_read_by_it(tmp_path):
    theirs = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(ARRAYS, theirs, {"format": "pt"})
    opened = open_tensors(theirs)
    assert opened.metadata == {"format": "pt"}
    for name, array in ARRAYS.items():
        assert opened.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(opened.tensors[name].read(), array)
    ours = tmp_path / "ours.safetensors"
    done = []
    write_safetensors(ours, opened.tensors, progress=done.append)
    assert sum(done) == sum(array.size for array in ARRAYS.values())
    assert open_tensors(ours).metadata == {"format": "pt"}  # which transformers requires
    for name, array in safetensors.numpy.load_file(ours).items():
        np.testing.assert_array_equal(array, ARRAYS[name], strict=True)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_tensor_without_entries_is_no_longer_than_others(tmp_path):
    """Markers are empty; a size of 10⁹ that no bytes prove would be computed with."""
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"marker": np.zeros(0), "x": np.zeros((10**9, 0))}, path)
    with pytest.raises(ValueError, match=r"x\.safetensors: 'x' has shape \(1000000000, 0\), with"):
        open_tensors(path)
    safetensors.numpy.save_file({"marker": np.zeros(0)}, path)
    assert open_tensors(path).tensors["marker"].size == 0


def test_bfloat16_survives(tmp_path):
    array = np.arange(6).astype(ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "x.safetensors", {"x": in_memory(array)})
    read = open_tensors(tmp_path / "x.safetensors").tensors["x"]
    np.testing.assert_array_equal(read.read(), array, strict=True)
    assert read.astype(np.float32).read().dtype == np.float32
    count = in_memory(np.arange(3))
    assert count.astype(np.float16) is count  # integers are not numbers to round


@pytest.mark.parametrize(
    ("source", "target", "number"),
    [
        ("float32", "float16", 2**17),
        (ml_dtypes.bfloat16, "float16", 2**17),
        (ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, 2**17),
        ("float32", ml_dtypes.float8_e4m3fn, 2**10),  # which has no infinity
    ],
)
def test_a_number_beyond_the_range_of_another_dtype_is_refused(source, target, number):
    fits = in_memory(np.array([number / 4, -0.5, np.inf], source)).astype(target).read()
    assert fits[:2].tolist() == [number / 4, -0.5] and not np.isfinite(fits[2])
    wide = in_memory(np.array([2, -number, np.inf], source)).astype(target, "part/x")
    with pytest.raises(ValueError, match=f"^part/x has {number:.6g}, which is beyond the range"):
        wide.read()


def test_tensors_are_read_when_asked_for_and_not_before(tmp_path):
    def explode():
        raise AssertionError("read")

    lazy = Tensor((2,), np.dtype("<f4"), explode).astype(np.float16)
    assert lazy.shape == (2,) and lazy.dtype == np.float16
    with pytest.raises(AssertionError):
        write_safetensors(tmp_path / "x.safetensors", {"x": lazy})
    assert list(tmp_path.iterdir()) == []  # nothing half-written stays


def test_in_whatever_order_tensors_come_the_file_is_the_same(tmp_path):
    tensors = {name: in_memory(array) for name, array in ARRAYS.items()}
    for name in ("sorted", "reversed"):
        write_safetensors(tmp_path / name, tensors)
        tensors = dict(reversed(tensors.items()))
    assert (tmp_path / "sorted").read_bytes() == (tmp_path / "reversed").read_bytes()


@pytest.mark.parametrize(
    ("header", "data", "length", "reason"),
    [
        ({"x": spec()}, b"\0" * 4, None, "truncated or padded"),
        ({"x": spec()}, b"\0" * 12, None, "truncated or padded"),
        ({"x": spec(offsets=(0, 12))}, b"\0" * 12, None, "but 12 bytes"),
        ({"x": spec("F4")}, b"\0" * 8, None, "unknown dtype 'F4'"),
        ({"x": spec(), "y": spec(offsets=(4, 12))}, b"\0" * 12, None, "'y' starts at byte 4"),
        ({"x": spec(shape=(-2, -1))}, b"\0" * 8, None, "shape"),
        ({"x": {"dtype": "F32"}}, b"", None, "damaged header"),
        (b"{not json", b"", None, "damaged header"),
        (b"{", b"", 1 << 40, "header claims"),
        (b'{"x":' + b"[" * 100_000, b"", None, "damaged header"),
    ],
)
def test_damaged_safetensors_are_refused(tmp_path, header, data, length, reason):
    path = raw_safetensors(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(ValueError, match=reason) as error:
        open_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_shards_are_joined_by_their_index(tmp_path):
    for name in ("a", "c"):
        write_safetensors(tmp_path / f"{name}.safetensors", {name: in_memory(ARRAYS[name])})
    index = tmp_path / "model.safetensors.index.json"
    shards = {name: f"{name}.safetensors" for name in ("a", "c")}
    index.write_text(json.dumps({"weight_map": shards}))
    np.testing.assert_array_equal(open_tensors(index).tensors["a"].read(), ARRAYS["a"])
    index.write_text(json.dumps({"weight_map": {**shards, "b": "a.safetensors"}}))
    with pytest.raises(ValueError, match="'b' is not in its shard"):
        open_tensors(index)
    both = {name: in_memory(ARRAYS[name]) for name in ("a", "c")}
    write_safetensors(tmp_path / "both.safetensors", both)
    index.write_text(json.dumps({"weight_map": {"a": "both.safetensors"}}))
    with pytest.raises(ValueError, match="its weight_map lacks 'c' of the shard 'both"):
        open_tensors(index)
    index.write_text(json.dumps({"weight_map": {"a": "both.safetensors", "c": "c.safetensors"}}))
    np.testing.assert_array_equal(open_tensors(index).tensors["c"].read(), ARRAYS["c"])
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="outside the folder"):
        open_tensors(index)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object, but list"):
        open_tensors(index)


def test_the_best_file_of_a_folder_is_found(tmp_path):
    stems = ("model", "pytorch_model")
    assert find_weights(tmp_path, stems) is None
    for worse_to_better in (
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "model.safetensors",
    ):
        (tmp_path / worse_to_better).touch()
        assert find_weights(tmp_path, stems).name == worse_to_better
    assert find_weights(tmp_path, stems, "fp16").name == "model.fp16.safetensors"
    assert find_weights(tmp_path, stems, "non_ema") is None
    # Shards of a variant, as diffusers and as transformers name them.
    for index in ("model.safetensors.fp16.index.json", "model.safetensors.index.fp16.json"):
        (tmp_path / index).mkdir()
        (tmp_path / index / index).touch()
        assert find_weights(tmp_path / index, stems, "fp16").name == index


# --------------------------------------------------------------------------- torch's zip files


class Global:
    """Pickles as the mere mention of a global, without importing it."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as a call of a global."""

    def __init__(self, module, name, *args):
        self.callee, self.args = Global(module, name), args


class Stored:
    """Pickles as torch's reference to a storage."""

    def __init__(self, kind, key, numel):
        self.pid = ("storage", Global("torch", kind), key, "cpu", numel)


class HandPickler(pickle._Pickler):
    """Writes what torch would write, and what an attacker would."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Stored) else None

    def save_global_by_name(self, obj, name=None):
        self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj):
        self.save(obj.callee)
        self.save(obj.args)
        self.write(b"R")

    dispatch[Global] = save_global_by_name
    dispatch[Call] = save_call


def tensor(kind, key, numel, shape, stride, offset=0):
    return Call(
        "torch._utils", "_rebuild_tensor_v2", Stored(kind, key, numel), offset, shape, stride,
        False, OrderedDict(),
    )  # fmt: skip


def torch_zip(path, tree, storages=(), compression=zipfile.ZIP_STORED, extra=()):
    buffer = io.BytesIO()
    HandPickler(buffer, 2).dump(tree)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        for key, array in dict(storages).items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
        for name, data in extra:
            archive.writestr(name, data)
    return path


FLAT = np.arange(12, dtype=np.float32)


def test_torch_zip_files_are_read_without_torch(tmp_path):
    half = np.arange(3, dtype=np.float16)
    path = torch_zip(
        tmp_path / "model.ckpt",
        {
            "state_dict": OrderedDict(
                x=tensor("FloatStorage", "0", 12, (3, 4), (4, 1)),
                transposed=tensor("FloatStorage", "0", 12, (4, 2), (1, 4), 4),
                half=Call("torch._utils", "_rebuild_parameter",
                          tensor("HalfStorage", "1", 3, (3,), (1,)), True, OrderedDict()),
                scalar=tensor("FloatStorage", "0", 12, (), (), 5),
                none=tensor("FloatStorage", "0", 12, (0, 2), (2, 1)),
            ),
            "global_step": 470000,
            "callbacks": {
                Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): {
                    "best": Call("numpy.core.multiarray", "scalar", np.dtype("<f8"),
                                 Call("_codecs", "encode", "\x00" * 6 + "\xf0?", "latin1")),
                    "size": Call("torch", "Size", [3]),
                }
            },
        },
        {"0": FLAT, "1": half},
    )  # fmt: skip
    opened = open_tensors(path)
    assert opened.metadata == {"global_step": 470000}
    read = {name: tensor.read() for name, tensor in opened.tensors.items()}
    np.testing.assert_array_equal(read["x"], FLAT.reshape(3, 4), strict=True)
    np.testing.assert_array_equal(read["transposed"], FLAT.reshape(3, 4)[1:].T, strict=True)
    np.testing.assert_array_equal(read["half"], half, strict=True)
    assert read["scalar"] == 5 and read["none"].shape == (0, 2)


def typed(dtype, numel, shape, stride, offset=0, *flags):
    """As torch saves dtypes for which it has no class of storages; numel counts bytes."""
    stored = Stored("UntypedStorage", "0", numel)
    stored.pid = ("storage", Global("torch.storage", "UntypedStorage"), *stored.pid[2:])
    more = (False, OrderedDict(), Global("torch", dtype), *flags)
    return Call("torch._utils", "_rebuild_tensor_v3", stored, offset, shape, stride, *more)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn"),
        (ml_dtypes.float8_e5m2, "float8_e5m2"),
        *((f"<u{width}", f"uint{8 * width}") for width in (2, 4, 8)),
    ],
)
def test_dtypes_without_a_class_of_storages_are_read(dtype, name, tmp_path):
    flat = np.arange(12).astype(dtype)
    tree = {"x": typed(name, flat.nbytes, (4, 2), (1, 4), 4)}
    read = open_tensors(torch_zip(tmp_path / "x.pt", tree, {"0": flat})).tensors["x"].read()
    np.testing.assert_array_equal(read, flat.reshape(3, 4)[1:].T, strict=True)


def test_a_bare_state_dict_is_read_too(tmp_path):
    path = torch_zip(
        tmp_path / "m.bin", {"x": tensor("FloatStorage", "0", 12, (12,), (1,))}, {"0": FLAT}
    )
    np.testing.assert_array_equal(open_tensors(path).tensors["x"].read(), FLAT)


def test_what_a_long_pickle_refers_to_is_found(tmp_path):
    """Beyond 256 objects, references to earlier ones have four bytes."""
    tensors = {f"x{i}": tensor("FloatStorage", "0", 12, (12 - i % 9,), (1,)) for i in range(99)}
    text = "a note"
    tree = {"state_dict": tensors, "first": text, "second": text}
    opened = open_tensors(torch_zip(tmp_path / "m.ckpt", tree, {"0": FLAT}))
    assert opened.metadata == {"first": text, "second": text}
    for i in range(99):
        np.testing.assert_array_equal(opened.tensors[f"x{i}"].read(), FLAT[: 12 - i % 9])


def test_dictionaries_of_an_ip_adapter_are_joined(tmp_path):
    x = tensor("FloatStorage", "0", 12, (12,), (1,))
    tree = {"image_proj": {"proj.weight": x}, "ip_adapter": {"1.to_k_ip.weight": x}}
    opened = open_tensors(torch_zip(tmp_path / "ip.bin", tree, {"0": FLAT}))
    assert opened.tensors.keys() == {"image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"}


X = tensor("FloatStorage", "0", 12, (12,), (1,))


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"x": X, "evil": Call("os", "system", "true")}, r"refused to load 'os\.system'"),
        ({"evil": Call("builtins", "eval", "1")}, r"refused to load 'builtins\.eval'"),
        ({"evil": Global("posix", "system")}, r"refused to load 'posix\.system'"),
        ({"evil": Call("torch", "load", "x")}, r"refused to load 'torch\.load'"),
        ({"evil": Call("numpy", "load", "x")}, r"refused to load 'numpy\.load'"),
        (Call("torch.nn.modules.linear", "Linear"), r"refused to load 'torch\.nn\.modules"),
        ({"x": Call("torch", "FloatStorage", 10**9)}, "not callable"),
        ({"x": tensor("FloatStorage", "0", 13, (12,), (1,))}, "claims 13 elements"),
        ({"x": tensor("FloatStorage", "9", 12, (12,), (1,))}, "storage '9' is missing"),
        ({"x": tensor("FloatStorage", "0", 12, (12,), (1,), 1)}, "exceeds its storage"),
        ({"x": tensor("FloatStorage", "0", 12, (10**9,), (0,))}, "exceeds its storage"),
        ({"x": tensor("FloatStorage", "0", 12, (12,), (-1,), 11)}, "strides"),
        ({"x": tensor("ComplexFloatStorage", "0", 12, (12,), (1,))}, "ComplexFloatStorage"),
        ({"x": tensor("float32", "0", 12, (12,), (1,))}, "storage of unknown type"),
        ({"x": Call("torch._utils", "_rebuild_tensor_v2", 1, 0, (1,), (1,))}, "no storage"),
        *(({"x": Call("torch._utils", "_rebuild_tensor_v2", *X.args, {flag: True})},
           f"a tensor with torch's {flag} flag; save what") for flag in ("neg", "conj")),
        ({"x": typed("uint16", 48, (24,), (1,), 0, {"neg": True})}, "neg flag; save what its res"),
        ({"x": typed("uint16", 48, (24,), (1,), 1)}, "exceeds its storage"),
        ({"x": typed("uint16", 12, (6,), (1,))}, "claims 12 elements"),
        ({"x": typed("float4", 48, (24,), (1,))}, r"refused to load 'torch\.float4'"),
        ({"x": typed("FloatStorage", 48, (12,), (1,))}, "a tensor of Name.*FloatStorage"),
        ({"step": 3}, "holds no tensors"),
        ([1, 2], "expected a dictionary"),
    ],
)  # fmt: skip
def test_hostile_or_damaged_pickles_are_refused(tmp_path, tree, reason):
    path = torch_zip(tmp_path / "bad.ckpt", tree, {"0": FLAT})
    with pytest.raises(ValueError, match=reason) as error:
        open_tensors(path)
    assert str(path) in str(error.value)


def raw_pickle(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return path


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"\x80\x02]r\xff\xff\xff\x7f.", "expected a dictionary"),  # at place 2³¹ of the memo
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x3f.", "damaged pickle"),  # 2⁶² bytes
        (b"\x80\x02}q\x00", "damaged pickle"),  # no end
        (b"\x80\x02\xff.", "damaged pickle"),
        (b"\x80\x02\x82\x01.", "refused the instruction EXT1"),
        (b"(i__main__\nx\n.", "refused the instruction INST"),
    ],
)
def test_programs_that_no_writer_of_tensors_makes_are_refused(tmp_path, pickled, reason):
    with pytest.raises(ValueError, match=reason):
        open_tensors(raw_pickle(tmp_path / "bad.ckpt", pickled))


def test_a_message_about_a_bomb_is_short(tmp_path):
    """Forty lists, each twice in the next: a small file whose full text has 2⁴⁰ words."""
    nested = b"".join(b"]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(1, 40))
    program = b"\x80\x02]q\x00" + nested + b"Q."
    with pytest.raises(ValueError, match="refused to load external data") as error:
        open_tensors(raw_pickle(tmp_path / "bad.ckpt", program))
    assert len(str(error.value)) < 2000


def test_two_entries_of_one_name_are_refused(tmp_path):
    """Else one program checks the one, and another reads the other."""
    path = torch_zip(tmp_path / "bad.ckpt", {"x": X}, {"0": FLAT, "1": FLAT})
    path.write_bytes(path.read_bytes().replace(b"archive/data/1", b"archive/data/0"))
    with pytest.raises(ValueError, match="same name"):
        open_tensors(path)


def test_encrypted_entries_are_refused(tmp_path):
    path = torch_zip(tmp_path / "bad.ckpt", {"x": X}, {"0": FLAT})
    data = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + at] |= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="encrypted"):
        open_tensors(path)


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_whatever_byte_is_wrong_the_file_is_read_or_refused_in_one_way(tmp_path, kind):
    """Two thousand damaged copies: nothing but tensors, or a ValueError that names the file."""
    good = tmp_path / "good"
    if kind == "zip":
        torch_zip(good, {"x": X, "n": 3}, {"0": FLAT})
    else:
        write_safetensors(good, {"x": in_memory(FLAT), "y": in_memory(FLAT)})
    data, bad, rng = good.read_bytes(), tmp_path / "bad", np.random.default_rng(0)
    refused = 0
    for i in range(1000):
        copy = bytearray(data)
        copy[rng.integers(len(copy))] = rng.integers(256)
        bad.write_bytes(copy if i % 2 else copy[: rng.integers(len(copy))])
        try:
            for tensor in open_tensors(bad).tensors.values():
                assert tensor.read().size == tensor.size
        except ValueError as error:
            assert str(bad) in str(error)
            refused += 1
    assert refused > 500  # every truncated one


def test_a_pickle_cannot_alter_what_it_may_call(tmp_path):
    """BUILD on a function would set its attributes, e.g. its defaults, for everybody."""
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x0c__defaults__)s\x86b."
    path = tmp_path / "bad.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(ValueError, match="attribute"):
        open_tensors(path)


def test_zip_bombs_truncated_and_foreign_files_are_refused(tmp_path):
    good = torch_zip(tmp_path / "good.ckpt", {"x": X}, {"0": FLAT})
    bomb = torch_zip(tmp_path / "bomb.ckpt", {"x": X}, {"0": FLAT}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        open_tensors(bomb)
    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or truncated"):
        open_tensors(tmp_path / "cut.ckpt")
    big_endian = torch_zip(
        tmp_path / "big.ckpt", {"x": X}, {"0": FLAT}, extra=[("archive/byteorder", b"big")]
    )
    with pytest.raises(ValueError, match="big-endian"):
        open_tensors(big_endian)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(ValueError, match=r"without data\.pkl"):
        open_tensors(tmp_path / "other.zip")
    (tmp_path / "legacy.bin").write_bytes(pickle.dumps(1) * 3)
    with pytest.raises(ValueError, match=r"before 1\.6"):
        open_tensors(tmp_path / "legacy.bin")
    (tmp_path / "noise.bin").write_bytes(b"hello world, this is not a model")
    with pytest.raises(ValueError, match="neither"):
        open_tensors(tmp_path / "noise.bin")
    with pytest.raises(ValueError, match="no such file"):
        open_tensors(tmp_path / "nothing.ckpt")


def test_entries_that_overlap_are_refused(tmp_path):
    """Two directory entries over the same bytes multiply a small file."""
    path = torch_zip(tmp_path / "bad.ckpt", {"x": X}, {"0": FLAT, "1": FLAT})
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"archive/data/{key}").header_offset for key in "01")
    data = path.read_bytes()
    at = data.rindex(struct.pack("<I", second))  # in the directory, at the end of the file
    path.write_bytes(data[:at] + struct.pack("<I", first) + data[at + 4 :])
    with pytest.raises(ValueError, match="overlaps"):
        open_tensors(path)
