import csv
import json
import logging
import math
import os
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, features

from configs import default
from latent_diffusion import data
from latent_diffusion.data import epoch, image_folder, make_source, make_transform
from latent_diffusion.data.captions import read_lines
from latent_diffusion.data.pictures import (
    SUFFIXES,
    files,
    read_depth,
    read_image,
    read_levels,
    read_mask,
    size_of,
    stored_size,
)

RED = (200, 0, 0)


def config(folder, **changes):
    c = default.data()
    c.update({"name": "image_folder", "dir": str(folder), "image_size": 8, "test_fraction": 0.25})
    c.update(changes)
    return c


def everything(folder):
    return make_source(config(folder, train_split="all"), "train")


def save(path, colour=RED, size=(6, 4), mode="RGB", **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **kwargs)
    return path


def png(*chunks):
    """A PNG file of these chunks (name, content)."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    )


def grey_png(levels, transparent):
    """16 bits of grey, of which one level is transparent; Pillow doesn't write such files."""
    height, width = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    return png(
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)),
        (b"tRNS", struct.pack(">H", transparent)),
        (b"IDAT", zlib.compress(rows)),
    )


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_formats(suffix, tmp_path):
    image = read_image(save(tmp_path / f"a{suffix}"))
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8
    assert abs(image.astype(int) - RED).max() <= 3


def test_usual_suffixes_are_read():
    assert {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff"} <= SUFFIXES
    for suffix in ("webp", "avif"):
        assert (f".{suffix}" in SUFFIXES) == bool(features.check(suffix))


def test_modes(tmp_path):
    path = tmp_path / "a.png"

    def read(mode, colour):
        return read_image(save(path, colour, mode=mode))[0, 0].tolist()

    assert read("L", 77) == [77, 77, 77]
    assert read("1", 1) == [255, 255, 255]
    assert read("RGBA", (200, 0, 0, 0)) == [255, 255, 255]  # transparent: white, not black
    assert read("LA", (0, 128)) == [127, 127, 127]
    assert (
        read_image(save(tmp_path / "a.jpg", (0, 0, 0, 0), mode="CMYK"))[0, 0].tolist() == [255] * 3
    )
    Image.fromarray(np.full((4, 6), 0x8080, np.uint16)).save(path)
    assert read_image(path)[0, 0].tolist() == [0x80] * 3
    levels = np.arange(24).reshape(4, 6).astype(np.uint16) * 257
    path.write_bytes(grey_png(levels, transparent=10 * 257))
    assert read_image(path)[..., 1].ravel().tolist() == [*range(10), 255, *range(11, 24)]
    assert np.flatnonzero(read_mask(path)).tolist() == [10]
    palette = Image.new("P", (6, 4), 0)
    palette.putpalette([9, 8, 7, 0, 0, 255])
    palette.save(path)
    assert read_image(path)[0, 0].tolist() == [9, 8, 7]
    palette.save(path, transparency=b"\x00\xff")
    assert read_image(path)[0, 0].tolist() == [255, 255, 255]


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to show
    for suffix in ("jpg", "png", "webp", "tiff"):
        path = save(tmp_path / f"a.{suffix}", exif=exif)
        assert read_image(path).shape == (6, 4, 3) and size_of(path) == (6, 4)
    grey = save(tmp_path / "b.jpg", 200, mode="L", exif=exif)
    assert read_mask(grey).shape == read_depth(grey).shape == (6, 4, 1)
    assert read_levels(grey).shape == (6, 4)


def test_a_size_is_read_without_the_pixels(tmp_path):
    """Also if the EXIF data of a PNG come after them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    header = (b"IHDR", struct.pack(">IIBBBBB", 6, 4, 8, 0, 0, 0, 0))
    turned, broken = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")), (b"IDAT", b"nothing")
    pixels = zlib.compress(bytes(4 * 7))
    whole = [(b"IDAT", pixels[:9]), (b"IDAT", pixels[9:])]
    path = tmp_path / "a.png"
    for chunks, size in (
        ([header, broken, broken], (4, 6)),
        ([header, turned, broken], (6, 4)),
        ([header, *whole, turned], (6, 4)),
        ([header, *whole, (b"tEXt", b"a\0b")], (4, 6)),
    ):
        path.write_bytes(png(*chunks))
        assert size_of(path) == size
        assert stored_size(path) == (4, 6)
    assert read_image(path).shape == (4, 6, 3)
    path.write_bytes(png(header, *whole, turned))
    assert read_image(path).shape == (6, 4, 3)


def test_animations_and_floats(tmp_path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in (RED, (0, 0, 200))]
    for suffix in ("gif", "png", "webp", "tiff"):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert abs(read_image(path)[0, 0].astype(int) - RED).max() <= 3, suffix
    Image.fromarray(np.full((4, 6), 0.2, np.float32)).save(tmp_path / "b.tiff")
    assert read_image(tmp_path / "b.tiff")[0, 0].tolist() == [51] * 3
    Image.fromarray(np.full((4, 6), 7.0, np.float32)).save(tmp_path / "b.tiff")
    assert read_depth(tmp_path / "b.tiff")[0, 0, 0] == 7.0
    Image.fromarray(np.full((1, 1), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(ValueError, match=r"nan.tiff can't be read .* levels that aren't finite"):
        read_depth(tmp_path / "nan.tiff")
    with pytest.raises(ValueError, match=r"b\.tiff can't be read as a picture: floats in \[7, 7\]"):
        read_image(tmp_path / "b.tiff")


def test_depths_of_16_bits_are_evenly_spaced(tmp_path):
    levels = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    Image.fromarray(levels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_depth(tmp_path / "a.png")[..., 0], levels)
    shown = read_image(tmp_path / "a.png")[..., 0].astype(int)
    assert np.ptp(np.diff(shown.ravel())) <= 1 and shown.max() == 255
    assert read_mask(tmp_path / "a.png")[..., 0].sum() == 8


def test_pixels_that_are_mostly_transparent_are_holes(tmp_path):
    rgba = np.full((1, 4, 4), 90, np.uint8)
    rgba[..., 3] = [0, 100, 200, 255]
    Image.fromarray(rgba).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").reshape(-1).tolist() == [1, 1, 0, 0]


def test_masks_are_white_or_transparent(tmp_path):
    inside = np.zeros((4, 6), bool)
    inside[1:3, 2:5] = True
    white, black = np.full((4, 6, 3), 255, np.uint8), np.zeros((4, 6, 3), np.uint8)
    alpha = np.where(inside, 255, 0).astype(np.uint8)[..., None]
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    masks = {
        "white on black": np.where(inside[..., None], white, black),
        "opaque": np.concatenate([np.where(inside[..., None], white, black), ~(alpha & 0)], -1),
        "white on nothing": np.concatenate([white, alpha], -1),
        "erased": np.concatenate([picture, ~alpha], -1),
        "erased from white and black": np.concatenate(
            [np.where(np.arange(6)[None, :, None] < 3, white, black), ~alpha], -1
        ),
    }  # fmt: skip
    for name, pixels in masks.items():
        Image.fromarray(pixels).save(tmp_path / "a.png")
        read = read_mask(tmp_path / "a.png")
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read[..., 0], inside, name)


def test_classes_have_no_colours(tmp_path):
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(np.repeat(grey[..., None], 3, -1)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_levels(tmp_path / "a.png"), grey)
    with pytest.raises(ValueError, match=r"a\.png can't be read as a picture: it has colours"):
        read_levels(save(tmp_path / "a.png"))


def test_what_is_no_picture_is_named_in_one_line(tmp_path):
    huge = tmp_path / "huge.png"
    ihdr = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    huge.write_bytes(png((b"IHDR", ihdr), (b"IDAT", zlib.compress(b""))))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    cut = save(tmp_path / "cut.jpg", size=(64, 64))
    cut.write_bytes(cut.read_bytes()[:400])
    for name, reason in (
        ("huge.png", r"huge\.png can't be read as a picture: .*decompression bomb"),
        ("program.png", r"program\.png can't be read as a picture: cannot identify"),
        ("cut.jpg", r"cut\.jpg can't be read as a picture: .*[Tt]runcated"),
        ("none.png", r"none\.png: no such file"),
        ("pipe.png", r"pipe\.png: no such file"),
    ):
        for read in (read_image, read_mask, read_levels, read_depth):
            with pytest.raises(ValueError, match=reason) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)
    for name in ("program.png", "cut.jpg"):
        (tmp_path / name).unlink()
    good = save(tmp_path / "z.png")
    assert everything(tmp_path)[0]["name"] == good.name  # in training the bomb is skipped


def test_hidden_names_are_left_out_and_links_are_followed(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for path in ("dog/a.png", ".ipynb_checkpoints/a.png", "dog/.b.png", "dog/.cache/c.png"):
        save(here / path)
    save(there / "d.png")
    (here / "cat").symlink_to(there)
    (here / "dog/back").symlink_to(here)
    assert [p.relative_to(here).as_posix() for p in files(here)] == ["cat/d.png", "dog/a.png"]
    source = everything(here)
    assert source.class_names == ("cat", "dog")
    assert [source[i]["class_label"] for i in range(2)] == [0, 1]


def test_hash_split_is_a_partition_that_files_keep(tmp_path):
    for i in range(60):
        save(tmp_path / f"{i:02d}.png", size=(1, 1))
    names = lambda split: {p.name for p in make_source(config(tmp_path), split).paths}  # noqa: E731
    train, test = names("train"), names("test")
    assert not train & test and len(train | test) == 60 and 6 <= len(test) <= 25
    save(tmp_path / "new.png")
    assert test <= names("test") and train <= names("train")
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}_moved")
    assert {p.name for p in make_source(config(moved), "test").paths} == names("test")
    none = config(tmp_path, test_fraction=0.0)
    assert len(make_source(none, "train")) == 61
    with pytest.raises(
        ValueError, match=r"none of the 61 images in .* belongs to split 'test', to which"
    ):
        make_source(none, "test")


def test_split_and_class_folders(tmp_path):
    save(tmp_path / "train/dog/1.png")
    save(tmp_path / "train/cat/deep/2.png")
    save(tmp_path / "test/dog/3.JPG")
    save(tmp_path / "test/ape/4.png")  # a class of one split alone has a number in all
    train, test = (make_source(config(tmp_path), split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("ape", "cat", "dog")
    assert [train[i]["class_label"] for i in range(2)] == [1, 2]
    assert [test[i]["class_label"] for i in range(2)] == [0, 2] and test[1]["name"] == "3.JPG"
    with pytest.raises(ValueError, match=r"unknown split 'val' of .*; known: train, test"):
        make_source(config(tmp_path, test_split="val"), "test")


def test_a_picture_outside_the_class_folders_means_no_classes(tmp_path):
    save(tmp_path / "dog/1.png")
    save(tmp_path / "2.png")
    assert everything(tmp_path).class_names == ()
    assert "class_label" not in everything(tmp_path)[0]


def test_captions_txt(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    (tmp_path / "captions.txt").write_text(
        "a.png\ta red|square\nb.png|one\nb.png|two\n\nz.png|gone\n"
    )
    source = everything(tmp_path)
    assert [source[i]["caption"] for i in range(3)] == ["a red|square", ["one", "two"], ""]
    assert data.captions(source) == ["a red|square", "one", "two", ""]
    (tmp_path / "captions.txt").write_text("a.png a red square\n")
    with pytest.raises(ValueError, match=r"captions.txt:1: expected 'file<TAB>caption'"):
        everything(tmp_path)


def test_caption_beside_the_picture(tmp_path):
    save(tmp_path / "x/a.png")
    save(tmp_path / "x/b.png")
    (tmp_path / "x/a.txt").write_text("a red square\n")
    source = everything(tmp_path)
    assert [source[i]["caption"] for i in range(2)] == ["a red square", ""]
    assert source[0]["class_label"] == 0


def test_metadata_jsonl(tmp_path):
    save(tmp_path / "train/a.png")
    save(tmp_path / "train/b.png")
    rows = [
        {"file_name": f"{n}.png", "text": f"letter {n}", "class_label": i}
        for i, n in enumerate("ab", 3)
    ]
    file = tmp_path / "train/metadata.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    source = make_source(config(tmp_path), "train")
    assert source[1]["caption"] == "letter b" and source[1]["class_label"] == 4
    (batch,) = epoch(source, make_transform(config(tmp_path), train=False), 2)
    assert batch["class_label"].tolist() == [3, 4]
    file.write_text(json.dumps(rows[0]))
    with pytest.raises(
        ValueError, match=r"class_label is given for some files but not for .*b.png"
    ):
        make_source(config(tmp_path), "train")
    file.write_text("[]")
    with pytest.raises(
        ValueError, match=r"metadata.jsonl:1: expected a JSON object with file_name"
    ):
        make_source(config(tmp_path), "train")


ROWS = [
    {"file_name": "a.png", "text": "a \u2028 line", "prompt": "red, one", "class_label": 3},
    {"file_name": "sub/b.png", "text": 'the "second"', "prompt": "two\nlines", "class_label": 4},
]


def written(folder, kind, rows=ROWS, delimiter=","):
    """A folder of two pictures with metadata of a kind."""
    for name in ("a.png", "sub/b.png"):
        save(folder / name)
    file = folder / f"metadata.{kind}"
    if kind == "jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        file.write_text(text, encoding="utf-8-sig")
    elif kind == "csv":
        with file.open("w", encoding="utf-8-sig", newline="") as out:
            table = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_the_column_of_captions_has_a_name(kind, tmp_path):
    written(tmp_path, kind)
    for column, wanted in (("", "text"), ("text", "text"), ("prompt", "prompt")):
        source = make_source(config(tmp_path, train_split="all", caption_column=column), "train")
        assert source.captions() == [row[wanted] for row in ROWS]
        assert [source[i]["class_label"] for i in range(2)] == [3, 4]
        assert source.class_names == ()
    with pytest.raises(ValueError, match=r"metadata.*: no column 'words' .*; others: prompt, text"):
        make_source(config(tmp_path, caption_column="words"), "train")


@pytest.mark.parametrize("delimiter", ";\t")
def test_other_delimiters(delimiter, tmp_path):
    written(tmp_path, "csv", delimiter=delimiter)
    assert everything(tmp_path).captions() == [row["text"] for row in ROWS]


def test_a_column_is_no_setting_of_plain_texts(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "captions.txt").write_text("a.png|red\n")
    with pytest.raises(ValueError, match=r"data\.caption_column='words' needs metadata"):
        make_source(config(tmp_path, caption_column="words"), "train")


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("jsonl", {"text": 7}, r"metadata.jsonl:2: text is 7, expected a text"),
        ("parquet", {"text": [b"x"]}, r"metadata.parquet:row 1: text is .*, expected a text"),
        ("jsonl", {"file_name": 7}, r"metadata.jsonl:2: expected a row with file_name, got"),
        ("csv", {"class_label": "cat"}, r"metadata.csv:4: class_label is 'cat', expected an int"),
        ("jsonl", {"class_label": 1.5}, r"metadata.jsonl:2: class_label is 1.5, expected an int"),
        (
            "jsonl",
            {"class_label": -1},
            r"metadata.jsonl:2: class_label is -1, which is out of range",
        ),
        ("jsonl", {"class_label": 2**31}, r"metadata.jsonl:2: class_label is \d+, which is out of"),
        ("jsonl", {"class_label": [1, 2]}, r"jsonl:2: class_label has shape \(2,\), expected one"),
        ("jsonl", {"original_size": 512}, r"jsonl:2: original_size has shape \(\), expected \[2\]"),
        ("jsonl", {"boxes": [[0, 0, 1]]}, r"jsonl:2: boxes has shape \(1, 3\), expected \[N 4\]"),
        (
            "jsonl",
            {"aesthetic_score": math.nan},
            r"metadata.jsonl:2: aesthetic_score is nan, which",
        ),
        ("jsonl", {"mask": 7}, r"metadata.jsonl:2: mask is 7, expected the name of a picture"),
    ],
)
def test_wrong_rows_are_named(kind, changed, message, tmp_path):
    first = {**ROWS[0], **({"text": [b"y"]} if kind == "parquet" else {})}
    written(tmp_path, kind, [first, {**ROWS[1], **changed}])
    with pytest.raises(ValueError, match=message):
        everything(tmp_path)


def test_half_a_letter_is_no_text(tmp_path):
    save(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": "a \ud800"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"metadata.jsonl:1: text is 'a .ud800', expected a text"):
        everything(tmp_path)


def test_names_as_file_systems_write_them(tmp_path, caplog):
    """macOS takes letters and their accents apart; a name may be too long for this system."""
    save(tmp_path / "u\u0308ber.png")
    rows = {"\u00fcber.png": "over", "x" * 5000: "none"}
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert everything(tmp_path).captions() == ["over"]
    assert "1 described files are missing" in caplog.text and "xxx" in caplog.text


def test_maps_whose_names_the_file_system_writes_otherwise_are_found(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "cat" / "1.png")
        save(tmp_path / split / "u\u0308.png", 7, mode="L")
        row = {"file_name": "cat/1.png", "segmentation": "\u00fc.png"}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row))
    source = make_source(config(tmp_path), "train")
    assert (len(source), source.class_names) == (1, ("cat",))
    assert (source[0]["segmentation"] == 7).all()


def test_files_beside_those_that_are_read_are_named(tmp_path, caplog):
    written(tmp_path, "jsonl")
    (tmp_path / "metadata.csv").write_text("file_name, text\na.png, red\n")
    assert everything(tmp_path).captions() == [row["text"] for row in ROWS]
    assert "metadata.csv isn't read, since there is a metadata.jsonl" in caplog.text
    (tmp_path / "metadata.jsonl").unlink()
    assert everything(tmp_path).captions() == ["red", ""]


def test_broken_metadata_is_named(tmp_path, monkeypatch):
    written(tmp_path, "csv").write_text("file_name,text\na.png,one,two\n")
    with pytest.raises(ValueError, match=r"metadata.csv:2: a row of another length than the 2"):
        everything(tmp_path)
    (tmp_path / "metadata.csv").rename(tmp_path / "metadata.parquet")
    with pytest.raises(ValueError, match=r"metadata.parquet: "):
        everything(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"metadata.parquet: .* needs pip install pyarrow"):
        everything(tmp_path)


def test_texts_as_people_save_them(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    file = tmp_path / "captions.txt"
    file.write_bytes("\ufeffa.png|a \u2028 \x85 line\r\nb.png|é\r\n".encode())
    assert everything(tmp_path).captions() == ["a \u2028 \x85 line", "é"]
    file.write_bytes(b"a.png|a\nb.png|\xe9\n")
    with pytest.raises(ValueError, match=r"captions.txt:2: byte 0xe9 isn't UTF-8 .*Latin-1"):
        everything(tmp_path)
    file.write_bytes(b"a\n\nb\x0bc\n")
    assert read_lines(file) == ["a", "", "b\x0bc"]
    file.write_bytes(b"")
    assert read_lines(file) == []


def test_missing_captions_are_counted(tmp_path, caplog):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    (tmp_path / "b.txt").write_text("red")
    with caplog.at_level(logging.WARNING):
        assert everything(tmp_path).captions() == ["", "red", ""]
    assert "2 of 3 pictures have no caption" in caplog.text and "a.png" in caplog.text
    caplog.clear()
    texts = {"a": " ", "b": "red", "c": []}
    rows = [{"file_name": f"{name}.png", "text": text} for name, text in texts.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert everything(tmp_path).captions() == ["", "red", ""]
    assert "2 of 3 pictures have no caption" in caplog.text


def test_maps_come_with_their_picture(tmp_path):
    """A mask, depths and classes in pictures that metadata names; these are no examples."""
    save(tmp_path / "a.png")
    save(tmp_path / "maps/mask.png", 255, mode="L")
    Image.fromarray(np.full((4, 6), 700, np.uint16)).save(tmp_path / "maps/depth.png")
    save(tmp_path / "maps/classes.png", 9, mode="L")
    names = {"mask": "mask", "depth": "depth", "segmentation": "classes"}
    row = {"file_name": "../a.png", **{key: f"{name}.png" for key, name in names.items()}}
    (tmp_path / "maps/metadata.jsonl").write_text(json.dumps(row))
    source = everything(tmp_path)
    (batch,) = epoch(source, make_transform(config(tmp_path), train=False), 1)
    assert (batch["mask"] == 1).all() and batch["mask"].shape == (1, 8, 8, 1)
    np.testing.assert_allclose(batch["depth"], np.full((1, 8, 8, 1), 700))
    assert (batch["segmentation"] == 9).all() and len(source) == 1


def test_described_files_that_are_missing_are_reported(tmp_path, caplog):
    save(tmp_path / "a.png")
    (tmp_path / "captions.txt").write_text("a.png|here\nz.png|gone\n")
    with caplog.at_level(logging.WARNING):
        everything(tmp_path)
    assert "1 described files are missing" in caplog.text and "z.png" in caplog.text


def test_described_files_of_the_other_split_are_not_missing(tmp_path, caplog):
    names = [f"{i}.png" for i in range(12)]
    for name in names:
        save(tmp_path / name)
    (tmp_path / "captions.txt").write_text("".join(f"{name}|red\n" for name in names))
    with caplog.at_level(logging.WARNING):
        sizes = [len(make_source(config(tmp_path), split)) for split in ("train", "test")]
    assert min(sizes) > 0 and sum(sizes) == 12 and "missing" not in caplog.text


def test_unreadable_files_are_named_once_and_replaced(tmp_path, caplog):
    save(tmp_path / "a.png", (1, 1, 1))
    (tmp_path / "b.png").write_bytes(b"not a picture")
    whole = save(tmp_path / "c.png", (3, 3, 3), size=(64, 64)).read_bytes()
    (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
    save(tmp_path / "d.png", (4, 4, 4))
    (tmp_path / "e.png").write_bytes(b"")  # behind the last one comes the first
    source = everything(tmp_path)
    transform = make_transform(config(tmp_path), train=False)
    with caplog.at_level(logging.WARNING):
        batches = [next(epoch(source, transform, 5))["image"][:, 0, 0, 0] for _ in range(2)]
    expected = np.float32([1, 4, 4, 4, 1]) / np.float32(127.5) - 1
    np.testing.assert_allclose(batches, [expected, expected], atol=1e-6)
    assert {p.name for p in source.unreadable} == {"b.png", "c.png", "e.png"}
    assert caplog.text.count("b.png") >= 1 and len(caplog.records) == 3
    for name in "ad":
        (tmp_path / f"{name}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 5 images can be read"):
        everything(tmp_path)[0]


def test_folder_errors(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"needs data\.dir"):
        make_source(config(""), "train")
    with pytest.raises(ValueError, match=r"data\.dir: no folder .*/nowhere"):
        make_source(config(tmp_path / "nowhere"), "train")
    with pytest.raises(ValueError, match=r"no images in .*\.png"):
        make_source(config(tmp_path), "train")
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no images in .*; it has 1 \.heic, which isn't read"):
        make_source(config(tmp_path), "train")
    save(tmp_path / "b.png")
    assert len(everything(tmp_path)) == 1 and "these files aren't read: 1 .heic" in caplog.text
    with pytest.raises(ValueError, match=r"unknown split 'half'.*known: all, test, train"):
        make_source(config(tmp_path, train_split="half"), "train")


def test_rows_of_metadata_for_one_picture_are_its_captions(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows = "file_name,caption,class_label\na.png,red,1\nb.png,blue,2\na.png,scarlet,1\n"
    rows += "a.png,ruby,1\n"
    (tmp_path / "metadata.csv").write_text(rows)
    source = everything(tmp_path)
    assert [source[i]["caption"] for i in range(2)] == [["red", "scarlet", "ruby"], "blue"]
    (tmp_path / "metadata.csv").write_text(rows + "b.png,navy,3\n")
    with pytest.raises(ValueError, match=r"b\.png has an earlier row with other values"):
        everything(tmp_path)


def test_a_folder_that_two_paths_lead_to_has_the_name_of_the_real_one(tmp_path):
    for name in ("b", "pool"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pool" / "x.png")
    for link in ("a", "latest", "b/again"):
        (tmp_path / link).symlink_to(tmp_path / "pool")
    found = [str(path.relative_to(tmp_path)) for path in files(tmp_path)]
    assert found == ["b/again/x.png"]  # real folders come in the order of their names
    (tmp_path / "b" / "again").unlink()
    assert files(tmp_path) == [tmp_path / "pool" / "x.png"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"/b can't be listed: Permission denied"):
        files(tmp_path)


def test_maps_beside_the_class_folders_are_no_class(tmp_path):
    """Whether they have a folder of their own or none, in every split."""
    for split in ("train", "test"):
        for folder, place in (("own", "depths/"), ("none", "")):
            rows = []
            for name in ("cat", "dog"):
                save(tmp_path / folder / split / name / "1.png")
                depth = f"{place}{name}.png"
                save(tmp_path / folder / split / depth, 7, mode="L")
                rows.append(json.dumps({"file_name": f"{name}/1.png", "depth": depth}))
            (tmp_path / folder / split / "metadata.jsonl").write_text("\n".join(rows))
    for folder in ("own", "none"):
        for split in ("train", "test"):
            source = make_source(config(tmp_path / folder), split)
            assert source.class_names == ("cat", "dog") and len(source) == 2
            assert [source[i]["class_label"] for i in range(2)] == [0, 1]


def test_annotations_above_the_splits_are_named_and_change_nothing(tmp_path, caplog):
    for split in ("train", "test"):
        save(tmp_path / split / "1.png")
        (tmp_path / split / "1.txt").write_text(f"of {split}")
    (tmp_path / "captions.txt").write_text("test/1.png\tanother")
    (tmp_path / "metadata.csv").write_text("image_id,label\n1,2\n")
    for split in ("train", "test"):
        assert make_source(config(tmp_path), split).captions() == [f"of {split}"]
    for name in ("captions.txt", "metadata.csv"):
        assert f"{tmp_path / name} isn't read: annotations lie in train/, test/" in caplog.text


def test_metadata_of_another_split_are_searched_for_maps_alone(tmp_path):
    for split, row in (("train", {"prompt": "a cat"}), ("test", {"text": 5})):
        save(tmp_path / split / "cat" / "1.png")
        save(tmp_path / split / "depths" / "1.png", 7, mode="L")
        row |= {"file_name": "cat/1.png", "depth": "depths/1.png"}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row))
    source = make_source(config(tmp_path, caption_column="prompt"), "train")
    assert source.class_names == ("cat",) and source.captions() == ["a cat"]


def test_an_index_of_another_version_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_folder, "LARGE", 0)
    save(tmp_path / "pictures" / "1.png")
    changed = config(tmp_path / "pictures", train_split="all")
    assert len(make_source(changed, "train")) == 1
    read = image_folder._read
    monkeypatch.setattr(image_folder, "_read", None)
    assert len(make_source(changed, "train")) == 1
    monkeypatch.setattr(image_folder, "FORMAT", 0)
    with pytest.raises(TypeError):
        make_source(changed, "train")
    monkeypatch.setattr(image_folder, "_read", read)
    assert len(make_source(changed, "train")) == 1


def test_the_index_of_a_large_folder_has_the_captions_of_the_column(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_folder, "LARGE", 0)
    written(tmp_path / "pictures", "jsonl")
    for column in ("text", "prompt"):
        changed = config(tmp_path / "pictures", train_split="all", caption_column=column)
        assert make_source(changed, "train").captions() == [row[column] for row in ROWS]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_picture_may_have_no_objects(kind, tmp_path):
    rows = [
        {"file_name": "a.png", "boxes": [[0, 0, 1, 1]], "labels": [3]},
        {"file_name": "sub/b.png", "boxes": [], "labels": []},
    ]
    written(tmp_path, kind, rows)
    source, changed = everything(tmp_path), config(tmp_path)
    assert (source[1]["boxes"].shape, source[1]["labels"].dtype.kind) == ((0, 4), "i")
    changed.layout.update({"vocab_size": 1024, "max_objects": 1, "encode_crop": False})
    (batch,) = epoch(source, make_transform(changed, train=True), 2)
    assert batch["layout"].tolist() == [[3, 0, 1023], [1023, 1023, 1023]]
