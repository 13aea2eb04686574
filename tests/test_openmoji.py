import builtins
import collections

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import default
from latent_diffusion import data
from latent_diffusion.data import openmoji, openmoji_builder
from latent_diffusion.data.openmoji import GROUPS, HELD_OUT_COMBINATIONS, SKIN_TONES
from latent_diffusion.data.tokenizers import words
from latent_diffusion.data.transforms import on_white

catalogue = openmoji.catalogue()
by_caption = {emoji.caption: emoji for emoji in catalogue}
of_style = {style: openmoji.catalogue(style) for style in ("openmoji", "twemoji")}
GENDERS = ("man", "woman", "person", "")


def draw(emoji, size=32, style="openmoji"):
    return on_white(np.asarray(openmoji.draw(emoji.hexcode, size, style))).astype(np.float32) / 255


def config(folder, size=16):
    c = default.data()
    c.update({"name": "openmoji", "dir": str(folder), "image_size": size})
    return c


# --- catalogue and split ---


def test_catalogue():
    assert len(catalogue) >= 3700
    assert len(by_caption) == len(catalogue)  # captions are unique
    groups = collections.Counter(emoji.class_label for emoji in catalogue)
    assert set(groups) == set(range(9)) and groups[GROUPS.index("People & Body")] > 2000
    assert by_caption["woman pilot dark skin tone"].hexcode == "1F469-1F3FF-200D-2708-FE0F"
    assert by_caption["red heart"].class_label == GROUPS.index("Smileys & Emotion")
    assert by_caption["São Tomé & Príncipe"].class_label == GROUPS.index("Flags")
    assert "light skin tone" not in by_caption  # a swatch


def test_both_styles_draw_the_same_things_with_the_same_side_of_the_split():
    ours, theirs = ({e.caption: e for e in of_style[style]} for style in of_style)
    assert ours.keys() == theirs.keys()
    assert all(ours[c].class_label == theirs[c].class_label for c in ours)
    assert all(theirs[c].combination == ours[c].combination for c in ours)
    other = {openmoji.subject(c) for c in ours if ours[c].split != theirs[c].split}
    assert other == openmoji._TWEMOJI_DRAWS_ALIKE  # held out in one style alone
    assert theirs["keycap 5"].hexcode == "35-20e3"  # whose files lack FE0F and leading zeros
    pictures = [
        openmoji.draw(c["red heart"].hexcode, 16, s)
        for c, s in ((ours, "openmoji"), (theirs, "twemoji"))
    ]
    assert (np.asarray(pictures[0]) != np.asarray(pictures[1])).any()


def test_a_drawing_that_is_wider_than_high_stands_in_the_middle():
    watermelon = {e.caption: e for e in of_style["twemoji"]}["watermelon"]
    alpha = np.asarray(openmoji.draw(watermelon.hexcode, 36, "twemoji"))[..., 3]
    rows = np.flatnonzero(alpha.max(1))
    assert alpha.shape == (36, 36) and abs(rows[0] - (35 - rows[-1])) <= 1 and rows[0] >= 4


def test_skin_tone():
    assert [openmoji.skin_tone(f"old man {tone}") for tone in SKIN_TONES] == [0, 1, 2, 3, 4]
    assert openmoji.skin_tone("woman medium-dark skin tone beard") == 3
    assert openmoji.skin_tone("rocket") == -1
    assert openmoji.skin_tone("handshake light skin tone dark skin tone") == -1
    assert openmoji.subject("woman running facing right dark skin tone") == "woman running"


def test_split_is_about_a_tenth_and_has_every_group():
    test = [emoji for emoji in catalogue if emoji.split == "test"]
    assert 0.08 <= len(test) / len(catalogue) <= 0.11
    assert {emoji.class_label for emoji in test} == set(range(9))
    assert {emoji.split for emoji in catalogue} == {"train", "test"}


@pytest.mark.parametrize("style", of_style)
def test_tone_variants_are_on_one_side(style):
    sides = collections.defaultdict(set)
    for emoji in of_style[style]:
        sides[openmoji.subject(emoji.caption)].add(emoji.split)
    assert all(len(side) == 1 for side in sides.values())


def test_held_out_combinations_are_new_but_their_parts_are_not():
    train = [emoji.caption for emoji in catalogue if emoji.split == "train"]
    subjects = {openmoji.subject(caption) for caption in train}
    vocabulary = {word for caption in train for word in words(caption)}
    known = {openmoji.subject(emoji.caption) for emoji in catalogue}
    assert known >= HELD_OUT_COMBINATIONS and not HELD_OUT_COMBINATIONS & subjects
    for name in HELD_OUT_COMBINATIONS:
        role = " ".join(word for word in name.split() if word not in GENDERS)
        others = {
            " ".join(f"{first} {gender} {last}".split())
            for gender in GENDERS
            for first, last in ((role, ""), ("", role))
        }
        assert others & subjects, name
        assert set(words(name)) <= vocabulary, name
    assert {openmoji.skin_tone(caption) for caption in train} == {-1, 0, 1, 2, 3, 4}


def test_held_out_prompts_are_balanced():
    prompts = openmoji.held_out_combinations()
    assert len(prompts) == len(set(prompts)) >= 200
    tones = collections.Counter(openmoji.skin_tone(prompt) for prompt in prompts)
    assert set(tones) == set(range(5)) and len(set(tones.values())) == 1
    assert all(by_caption[prompt].split == "test" for prompt in prompts)
    assert [openmoji.skin_tone(prompt) for prompt in prompts[:5]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("style", of_style)
def test_held_out_combinations_look_like_nothing_in_training(style):
    people = [
        e
        for e in of_style[style]
        if e.caption.count("skin tone") == 1 and " medium skin" in e.caption
    ]
    images = {e.caption: draw(e, style=style) for e in people}
    train = np.stack([images[e.caption] for e in people if e.split == "train"])
    for emoji in (e for e in people if e.combination):
        distance = np.sqrt(((train - images[emoji.caption]) ** 2).mean(axis=(1, 2, 3)))
        assert distance.min() > 0.08, emoji.caption


def test_flags_drawn_alike_stay_together():
    sides = collections.defaultdict(set)
    for emoji in catalogue:
        if GROUPS[emoji.class_label] == "Flags":
            sides[draw(emoji, 16).tobytes()].add(emoji.split)
    assert len(sides) < sum(GROUPS[e.class_label] == "Flags" for e in catalogue)
    assert all(len(side) == 1 for side in sides.values())


def test_missing_packages_are_named_in_one_line(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "resvg_py":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r'resvg_py: pip install "latent_diffusion\[open'):
        openmoji.catalogue.__wrapped__()


# --- preparation; a few drawings stand for all ---


@pytest.fixture
def few(monkeypatch):
    names = [
        "rocket",
        "France",
        "woman pilot",
        "woman pilot dark skin tone",
        "man pilot",
        "ringed planet",
    ]
    chosen = {s: tuple(e for e in of_style[s] if e.caption in names) for s in of_style}
    monkeypatch.setattr(openmoji_builder, "catalogue", chosen.__getitem__)
    return chosen["openmoji"]


def test_source(few, tmp_path):
    source = data.make_source(config(tmp_path), "test")
    held_out = sorted(e.caption for e in few if e.split == "test")
    assert sorted(source.captions()) == held_out and "woman pilot" in held_out
    train = data.make_source(config(tmp_path), "train")
    examples = {train[i]["caption"]: train[i] for i in range(len(train))}
    rocket = examples["rocket"]
    assert rocket["image"].shape == (16, 16, 3) and rocket["image"].dtype == np.uint8
    assert rocket["alpha"].shape == (16, 16) and set(np.unique(rocket["alpha"])) >= {0, 255}
    assert (rocket["image"][rocket["alpha"] == 0] == 255).all()  # white ground
    assert rocket["name"] == "1F680" and GROUPS[rocket["class_label"]] == "Travel & Places"
    np.testing.assert_allclose(rocket["image"] / 255, draw(by_caption["rocket"], 16), atol=1e-6)
    larger = ConfigDict({**config(tmp_path).to_dict(), "shorter_side": 20})  # for crops
    assert data.make_source(larger, "train")[0]["image"].shape == (20, 20, 3)
    everything = ConfigDict({**config(tmp_path).to_dict(), "train_split": "train+test"})
    assert len(data.make_source(everything, "train")) == len(few)
    with pytest.raises(ValueError, match="unknown split 'dev' of openmoji; known: test, train"):
        data.make_source(ConfigDict({**config(tmp_path).to_dict(), "train_split": "dev"}), "train")


def test_two_styles(few, tmp_path):
    c = config(tmp_path)
    alone = [data.make_source(ConfigDict({**c.to_dict(), "name": s}), "train") for s in of_style]
    both = data.make_source(ConfigDict({**c.to_dict(), "name": "openmoji+twemoji"}), "train")
    singles = [source[i] for source in alone for i in range(len(source))]
    assert len(both) == len(singles) == 2 * len(alone[0])
    for i, single in enumerate(singles):
        style = "openmoji" if i < len(alone[0]) else "twemoji"
        assert both[i]["caption"] == [f"{style} {single['caption']}", single["caption"]]
        assert both[i]["name"] == f"{style}-{single['name']}"
        np.testing.assert_array_equal(both[i]["image"], single["image"])
    assert both.captions() == [text for i in range(len(both)) for text in both[i]["caption"]]
    with pytest.raises(IndexError):
        both[len(both)]


def test_prepared_once_per_size_without_the_packages(few, tmp_path, monkeypatch):
    for size in (16, 20):
        assert data.make_source(config(tmp_path, size), "train")[0]["image"].shape[0] == size

    def missing(style):
        raise ModuleNotFoundError("no packages")

    monkeypatch.setattr(openmoji_builder, "catalogue", missing)
    assert len(data.make_source(config(tmp_path), "train")) > 0
    with pytest.raises(ModuleNotFoundError, match="no packages"):
        data.make_source(config(tmp_path, 24), "train")
    assert not (tmp_path / "openmoji" / "24px").exists()


def test_a_killed_preparation_is_started_over(few, tmp_path, monkeypatch):
    def killed(style):
        if (tmp_path / "openmoji").exists():  # writing has begun
            raise KeyboardInterrupt
        return few

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(openmoji_builder, "catalogue", killed)
        data.make_source(config(tmp_path), "train")
    leftover = tmp_path / "openmoji" / "16px" / "incomplete.ABC123_1.0.0"
    leftover.mkdir(parents=True, exist_ok=True)  # what SIGKILL leaves
    assert len(data.make_source(config(tmp_path), "train")) > 0


def test_two_preparations_at_once_both_succeed(few, tmp_path, monkeypatch):
    others = []

    def overtaken(style):
        if (tmp_path / "openmoji").exists() and not others:  # another process is faster
            others.append(None)
            others.append(data.make_source(config(tmp_path), "train"))
        return few

    monkeypatch.setattr(openmoji_builder, "catalogue", overtaken)
    ours = data.make_source(config(tmp_path), "train")
    assert len(others) == 2 and ours.captions() == others[1].captions()


def test_without_a_folder_the_cache_is_that_of_tfds():
    seen = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(
            openmoji_builder, "prepare", lambda *args: seen.append(args) or next(iter(()))
        )
        data.make_source(config(""), "train")
    assert seen == [(16, None, "openmoji")]
