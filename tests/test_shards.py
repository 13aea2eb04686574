"""Latents in shards: the right ones, whole, and no other training than on the pictures."""

import contextlib
import functools
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from several import make_config
from tiny import SIZE
from tiny import make_config as make_tiny

from latent_diffusion import data
from latent_diffusion.data import shards
from latent_diffusion.data.folders import Folder
from latent_diffusion.evaluate.generate import of_data
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder
from latent_diffusion.runtime import processes
from latent_diffusion.training import encoding, frozen, loop, start

COUNT = 37  # pictures, no multiple of a shard or a batch


def pixels(**fields):
    """A run of `several` on the pixels themselves, whose first stage has no parameters."""
    always = {"data.flip": True, "num_steps": 4, "log.every_steps": 1, "first_stage.cache": False}
    return make_config(**always, **fields)


def on_shards(config, out):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({"data.name": "latents", "data.dir": str(out)})
    return config


def source_of(folder):
    return shards.ShardSource(Folder(folder))


def logged(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    own = ("images_per_second", "peak_memory_gib")
    return [{k: v for k, v in row.items() if k not in own} for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pixels of 480 + 120 pictures of 8×8, and their mirror images."""
    out = tmp_path_factory.mktemp("latents")
    encoding.encode(pixels(), out, shard_size=100)
    return out


def test_training_on_shards_is_training_on_the_pictures(folder, tmp_path):
    """The same draws: of pictures, mirror images, noise; and evaluation sees the same pictures."""
    loop.train(pixels(), tmp_path / "pictures")
    loop.train(on_shards(pixels(), folder), tmp_path / "shards")
    for got, want in zip(logged(tmp_path / "shards"), logged(tmp_path / "pictures"), strict=True):
        assert got.keys() == want.keys()
        for name in got:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)


def batches_of(config, begin, count, index=0, processes=1):
    iterator = data.iterate(
        data.make_source(config.data, "train"),
        data.make_transform(config.data, train=True),
        **{"batch_size": 16, "seed": 0, "start_step": begin},
        **{"process_index": index, "process_count": processes},
    )
    return [next(iterator) for _ in range(count)]


def test_an_epoch_is_complete_and_goes_on_anywhere_bitwise_on_any_number_of_processes(folder):
    config = on_shards(pixels(), folder)
    whole = batches_of(config, 0, 30)
    source = data.make_source(config.data, "train")
    either = lambda m: min(m.tobytes(), m[:, ::-1].tobytes())  # noqa: E731  # also mirrored
    first = [either(source[i]["crops"][0]["mirrors"][0]["moments"]) for i in range(480)]
    assert sorted(first) == sorted(either(row) for batch in whole for row in batch["moments"])
    for count in (1, 2, 4):
        parts = [batches_of(config, 17, 9, p, count) for p in range(count)]
        for step, want in enumerate(whole[17:26]):
            for key in want:
                joined = np.concatenate([part[step][key] for part in parts])
                np.testing.assert_array_equal(joined, want[key])


def tiny(**fields):
    """A run with a real first stage of 4×4 latents."""
    config = make_tiny("denoising", **{"data.crop": "center", **fields})
    config.data.sizes = True
    return config


@pytest.fixture
def made(monkeypatch):
    """The first stage that every config has, and a source of wide pictures."""
    module = make_autoencoder(tiny().autoencoder.to_dict())
    init = jax.jit(lambda rng: module.init(rng, jnp.zeros((1, SIZE, SIZE, 3)))["params"])
    first_stage = FirstStage(
        init(jax.random.key(0, impl="unsafe_rbg")), jnp.ones(()), jnp.zeros(()), module
    )
    images = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, 3 * SIZE, 3), np.uint8)
    captions = [["one", f"number {i}"] for i in range(COUNT)]
    maps = {"segmentation": images[..., 0] // 32, "depth": images[..., 1].astype(np.float32)}
    source = data.ArraySource(
        {"image": images, "caption": captions, **maps, "other": np.arange(COUNT)}
    )
    monkeypatch.setattr(data, "make_source", lambda config, split: source)
    monkeypatch.setattr(start, "with_files", lambda config: config)
    monkeypatch.setattr(frozen, "read_first_stage", lambda *_: (first_stage, True))
    return first_stage, source


def test_every_window_and_its_mirror_image_is_encoded(made, tmp_path):
    first_stage, source = made
    config = tiny(**{"data.crop": "random", "data.flip": True})
    encoding.encode(config, tmp_path, crops=3, shard_size=16, splits=["train"])
    read = source_of(tmp_path / "train")
    assert len(read) == COUNT and [shard.examples for shard in read.shards] == [16, 16, 5]
    of_picture = jax.jit(first_stage.moments)
    windows = set()
    for i in (0, 16, COUNT - 1):
        example = read[i]
        assert example.keys() == {"caption", "original_size", "crops"}
        assert example["caption"] == ["one", f"number {i}"]
        np.testing.assert_array_equal(example["original_size"], (SIZE, 3 * SIZE))
        for crop in example["crops"]:
            left, top, right, bottom = crop["window"]
            windows.add(left)
            columns = slice(round(left * 3 * SIZE), round(right * 3 * SIZE))
            cut = source[i]["image"][:, columns] / np.float32(127.5) - 1
            assert (top, bottom, cut.shape) == (0, 1, (SIZE, SIZE, 3))
            np.testing.assert_array_equal(
                crop["segmentation"], source[i]["segmentation"][:, columns]
            )
            np.testing.assert_allclose(crop["depth"][..., 0], source[i]["depth"][:, columns])
            want = of_picture(np.stack([cut, cut[:, ::-1]]))
            got = [mirror["moments"] for mirror in crop["mirrors"]]
            np.testing.assert_allclose(got, want, atol=1e-5)
    assert len(windows) > 3

    transform = data.make_transform(config.data, train=True)
    example = read[5]
    kinds = [m["moments"].tobytes() for crop in example["crops"] for m in crop["mirrors"]]
    corners = set()
    for seed in range(40):
        out = transform(example, np.random.default_rng(seed))
        place = kinds.index(out["moments"].tobytes())
        left, _, right, _ = example["crops"][place // 2]["window"]
        corner = round((1 - right if place % 2 else left) * 3 * SIZE)
        np.testing.assert_array_equal(out["crop_top_left"], (0, corner))
        corners.add((place, corner))
    assert len(corners) == 6  # every window, and its mirror image


def test_bfloat16_halves_the_shards_and_rounds_the_moments(made, tmp_path):
    for dtype in ("float32", "bfloat16"):
        encoding.encode(tiny(), tmp_path / dtype, dtype, splits=["train"])
    full, half = (source_of(tmp_path / d / "train") for d in ("float32", "bfloat16"))
    moments = [source[3]["crops"][0]["mirrors"][0]["moments"] for source in (full, half)]
    assert moments[1].nbytes * 2 == moments[0].nbytes
    np.testing.assert_allclose(moments[1].astype(np.float32), moments[0], rtol=2**-8)
    batch = data.make_transform(tiny().data, train=True)(half[3])
    assert batch["moments"].dtype == np.float32


def test_codes_take_the_place_of_moments_for_a_prior(made, tmp_path, monkeypatch):
    config = make_tiny("prior", **{"data.crop": "center", "data.flip": True})
    module = make_autoencoder(config.autoencoder.to_dict())
    init = jax.jit(lambda rng: module.init(rng, jnp.zeros((1, SIZE, SIZE, 3)))["params"])
    params = init(jax.random.key(1, impl="unsafe_rbg"))
    first_stage = FirstStage(params, jnp.ones(()), jnp.zeros(()), module)
    monkeypatch.setattr(frozen, "read_first_stage", lambda *_: (first_stage, True))
    encoding.encode(config, tmp_path, splits=["train"])
    read, image = source_of(tmp_path / "train"), made[1][4]["image"][:, SIZE : 2 * SIZE]
    assert read.made["kind"] == "codes"
    pixels = np.stack([image, image[:, ::-1]]) / np.float32(127.5) - 1
    want = jax.jit(first_stage.indices)({"image": pixels})
    got = [mirror["codes"] for mirror in read[4]["crops"][0]["mirrors"]]
    np.testing.assert_array_equal(got, want)


def test_what_is_written_stays_and_is_not_made_again(made, tmp_path, monkeypatch):
    config, folder = tiny(), tmp_path / "train"
    write, written = shards.write_shard, []

    def until_full(folder, name, examples):
        if len(written) == 2:
            raise OSError(f"{name}: No space left on device")
        written.append(tmp_path / "train" / name)
        write(folder, name, examples)

    monkeypatch.setattr(shards, "write_shard", until_full)
    with pytest.raises(
        OSError, match=r"No space left on device; 2 of 4 shards of .* are whole: make"
    ):
        encoding.encode(config, tmp_path, shard_size=10, splits=["train"])
    with pytest.raises(ValueError, match="isn't complete: 2 of 4 shards are there; the command"):
        source_of(folder)
    before = [path.stat().st_mtime_ns for path in written]
    monkeypatch.setattr(shards, "write_shard", write)
    encoding.encode(config, tmp_path, shard_size=10, splits=["train"])
    assert [path.stat().st_mtime_ns for path in written] == before
    whole = source_of(folder)
    assert [whole[i]["caption"][1] for i in range(COUNT)] == [f"number {i}" for i in range(COUNT)]

    with pytest.raises(ValueError, match=r"was begun with crops=1, not 2: choose another --out"):
        encoding.encode(tiny(**{"data.crop": "random"}), tmp_path, crops=2, splits=["train"])
    cut_short = folder / shards.shard_name(1)
    cut_short.write_bytes(cut_short.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"1 of 4 shards are missing or cut short: 00001\S+ has"):
        source_of(folder)
    encoding.encode(config, tmp_path, shard_size=10, splits=["train"])
    assert source_of(folder)[12]["caption"] == whole[12]["caption"]


def test_a_full_device_is_an_os_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Folder, "whole", lambda *_: contextlib.nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match=r"x: .*No space left on device"):
        shards.write_shard(Folder(tmp_path), "x", [{"crops": [], "a": np.zeros(10**7)}])


def test_shards_lie_on_any_file_system_that_fsspec_knows(made, tmp_path, monkeypatch):
    """A shard that isn't sent whole never has its name; a shard is copied here once, when read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    out, system = f"memory://{tmp_path.name}", fsspec.filesystem("memory")
    put, get = type(system).put_file, type(system).get_file

    def cut_short(self, local, remote):
        put(self, local, remote)
        if "00001" in remote:
            self.pipe_file(remote, self.cat_file(remote)[:-10])

    monkeypatch.setattr(type(system), "put_file", cut_short)
    said = r"/train/00001.array_record: .* bytes were sent; 1 of 4 shards of memory://.*/train are"
    with pytest.raises(OSError, match=said):
        encoding.encode(tiny(), out, shard_size=10, splits=["train"])
    monkeypatch.setattr(type(system), "put_file", put)
    assert not system.exists(f"{out}/train/00001.array_record")
    first = system.modified(f"{out}/train/00000.array_record")
    encoding.encode(tiny(), out, shard_size=10, splits=["train"])
    assert system.modified(f"{out}/train/00000.array_record") == first
    encoding.encode(tiny(), tmp_path / "here", shard_size=10, splits=["train"])

    copied = []
    monkeypatch.setattr(
        type(system), "get_file", lambda self, path, *a: copied.append(path) or get(self, path, *a)
    )
    here = source_of(tmp_path / "here" / "train")
    for _ in range(2):
        there = shards.make(SimpleNamespace(dir=out), "train")
        for i in (0, 36, 12, 3):
            assert there[i]["caption"] == here[i]["caption"] == ["one", f"number {i}"]
    names = [Path(path).name for path in copied]
    assert names == [shards.INDEX, *map(shards.shard_name, (0, 3, 1)), shards.INDEX]
    system.rm(f"{out}/train", recursive=True)  # others take its place
    encoding.encode(tiny(), out, "bfloat16", shard_size=10, splits=["train"])
    other = shards.make(SimpleNamespace(dir=out), "train")[3]["crops"][0]["mirrors"][0]
    assert other["moments"].dtype == jnp.bfloat16
    system.rm(f"{out}/train/00002.array_record")
    with pytest.raises(ValueError, match="1 of 4 shards are missing or cut short: 00002"):
        shards.make(SimpleNamespace(dir=out), "train")


def test_a_file_system_that_remembers_its_files_is_asked_anew(tmp_path, monkeypatch):
    """As those of object stores do."""
    folder = Folder(f"memory://{tmp_path.name}")
    remembered = functools.lru_cache(folder._system.ls)
    monkeypatch.setattr(folder._system, "ls", remembered)
    monkeypatch.setattr(
        folder._system, "invalidate_cache", lambda path=None: remembered.cache_clear()
    )
    folder._system.makedirs(folder._root)
    assert folder.sizes() == {}
    folder._system.pipe_file(f"{folder._root}/a", b"123")
    assert folder.sizes() == {"a": 3}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gs://a/b", "gs://a/b: Please install gcsfs"),
        ("xyz://a", "xyz://a: Protocol not known"),
    ],
)
def test_a_file_system_without_its_package_is_named(made, tmp_path, name, message):
    if name.startswith("gs") and importlib.util.find_spec("gcsfs"):
        pytest.skip("it is installed")
    with pytest.raises(ValueError, match=message):
        encoding.encode(tiny(), name, splits=["train"])
    for source in ("tars", "latents"):
        with pytest.raises(ValueError, match=message):
            data.DATASETS[source](SimpleNamespace(dir=name), "train")


def test_a_shard_of_a_bucket_has_pictures_of_its_size(made, tmp_path):
    first_stage, source = made
    images = [
        image[:, : (2 * SIZE if i % 3 else SIZE)] for i, image in enumerate(source.arrays["image"])
    ]
    source.arrays["image"] = images
    config = tiny(**{"data.bucket_step": 8})
    encoding.encode(config, tmp_path, shard_size=10, splits=["train"])
    read = source_of(tmp_path / "train")
    assert [shard[1::2] for shard in read.shards] == [
        *((10, (8, 16)), (10, (8, 16)), (4, (8, 16))),
        *((10, (16, 16)), (3, (16, 16))),
    ]
    numbers = [int(read[i]["caption"][1].split()[1]) for i in range(COUNT)]
    assert numbers == [*(i for i in range(COUNT) if i % 3), *range(0, COUNT, 3)]
    transform = data.make_transform(config.data, train=True)
    plain = data.Bucketed(source, config.data, 4, seed=0)
    latent = data.Bucketed(read, config.data, 4, seed=0)
    assert plain.batches_per_epoch == latent.batches_per_epoch == 9
    for bucketed in (plain, latent):
        out = transform(bucketed[0])
        assert tuple(out["target_size"]) == bucketed[0]["size"]
    assert {tuple(shape) for shape in read.shapes()} == {(8, 16), (16, 16)}
    wide = transform(read[0])
    image = transform({**source[1], "size": (8, 16)})
    want = jax.jit(first_stage.moments)(image["image"][None])[0]
    np.testing.assert_allclose(wide["moments"], want, atol=1e-5)
    for key in ("crop_top_left", "target_size", "original_size"):
        np.testing.assert_array_equal(wide[key], image[key])


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_shards(made, tmp_path, monkeypatch, count):
    """Each does its own; the last one that comes is process 0, which writes the index."""
    for process in reversed(range(count)):
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(
            processes, "barrier", lambda name: (tmp_path / "train").mkdir(exist_ok=True)
        )
        encoding.encode(tiny(), tmp_path, shard_size=8, splits=["train"])
        there = {int(path.name[:5]) for path in (tmp_path / "train").glob("*.array_record")}
        assert there == {n for n in range(5) if n % count >= process}
    read = source_of(tmp_path / "train")
    assert [read[i]["caption"][1] for i in range(COUNT)] == [f"number {i}" for i in range(COUNT)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.image_size": 16}, "data.image_size=16, but .* was made with 8"),
        ({"data.crop": "random"}, "data.crop='random', but"),
        ({"data.sizes": True}, "data.sizes=True was not asked for when"),
        ({"data.embedding": "alexnet"}, "data.embedding='alexnet', but .* was made with ''"),
        ({"data.low_res": "bicubic"}, "a condition made of pictures was not asked for"),
        ({"task": "autoencoding"}, "data.name='latents' has no pictures, which autoencoding"),
        ({"first_stage.cache": True}, "is cached: set first_stage.cache=False"),
        ({"data.dir": ""}, "needs data.dir, which python -m latent_diffusion.encode wrote"),
    ],
)
def test_a_run_that_asks_for_other_latents_is_refused(folder, tmp_path, fields, message):
    config = on_shards(pixels(), folder)
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=message):
        loop.train(config, tmp_path)


def test_shards_within_buckets_are_of_the_runs_first_stage_too(folder, tmp_path):
    bucketed = SimpleNamespace(source=source_of(folder / "train"))
    other = SimpleNamespace(first_stage=FirstStage({"x": np.ones(1)}, 1.0, 0.0, None))
    config = on_shards(pixels(), folder)
    with pytest.raises(ValueError, match="has latents of another first stage than that of this"):
        start._encoded_once(config, tmp_path, bucketed, None, None, other, None)


def test_an_index_that_does_not_match_is_refused(folder, tmp_path):
    index = json.loads((folder / "train" / "index.json").read_text())
    for change, message in (
        ({"first_stage": "x"}, "has latents of another first stage than that of this run"),
        ({"kind": "codes"}, "has codes, but task='denoising' needs moments"),
        ({"mirrors": False}, "data.flip=True was not asked for"),
        ({"examples": 481}, "its shards have 480 examples together, but it counts 481"),
    ):
        out = tmp_path / next(iter(change))
        shutil.copytree(folder, out)
        (out / "train" / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=message):
            loop.train(on_shards(pixels(), out), tmp_path / "run")
    shutil.copytree(folder, tmp_path / "damaged")
    others = json.loads(json.dumps(index["shards"]))
    others[0][1], others[1][1] = 99, 101  # as many together
    (tmp_path / "damaged/train/index.json").write_text(json.dumps({**index, "shards": others}))
    with pytest.raises(ValueError, match=r"00000\S+ 100 examples; index.json says 99"):
        source_of(tmp_path / "damaged" / "train")[0]
    (tmp_path / "damaged/train/index.json").write_text(json.dumps(index))
    shard = tmp_path / "damaged" / "train" / shards.shard_name(2)
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match=r"00002.array_record: "):
        source_of(tmp_path / "damaged" / "train")[200]


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"crops": 2}, "crops=2 needs data.crop='random', not 'center'"),
        ({}, {"shard_size": 0}, "shard_size=0 must be at least 1"),
        ({}, {"dtype": "float16"}, "unknown dtype 'float16'; known: bfloat16, float32"),
        ({"task": "autoencoding"}, {}, "encode takes the config of a run that will train on lat"),
        ({"data.name": "latents"}, {}, "encode takes the config of a run that will train on lat"),
    ],
)
def test_bad_input_of_encode_is_refused(tmp_path, fields, options, message):
    with pytest.raises(ValueError, match=message):
        encoding.encode(pixels(**fields), tmp_path, **options)


def test_pictures_of_evaluations_are_in_the_shards_of_their_split_alone(folder):
    on, of = on_shards(pixels(), folder), of_data(pixels(), "test")
    np.testing.assert_array_equal(of_data(on, "test").read(3, 9), of.read(3, 9))
    with pytest.raises(ValueError, match=r"latents@train: these shards hold latents without pict"):
        of_data(on, "train").read(0, 1)


def test_embeddings_of_shards_are_those_that_they_hold(folder):
    """`encode` has stored them; there are no pictures to embed again."""
    config = on_shards(pixels(**{"data.embedding": "alexnet"}), folder)
    assert len(data.make_source(config.data, "train")) == 480


def test_shards_with_other_captions_are_refused(tmp_path):
    pictures, out = tmp_path / "pictures", tmp_path / "latents"
    pictures.mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(pictures / f"{i:02}.png")
        (pictures / f"{i:02}.txt").write_text("red")
    config = pixels(**{"data.name": "image_folder", "data.dir": str(pictures)})
    config.data.train_split = "all"
    encoding.encode(config, out, splits=["train"])
    encoding.encode(config, out, splits=["train"])  # nothing to do
    (pictures / "07.txt").write_text("blue")
    with pytest.raises(ValueError, match=r"was begun with annotations=.*: choose another --out"):
        encoding.encode(config, out, splits=["train"])


def test_the_config_of_encode_is_that_of_the_training_whatever_its_splits_are_called(tmp_path):
    """Shards lie in folders of the roles: those of training, and those of evaluations."""
    pictures, out = tmp_path / "pictures", tmp_path / "latents"
    pictures.mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(pictures / f"{i:02}.png")
    config = pixels(**{"data.name": "image_folder", "data.dir": str(pictures)})
    config.data.update({"train_split": "all", "test_split": "train", "test_fraction": 0.3})
    encoding.encode(config, out)
    of = {role: data.make_source(config.data, role) for role in ("train", "test")}
    on = {role: data.make_source(on_shards(config, out).data, role) for role in ("train", "test")}
    assert len(on["train"]) == len(of["train"]) == 20 > len(on["test"]) == len(of["test"]) > 0
    shutil.rmtree(out / "test")
    with pytest.raises(ValueError, match=r"no split 'test' in .*; known: train \(python -m"):
        data.make_source(on_shards(config, out).data, "test")
