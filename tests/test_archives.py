"""Tars and Parquet files as others write them, and the indices of large folders."""

import io
import json
import os
import shutil
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image
from test_data import config

from latent_diffusion import data
from latent_diffusion.data import image_folder, index_files, tars
from latent_diffusion.training import moments


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "latent_diffusion" / "indices"


def png(number):
    """A picture of one colour, number + 1 pixels wide."""
    file = io.BytesIO()
    Image.new("RGB", (number + 1, 4), (number, 0, 0)).save(file, "png")
    return file.getvalue()


def members(number):
    facts = {"caption": "not this", "original_width": 100 + number, "original_height": 50}
    key = f"{number:05d}"
    return {
        f"{key}.png": png(number),
        f"{key}.txt": f" number {number}\n".encode(),
        f"{key}.json": json.dumps(facts).encode(),
        f"{key}.cls": str(number % 3).encode(),
    }


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_tars(folder, system=None, count=10):
    """Two tars, as img2dataset numbers them, and a file beside them."""
    system = system or fsspec.filesystem("file")
    system.makedirs(folder, exist_ok=True)
    for number in range(2):
        inside = {}
        for i in range(number * count, (number + 1) * count):
            inside |= members(i)
        system.pipe_file(f"{folder}/{number:05d}.tar", tar_of(inside))
    system.pipe_file(f"{folder}/00000_stats.json", b"{}")


def everything(folder, name="tars", **fields):
    fields = {"name": name, "dir": str(folder), "train_split": "all", "test_split": "all", **fields}
    return data.make_source(config(**fields), "train")


def assert_whole(source, count=20):
    assert len(source) == count
    for i in (0, 7, count - 1, 3):
        example = source[i]
        assert example["image"].shape == (4, i + 1, 3) and (example["image"][..., 0] == i).all()
        assert example["caption"] == f"number {i}" and example["class_label"] == i % 3
    assert data.captions(source) == [f"number {i}" for i in range(count)]
    np.testing.assert_array_equal(source.shapes(), [(4, i + 1) for i in range(count)])


@pytest.mark.parametrize("remote", [False, True])
def test_tars_are_read_at_random_where_they_lie(tmp_path, remote):
    folder = f"memory://{tmp_path.name}" if remote else tmp_path
    write_tars(folder if remote else str(folder), fsspec.filesystem("memory") if remote else None)
    if not remote:
        (tmp_path / ".checkpoints").mkdir()
        shutil.copy(tmp_path / "00000.tar", tmp_path / ".checkpoints" / "00000.tar")
        shutil.copy(tmp_path / "00000.tar", tmp_path / "._00000.tar")
    source = everything(folder)
    assert_whole(source)
    np.testing.assert_array_equal(source[3]["original_size"], (50, 103))


def test_tars_are_indexed_again_when_they_change_and_only_then(tmp_path, caches, monkeypatch):
    write_tars(str(tmp_path / "tars"))
    everything(tmp_path / "tars")
    assert len(list(caches.iterdir())) == 1
    made = []
    tars = data.tars
    index = tars._index
    monkeypatch.setattr(tars, "_index", lambda *args: made.append(1) or index(*args))
    assert_whole(everything(tmp_path / "tars"))
    assert not made
    (tmp_path / "tars" / "00001.tar").write_bytes(tar_of(members(10)))
    assert_whole(everything(tmp_path / "tars"), 11)
    assert len(made) == 1
    (tmp_path / "tars" / "00001.tar").write_bytes(tar_of(members(11)))  # as long as before
    assert everything(tmp_path / "tars").captions()[10] == "number 11" and len(made) == 2
    monkeypatch.setattr(tars, "FORMAT", 0)
    everything(tmp_path / "tars")
    assert len(made) == 3
    (tmp_path / "tars" / "00001.tar").write_bytes(tar_of(members(10)))
    (file,) = caches.iterdir()
    file.write_bytes(file.read_bytes()[:50])  # a damaged index is made anew
    assert_whole(everything(tmp_path / "tars"), 11)


def splits_of(folder):
    sources = (data.make_source(config(name="tars", dir=str(folder)), s) for s in ("train", "test"))
    return [data.captions(source) for source in sources]


def test_splits_of_tars_are_a_partition_by_key_or_folders(tmp_path):
    write_tars(str(tmp_path / "whole"), count=100)
    train, test = splits_of(tmp_path / "whole")
    assert len({*train, *test}) == len(train) + len(test) == 200 and 30 <= len(test) <= 70
    for split, count in (("train", 3), ("test", 1)):
        write_tars(str(tmp_path / "parts" / split), count=count)
    assert list(map(len, splits_of(tmp_path / "parts"))) == [6, 2]


def test_what_is_damaged_in_tars_is_named(tmp_path, caplog):
    inside = members(0) | members(1) | members(2) | {"00001.png": b"no picture"}
    (tmp_path / "a.tar").write_bytes(tar_of(inside))
    (tmp_path / "b.tar").write_bytes(tar_of(members(3) | members(4))[:5000])
    source = everything(tmp_path)
    (record,) = caplog.records
    assert "1 of 2 tars are cut short: " in record.message and "after 1 examples" in record.message
    assert len(source) == 4 and source[1]["caption"] == "number 2"
    assert "skipping" in caplog.records[1].message and "a.tar@" in caplog.records[1].message


@pytest.mark.parametrize("name", ["tars", "parquet"])
def test_texts_that_are_none_are_counted_or_named(tmp_path, name, caplog):
    texts = ["\ufeffred", "", 7, "blue"]
    if name == "tars":
        rows = {}
        for i, text in enumerate(texts):
            rows |= {f"{i}.png": png(i), f"{i}.json": json.dumps({"caption": text}).encode()}
        rows["0.txt"] = texts[0].encode()
        (tmp_path / "a.tar").write_bytes(tar_of(dict(sorted(rows.items()))))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        for number, some in enumerate((["red", None], [7], ["blue"])):
            columns = {"image": [png(number)] * len(some), "text": some}
            parquet.write_table(pyarrow.table(columns), tmp_path / f"{number}.parquet")
    source = everything(tmp_path, name)
    assert source.captions() == ["red", "", "", "blue"]
    assert "2 of 4 pictures have no caption" in caplog.text
    assert [source[i].get("caption") for i in (0, 2, 3)] == ["red", "blue", "blue"]
    assert "caption is 7, expected a text" in caplog.text


def test_a_class_is_an_integer(tmp_path, caplog):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"image": [png(0), png(1)], "label": [1.5, None]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        everything(tmp_path, "parquet")[0]
    assert "class_label is 1.5, expected an integer" in caplog.text
    assert "class_label is None, expected" in caplog.text


def test_a_row_without_a_value_is_skipped(tmp_path, caplog):
    """It would be NaN in the batch."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"image": [png(0), png(1)], "text": ["red", None], "score": [1.5, None]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    named = config(name="parquet", dir=str(tmp_path), train_split="all")
    named.features = {"image": "image", "caption": "text", "aesthetic_score": "score"}
    assert data.make_source(named, "train")[1]["aesthetic_score"] == 1.5
    assert "no aesthetic_score (column 'score')" in caplog.text


def test_maps_in_parquet_are_read_as_those_of_a_folder(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def grey(*levels):
        file = io.BytesIO()
        Image.fromarray(np.array([levels], np.uint8)).save(file, "png")
        return {"bytes": file.getvalue(), "path": "x"}

    columns = {"image": [png(1)], "mask": [grey(0, 255)], "classes": [grey(3, 255)]}
    columns |= {"far": [grey(7, 9)["bytes"]], "numbers": [[[3, 255]]]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")

    def source(**features):
        named = config(name="parquet", dir=str(tmp_path), train_split="all", image_size=1)
        named.features = features
        return data.make_source(named, "train")

    maps = {"mask": "mask", "segmentation": "classes", "depth": "far"}
    example = source(**maps)[0]  # the picture has its usual name
    assert example["image"].shape == (4, 2, 3)
    want = {"mask": [[[0], [1]]], "segmentation": [[3, 255]], "depth": [[[7], [9]]]}
    for key, values in want.items():
        np.testing.assert_array_equal(example[key], values, err_msg=key)
    assert source(segmentation="numbers")[0]["segmentation"] == [[3, 255]]


@pytest.mark.parametrize("name", ["tars", "parquet"])
def test_a_folder_without_files_is_an_error_of_one_line(tmp_path, name):
    with pytest.raises(ValueError, match=r"needs data\.dir, the folder of"):
        everything("", name)
    with pytest.raises(ValueError, match=r"no \S+ files in this folder"):
        everything(tmp_path, name)


def test_a_key_ends_at_its_first_dot(tmp_path):
    """So do keys of webdataset: "a.left.png" is the part "left.png" of a, which nothing reads."""
    inside = {"a.png": png(3), "a.txt": b"number 3", "a.left.png": png(5), "b.left.png": png(5)}
    (tmp_path / "x.tar").write_bytes(tar_of(inside))
    source = everything(tmp_path)
    assert len(source) == 1 and source[0]["caption"] == "number 3"
    assert source[0]["image"].shape == (4, 4, 3)


def test_examples_of_a_tar_have_the_same_keys(tmp_path):
    """Captions and sizes that stand in the .json of a part of the examples alone."""
    facts = [{"caption": "red", "original_width": 8, "original_height": 9}, {}, {"caption": None}]
    inside = {}
    for i in range(24):
        inside |= {f"{i:02}.png": png(i), f"{i:02}.json": json.dumps(facts[i % 3]).encode()}
    (tmp_path / "a.tar").write_bytes(tar_of(inside))
    source = everything(tmp_path)
    transform = data.make_transform(config(image_size=4), True, lambda texts: np.zeros((1, 2)))
    examples = [transform(source[i], np.random.default_rng(0)) for i in range(24)]
    assert {frozenset(example) for example in examples} == {frozenset({"image", "tokens"})}
    assert [source[i]["caption"] for i in range(3)] == ["red", "", ""]
    (tmp_path / "a.tar").write_bytes(tar_of({"0.png": png(0), "1.png": png(1), "1.json": b"{}"}))
    with pytest.raises(ValueError, match="no caption to tokenize"):
        transform(everything(tmp_path)[1], np.random.default_rng(0))


@pytest.mark.parametrize("position", [0, 1])
def test_a_parquet_file_without_a_column_of_the_others_is_named(tmp_path, position):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for number in range(2):
        columns = {"image": [png(number)], "text": ["red"]}
        if number == position:
            del columns["text"]
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{number}.parquet")
    with pytest.raises(ValueError, match=rf"{position}\.parquet has no column 'text', unlike"):
        everything(tmp_path, "parquet")


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_with_pictures(tmp_path, as_struct):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name, numbers, **columns):
        pictures = [{"bytes": png(i), "path": "x"} if as_struct else png(i) for i in numbers]
        columns = {"picture" if columns else "image": pictures, **columns}
        columns |= {"text": [f"number {i}" for i in numbers], "label": [i % 3 for i in numbers]}
        parquet.write_table(pyarrow.table(columns), tmp_path / name, row_group_size=4)

    write("a.parquet", range(11))
    write("b.parquet", range(11, 20))
    shutil.copy(tmp_path / "a.parquet", tmp_path / "._a.parquet")
    assert_whole(everything(tmp_path, "parquet"))

    def held_out(directory, split):
        source = data.make_source(config(name="parquet", dir=str(directory)), split)
        return [source[i]["caption"] for i in range(len(source))]

    train, test = (held_out(tmp_path, split) for split in ("train", "test"))
    assert len(train) + len(test) == 20 and test and not {*train} & {*test}
    (tmp_path / "moved").mkdir()
    for name in ("a.parquet", "b.parquet"):
        shutil.copy(tmp_path / name, tmp_path / "moved")
    assert held_out(tmp_path / "moved", "test") == test  # wherever the folder lies
    shutil.rmtree(tmp_path / "moved")
    write("test-00000-of-00001.parquet", range(3))
    write("train-00000-of-00001.parquet", range(5), unused=range(5))
    fields = {"name": "parquet", "dir": str(tmp_path)}
    assert len(data.make_source(config(**fields), "test")) == 3
    with pytest.raises(ValueError, match=r"data\.features: name the image feature of .*picture"):
        data.make_source(config(**fields), "train")
    named = config(**fields)
    named.features = {"image": "picture", "caption": "text"}
    source = data.make_source(named, "train")
    assert (
        len(source) == 5 and source[4]["caption"] == "number 4" and "class_label" not in source[4]
    )
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(ValueError, match=r"^\S+test-00000-of-00001.parquet: "):
        data.make_source(config(**fields), "test")


def test_a_large_folder_is_described_again_when_a_file_changes_and_only_then(
    tmp_path, caches, monkeypatch
):
    monkeypatch.setattr(image_folder, "LARGE", 5)
    folder = tmp_path / "pictures"
    for i in range(4):
        path = folder / ("cats" if i % 2 else "dogs") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
        path.with_suffix(".txt").write_text(f"number {i}")
    read, calls = image_folder._read, []
    monkeypatch.setattr(image_folder, "_read", lambda *args: calls.append(1) or read(*args))
    first, second = (everything(folder, "image_folder") for _ in range(2))
    assert len(calls) == 1 and len(list(caches.iterdir())) == 1
    assert first.class_names == second.class_names == ("cats", "dogs")
    for i in range(4):
        assert first[i].keys() == second[i].keys() and first[i]["name"] == second[i]["name"]
        assert first[i]["caption"] == second[i]["caption"]
        assert first[i]["class_label"] == second[i]["class_label"]
    (folder / "dogs" / "2.txt").write_text("another")
    assert "another" in data.captions(everything(folder, "image_folder")) and len(calls) == 2
    os.remove(folder / "cats" / "1.png")
    os.remove(folder / "cats" / "1.txt")
    assert len(everything(folder, "image_folder")) == 3 and len(calls) == 3


def test_a_link_to_nowhere_in_a_large_folder_is_skipped(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(image_folder, "LARGE", 2)
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").parent.mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))
    (tmp_path / "pictures" / "1a.png").symlink_to(tmp_path / "nowhere")
    source = everything(tmp_path / "pictures", "image_folder")
    assert len(source) == 4 and [source[i]["name"] for i in (0, 1, 3)] == [
        "0.png",
        "1.png",
        "2.png",
    ]
    source[2]
    assert "1a.png" in caplog.text


def test_the_index_of_a_large_folder_is_of_its_share_for_tests(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.png").write_bytes(png(i))

    def names(large):
        monkeypatch.setattr(image_folder, "LARGE", large)
        fields = {"name": "image_folder", "dir": str(folder)}
        shares = [config(**fields, test_fraction=share) for share in (0.3, 0.8, 0.3)]
        return [[path.name for path in data.make_source(c, "test").paths] for c in shares]

    small = names(100)
    assert names(5) == small and len(small[0]) < len(small[1])
    fields = {"name": "image_folder", "dir": str(folder), "test_fraction": 0.3}
    train, test = (data.make_source(config(**fields), split).paths for split in ("train", "test"))
    assert [path.name for path in test] == small[0] and len({*train, *test}) == 12


def test_each_split_of_tars_keeps_its_index(tmp_path, monkeypatch):
    for split, count in (("train", 3), ("test", 2)):
        write_tars(str(tmp_path / "tars" / split), count=count)
    calls, index = [], tars._index
    monkeypatch.setattr(tars, "_index", lambda *given: calls.append(1) or index(*given))
    splits = ["train", "test"] * 2
    sources = [data.make_source(config(name="tars", dir=str(tmp_path / "tars")), s) for s in splits]
    assert [len(source) for source in sources] == [6, 4, 6, 4] and len(calls) == 2


def test_rows_for_tests_are_drawn_anew_for_each_parquet_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name, start, count=40):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        table = {"image": [png(1)] * count, "label": range(start, start + count)}
        parquet.write_table(pyarrow.table(table), tmp_path / name)

    def labels(split):
        source = data.make_source(config(name="parquet", dir=str(tmp_path)), split)
        return [source[i]["class_label"] for i in range(len(source))]

    write("a.parquet", 0)
    write("b.parquet", 40)
    held_out = labels("test")
    assert [i for i in held_out if i < 40] != [i - 40 for i in held_out if i >= 40]
    assert sorted(held_out + labels("train")) == list(range(80))
    write("0.parquet", 100)  # and comes first
    assert [i for i in labels("test") if i < 100] == held_out
    write("test/c.parquet", 90, 2)  # from now on, folders are the splits
    write("train/c.parquet", 95, 3)
    assert (labels("test"), labels("train")) == ([90, 91], [95, 96, 97])


def test_indices_that_cannot_be_written_are_no_error(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    index = index_files.remembered("kind", "root", ["a"], lambda: {"a": np.arange(3)})
    np.testing.assert_array_equal(index["a"], range(3))
    assert "the next start indexes again" in caplog.records[0].message


def test_splits_of_parquet_files_are_folders_at_any_depth_below_the_named_one(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name, label):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table({"image": [png(1)], "label": [label]}), tmp_path / name)

    def labels(folder, split):
        fields = {"name": "parquet", "dir": str(tmp_path / folder), "test_split": split}
        source = data.make_source(config(**fields), "test")
        return [source[i]["class_label"] for i in range(len(source))]

    write("parts/train/part=0/x.parquet", 1)
    write("parts/default/test/part=0/y.parquet", 2)
    assert (labels("parts", "train"), labels("parts", "test")) == ([1], [2])
    write("names/train-0.parquet", 3)
    write("names/test/train-0.parquet", 4)  # the folder counts before the name
    assert (labels("names", "train"), labels("names", "test")) == ([3], [4])
    write("train/0000.parquet", 5)  # the name of data.dir itself says nothing
    assert labels("train", "all") == [5]


def test_a_tar_that_is_cut_anywhere_is_named(tmp_path, caplog):
    """Between two members and inside a header, too, which `tarfile` takes for the end."""
    first, second = members(0), members(1)
    end = len(tar_of(first).rstrip(b"\0"))
    between = end + -end % 512
    (tmp_path / "b.tar").write_bytes(tar_of(members(3)))
    for length in (between, between + 100, between + 512):
        caplog.clear()
        (tmp_path / "a.tar").write_bytes(tar_of(first | second)[:length])
        assert everything(tmp_path).captions()[-1] == "number 3"
        assert "1 of 2 tars are cut short: " in caplog.text and "a.tar: " in caplog.text


NOT_UTF_8 = os.fsdecode(b"caf\xe9")


def test_names_that_are_not_utf_8_are_read(tmp_path, monkeypatch):
    """As older systems wrote them: of pictures, of their folders, and of members of tars."""
    folder = tmp_path / "pictures"
    for name in (f"{NOT_UTF_8}/{NOT_UTF_8}.png", "tea/0.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(png(1))
    fields = {"name": "image_folder", "dir": str(folder), "test_fraction": 1.0}
    hashes = set()
    for largest in (2, 0, 0):  # as a small folder, then indexed, then from the index
        monkeypatch.setattr(image_folder, "LARGE", largest)
        source = data.make_source(config(**fields), "test")
        assert source.class_names == (NOT_UTF_8, "tea")
        assert [source[i]["name"] for i in range(2)] == [f"{NOT_UTF_8}.png", "0.png"]
        hashes.add(moments.sample_hash(source))
    assert len(hashes) == 1
    inside = {f"{NOT_UTF_8}.png": png(0), f"{NOT_UTF_8}.txt": b"number 0"}
    (tmp_path / f"{NOT_UTF_8}.tar").write_bytes(tar_of(inside))
    assert everything(tmp_path).captions() == ["number 0"]
