"""No field, argument or flag is decoration: each has a test that sees its effect."""

import ast
import functools
import inspect
import itertools
import json
import re
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several
import wiring
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from test_denoiser import equations
from test_mutants import names_of_tests
from tiny import make_config

from configs import default
from latent_diffusion import data
from latent_diffusion.convert import experiment
from latent_diffusion.data import retrieval
from latent_diffusion.evaluate.features import FeatureNet
from latent_diffusion.evaluate.frechet import frechet_distance, gaussian
from latent_diffusion.generation.model import Model
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder
from latent_diffusion.optimisation.averages import PowerAverages
from latent_diffusion.process.options import ALL_OPTIONS
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.tasks import TASKS
from latent_diffusion.tasks.autoencoding import Constants as PerceptualConstants
from latent_diffusion.training import evaluator, frozen, loop, start
from latent_diffusion.training.batch_spec import batch_spec
from latent_diffusion.training.evaluator import Evaluator
from latent_diffusion.training.start import Start
from latent_diffusion.training.tokenizer import make_tokenizer

RNG = jax.random.key(0)
SMALL = {
    "data.image_size": 8,
    "batch_size": 2,
    "autoencoder.channels": 4,
    "autoencoder.channel_mult": (1,),
    "autoencoder.num_res_blocks": 1,
    "autoencoding.discriminator.channels": 4,
    "autoencoding.perceptual": "none",
}


# --------------------------------------------------------------------------------- the tables


def test_the_fields_of_a_workdir_that_are_known_are_those_of_the_configs():
    config = default.get_config()
    for section in ("data", "tokenizer"):
        assert experiment.KNOWN[section] == set(config[section])


def config_fields():
    """Every field of the configs, by its path; a part that experiments fill is one field."""
    return set(flatten_dict(default.get_config().to_dict(), sep=".", keep_empty_nodes=True))


def test_every_config_field_has_one_entry():
    examples = {f"data.{field}" for field in wiring.EXAMPLES}
    listed = [*wiring.PROGRAMS, *examples, *wiring.CONFIG]
    assert sorted(listed) == sorted(config_fields())


@pytest.mark.parametrize("method", wiring.ARGUMENTS)
def test_every_argument_has_one_entry(method):
    arguments = set(inspect.signature(getattr(Model, method)).parameters) - {"self"}
    listed = [*wiring.ARGUMENTS[method]]
    if method == "sample":
        arguments = arguments - {"options"} | ALL_OPTIONS.keys()
        listed += wiring.OPTIONS
    assert sorted(listed) == sorted(arguments)


def test_the_tests_that_are_named_exist():
    for entries in (wiring.CONFIG, *wiring.ARGUMENTS.values()):
        for field, test in entries.items():
            file, _, name = test.partition("::")
            assert name in names_of_tests(f"tests/{file}"), f"{field}: {test}"


# ----------------------------------------------------------------------- fields of the programs


def with_fields(task, fields):
    config = make_config(task)
    if task == wiring.DENOISER:
        config.conditioners.text.depth = 0
        config.autoencoder.regularization = "identity"
    with config.unlocked():
        for path, value in {**SMALL, **fields}.items():
            *parents, name = path.split(".")
            part = functools.reduce(getattr, parents, config)
            part[name] = ConfigDict(value) if isinstance(value, dict) else value
    return config


WEIGHTS = {"kernel": np.ones(2, np.float32), "bias": np.ones(1, np.float32)}


def traced(task, part, fields):
    """The program of a part of a task, as a jaxpr."""
    config = with_fields(task, fields)
    made, spec = TASKS[config.task](config), batch_spec(config)
    if part in ("tx", "disc_tx"):
        tx = getattr(made, part)
        return jax.make_jaxpr(lambda w: tx.update(w, tx.init(w), w))(WEIGHTS)
    if part == "autoencoder":
        streams, apply = ("params", "dropout", "codebook"), made.autoencoder.init_with_output
        return jax.make_jaxpr(
            lambda x, rng, keys: apply(dict.fromkeys(streams, rng), x, keys, True)
        )(spec["image"], RNG, jax.random.split(RNG, config.batch_size))
    if part == "init":
        return jax.make_jaxpr(made.init)(RNG, spec)
    return jax.make_jaxpr(getattr(made, part))(*jax.eval_shape(made.init, RNG, spec), spec, RNG)


@functools.cache
def program(task, part, fields):
    """What a task traces: the text, and the bytes of constants. fields: the repr of a dict."""
    jaxpr = traced(task, part, ast.literal_eval(fields))
    constants = [*jaxpr.consts]
    for equation in equations(jaxpr.jaxpr):
        for value in equation.params.values():
            constants += getattr(value, "consts", [])
    return re.sub("0x[0-9a-f]+", "", str(jaxpr)), [np.asarray(x).tobytes() for x in constants]


@pytest.mark.parametrize("field", wiring.PROGRAMS)
def test_a_field_changes_the_program(field):
    task, part, value, others = wiring.PROGRAMS[field]
    fields = (repr(others), repr({**others, field: value}))
    before, after = (program(task, part, each) for each in fields)
    differs = before != after  # not in the assertion, which would print both
    assert differs


# --------------------------------------------------------------------------- fields of the data


def examples_of(fields):
    """What training sees of one example, in twenty draws."""
    config = default.data()
    config.update_from_flattened_dict({"image_size": 8, **fields})
    picture = np.random.default_rng(0).integers(0, 256, (12, 24, 3)).astype(np.uint8)
    boxes = np.array([[0.1, 0.2, 0.6, 0.7], [0.5, 0.1, 0.9, 0.4]], np.float32)
    example = {"image": picture, "boxes": boxes, "labels": np.array([2, 3], np.int32)}
    transform = data.make_transform(config, train=True)
    return [transform(example, np.random.default_rng(i)) for i in range(20)]


@pytest.mark.parametrize("field", wiring.EXAMPLES)
def test_a_field_changes_the_examples(field):
    value, others = wiring.EXAMPLES[field]
    before, after = examples_of(others), examples_of({**others, field: value})
    assert any(
        a.keys() != b.keys() or any(not np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(before, after, strict=True)
    )


# --------------------------------------------------------------------------- fields of the loop


class Counted(flax.struct.PyTreeNode):
    """A state that counts its steps."""

    params: Any
    ema_params: Any = None
    opt_state: Any = PowerAverages(np.zeros((), np.int32), None, {"0.1": np.zeros(1)})


class Given(Evaluator):
    """An evaluator whose score is best at step 3."""

    def __init__(self):
        pass

    def measure(self, state, rng, stopped=lambda: False):
        return {"eval_score": abs(float(state.params) - 3.0)}

    def draw(self, state, rng):
        return {"picture": np.zeros((2, 2, 3), np.float32)}


def events(directory, monkeypatch, **fields):
    """Steps of a run of seven by what happened: logged, evaluated, drawn, saved; and the best."""
    config = default.get_config()
    config.update_from_flattened_dict({"num_steps": 7, **fields})
    run = Start(
        step=0,
        state=Counted(jnp.zeros(())),
        constants=None,
        rng=RNG,
        batches=itertools.repeat(None),
        train_step=lambda state, *_: (
            Counted(state.params + 1),
            {"loss": state.params, "finite": jnp.ones((), bool)},
        ),
        evaluator=Given(),
        mode="single",
    )
    monkeypatch.setattr(loop, "resolve", lambda config, directory: config)
    monkeypatch.setattr(loop, "start", lambda *_: run)
    loop.train(config, directory)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    best = directory / "best" / "best.json"
    return {
        "logged": [line["step"] for line in lines if "loss" in line],
        "evaluated": [line["step"] for line in lines if "eval_score" in line],
        "drawn": sorted(int(p.stem[-8:]) for p in (directory / "images").glob("*.png")),
        "saved": sorted(int(path.name) for path in (directory / "checkpoints").glob("[0-9]*")),
        "averaged": sorted(int(path.name) for path in (directory / "averages").glob("[0-9]*")),
        "best": json.loads(best.read_text())["step"] if best.exists() else None,
    }


EVENTS = [
    ({}, {"logged": [7], "evaluated": [7], "saved": [7], "best": None}),
    ({"log.every_steps": 3}, {"logged": [3, 6, 7]}),
    ({"log.eval_every_steps": 2}, {"evaluated": [2, 4, 6, 7]}),
    ({"log.images_every_steps": 0}, {"drawn": [7]}),
    ({"log.images_every_steps": 3}, {"drawn": [1, 2, 3, 6, 7]}),
    ({"checkpoint.every_steps": 2}, {"saved": [4, 6, 7]}),
    ({"checkpoint.every_steps": 2, "checkpoint.keep": 2}, {"saved": [6, 7]}),
    ({}, {"averaged": []}),
    ({"optimizer.averages": (0.1,)}, {"averaged": [7]}),
    ({"optimizer.averages": (0.1,), "checkpoint.averages_every_steps": 3}, {"averaged": [3, 6, 7]}),
    ({"checkpoint.best": "eval_score", "log.eval_every_steps": 1}, {"best": 3}),
    (
        *({"checkpoint.best": "eval_score", "checkpoint.best_mode": "max",
           "log.eval_every_steps": 1}, {"best": 7}),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), EVENTS)
def test_events_of_the_loop_come_when_the_config_says(fields, expected, tmp_path, monkeypatch):
    seen = events(tmp_path, monkeypatch, **fields)
    assert {name: seen[name] for name in expected} == expected


# ----------------------------------------------------------------- fields of what a run starts with


def pixel_config(**fields):
    """Latent denoising of synthetic pictures of 8 pixels, without a first stage."""
    return several.make_config(**{"parallel.mode": "mesh", **fields})


def started(directory, **fields):
    config = loop.resolve(pixel_config(**fields), directory)
    with Checkpointer(directory / "checkpoints") as checkpoints:
        return start.start(config, directory, checkpoints)


def test_a_run_starts_on_its_mesh_from_its_seed_and_with_latents_if_it_caches_them(tmp_path):
    rules = ((".*unet.*kernel", "fsdp(min_mb=0)"), (".*", "replicate"))
    fields = {"parallel.mesh.data": 2, "parallel.mesh.fsdp": 2, "parallel.mesh.tensor": 2}
    fields |= {"parallel.rules": rules, "seed": 2**32 + 3, "first_stage.cache": True}
    run = started(tmp_path, **fields)
    unet = run.state.params["unet"]
    kernel, bias = (unet["input_blocks_0_0"][name] for name in ("kernel", "bias"))
    assert dict(kernel.sharding.mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert "fsdp" in kernel.sharding.spec and "fsdp" not in bias.sharding.spec
    assert run.mode == "mesh" and jax.random.key_data(run.rng).tolist() == [1, 3]
    batch = next(run.batches)
    assert batch["moments"].shape == (8, 8, 8, 3) and "image" not in batch


def test_the_seed_orders_the_data(tmp_path):
    fields = {"parallel.mode": "single", "first_stage.cache": False}
    first, again, other = (
        next(started(tmp_path / str(i), **fields, seed=seed).batches)["image"]
        for i, seed in enumerate((0, 0, 1))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.dtype == np.uint8  # scaled in the step


def test_a_run_learns_from_one_split_and_is_evaluated_on_the_other(tmp_path, monkeypatch):
    sources = {
        split: data.ArraySource(
            {"image": np.full((8, 8, 8, 3), level, np.uint8), "caption": ["red circle"] * 8}
        )
        for split, level in (("train", 0), ("test", 255))
    }
    monkeypatch.setattr(data, "make_source", lambda config, split: sources[split])
    monkeypatch.setattr(start, "Evaluator", lambda *given: Mock(spec=Evaluator, given=given))
    iterate, workers = data.iterate, []
    monkeypatch.setattr(
        data,
        "iterate",
        lambda *given, **how: workers.append(how.pop("workers")) or iterate(*given, **how),
    )
    fields = {"parallel.mode": "single", "first_stage.normalization": "none", "data.workers": 2}
    with pytest.raises(
        ValueError, match=r"data\.workers=2 can't share what a run caches: set first"
    ):
        started(tmp_path, **fields, **{"first_stage.cache": True})
    with pytest.raises(ValueError, match=r"data\.workers=2 can't share what a run caches"):
        started(tmp_path, **fields, **{"first_stage.cache": False, "cache_texts": True})
    run = started(tmp_path, **fields, **{"first_stage.cache": False})
    assert workers[-1] == 2 and sum(workers) == 2  # the scale needs none
    assert set(np.unique(next(run.batches)["image"])) == {0}
    given = run.evaluator.given
    assert sources["test"] in given and sources["train"] not in given


def pictures(count):
    """A source of `count` pictures, ever brighter, with their numbers for labels."""
    noise = np.random.default_rng(0).integers(0, 90, (count, 8, 8, 3))
    images = (noise + 160 * np.arange(count)[:, None, None, None] / count).astype(np.uint8)
    return data.ArraySource({"image": images, "class_label": np.arange(count)}), images


@pytest.mark.parametrize("num_batches", [1, 3])
@pytest.mark.parametrize("normalization", ["scalar", "channel"])
def test_the_latent_scale_is_that_of_the_batches_that_the_config_says(normalization, num_batches):
    config = pixel_config(
        **{"parallel.mode": "single", "first_stage.num_batches": num_batches,
           "first_stage.normalization": normalization}
    )  # fmt: skip
    source, _ = pictures(24)
    plain = FirstStage({}, jnp.ones(()), jnp.zeros(()), make_autoencoder(config.autoencoder))
    measured = frozen.measure_scale(config, plain, source)
    batches = data.iterate(
        source, data.make_transform(config.data, True), batch_size=8, seed=config.seed
    )
    seen = np.concatenate([batch["image"] for batch in itertools.islice(batches, num_batches)])
    axes = (0, 1, 2) if normalization == "channel" else (0, 1, 2, 3)
    np.testing.assert_allclose(measured.scale_factor, 1 / seen.std(axes), rtol=1e-4)
    shift = seen.mean(axes) if normalization == "channel" else 0.0
    np.testing.assert_allclose(measured.shift, shift, atol=1e-5)


def test_a_run_reads_the_perceptual_weights_that_the_config_names(monkeypatch):
    fields = {"autoencoding.perceptual_path": "here", "autoencoding.perceptual": "alex"}
    config = make_config("autoencoding", **fields)
    monkeypatch.setattr(frozen, "load_lpips_params", lambda net, path: {"of": (net, path)})
    loaded = frozen.load_constants(config, PerceptualConstants(None), None, None, None)
    assert loaded.lpips == {"of": ("alex", "here")}


def test_the_tokenizer_is_the_one_that_the_config_describes(tmp_path):
    config = default.get_config()
    captions = data.ArraySource({"caption": np.array(["a b c d", "a b"])})

    def made(**fields):
        config.tokenizer.update(fields)
        return make_tokenizer(config, captions, None, None)[1]

    words = made(name="word", vocab_size=4, max_length=3)
    assert words(["b c a e"]).tolist() == [[3, 1, 2]] and words.vocab_size == 4
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "b"]))
    pieces = made(name="bert", path=str(vocabulary), max_length=4)
    assert pieces(["b"]).tolist() == [[2, 5, 3, 0]]
    assert made(name="none") is None


# ------------------------------------------------------------------------ fields of an evaluation


def evaluated(count, **fields):
    """An evaluator of `count` pictures, whose samples are the negatives of its inputs."""
    config = pixel_config(**{"batch_size": 4, **fields})

    def eval_step(state, constants, batch, rng, *, axis_name=None):
        return {"value": batch["class_label"].astype(np.float32)}

    def show(state, constants, batch, rng, *, axis_name=None):
        return {"inputs": batch["image"], "samples": -batch["image"]}

    source, images = pictures(count)
    task, layout = SimpleNamespace(eval_step=eval_step, show=show), {"mesh": None, "rules": ()}
    return Evaluator(config, task, {}, source, None, "single", layout), images


@pytest.mark.parametrize(("num_batches", "mean"), [(1, 2.0), (2, 2.5), (9, 2.5)])
def test_an_evaluation_is_the_mean_over_its_batches_without_the_padding(num_batches, mean):
    made, _ = evaluated(6, **{"log.eval_batches": num_batches})
    assert made.measure({}, RNG) == {"eval_value": mean}


def test_each_batch_of_an_evaluation_draws_anew():
    made, _ = evaluated(8, **{"log.eval_batches": 2})
    seen = []

    def step(state, constants, batch, rng):
        seen.append(jax.random.key_data(rng).tolist())
        return {"value": np.zeros(4), "weight": np.ones(4)}

    made._eval_step = step
    made.measure({}, RNG)
    assert len(seen) == 2 and seen[0] != seen[1]


def test_a_drawing_has_as_many_pictures_as_the_config_says():
    made, images = evaluated(6, **{"log.num_images": 3})
    (grid,) = made.draw({}, RNG).values()
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    assert np.abs(grid[2:10, 12:20].astype(int) - images[2]).max() <= 1  # evenly spaced


def test_a_distance_is_over_so_many_pictures_and_of_the_features_that_the_config_names(
    monkeypatch,
):
    asked = []

    def make_features(name, path):
        asked.append((name, path))
        return FeatureNet(name, {}, lambda params, levels: {"features": levels.mean((1, 2))})

    monkeypatch.setattr(evaluator, "make_features", make_features)
    fields = {"log.distance": "vgg16", "log.distance_path": "here", "log.distance_images": 24}
    made, images = evaluated(30, **fields)
    got = made.measure({}, RNG)["eval_fd_vgg16"]
    assert asked == [("vgg16", "here")]
    real = images[np.arange(24) * 30 // 24].mean((1, 2))
    assert got == pytest.approx(frechet_distance(gaussian(real), gaussian(255.0 - real)), rel=1e-4)
    # A part of a batch counts as a whole one: 28 pictures in batches of 7.
    rounded, _ = evaluated(30, **{**fields, "batch_size": 7})
    real = images[np.arange(28) * 30 // 28].mean((1, 2))
    wanted = frechet_distance(gaussian(real), gaussian(255.0 - real))
    assert rounded.measure({}, RNG)["eval_fd_vgg16"] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ValueError, match=r"^log\.distance='vgg16' is of samples or reconst"):
        evaluated(30, **{**fields, "task": "classifying"})
    batches = itertools.count()  # a signal comes after the first batch of the distance
    rounded._config.log.eval_batches = 1
    assert rounded.measure({}, RNG, lambda: next(batches) == 2) is None
    every, _ = evaluated(30, **{**fields, "log.distance_images": 30})
    assert every.measure({}, RNG)["eval_fd_vgg16"] != pytest.approx(got, rel=1e-2)


def test_neighbours_are_searched_for_by_the_name_in_the_config(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setitem(
        retrieval.SEARCHES, "mine",
        lambda table, queries, k, exclude: asked.append(k) or retrieval._by_numpy(
            table, queries, k, exclude
        ),
    )  # fmt: skip
    source, _ = pictures(5)
    table = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    retrieval.Database(table).save(tmp_path / "train.npz")
    config = default.data()
    config.update({"embedding": "precomputed", "embedding_path": str(tmp_path)})
    config.update({"num_neighbours": 2, "search": "mine"})
    found = retrieval.with_embeddings(source, "train", source, config)
    assert asked == [2] and found[0]["neighbours"].shape == (2, 4)
