"""How much should the first stage compress? What doesn't need training to be checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import compression_report as report
from benchmarks.compression_results import Results
from benchmarks.compression_timing import seconds_per_image, steps_in
from configs.openmoji_compression import FACTORS, get_config
from latent_diffusion.models.denoiser import make_network
from latent_diffusion.models.first_stage import make_autoencoder

SCORE = {"fd_alexnet": [9.0, 0.5], "precision_alexnet": [0.5, 0.01], "recall_alexnet": [0.25, 0.01]}
FOUND = {
    "timed": {
        str(f): {
            "seconds_per_step": 2.0 / f,
            "seconds_per_image": {"10": 1.5 / f, "20": 2.5 / f},
            "latent": [64 // f, 64 // f, 3],
        }
        for f in (1, 4)
    },
    "first_stages": {"4": {"psnr": 20.0, "rfd_alexnet": 3.0}},
    "denoisers": {"1": {"num_steps": 30}, "4": {"num_steps": 1200}},
    "real": {"8": SCORE},
    "scores_f4": {"10": SCORE, "20": {**SCORE, "fd_alexnet": [4.0, 0.5]}},
    "scores_f1": {"10": {**SCORE, "fd_alexnet": [70.0, 0.5]}},
}


def test_equal_time_is_a_number_of_steps():
    assert steps_in(20, 0.5) == 2400
    assert steps_in(0.01, 5.0) == 1


def test_the_seconds_of_a_sample_are_a_line_in_its_steps():
    timed = {"seconds_per_image": {"10": 1.5, "20": 2.5}}
    assert [seconds_per_image(timed, n) for n in (10, 20, 200)] == [1.5, 2.5, 20.5]


def test_the_table_compares_at_steps_that_all_have_and_shows_what_was_left_out():
    assert report.common_steps(report.scores(FOUND)) == 10
    first, second = report.table(FOUND, (10, 20, 50)).split("\n\n")
    assert "FD, 10 steps" in first
    assert "| 1 (pixels) | 64×64×3 | 30 | 2 | – | – | 70.00 ± 0.50 | 0.50 ± 0.01" in first
    assert "| 4 | 16×16×3 | 1,200 | 0.5 | 20.0 | 3.00 | 9.00 ± 0.50 |" in first
    assert "| 8 real pictures | | | | | | 9.00 ± 0.50 |  | 0.25 ± 0.01 | |" in first
    assert "| 1 | 70.00 (1.5 s) | – (2.5 s) | – (5.5 s) |" in second
    assert "| 4 | 9.00 (0.375 s) | 4.00 (0.625 s) | – (1.38 s) |" in second


def test_table_plot_and_samples_are_written(tmp_path):
    for f in (1, 4):
        folder = tmp_path / f"f{f}" / "samples_10" / "images"
        folder.mkdir(parents=True)
        Image.fromarray(np.full((4, 4, 3), 10 * f, np.uint8)).save(folder / "00000.png")
    report.write(tmp_path, FOUND, (10, 20), shown=1)
    assert (tmp_path / "table.md").read_text() == report.table(FOUND, (10, 20))
    rows = np.asarray(Image.open(tmp_path / "samples.png"))
    assert [int(rows[y, 4, 0]) for y in (4, 10)] == [10, 40]
    assert np.asarray(Image.open(tmp_path / "plot.png")).std() > 0


def test_what_has_been_found_is_not_done_again(tmp_path):
    results = Results(tmp_path / "results.json")
    assert results.get("timed", 4, lambda: {"seconds": 1.0}) == {"seconds": 1.0}
    again = Results(tmp_path / "results.json")
    assert again.get("timed", 4, lambda: pytest.fail("done again")) == {"seconds": 1.0}
    assert again.get("timed", 8, lambda: 2) == 2
    again.check(minutes=4.0)
    again.check(minutes=4.0)
    with pytest.raises(ValueError, match=r"begun with --minutes=4.0; --minutes=20.0 needs another"):
        Results(tmp_path / "results.json").check(minutes=20.0)


def unet_shapes(config):
    """Paths and shapes of a denoiser's parameters, and the side of its latents."""
    f = make_autoencoder(config.autoencoder).downsampling
    channels = make_autoencoder(config.autoencoder).latent_channels
    unet = make_network("unet", config.unet, out_channels=channels)
    side = config.data.image_size // f
    z = jnp.zeros((1, side, side, channels))
    params = jax.eval_shape(unet.init, jax.random.key(0), z, jnp.zeros(1))["params"]
    return f, {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(params)}


def test_denoisers_differ_in_first_and_last_convolution_alone():
    shapes = {}
    for f in FACTORS:
        found, shapes[f] = unet_shapes(get_config(f"f{f}"))
        assert found == f
    for f in FACTORS:
        differing = {path for path in shapes[1] if shapes[f][path] != shapes[1][path]}
        assert shapes[f].keys() == shapes[1].keys()
        ends = "['input_blocks_0_0']['kernel']", "['out_2']['kernel']", "['out_2']['bias']"
        assert differing <= set(ends)


def test_variants_share_one_recipe_and_fit_their_first_stage():
    def recipe(f):
        config = get_config(f"f{f}").to_dict()
        return {k: v for k, v in config.items() if k != "autoencoder"} | {
            "first_stage": {**config["first_stage"], "path": "", "trained_by": ""}
        }

    for f in FACTORS[1:]:
        assert recipe(f) == recipe(1)
        assert get_config(f"f{f}").autoencoder == get_config(f"first_stage_f{f}").autoencoder
    with pytest.raises(ValueError, match="unknown variant 'f3'; known: f1, f16, f2"):
        get_config("f3")
