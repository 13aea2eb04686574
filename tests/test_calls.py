"""Promises about whole sampling calls: programs, memory, keys, seeds, texts, and no silent NaN."""

import gc
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import RNG, SIDE, TEXT, model
from conftest import ROOT

from latent_diffusion.core.rng import example_keys, sampling_keys, seed_key
from latent_diffusion.generation import program
from latent_diffusion.process.options import (
    SAMPLER_NAMES,
    SPACING_NAMES,
    PriorOptions,
    SamplingOptions,
    markdown,
)
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.spacings import SPACINGS

BALLAST = (12_345,)  # the shape of a parameter that no other array has


def with_ballast():
    """A model with one parameter that can be found among all arrays."""
    made = model(TEXT)
    params = {**made.denoiser.params, "ballast": jnp.ones(BALLAST)}
    return made.replace(denoiser=made.denoiser.replace(params=params))


def bytes_of_ballast():
    gc.collect()
    # Looking at an array's shards would make arrays of them, which count again.
    held = [array for array in jax.live_arrays() if array.shape == BALLAST]
    return sum(array.nbytes * len(array.sharding.device_set) for array in held)


def test_batches_are_large_where_that_costs_no_time():
    rows = {1: 1, 2: 1, 3: 4, 9: 4, 100: 16, 480: 128, 512: 128}
    assert {total: program.batch_rows(total, 128, 1) for total in rows} == rows
    assert program.batch_rows(960, 256, 2) == 256


def test_other_numbers_seeds_and_counts_need_three_programs_at_most(monkeypatch):
    traces, sample = [], program._sample
    monkeypatch.setattr(program, "_sample", lambda *given: traces.append(1) or sample(*given))
    program._compiled.cache_clear()
    made = model(TEXT)
    numbers = zip(range(10), itertools.cycle(range(1, 9)), strict=False)
    for i, count in numbers:
        images = made.sample(
            jax.random.key(i),
            ["red cat"] * count,
            guidance_scale=1.5 + i,
            eta=i / 10,
            num_steps=2,
            mode="single",
        )
        assert len(images) == count
    compiled = len(traces)
    assert 1 <= compiled <= 3
    made.sample(RNG, "red cat", guidance_scale=2.0, eta=0.5, num_steps=3, mode="single")
    assert len(traces) == compiled + 1  # another number of steps is another program


@pytest.mark.parametrize("mode", ["single", "pmap"])
def test_parameters_are_placed_once_and_freed_with_their_model(mode, monkeypatch):
    placed, place = [], program.parallel.place
    monkeypatch.setattr(program.parallel, "place", lambda *a: placed.append(1) or place(*a))
    before = bytes_of_ballast()
    made = with_ballast()
    made.sample(RNG, "red cat", num_images=8, mode=mode)
    held = bytes_of_ballast()
    assert held > before and len(placed) == 1
    made.sample(jax.random.key(1), "blue dog", num_images=8, mode=mode)
    assert bytes_of_ballast() == held and len(placed) == 1
    del made
    assert bytes_of_ballast() == before


def test_a_changed_parameter_changes_the_pictures():
    made = model(TEXT)
    first = made.sample(RNG, "red cat", mode="single")
    made.denoiser.params["unet"]["bias"] = jnp.array(0.3)
    assert np.abs(made.sample(RNG, "red cat", mode="single") - first).max() > 0.01


def test_all_keys_of_a_call_differ():
    keys = example_keys(RNG, 3)
    data = [np.asarray(jax.random.key_data(k)) for k in (keys, *sampling_keys(keys))]
    rows = np.concatenate(data)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_all_bits_of_a_seed_count_and_small_seeds_are_those_of_jax():
    seeds = [0, 5, 5 + 2**32, 5 + 2**33, 2**64 - 1]
    rows = np.stack([np.asarray(jax.random.key_data(seed_key(seed))) for seed in seeds])
    assert len(np.unique(rows, axis=0)) == len(seeds)
    np.testing.assert_array_equal(rows[1], jax.random.key_data(jax.random.key(5)))
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"seed={seed} must lie in \[0, 2\^64\)"):
            seed_key(seed)


def test_images_of_several_calls_can_be_made_in_one():
    """With the keys of their images, whose numbers in their calls differ."""
    made = model(TEXT)
    calls = [jax.random.key(seed) for seed in (3, 4)]
    apart = [made.sample(rng, "red cat", num_images=2, mode="single") for rng in calls]
    keys = jnp.concatenate([example_keys(rng, 2) for rng in calls])
    together = made.sample(keys, "red cat", num_images=4, mode="single")
    np.testing.assert_allclose(together, np.concatenate(apart), atol=1e-6)
    with pytest.raises(ValueError, match=r"rng has \(4,\) keys; expected one key, or 3"):
        made.sample(keys, "red cat", num_images=3, mode="single")
    others = jnp.stack([jax.random.key(seed, impl="rbg") for seed in (3, 4)])
    want = made.sample(jnp.stack(calls), "red cat", num_images=2, mode="single")
    got = made.sample(others, "red cat", num_images=2, mode="single")
    np.testing.assert_array_equal(got, want)
    for wrong in (5, jax.random.key_data(RNG)):  # the second is as jax.random.PRNGKey makes it
        with pytest.raises(ValueError, match=r"^rng=.* must be a key: jax.random.key\(seed\)$"):
            made.sample(wrong, "red cat", num_images=2, mode="single")


def test_a_string_is_one_prompt():
    made = model(TEXT)
    images = made.sample(RNG, "red cat", mode="single")
    np.testing.assert_array_equal(images, made.sample(RNG, ["red cat"], mode="single"))
    assert made.condition("red cat").context.shape[0] == 1


def test_pictures_lie_in_their_range():
    images = model(TEXT, bias=50.0).sample(RNG, "red cat", mode="single")
    assert images.min() == -1.0 and images.max() == 1.0


def test_a_parameter_that_is_not_finite_is_named_instead_of_drawn():
    made = model(TEXT, bias=np.nan)
    with pytest.raises(ValueError, match=r"parameter denoiser/params/unet/bias isn't finite"):
        made.sample(RNG, "red cat", mode="single")


def test_an_image_that_is_not_finite_is_named_by_its_number():
    start = np.zeros((4, SIDE, SIDE, 3), np.float32)
    start[3, 0, 0, 0] = np.nan
    with pytest.raises(
        ValueError, match=r"^image 3 isn't finite: its latents grew beyond all boun"
    ):
        made = model(TEXT, gain=1.0)
        made.sample(RNG, ["red cat"] * 4, z_T=start, batch_size=2, mode="single")


BROKEN = """
import sys
sys.path.insert(0, "tests")
import numpy as np
from absl import app
import answers
import latent_diffusion.generation.__main__ as command
from latent_diffusion.generation import sampling
sampling.load = lambda *_, **__: answers.model(answers.TEXT, bias=np.nan)
app.run(command.main)
"""


def test_sample_writes_no_picture_of_nan(tmp_path):
    flags = ["--model=it", f"--out={tmp_path / 'out'}", "--prompts=red cat", "--num_images=1"]
    command = [sys.executable, "-c", BROKEN, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: parameter denoiser/")
    assert not list(tmp_path.rglob("*.png"))


def test_the_table_of_options_in_the_docs_is_made_from_them():
    page = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    assert markdown(SamplingOptions) in page
    page = (ROOT / "docs" / "priors.md").read_text(encoding="utf-8")
    assert markdown(PriorOptions) in page


def test_the_help_names_every_sampler_and_spacing():
    assert SAMPLER_NAMES.split(", ") == list(SAMPLERS)
    assert SPACING_NAMES.split(", ") == list(SPACINGS)
