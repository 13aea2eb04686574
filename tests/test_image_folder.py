import json
import logging

import numpy as np
import pytest
from PIL import Image

from configs import default
from latent_diffusion import data
from latent_diffusion.data import epoch, make_source, make_transform
from latent_diffusion.data.image_folder import SUFFIXES, read_image

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


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_formats(suffix, tmp_path):
    image = read_image(save(tmp_path / f"a{suffix}"))
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8
    assert abs(image.astype(int) - RED).max() <= 3


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
    palette = Image.new("P", (6, 4), 0)
    palette.putpalette([9, 8, 7, 0, 0, 255])
    palette.save(path)
    assert read_image(path)[0, 0].tolist() == [9, 8, 7]
    palette.save(path, transparency=b"\x00\xff")
    assert read_image(path)[0, 0].tolist() == [255, 255, 255]


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to show
    path = save(tmp_path / "a.jpg", exif=exif)
    assert read_image(path).shape == (6, 4, 3)


def test_hash_split_is_a_partition_that_files_keep(tmp_path):
    for i in range(60):
        save(tmp_path / f"{i:02d}.png", size=(1, 1))
    names = lambda split: {p.name for p in make_source(config(tmp_path), split).paths}  # noqa: E731
    train, test = names("train"), names("test")
    assert not train & test and len(train | test) == 60 and 6 <= len(test) <= 25
    save(tmp_path / "new.png")
    assert test <= names("test") and train <= names("train")
    none = config(tmp_path, test_fraction=0.0)
    assert len(make_source(none, "train")) == 61
    with pytest.raises(ValueError, match="no images for split 'test'"):
        make_source(none, "test")


def test_split_and_class_folders(tmp_path):
    save(tmp_path / "train/dog/1.png")
    save(tmp_path / "train/cat/deep/2.png")
    save(tmp_path / "test/dog/3.JPG")
    train, test = (make_source(config(tmp_path), split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog")
    assert [train[i]["class_label"] for i in range(2)] == [0, 1]
    assert test[0]["class_label"] == 1 and test[0]["name"] == "3.JPG"
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
    with pytest.raises(ValueError, match=r"class_label is given for some files but not for b.png"):
        make_source(config(tmp_path), "train")
    file.write_text("[]")
    with pytest.raises(
        ValueError, match=r"metadata.jsonl:1: expected a JSON object with file_name"
    ):
        make_source(config(tmp_path), "train")


def test_described_files_that_are_missing_are_reported(tmp_path, caplog):
    save(tmp_path / "a.png")
    (tmp_path / "captions.txt").write_text("a.png|here\nz.png|gone\n")
    with caplog.at_level(logging.WARNING):
        everything(tmp_path)
    assert "1 described files missing" in caplog.text and "z.png" in caplog.text


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
    source = everything(tmp_path)
    transform = make_transform(config(tmp_path), train=False)
    with caplog.at_level(logging.WARNING):
        batches = [next(epoch(source, transform, 4))["image"][:, 0, 0, 0] for _ in range(2)]
    expected = np.float32([1, 4, 4, 4]) / np.float32(127.5) - 1
    np.testing.assert_allclose(batches, [expected, expected], atol=1e-6)
    assert {p.name for p in source.unreadable} == {"b.png", "c.png"}
    assert caplog.text.count("b.png") >= 1 and len(caplog.records) == 2
    for name in "ad":
        (tmp_path / f"{name}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 4 images can be read"):
        everything(tmp_path)[0]


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match=r"needs data\.dir"):
        make_source(config(""), "train")
    with pytest.raises(ValueError, match=r"data\.dir: no folder .*/nowhere"):
        make_source(config(tmp_path / "nowhere"), "train")
    with pytest.raises(ValueError, match="no images for split 'train' in"):
        make_source(config(tmp_path), "train")
    with pytest.raises(ValueError, match=r"unknown split 'half'.*known: all, test, train"):
        make_source(config(tmp_path, train_split="half"), "train")
