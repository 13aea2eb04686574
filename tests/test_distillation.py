"""Distillation: its objective against formulas in NumPy, its start, its resume, its errors."""

import functools
import logging
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_start import begin, few
from tiny import make_config

from configs import openmoji_few_steps
from latent_diffusion import convert
from latent_diffusion.core.rng import (
    example_keys,
    init_key,
    normal_per_example,
    split_per_example,
    uniform_per_example,
)
from latent_diffusion.core.types import Conditioning
from latent_diffusion.data.tokenizers import load_tokenizer
from latent_diffusion.generation.adapters import load_adapter
from latent_diffusion.generation.loading import load
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.nets.autoencoder import Identity
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.optimisation.optimizers import make_optimizer
from latent_diffusion.process import objectives
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.process.spacings import distilled_timesteps, spacing
from latent_diffusion.runtime import parallel, workdir
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.tasks import TASKS
from latent_diffusion.tasks.denoising import Denoising
from latent_diffusion.tasks.distillation import Distillation
from latent_diffusion.training import start

RNG, SIDE, BATCH = jax.random.key(3), 2, 8
WEIGHTS = np.array([0.3, -0.7, 0.9, 0.4], np.float32)
LABELS = np.arange(BATCH, dtype=np.int32) % 3
PICTURES = np.random.default_rng(0).normal(size=(BATCH, SIDE, SIDE, 3)).astype(np.float32)
BATCH_OF = {"image": jnp.asarray(PICTURES), "class_label": jnp.asarray(LABELS)}
KINDS = {"eps": "linear", "v": "cosine", "flow": "rectified_flow"}


class Line(nn.Module):
    """A network that is a line in its latent, its timestep, its condition and its guidance."""

    guidance_dim: int | None = None

    @nn.compact
    def __call__(self, z_t, t, conditioning: Conditioning, train=False):
        w = self.param("weights", lambda key: jnp.asarray(WEIGHTS))
        rest = w[1] * t / 1000 + w[2] * conditioning.context.mean((1, 2))
        rest = rest if conditioning.guidance is None else rest + w[3] * conditioning.guidance
        return w[0] * z_t + rest[:, None, None, None]


@functools.cache
def made(kind, method="consistency", scales=(2.0, 5.0), embedded=True, **fields):
    """A distillation of lines, its state and its constants; the student isn't its teacher."""
    conditioner = make_conditioner({"class_label": {"num_classes": 3, "width": 4}})
    noise = make_schedule(KINDS[kind], 1000, 0.0015, 0.0195)
    network = Line(guidance_dim=4 if embedded else None)
    optimizer = make_config("denoising").optimizer
    student = Denoising(
        denoiser=Denoiser({}, noise, network, conditioner, kind),
        autoencoder=Identity(3),
        tx=make_optimizer(optimizer, 4),
        image_shape=(SIDE, SIDE, 3),
        sampling={},
        ema_decay=0.9,
        pretrained=frozenset({"class_label"}),
        loss=fields.pop("loss", "l2"),
    )
    task = Distillation(student, method, scales, **fields)
    state, constants = task.init(init_key(0), BATCH_OF)
    params = jax.tree.map(lambda x: 1.1 * x, state.params)
    return task, state.replace(params=params, opt_state=student.tx.init(params)), constants


def by_hand(kind, loss, scales, embedded, steps, phases):
    """The loss [B] of the state of `made`, in NumPy with 64 bits; the draws are the task's."""
    task, state, constants = made(kind, scales=scales, embedded=embedded, loss=loss, phases=phases)
    noise = task.student.denoiser.schedule
    keys = split_per_example(example_keys(RNG, BATCH), 5)
    eps = np.asarray(normal_per_example(keys[2], (SIDE, SIDE, 3)), np.float64)
    low, high = scales
    w = low + (high - low) * np.asarray(uniform_per_example(keys[3]), np.float64) - 1
    ratio = 1000 // steps
    index = np.floor(np.asarray(uniform_per_example(keys[1])) * steps).astype(int)
    t = np.arange(1, steps + 1)[index] * ratio - 1
    alpha, sigma = (np.asarray(x, np.float64) for x in (noise.alphas, noise.sigmas))
    table = np.asarray(constants.conditioner["class_label"]["embedding"]["embedding"], np.float64)

    def column(x):
        return x[:, None, None, None]

    def network(weights, z, t, labels, guidance):
        rest = weights[1] * t / 1000 + weights[2] * table[labels].mean(1) + weights[3] * guidance
        return weights[0] * z + column(rest)

    def both(pred, z, t):  # z_0 and eps of a prediction
        a, s = column(alpha[t]), column(sigma[t])
        if kind == "eps":
            return (z - s * pred) / a, pred
        if kind == "v":
            return a * z - s * pred, s * z + a * pred
        return z - s * pred, z + (1 - s) * pred

    def jump(weights, z, t):
        guidance = w if embedded else 0.0
        z_0, e = both(network(weights, z, t, LABELS, guidance), z, t)
        skip = 0.25 / ((10 * t) ** 2 + 0.25)
        start = column(skip) * z + column(10 * t / np.sqrt((10 * t) ** 2 + 0.25)) * z_0
        ends = np.array([0, *(1000 * np.arange(1, phases) // phases - 1)])[index * phases // steps]
        return np.where(
            column(ends) > 0, column(alpha[ends]) * z_0 + column(sigma[ends]) * e, start
        )

    z = column(alpha[t]) * PICTURES + column(sigma[t]) * eps
    teacher_weights = WEIGHTS.astype(np.float64)
    cond = both(network(teacher_weights, z, t, LABELS, 0.0), z, t)
    null = both(network(teacher_weights, z, t, np.full(BATCH, 3), 0.0), z, t)
    z_0, e = (c + column(w) * (c - n) for c, n in zip(cond, null, strict=True))
    # The solver's last step ends at the first entry of the table, as in diffusers' script.
    before = np.maximum(t - ratio, 0)
    z_before = column(alpha[before]) * z_0 + column(sigma[before]) * e
    live = np.asarray(state.params["unet"]["weights"], np.float64)
    average = np.asarray(state.target["unet"]["weights"], np.float64)
    error = jump(live, z, t) - jump(average, z_before, before)
    if loss == "l2":
        return (error**2).mean((1, 2, 3))
    return (np.sqrt(error**2 + 1e-6) - 1e-3).mean((1, 2, 3))


@pytest.mark.parametrize(
    ("kind", "loss", "scales", "embedded", "phases"),
    [
        ("eps", "pseudo_huber", (3.0, 15.0), True, 1),
        ("v", "l2", (2.0, 2.0), False, 1),
        ("v", "l2", (2.0, 2.0), False, 5),
        ("flow", "l2", (2.0, 5.0), False, 1),
        ("v", "l2", (1.0, 4.0), True, 1),
    ],
)
def test_the_loss_is_that_of_latent_consistency(kind, loss, scales, embedded, phases):
    fields = {"scales": scales, "embedded": embedded, "loss": loss, "phases": phases}
    task, state, constants = made(kind, **fields)
    keys = example_keys(RNG, BATCH)
    got = task._loss(state.params, state.target, constants, BATCH_OF, keys)
    want = by_hand(kind, loss, scales, embedded, 50, phases)
    # alpha is 0.002 … 1, and the error of 32 bits in z_0 is that of eps over alpha.
    np.testing.assert_allclose(got, want, rtol=3e-5, atol=1e-6)


def test_the_steps_of_a_phased_student_start_where_its_phases_do():
    config = openmoji_few_steps.get_config("phased")
    own = config.distillation
    starts = distilled_timesteps(1000, own.distilled_steps)[:: -own.distilled_steps // own.phases]
    schedule = make_schedule("cosine", 1000, 0.0015, 0.0195)
    taken = spacing(config.sampling.spacing, schedule, config.sampling.num_steps)
    np.testing.assert_allclose(taken[:-1], starts)
    assert len(starts) == own.phases == 4 and config.sampling.sampler == "ddim"


def test_one_evaluation_learns_the_guided_prediction():
    task, state, constants = made("eps", "guidance", (2.0, 2.0), False)
    assert state.target is None
    keys = example_keys(RNG, BATCH)
    weights = jnp.asarray(WEIGHTS)
    table = np.asarray(constants.conditioner["class_label"]["embedding"]["embedding"])
    means = table.mean(1)
    same = task._loss({"unet": {"weights": weights}}, None, constants, BATCH_OF, keys)
    # The student without guidance errs by (scale − 1)(cond − null) everywhere.
    error = WEIGHTS[2] * (means[LABELS] - means[3])
    np.testing.assert_allclose(same, error**2, rtol=1e-3, atol=1e-7)
    plain, *_ = made("eps", "guidance", (1.0, 1.0), False)
    exact = plain._loss({"unet": {"weights": weights}}, None, constants, BATCH_OF, keys)
    np.testing.assert_allclose(exact, 0.0, atol=1e-12)
    weighted = replace(task, student=replace(task.student, loss_weight="min_snr"))
    t = np.floor(1000 * np.asarray(uniform_per_example(split_per_example(keys, 5)[1]))).astype(int)
    noise = task.student.denoiser.schedule
    snr = np.square(np.asarray(noise.alphas, np.float64) / np.asarray(noise.sigmas))[t]
    got = weighted._loss({"unet": {"weights": weights}}, None, constants, BATCH_OF, keys)
    np.testing.assert_allclose(got, np.minimum(1, 5 / snr) * same, rtol=1e-3, atol=1e-9)


def test_a_student_is_evaluated_by_its_averaged_parameters():
    task, state, constants = made("eps")
    seen = task.eval_step(state, constants, BATCH_OF, RNG)["loss"]
    keys, average = example_keys(RNG, BATCH), state.ema_params
    np.testing.assert_array_equal(seen, task._loss(average, average, constants, BATCH_OF, keys))
    live = task._loss(state.params, state.params, constants, BATCH_OF, keys)
    assert np.abs(seen - live).max() > 1e-4


def test_targets_are_made_by_an_average_and_have_no_gradient():
    task, state, constants = made("eps")
    state = state.replace(step=jnp.asarray(1000))  # the average is warm
    after, _ = task.train_step(state, constants, BATCH_OF, RNG)
    average = 0.9 * state.ema_params["unet"]["weights"] + 0.1 * after.params["unet"]["weights"]
    np.testing.assert_allclose(after.ema_params["unet"]["weights"], average, rtol=1e-6)
    want = 0.95 * state.target["unet"]["weights"] + 0.05 * after.params["unet"]["weights"]
    np.testing.assert_allclose(after.target["unet"]["weights"], want, rtol=1e-6)
    alone, own, _ = made("eps", target_decay=0.0)
    assert own.target is None
    keys = example_keys(RNG, BATCH)

    def loss(params, target):
        return jnp.mean(task._loss(params, target, constants, BATCH_OF, keys))

    grads = jax.grad(loss)(state.params, state.params)
    both = jax.grad(lambda params: loss(params, params))(state.params)
    np.testing.assert_array_equal(both["unet"]["weights"], grads["unet"]["weights"])
    moved, _ = alone.train_step(own, constants, BATCH_OF, RNG)
    assert not np.array_equal(moved.params["unet"]["weights"], own.params["unet"]["weights"])
    averages = jax.tree.map(lambda x: x + 1, own.ema_params)
    again, _ = alone.train_step(own.replace(ema_params=averages), constants, BATCH_OF, RNG)
    np.testing.assert_array_equal(again.params["unet"]["weights"], moved.params["unet"]["weights"])


def test_all_modes_take_the_same_steps():
    task, first, constants = made("eps")
    ends = {}
    for mode in ("single", "pmap", "mesh"):
        mesh = parallel.make_mesh({"data": 8}) if mode == "mesh" else None
        step = parallel.compile_step(task.train_step, mode, mesh=mesh)
        state = parallel.place(jax.tree.map(np.asarray, first), mode, mesh)
        for _ in range(3):
            batch = {"image": PICTURES, "class_label": LABELS}
            state, _ = step(state, constants, batch, RNG)
        ends[mode] = jax.tree.map(np.asarray, parallel.to_global(state, mode))
    for mode in ("pmap", "mesh"):
        for a, b in zip(*map(jax.tree.leaves, (ends["single"], ends[mode])), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


# ------------------------------------------------------------------------------------- the run


PIXELS = {  # no first stage has to be trained
    "autoencoder.regularization": "identity", "data.image_size": 8, "conditioners.text.depth": 0,
    "log.num_images": 1, "log.images_every_steps": 0, "checkpoint.every_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The workdir of a teacher."""
    path = tmp_path_factory.mktemp("distillation") / "teacher"
    begin(few("denoising", **PIXELS, **{"first_stage.num_batches": 1}), path)
    return path


def student(taught, **fields):
    return few("distillation", **{**PIXELS, "distillation.teacher": str(taught), **fields})


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def started(config, directory):
    with Checkpointer(directory / "checkpoints") as checkpoints:
        return start.start(start.resolve(config, directory), directory, checkpoints)


def test_a_student_starts_as_its_teacher_and_goes_on_without_it(taught, tmp_path):
    config = student(taught, **{"unet.guidance_dim": 4})
    run, model = started(config, tmp_path), load(taught)
    for params in (run.state.params, run.state.target, run.state.ema_params):
        own = dict(params["unet"])
        assert params["conditioner"] == {}
        assert not np.any(own.pop("time_embed_guidance")["kernel"])
        equal(own, model.denoiser.params["unet"])
    equal(run.constants.teacher, model.denoiser.params["unet"])
    equal(run.constants.conditioner, model.denoiser.params["conditioner"])
    tokenizer = load_tokenizer(tmp_path / workdir.TOKENIZER)
    np.testing.assert_array_equal(*(t(["red circle"]) for t in (tokenizer, model.tokenizer)))

    later = jax.tree.map(lambda x: x + 1, run.state)
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, later, {"seed": 0})
    moved = taught.rename(tmp_path / "moved")
    try:
        again = started(config, tmp_path)
    finally:
        moved.rename(taught)
    equal(again.state, later)
    equal(again.constants, run.constants)


def test_a_distilled_model_knows_its_steps_and_scales(taught, tmp_path, caplog):
    fields = {"unet.guidance_dim": 4, "distillation.guidance_scales": (1.0, 3.0)}
    begin(student(taught, **fields, **{"sampling.guidance_scale": 2.0}), tmp_path / "run")
    model = load(tmp_path / "run")
    assert model.defaults["sampler"] == "lcm" and model.defaults["distilled_steps"] == 20
    assert model.defaults["num_steps"] == 2 and model.defaults["guidance_scale"] == 2.0
    model.save(tmp_path / "saved")  # in others' workdirs, too
    assert list(load(tmp_path / "saved").origin["guidance_range"]) == [1.0, 3.0]
    with caplog.at_level(logging.WARNING):
        model.sample(RNG, "red circle")
        assert not caplog.records
        model.sample(RNG, "red circle", guidance_scale=4.0)
    assert "guidance_scale=4, but the model is distilled for 1 to 3" in caplog.text


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adaptation_is_a_file_for_its_teacher(kind, taught, tmp_path):
    fields = {"lora.rank": 1, "lora.kind": kind, "distillation.guidance_scales": (2.0, 2.0)}
    config = student(taught, **fields)
    run = started(config, tmp_path / "run")
    equal(run.state.target, run.state.params)
    assert run.constants.teacher is None  # the base of the adaptation serves as the teacher
    equal(run.constants.base["unet"], load(taught).denoiser.params["unet"])
    moved = jax.tree.map(lambda x: x + 0.1, run.state)
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(1, moved, {"seed": 0})
    convert.write(convert.read(tmp_path / "run"), tmp_path / "lcm_lora.safetensors", "lora")
    written, of_run = (load_adapter(tmp_path / n) for n in ("lcm_lora.safetensors", "run"))
    assert of_run.path == str(tmp_path / "run")
    equal(of_run.modules, written.modules)
    with pytest.raises(ValueError, match=r"^\S+: this workdir is a model, no adapter"):
        load_adapter(taught)
    merged = load(taught, lora={tmp_path / "lcm_lora.safetensors": 1.0})
    whole, other = (m.denoiser.params["unet"] for m in (load(tmp_path / "run"), merged))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, other)
    kernel = ["middle_block_1", "transformer_blocks_0", "attn1", "to_q"]
    changed, base = (functools.reduce(dict.get, kernel, tree)["kernel"]
                     for tree in (whole, run.constants.base["unet"]))  # fmt: skip
    assert np.abs(changed - base).max() > 1e-4
    assert list(load(tmp_path / "run").origin["guidance_range"]) == [1.0, 1.0]


DIT = {
    "backbone": "dit", "dit.width": 16, "dit.depth": 1, "dit.num_heads": 2, "dit.patch_size": 2,
}  # fmt: skip
EMBEDDED = {"unet.guidance_dim": 4, "distillation.guidance_scales": (1.0, 3.0)}


@pytest.mark.parametrize(
    ("fields", "moved"),
    [
        ({"lora.rank": 1}, "lora"),
        ({**EMBEDDED, "distillation.method": "guidance"}, "time_embed_guidance"),
        ({**DIT, "distillation.phases": 2}, "blocks_0"),
    ],
)
def test_students_of_every_kind_learn_beside_a_frozen_teacher(fields, moved, taught, tmp_path):
    if "backbone" in fields:
        taught = tmp_path / "teacher"
        begin(few("denoising", **PIXELS, **DIT, **{"first_stage.num_batches": 1}), taught)
    fields = {"distillation.guidance_scales": (2.0, 2.0), **fields}
    run = started(student(taught, **fields), tmp_path / "run")
    # A fresh teacher predicts zeros, and so would its student.
    start = run.state.replace(params=jax.tree.map(lambda x: x + 0.01, run.state.params))
    before = jax.tree.map(np.array, start.params)  # the step takes the state's memory
    kept = jax.tree.map(np.array, run.constants)
    state, values = run.train_step(start, run.constants, next(run.batches), run.rng)
    assert 0 < float(values["loss"]) < np.inf
    changed = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, state.params)
    paths = [jax.tree_util.keystr(p) for p, x in jax.tree.leaves_with_path(changed) if x > 0]
    assert any(moved in path for path in paths), paths
    equal(run.constants, kept)


def test_a_teacher_that_does_not_fit_is_one_line(taught, tmp_path, monkeypatch):
    def refused(**fields):
        with pytest.raises(ValueError) as error:
            start.resolve(student(taught, **fields), tmp_path / "new")
        assert "\n" not in str(error.value)
        return str(error.value)

    other = str(tmp_path / "other")
    assert "distillation.teacher is empty" in refused(**{"distillation.teacher": ""})
    assert "has its own first stage" in refused(**{"first_stage.path": other})
    assert "starts from its teacher alone" in refused(init_from=other)
    config = student(taught)
    config.conditioners = {"class_label": {"num_classes": 3, "width": 8}}
    with pytest.raises(ValueError, match="is conditioned by text, but conditioners are class_l"):
        start.resolve(config, tmp_path / "new")
    bundle = convert.read(taught)
    distilled = replace(bundle.unet, fields={**bundle.unet.fields, "guidance_dim": 4})
    for given, message in ((None, "holds no denoiser"), (distilled, "it is distilled already")):
        changed = replace(bundle, unet=given)
        monkeypatch.setattr(convert, "read", lambda path, changed=changed: changed)
        assert message in refused()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distillation.method": "magic"}, "'magic'; known: consistency, guidance"),
        ({"distillation.guidance_scales": (3.0, 1.0)}, "must be the least, the largest"),
        ({"distillation.distilled_steps": 1001}, "distilled_steps=1001 must lie in 1 … 1000"),
        ({"distillation.phases": 3}, "phases=3 must divide distilled_steps=20"),
        ({"distillation.phases": 0}, "phases=0 must divide"),
        (
            {"distillation.phases": 4, "distillation.distilled_steps": 48},
            "distilled_steps=48 must divide the 1000 timesteps",
        ),
        ({"distillation.phases": 2, "distillation.method": "guidance"}, "of the method consist"),
        ({"lora.rank": 1, "unet.guidance_dim": 4}, "has no guidance_dim"),
        ({"diffusion.loss": "l3"}, "unknown loss 'l3'"),
        ({"control": "edges"}, "a distillation has no control, which is 'edges'"),
        ({"textual_inversion.word": "<it>"}, "a distillation has no textual_inversion.word"),
        ({"diffusion.drop_rate": 0.1}, "a distillation has no diffusion.drop_rate, which is 0.1"),
        ({"diffusion.max_noise": 0.2}, r"by consistency has no diffusion\.max_noise=0\.2"),
        ({"diffusion.shift": 3.0}, r"by consistency has no diffusion\.shift=3\.0"),
        ({"diffusion.timestep_sampling": "logit_normal"}, "no diffusion.timestep_sampling='logit"),
        ({"diffusion.loss_weight": "min_snr"}, "no diffusion.loss_weight='min_snr'"),
        (
            {"distillation.method": "guidance", "diffusion.timestep_sampling": "loss"},
            "by guidance has no diffusion.timestep_sampling='loss'",
        ),
    ],
)
def test_bad_fields_are_one_line(fields, message):
    with pytest.raises(ValueError, match=message):
        TASKS["distillation"](make_config("distillation", **fields))


def test_pseudo_huber_is_a_square_below_c_and_a_distance_above():
    error = jnp.array([[1e-3, 0.0], [4.0, 4.0]])
    got = objectives.pseudo_huber(error, jnp.zeros((2, 2)), c=0.1)
    np.testing.assert_allclose(got, [(1e-3**2 / 0.2) / 2, 3.9], rtol=1e-3)
