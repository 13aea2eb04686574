"""Training on crops: the data, the config, and the measures of the samples."""

import tracemalloc

import jax
import numpy as np
import pytest

from configs import openmoji_crops
from demo import crops
from latent_diffusion import data
from latent_diffusion.data import windows
from latent_diffusion.data.openmoji_wide import OpenMojiWide
from latent_diffusion.data.synthetic import SyntheticSource
from latent_diffusion.data.windows import corner, cut, window
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec


def test_a_wide_picture_has_its_drawing_in_the_middle():
    drawings = SyntheticSource("train", 8)
    wide, shapes = OpenMojiWide(drawings), []
    for i in range(60):
        picture, drawing = wide[i]["image"], drawings[i]["image"]
        (top, left), rest = ((n - 8) // 2 for n in picture.shape[:2]), picture.copy()
        np.testing.assert_array_equal(picture[top : top + 8, left : left + 8], drawing)
        rest[top : top + 8, left : left + 8] = 255
        assert (rest == 255).all() and wide[i]["caption"] == drawings[i]["caption"]
        shapes.append(picture.shape[:2])
    assert {shape: shapes.count(shape) > 10 for shape in set(shapes)} == dict.fromkeys(
        [(8, 8), (8, 16), (16, 8)], True
    )
    assert wide.captions() == drawings.captions() and len(wide) == len(drawings)


@pytest.mark.parametrize("variant", ["", "untold"])
def test_the_denoiser_reads_the_numbers_of_its_crops_or_none(variant):
    config = openmoji_crops.get_config(variant)
    source = OpenMojiWide(SyntheticSource("train", 16))
    transform = data.make_transform(config.data, train=True)
    batch = next(data.iterate(source, transform, batch_size=config.batch_size, seed=0))
    spec = batch_spec(config)
    told = {"original_size", "crop_top_left", "target_size"}
    assert set(spec) == {"image"} | (set() if variant else told)
    assert {key: batch[key].shape for key in spec} == {key: x.shape for key, x in spec.items()}
    if not variant:
        assert batch["crop_top_left"].max() > 0 and batch["original_size"].max() == 32
    task = TASKS[config.task](config)
    state = jax.eval_shape(task.init, jax.random.key(0), spec)
    _, metrics = jax.eval_shape(task.train_step, *state, batch, jax.random.key(1))
    assert metrics["loss"].shape == ()
    projections = [path for path in state[0].params["unet"] if path.startswith("label_emb")]
    assert len(projections) == (0 if variant else 2)


def test_a_crop_lies_where_its_corner_says():
    """The corner is in pixels of the picture that was resized as the crop was."""
    where = window((20, 60), (10, 20), "center", 0, np.random.default_rng(0))
    assert (where.rows, where.columns, where.left) == (20, 40, 10)
    assert corner(where.crop, (10, 20)) == (0, 5)
    where = window((60, 20), (20, 10), "center", 0, np.random.default_rng(0))
    assert corner(where.crop, (20, 10)) == (5, 0)
    line = np.arange(900, dtype=np.uint8).reshape(1, 900, 1).repeat(3, 2)
    for crop in ("center", "random"):  # a picture of one row has a window, too
        where = window((1, 900), (8, 16), crop, 0, np.random.default_rng(0))
        assert cut(line, where, (8, 16)).shape == (8, 16, 3)
    where = window((900, 1), (4, 16), "center", 0, np.random.default_rng(0))
    assert (cut(line.reshape(900, 1, 3), where, (4, 16)) == 449 % 256).all()


def test_of_a_line_only_the_window_is_resized():
    """The whole of it would have 384×384,000 pixels."""
    line = np.repeat(np.arange(1000) // 4, 3).astype(np.uint8).reshape(1, 1000, 3)
    where = window((1, 1000), (256, 256), "center", 384, np.random.default_rng(0))
    tracemalloc.start()
    seen = cut(line, where, (256, 256))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert seen.shape == (256, 256, 3) and np.abs(seen.astype(int) - 125).max() <= 1


def test_the_window_of_a_large_picture_is_that_of_the_whole(monkeypatch):
    y, x = np.mgrid[:90, :160]
    image = np.stack([x, y, (x + y) // 2], -1).astype(np.uint8)
    for crop, side in (("center", 48), ("random", 48), ("random", 0)):
        where = window((90, 160), (32, 32), crop, side, np.random.default_rng(3))
        monkeypatch.setattr(windows, "LARGEST", 2**26)
        whole = cut(image, where, (32, 32)).astype(int)
        monkeypatch.setattr(windows, "LARGEST", 0)
        assert np.abs(cut(image, where, (32, 32)) - whole).max() <= 1


def test_ink_off_the_middle_and_at_the_border_is_measured():
    white = np.full((4, 8, 8, 3), 255, np.uint8)
    pictures = white.copy()
    pictures[0, 3:5, 3:5] = 0  # in the middle
    pictures[1, 3:5, 7] = (255, 0, 0)  # at the right border, whatever the colour
    pictures[2, 0, 3:5] = 0  # at the upper border
    np.testing.assert_allclose(crops.off_centre(pictures), [0, 3.5 / 8, 3.5 / 8])  # one is white
    assert crops.is_cut(pictures).tolist() == [False, True, True, False]
    pictures[1, 3, 7] = 255  # a single pixel is no cut
    assert crops.is_cut(pictures).tolist() == [False, False, True, False]
