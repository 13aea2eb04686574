"""Batches: the contract, the pipeline, the transforms, and the sources that need no files."""

import concurrent.futures
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from configs import default
from latent_diffusion import data
from latent_diffusion.data import DATASETS, ArraySource, epoch, iterate, make_source, make_transform
from latent_diffusion.data.contract import KEYS, check_batch
from latent_diffusion.data.retrieval import Embedded
from latent_diffusion.data.sources import Readable, Remember
from latent_diffusion.data.synthetic import SHAPES
from latent_diffusion.data.tokenizers import WordTokenizer
from latent_diffusion.data.transforms import to_float, to_uint8
from latent_diffusion.data.windows import CROPS, cut_labels, fit, resize


def config(**changes):
    c = default.data()
    c.update({"name": "synthetic", "image_size": 8, "test_fraction": 0.25, **changes})
    return c


def numbered(length):
    return ArraySource({"class_label": np.arange(length, dtype=np.int32)})


def noisy(example, rng):
    """Keeps the label and shows the randomness an example meets."""
    return {**example, "moments": rng.standard_normal((1, 1, 1)).astype(np.float32)}


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


# --- pipeline ---


def test_batch_is_a_function_of_seed_and_step():
    source = numbered(20)
    batches = take(iterate(source, noisy, batch_size=6, seed=3), 8)
    assert_equal(batches, take(iterate(source, noisy, batch_size=6, seed=3), 8))
    assert_equal(batches[5:], take(iterate(source, noisy, batch_size=6, seed=3, start_step=5), 3))
    other = take(iterate(source, noisy, batch_size=6, seed=4), 8)
    assert any(
        (a["class_label"] != b["class_label"]).any() for a, b in zip(batches, other, strict=True)
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(processes):
    source, step = numbered(30), 2
    whole = take(iterate(source, noisy, batch_size=8, seed=0, start_step=step), 9)
    parts = [
        take(
            iterate(
                source,
                noisy,
                batch_size=8,
                seed=0,
                start_step=step,
                process_index=p,
                process_count=processes,
            ),
            9,
        )
        for p in range(processes)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in batch]) for key in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)


def compare_workers(folder):
    """Batches of two worker processes with those of threads, from any step."""
    fields = config(name="image_folder", dir=folder, train_split="all", bucket_step=4)
    fields.update({"flip": True, "low_res": "bsrgan_light", "low_res_factor": 2, "crop": "random"})
    fields.image_size = 16
    source = data.Bucketed(Remember(make_source(fields, "train")), fields, 2, seed=0)
    tokenizer = WordTokenizer.train(data.captions(source.source), 64, 4)
    made = make_transform(fields, train=True, tokenizer=tokenizer, as_bytes=True)

    def transform(example, rng):  # Ctrl-C is the main process's business
        if multiprocessing.parent_process() is not None:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return made(example, rng)

    def batches(start_step, count, **how):
        how |= {"batch_size": 2, "seed": 0, "shuffle": False, "repeat": False}
        return take(iterate(source, transform, start_step=start_step, **how), count)

    assert_equal(batches(2, 7, workers=2), batches(0, 9)[2:])
    how = {"batch_size": 2, "seed": 0, "shuffle": False, "repeat": False, "workers": 2}
    goes_on = iterate(source, transform, **how)
    begun = take(goes_on, 3)  # the first by this process, and one by each worker
    for worker in multiprocessing.active_children():
        worker.terminate()  # as schedulers do, whose SIGTERM is for all processes
    assert_equal([*begun, *take(goes_on, 6)], batches(0, 9))
    goes_on.close()
    deadline = time.monotonic() + 60
    while multiprocessing.active_children():
        assert time.monotonic() < deadline


def test_worker_processes_make_the_same_batches_from_any_step(tmp_path):
    """In a process where types aren't checked: the checks can't be sent to workers."""
    rng = np.random.default_rng(0)
    for i in range(24):
        shape = ((12, 8), (8, 12))[i % 2]
        Image.fromarray(rng.integers(0, 255, (*shape, 3), np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    code = f"import test_data; test_data.compare_workers({str(tmp_path)!r})"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, check=True)


def test_sources_go_to_worker_processes_without_what_they_have_open():
    balanced = data.Balanced(ArraySource({"class_label": np.array([0, 0, 1, 1])}), 0.5)
    assert pickle.loads(pickle.dumps(balanced))[2]["class_label"] == 1
    embedded = Embedded(balanced, {"image_embedding": np.arange(3.0)})
    assert pickle.loads(pickle.dumps(embedded))[2]["image_embedding"] == 2


def test_every_epoch_is_complete_and_shuffled_differently():
    batches = take(iterate(numbered(12), noisy, batch_size=4, seed=0), 9)
    labels = np.concatenate([b["class_label"] for b in batches]).reshape(3, 12)
    noise = np.concatenate([b["moments"] for b in batches])
    np.testing.assert_array_equal(np.sort(labels, axis=1), np.tile(np.arange(12), (3, 1)))
    assert (labels[0] != labels[1]).any() and (labels[1] != labels[2]).any()
    assert (labels[0] != np.arange(12)).any()
    assert len(np.unique(noise)) == 36  # fresh randomness each time an example returns


def test_without_shuffle_and_repeat_whole_batches_in_order():
    batches = list(iterate(numbered(11), noisy, batch_size=4, seed=0, shuffle=False, repeat=False))
    np.testing.assert_array_equal([b["class_label"] for b in batches], np.arange(8).reshape(2, 4))
    assert (
        list(iterate(numbered(11), noisy, batch_size=4, seed=0, repeat=False, start_step=9)) == []
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_epoch_pads_the_last_batch_with_weight_zero(processes):
    parts = [list(epoch(numbered(10), noisy, 4, p, processes)) for p in range(processes)]
    join = lambda key: np.concatenate([b[key] for step in zip(*parts, strict=True) for b in step])  # noqa: E731
    np.testing.assert_array_equal(join("class_label"), [*range(10), 9, 9])
    np.testing.assert_array_equal(join("weight"), [1] * 10 + [0, 0])
    assert join("weight").dtype == np.float32


@pytest.mark.parametrize(
    ("num_batches", "places"),
    [(0, []), (1, [0, 2, 5, 7]), (2, [0, 1, 2, 3, 5, 6, 7, 8]), (3, [*range(10), 9, 9])],
)
def test_a_part_of_an_epoch_is_evenly_spaced(num_batches, places):
    batches = epoch(numbered(10), noisy, 4, num_batches=num_batches)
    assert [int(label) for batch in batches for label in batch["class_label"]] == places


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 5, "process_count": 2}, "batch_size 5 is not divisible by 2 processes"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 4, "process_index": 1}, "process_index 1 is not below 1"),
        ({"batch_size": 11}, "10 examples, fewer than one batch: 11"),
    ],
)
def test_iterate_refuses_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        iterate(numbered(10), noisy, seed=0, **arguments)


@pytest.mark.parametrize(("most", "ahead"), [(0, 1), (5000, 5), (10**9, 16)])
def test_batches_that_wait_are_bounded_in_bytes(monkeypatch, most, ahead):
    read = []

    class Pictures(ArraySource):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr("latent_diffusion.data.pipeline.MOST_AHEAD", most)
    source = Pictures({"noise": np.zeros((400, 125), np.float32)})  # a batch of 2 has 1000 bytes
    iterator = iterate(source, lambda example, rng: example, batch_size=2, seed=0)
    take(iterator, 3)
    time.sleep(0.3)
    assert 2 * 3 <= len(read) <= 2 * (3 + ahead + 1)


def test_empty_epoch_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        next(epoch(numbered(0), noisy, 4))


# --- contract ---


def valid(key):
    sizes = {"3": 3, "1": 1}
    shape = [sizes.get(dim, 2) for dim in KEYS[key].shape.split()]
    return np.ones(shape, KEYS[key].dtype)


@pytest.mark.parametrize("key", KEYS)
def test_contract(key):
    batch = {key: valid(key)}
    check_batch(batch)
    with pytest.raises(ValueError, match=rf"batch\['{key}'\]: got dtype float64, expected"):
        check_batch({key: batch[key].astype(np.float64)})
    with pytest.raises(ValueError, match=rf"batch\['{key}'\]: got shape .* expected \[B"):
        check_batch({key: batch[key][None]})
    if np.isfinite(KEYS[key].high):
        with pytest.raises(ValueError, match=rf"batch\['{key}'\]: got values in \[5, 5\]"):
            check_batch({key: batch[key] * 5})
    if np.isfinite(KEYS[key].low):
        with pytest.raises(ValueError, match=rf"batch\['{key}'\]: got values in \[-5, -5\]"):
            check_batch({key: batch[key] * -5})


def test_contract_is_held_by_the_iterators():
    labels = ArraySource({"class_label": np.full(4, -1)})
    with pytest.raises(ValueError, match=r"'class_label'.*got dtype int64, expected int32"):
        next(iterate(labels, noisy, batch_size=2, seed=0))
    with pytest.raises(ValueError, match=r"'class_label'.*got values in \[-1, -1\]"):
        next(iterate(labels, make_transform(config(), train=True), batch_size=2, seed=0))
    with pytest.raises(ValueError, match=r"'name'.*expected numbers"):
        check_batch({"name": np.array(["a"])})
    with pytest.raises(ValueError, match=r"got values in \[nan"):
        check_batch({"image": np.full((1, 2, 2, 3), np.nan, np.float32)})
    check_batch({"edges": np.zeros((2, 4))})  # a task's own key


# --- sources ---


def test_array_source_serves_cached_latents():
    moments = np.arange(6 * 8, dtype=np.float32).reshape(6, 2, 2, 2)
    source = ArraySource({"moments": moments, "caption": np.array(["a b"] * 6)})
    tokenizer = WordTokenizer.train(data.captions(source), 4, 3)
    (batch,) = epoch(source, make_transform(config(), train=False, tokenizer=tokenizer), 6)
    np.testing.assert_array_equal(batch["moments"], moments)
    np.testing.assert_array_equal(batch["tokens"], [[2, 3, 0]] * 6)
    several = ArraySource({"moments": moments, "caption": [["a", "b"]] * 5 + [["b"]]})
    assert data.captions(several) == ["a", "b"] * 5 + ["b"]
    (batch,) = epoch(several, make_transform(config(), train=False, tokenizer=tokenizer), 6)
    np.testing.assert_array_equal(batch["tokens"][:, 0], [2] * 5 + [3])
    with pytest.raises(ValueError, match=r"one common length.*'a': 2, 'b': 3"):
        ArraySource({"a": np.zeros(2), "b": np.zeros(3)})


class Counting:
    """A source that counts its reads; each example has 100 bytes."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.reads += 1
        return {"x": np.full(100, index, np.uint8)}


def test_remember_reads_once_up_to_its_limit():
    counting = Counting()
    source = Remember(counting, max_bytes=250)
    for _ in range(3):
        assert [source[i]["x"][0] for i in range(4)] == [0, 1, 2, 3]
    assert counting.reads == 4 + 2 + 2 and source.bytes == 200
    assert source.reads == counting.reads  # everything else is the source's
    with pytest.raises(ValueError, match="read-only"):
        source[0]["x"][:] = 7


def test_sizes_of_many_pictures_are_read_in_blocks(monkeypatch):
    """In the order of the pictures, of which few wait in the pool."""
    blocks = []

    class Pool(ThreadPoolExecutor):
        def map(self, function, numbers):
            blocks.append(len(numbers))
            return super().map(function, numbers)

    monkeypatch.setattr(concurrent.futures, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr("latent_diffusion.data.sources.BLOCK", 40)
    sizes = Readable(100).sizes(lambda index: (index, 2 * index))
    np.testing.assert_array_equal(sizes, [(i, 2 * i) for i in range(100)])
    assert blocks == [40, 40, 20]


def test_synthetic():
    source, test = make_source(config(image_size=16), "train"), make_source(config(), "test")
    example = source[5]
    assert example["image"].shape == (16, 16, 3) and example["image"].dtype == np.uint8
    assert example["caption"] == "green square" and example["class_label"] == 1
    assert source.class_names == SHAPES
    assert len(set(source.captions())) == 24 == len(set(test.captions()))
    np.testing.assert_array_equal(source[5]["image"], source[5]["image"])
    assert (source[5]["image"] != source[29]["image"]).any()  # elsewhere, another size
    assert (make_source(config(image_size=16), "test")[5]["image"] != example["image"]).any()
    with pytest.raises(IndexError):
        source[len(source)]


def test_synthetic_end_to_end():
    source = make_source(config(), "train")
    tokenizer = WordTokenizer.train(data.captions(source), 16, 2)
    transform = make_transform(config(), train=True, tokenizer=tokenizer)
    batch = next(iterate(source, transform, batch_size=4, seed=0))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((4, 8, 8, 3), "float32"),
        "class_label": ((4,), "int32"),
        "tokens": ((4, 2), "int32"),
    }
    assert batch["image"].max() == 1 and batch["tokens"].min() >= 2


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({"name": "mnist"}, "train", "unknown data.name 'mnist'; known: .*openmoji"),
        ({}, "dev", "unknown split 'dev'; known: test, train"),
        ({"train_split": "half"}, "train", "unknown split of synthetic 'half'; known: test, train"),
    ],
)
def test_make_source_errors(changes, split, message):
    with pytest.raises(ValueError, match=message) as error:
        make_source(config(**changes), split)
    assert "\n" not in str(error.value)


def test_fields_that_a_data_set_ignores_are_refused_in_new_runs():
    for field, value, kinds in (
        ("caption_column", "prompt", "image_folder"),
        ("features", {"caption": "a"}, "tfds and parquet"),
    ):
        with pytest.raises(ValueError, match=f"data.{field} is for {kinds}, not for synthetic"):
            data.check_fields(config(**{field: value}))
        data.check_fields(config(**{field: value, "name": "latents"}))


WORKER = """
import multiprocessing, time
from latent_diffusion.data import pipeline

def work():
    pipeline._worker_starts(0, 1)
    print("started", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work).start()
    time.sleep(600)
"""


def test_a_worker_ends_with_the_main_process_even_if_that_is_killed(tmp_path):
    (tmp_path / "main.py").write_text(WORKER)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "main.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline() == "started\n"
        process.kill()
        assert process.stdout.read() == ""  # until the worker has closed it


def test_documented_names():
    names = {"openmoji", "openmoji_scenes", "openmoji_wide", "image_folder", "synthetic", "tfds"}
    names |= {"twemoji", "openmoji+twemoji", "latents", "parquet", "tars"}
    assert set(DATASETS) == names


# --- transforms ---


def ramp(height, width):
    """Brightness grows with the column; no two columns are alike."""
    return np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3))


def test_float_and_bytes_are_inverse():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert to_float(image).min() == -1 and to_float(image).max() == 1
    np.testing.assert_array_equal(to_uint8(to_float(image)), image)
    assert to_uint8(np.full((1, 1, 3), 1.5, np.float32)).max() == 255


def test_shrinking_is_antialiased():
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(resize(stripes, 8, 16).astype(int) - 127).max() <= 20


@pytest.mark.parametrize("crop", sorted(CROPS.keys() - {"none"}))
def test_crops(crop):
    transform = make_transform(config(crop=crop, image_size=4), train=True)
    columns = set()
    for seed in range(100):
        out = transform({"image": ramp(4, 12)}, np.random.default_rng(seed))["image"]
        assert out.shape == (4, 4, 3) and out.dtype == np.float32
        columns.add(tuple(to_uint8(out)[0, :, 0].tolist()))
    if crop == "squash":
        assert len(columns) == 1 and next(iter(columns))[0] <= 2 and next(iter(columns))[3] >= 9
    elif crop == "center":
        assert columns == {(4, 5, 6, 7)}
    else:
        assert {c[0] for c in columns} == set(range(9)) and all(c[3] - c[0] == 3 for c in columns)
        evaluated = make_transform(config(crop=crop, image_size=4), train=False)
        assert to_uint8(evaluated({"image": ramp(4, 12)})["image"])[0, 0, 0] == 4


def test_pictures_may_stay_bytes():
    """Those that are made of a picture, too; a compiled step scales them."""
    settings, example = config(image_size=8, low_res="bicubic"), {"image": ramp(8, 8)}
    settings.low_res_factor = 2
    levels = make_transform(settings, train=True, as_bytes=True)(example)
    plain = make_transform(settings, train=True)(example)
    for key in ("image", "low_res"):
        assert levels[key].dtype == np.uint8 and plain[key].dtype == np.float32
        np.testing.assert_array_equal(to_float(levels[key]), plain[key])
    check_batch({key: levels[key][None] for key in ("image", "low_res")})
    with pytest.raises(ValueError, match="got dtype uint8, expected float32"):
        check_batch({"mask": np.ones((1, 4, 4, 1), np.uint8)})


def test_pictures_keep_their_shape_unless_squashing_is_asked_for():
    transform = make_transform(config(crop="none", image_size=4), train=True)
    assert transform({"image": ramp(8, 8)})["image"].shape == (4, 4, 3)
    message = r"data\.crop='none' takes square pictures, but one has 12×4 pixels: 'center' and"
    with pytest.raises(ValueError, match=message):
        transform({"image": ramp(4, 12)})
    assert default.data().crop == "center"


@pytest.mark.parametrize("crop", ["center", "random", "squash"])
def test_maps_of_the_data_are_cut_and_flipped_with_the_picture(crop):
    """Each pixel's column is in the picture and in its maps; the depth map has half the size."""
    columns = np.repeat(np.arange(0, 240, 20)[None], 4, 0)
    example = {
        "image": np.repeat(columns[..., None], 3, -1).astype(np.uint8),
        "mask": columns > 110,
        "depth": np.repeat(np.arange(5.0, 240, 40)[None], 2, 0)[..., None] + 5,
        "segmentation": columns,
    }
    transform = make_transform(config(crop=crop, image_size=4, flip=True), train=True)
    middle, starts = slice(1, 3), set()  # away from the borders of the window
    for seed in range(20):
        out = transform(example, np.random.default_rng(seed))
        picture = (out["image"][..., :1] + 1) * 127.5
        starts.add(float(picture[0, 0, 0]))
        assert out["mask"].shape == out["depth"].shape == (4, 4, 1)
        np.testing.assert_array_equal(out["mask"], out["segmentation"][..., None] > 110)
        for key in ("depth", "segmentation"):
            error = np.abs(out[key].reshape(4, 4) - picture[..., 0])[:, middle]
            assert error.max() <= (10.5 if crop != "squash" else 30), (key, seed)
    assert len(starts) > 1  # the flip, at least


def test_maps_of_a_picture_that_is_no_square_have_its_height_and_width():
    """Nothing is cut or resized, so that every map stays as it is."""
    numbers = np.arange(24, dtype=np.float32).reshape(4, 6, 1)
    example = {"image": np.zeros((4, 6, 3), np.uint8), "size": (4, 6)}
    example |= {"depth": numbers, "mask": numbers, "segmentation": numbers[..., 0]}
    out = make_transform(config(crop="center"), train=False)(example)
    for key in ("depth", "mask", "segmentation"):
        np.testing.assert_allclose(out[key].reshape(4, 6, 1), numbers)


def test_a_smaller_map_has_the_values_in_the_middle_of_its_pixels():
    """As Pillow takes the nearest."""
    labels = np.random.default_rng(0).integers(0, 99, (8, 12)).astype(np.int32)
    for size in ((4, 4), (2, 3), (8, 6), (3, 5)):
        nearest = Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST)
        np.testing.assert_array_equal(cut_labels(labels, None, size), nearest)


def test_shorter_side_scales_before_the_window():
    """A 4×12 picture of shorter side 8 is 8×24; its middle 4 columns come from its middle 2."""
    picture = np.repeat(ramp(4, 12) * 10, 2, axis=1)[:, 6:18]
    transform = make_transform(config(crop="center", image_size=4, shorter_side=8), train=False)
    row = to_uint8(transform({"image": picture})["image"])[2, :, 0].astype(int)
    assert (np.diff(row) >= 0).all() and 50 <= row[0] < row[-1] <= 70
    small = make_transform(config(crop="center", image_size=4, shorter_side=2), train=True)
    with pytest.raises(ValueError, match=r"data\.shorter_side=2 is below data\.image_size=4"):
        small({"image": picture})


@pytest.mark.parametrize("shorter_side", [0, 24])
def test_sizes_are_those_of_the_picture_that_is_seen(shorter_side):
    """Each pixel shows its column; the corner is that of the resized and flipped picture."""
    columns = np.broadcast_to(np.arange(48) * 5, (24, 48))
    image = np.repeat(columns[..., None], 3, -1).astype(np.uint8)
    c = config(crop="random", shorter_side=shorter_side, flip=True, sizes=True)
    transform, seen = make_transform(c, train=True), set()
    scale = 1 if shorter_side else 8 / 24  # of the picture in which the window has 8 pixels
    for seed in range(20):
        out = transform({"image": image}, np.random.default_rng(seed))
        shown = to_uint8(out["image"])[0, :, 0] / 5.0
        flipped = shown[0] > shown[-1]
        first = (48 - shown[0] - 0.5) if flipped else shown[0] + 0.5  # in whole pixels' middles
        corner = out["crop_top_left"]
        assert abs(corner[1] - (first * scale - 0.5)) <= 0.51
        assert corner[0] == 0 if scale < 1 else 0 <= corner[0] <= 16
        np.testing.assert_array_equal(out["original_size"], [24, 48])
        np.testing.assert_array_equal(out["target_size"], [8, 8])
        seen.add((bool(flipped), int(corner[1])))
    assert {flipped for flipped, _ in seen} == {True, False} and len(seen) > 5
    still = make_transform(c, train=False)({"image": image, "original_size": [480, 960]})
    middle = [8, 20] if shorter_side else [0, 4]
    np.testing.assert_array_equal(still["crop_top_left"], middle)
    np.testing.assert_array_equal(still["original_size"], [480, 960])  # the source knows better
    whole = make_transform(config(crop="squash", sizes=True), train=True)({"image": image})
    np.testing.assert_array_equal(whole["crop_top_left"], [0, 0])


def test_flip_is_random_in_training_only():
    image = ramp(4, 4)
    train = make_transform(config(flip=True, image_size=4), train=True)
    outs = [train({"image": image}, np.random.default_rng(s))["image"][0, 0, 0] for s in range(40)]
    assert set(outs) == {to_float(image)[0, 0, 0], to_float(image)[0, 3, 0]}
    assert 10 <= outs.count(outs[0]) <= 30
    test = make_transform(config(flip=True, image_size=4), train=False)
    for seed in range(20):
        seen = test({"image": image}, np.random.default_rng(seed))["image"]
        np.testing.assert_array_equal(seen, to_float(image))


def test_several_captions_take_turns_in_training_only():
    tokenizer = WordTokenizer(["red", "blue"], 4, 1)
    example = {"caption": ["red", "blue"]}
    train, test = (make_transform(config(), train=t, tokenizer=tokenizer) for t in (True, False))
    seen = {int(train(example, np.random.default_rng(s))["tokens"][0]) for s in range(20)}
    assert seen == {2, 3}
    assert test(example)["tokens"].tolist() == [2] and test({"caption": []})["tokens"][0] == 0
    with pytest.raises(ValueError, match="no caption to tokenize; the example has: image"):
        test({"image": ramp(8, 8)})


def test_only_batch_keys_remain():
    out = make_transform(config(), train=False)(
        {"image": ramp(8, 8), "alpha": ramp(8, 8), "name": "a", "class_label": 3}
    )
    assert set(out) == {"image", "class_label"} and out["class_label"].dtype == np.int32


def test_unknown_crop():
    with pytest.raises(
        ValueError, match=r"unknown data.crop 'middle'; known: center, none, random, squash"
    ):
        make_transform(config(crop="middle"), train=True)


def test_resize_keeps_what_fits():
    image = np.asarray(Image.new("RGB", (5, 4), "red"))
    assert resize(image, 4, 5) is image


def test_a_picture_of_any_size_is_cut_to_any_size():
    """Rounding doesn't put the cut outside of the picture."""
    for height in range(850, 860):
        image = np.zeros((height, 1280, 3), np.uint8)
        for side in (8, 9, 16, 31):
            assert fit(image, (side, side)).shape == (side, side, 3)
            assert fit(image[..., :1], (side, 2 * side), mask=True).shape == (side, 2 * side, 1)
