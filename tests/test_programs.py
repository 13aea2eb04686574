"""Sampling programs on disk: a second start reads them, and only where they are the same."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
import test_control
import test_image_prompts
import test_model
from conftest import ROOT
from jax.experimental.compilation_cache import compilation_cache

from latent_diffusion.generation import program
from latent_diffusion.runtime import parallel, programs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Programs are stored here, however fast they are compiled; JAX's cache is empty."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "jax"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    monkeypatch.setattr(programs, "folder", tmp_path / "programs")
    yield tmp_path / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    program._compiled.cache_clear()


def sample(**options):
    """The pictures of a process that has started anew."""
    program._compiled.cache_clear()
    jax.clear_caches()
    return test_model.sample(["red cat"], **{"num_steps": 2, **options})


def stored(folder):
    return {path.name for path in folder.glob("*")}


def test_a_second_start_traces_nothing_and_draws_the_same_pictures(folder, monkeypatch):
    first = sample()
    assert len(stored(folder)) == 1
    monkeypatch.setattr(program, "_begin", None)  # whatever traces the program, fails
    np.testing.assert_array_equal(sample(), first)
    assert np.any(sample(guidance_scale=1.5) != first)  # a traced number
    with pytest.raises(TypeError):
        sample(sampler="heun")


OTHERS = (
    {"sampler": "heun"},
    {"num_steps": 3},
    {"num_images": 4},
    {"image_size": (16, 16)},
    {"clip_x0": 1.0},
    {"negative_prompts": "dog"},
    {
        "adapters": [(test_image_prompts.style(0), 1.0)],
        "controls": [(test_control.random_control(), test_control.HINTS[:1], 1.0)],
        "image_prompts": [(test_image_prompts.random_adapter(), test_model.IMAGE, 1.0)],
    },
)


def test_other_options_are_other_programs(folder):
    pictures = [sample(), *(sample(**options) for options in OTHERS)]
    assert len(stored(folder)) == len(pictures)
    for i, one in enumerate(pictures):
        assert not any(np.array_equal(one, other) for other in pictures[:i])


class Counted:
    """A function that counts its calls."""

    calls = 0

    def __call__(self, *_):
        self.calls += 1


def test_functions_that_look_on_change_neither_programs_nor_pictures(folder):
    """They are called between three programs, which are stored for all of them."""
    picture = sample()
    assert len(stored(folder)) == 1
    for _ in range(2):
        progress, preview = Counted(), Counted()
        np.testing.assert_array_equal(sample(progress=progress, preview=preview), picture)
        assert progress.calls == preview.calls == 2
        assert len(stored(folder)) == 4


@pytest.mark.parametrize("mode", ["pmap", "mesh"])
def test_programs_of_several_devices_are_not_stored(mode, folder):
    assert sample(mode=mode, num_steps=1).shape == (1, 8, 8, 3) and not stored(folder)


def test_parts_of_a_sampling_stay_cut_along_the_batch(monkeypatch):
    """Otherwise every device of a mesh would compute all images of a call that is watched."""
    shards, gathered = [], parallel.gathered

    def looking(tree, mode):
        shards.append((tree.shape, tree.sharding.shard_shape(tree.shape)))
        return gathered(tree, mode)

    monkeypatch.setattr(parallel, "gathered", looking)
    sample(mode="mesh", num_images=8, preview=lambda t, z_0: None)
    assert shards == [((2,), (2,)), *[((8, 8, 8, 3), (1, 8, 8, 3))] * 2]


def test_batches_of_other_names_have_other_programs(folder):
    def step(state, constants, batch, rng):
        return {name: state * x for name, x in batch.items()}

    compiled = parallel.compile_eval(step, "single", description="named")
    for name in ("first", "second", "first"):
        out = compiled(
            jax.device_put(np.float32(2)), (), {name: np.ones(1, np.float32)}, jax.random.key(0)
        )
        np.testing.assert_array_equal(out[name], [2])
    assert len(stored(folder)) == 2


def found(description="three times", factor=3):
    """A program of a process that has started anew, and whether it has been traced."""
    traced = []

    def function(x):
        traced.append(x)
        return factor * x

    argument = jax.device_put(np.arange(5.0, dtype=np.float32), jax.devices()[2])
    program = programs.find(jax.jit(function), (argument,), description)
    np.testing.assert_array_equal(program(argument), factor * np.arange(5.0))
    return bool(traced)


def forget_what_jax_has_cached(folder):
    jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
    compilation_cache.reset_cache()


def test_every_file_of_the_package_is_part_of_a_programs_name(monkeypatch):
    read, read_bytes = set(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.add(path) or read_bytes(path))
    before = programs._code.__wrapped__()
    assert {
        ROOT / "latent_diffusion/process/plan.py",
        ROOT / "latent_diffusion/nets/unet.py",
    } < read
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + b"\n")
    assert programs._code.__wrapped__() != before


SURROUNDINGS = {
    "code": lambda patch: patch.setattr(programs, "_code", lambda: "changed"),
    "processor": lambda patch: patch.setattr(programs, "_processor", lambda: "another"),
    "versions": lambda patch: patch.setattr(programs, "version", lambda package: "of tomorrow"),
    "flags": lambda patch: patch.setenv("XLA_SOMETHING", "1"),
    "cores": lambda patch: patch.setattr(os, "cpu_count", lambda: 96),
    "settings": lambda patch: jax.config.update("jax_default_matmul_precision", "float32"),
}


@pytest.mark.parametrize("changed", SURROUNDINGS)
def test_what_surrounds_a_program_is_part_of_its_name(changed, folder, tmp_path, monkeypatch):
    assert found() and not found()
    try:
        SURROUNDINGS[changed](monkeypatch)
        forget_what_jax_has_cached(tmp_path / "empty")
        assert found() and not found()
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    assert len(stored(folder)) == 2


def test_a_damaged_program_is_compiled_again(folder, tmp_path):
    assert found()
    (path,) = folder.glob("*")
    whole = path.read_bytes()
    for i, content in enumerate((b"", whole[:1000], b"\x80\x04N.")):
        path.write_bytes(content)
        forget_what_jax_has_cached(tmp_path / str(i))
        assert found() and not found()


def test_a_description_with_an_address_stores_nothing(folder):
    assert found(repr(object())) and not stored(folder)


def test_a_program_from_the_cache_of_jax_is_not_stored(folder, monkeypatch):
    """XLA's client for CPUs would serialise it without its functions."""
    with monkeypatch.context() as patch:
        patch.setattr(programs, "folder", None)
        assert found()
    assert found() and found() and not stored(folder)


def test_a_program_that_compiles_fast_is_not_stored(folder):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 600.0)
    assert found() and not stored(folder)


def test_the_program_that_was_used_longest_ago_goes_first(folder, monkeypatch):
    monkeypatch.setattr(programs, "KEPT", 2)
    names = []
    for factor in (3, 4):
        assert found(f"{factor} times", factor)
        (name,) = stored(folder) - {*names}
        names.append(name)
        os.utime(folder / name, (factor, factor))
    assert not found("3 times", 3)  # used again
    assert found("5 times", 5)
    assert names[0] in stored(folder) and names[1] not in stored(folder)
    assert len(stored(folder)) == 2


def test_a_disk_that_takes_no_program_costs_no_result(folder):
    folder.write_text("a file where the folder should be")
    assert found()
