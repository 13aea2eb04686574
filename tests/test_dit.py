"""The transformer over patches of the latent, and what it shares with the U-Net's tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several
from ml_collections import ConfigDict

import latent_diffusion as ldm
from configs import openmoji_dit
from latent_diffusion.convert.dit import _SIT, DIFFUSION
from latent_diffusion.core.rng import init_key
from latent_diffusion.core.types import Conditioning
from latent_diffusion.generation.model import Model
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.dit import DiT, positions_2d
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.tasks import TASKS
from latent_diffusion.training import init_from, loop
from latent_diffusion.training.batch_spec import batch_spec

SMALL = {"out_channels": 3, "width": 16, "depth": 2, "num_heads": 2, "base_size": 4}


def network(seed=0, context=None, vector=None, channels=3, size=(4, 6), **fields):
    """A small transformer with random parameters (not zeros anywhere), and its inputs."""
    dit = DiT(**{**SMALL, **fields})
    key = jax.random.key(seed)
    z = jax.random.normal(key, (2, *size, channels))
    conditioning = Conditioning(
        context=None if context is None else jax.random.normal(key, (2, 3, context)),
        vector=None if vector is None else jax.random.normal(key, (2, vector)),
    )
    t = jnp.array([3.0, 700.0])
    shapes = jax.eval_shape(dit.init, key, z, t, conditioning)["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), "float32"), shapes)
    return dit, params, z, t, conditioning


@pytest.mark.parametrize(
    ("fields", "millions"),
    [
        ({"width": 384, "depth": 12, "num_heads": 6}, 32.87),
        ({"width": 768, "depth": 12, "num_heads": 12}, 130.32),
        ({"width": 1024, "depth": 24, "num_heads": 16}, 457.84),
        ({}, 674.83),  # XL
    ],
    ids=["S", "B", "L", "XL"],
)
def test_the_sizes_of_the_paper(fields, millions):
    dit = DiT(learned_variance=True, **fields)
    z, t = jax.ShapeDtypeStruct((1, 32, 32, 4), "float32"), jax.ShapeDtypeStruct((1,), "float32")
    shapes = jax.eval_shape(dit.init, jax.random.key(0), z, t)["params"]
    table = 1001 * dit.width  # of labels, which the conditioner has here
    count = sum(x.size for x in jax.tree.leaves(shapes)) + table
    assert round(count / 1e6, 2) == millions


def test_every_block_is_the_identity_at_first_and_the_prediction_zero():
    dit = DiT(**SMALL)
    z = jax.random.normal(jax.random.key(1), (1, 4, 4, 3))
    params = dit.init(init_key(0), z, jnp.zeros(1))["params"]
    assert not dit.apply({"params": params}, z, jnp.zeros(1)).any()
    params["final_layer_linear"]["kernel"] = jnp.ones_like(params["final_layer_linear"]["kernel"])
    one_block = {k: v for k, v in params.items() if k != "blocks_1"}
    np.testing.assert_array_equal(
        dit.apply({"params": params}, z, jnp.zeros(1)),
        dit.clone(depth=1).apply({"params": one_block}, z, jnp.zeros(1)),
    )


def test_positions_of_another_size_span_the_trained_range():
    trained, larger = positions_2d(2, 2, 8, 2), positions_2d(4, 4, 8, 2)
    np.testing.assert_allclose(larger[np.array([0, 2, 8, 10])], trained, atol=1e-7)
    np.testing.assert_allclose(  # row 1, column 0: x = 0, y = 1
        positions_2d(2, 2, 8, 2)[2],
        [0, 0, 1, 1, np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)],
        atol=1e-7,
    )


def test_patches_keep_their_places():
    """Without blocks and positions the network is one linear map of each patch by itself."""
    dit, params, z, t, _ = network(depth=0)
    out = dit.apply({"params": params}, z, t)
    moved = dit.apply({"params": params}, z.at[0, 2:4, 4:6].add(1.0), t)
    changed = np.any(np.asarray(out != moved), -1)
    assert changed[0, 2:4, 4:6].all() and changed.sum() == 4
    assert out.shape == (2, 4, 6, 3)


@pytest.mark.parametrize("given", [{"context": 5}, {"vector": 16}, {"channels": 5}])
def test_each_condition_changes_the_prediction_of_its_example_alone(given):
    dit, params, z, t, conditioning = network(**given)
    out = dit.apply({"params": params}, z, t, conditioning)
    if "channels" in given:
        conditioning, z = Conditioning(concat=z[..., 3:]), z[..., :3]
        np.testing.assert_array_equal(out, dit.apply({"params": params}, z, t, conditioning))
    other = jax.tree.map(lambda x: x.at[0].add(1.0), conditioning)
    moved = dit.apply({"params": params}, z, t, other)
    assert (out[0] != moved[0]).all()
    np.testing.assert_array_equal(out[1], moved[1])


def test_the_learned_variance_is_left_out_of_the_prediction():
    dit, params, z, t, _ = network(learned_variance=True)
    last = params["final_layer_linear"]
    kernel, bias = (last[name].reshape(*last[name].shape[:-1], 4, 6) for name in ("kernel", "bias"))
    mean = {"kernel": kernel[..., :3].reshape(16, 12), "bias": bias[..., :3].reshape(12)}
    np.testing.assert_allclose(
        dit.apply({"params": params}, z, t),
        dit.clone(learned_variance=False).apply(
            {"params": {**params, "final_layer_linear": mean}}, z, t
        ),
        atol=1e-6,
    )


@pytest.mark.parametrize("fields", [{}, {"remat": "full"}, {"remat": "dots_saveable"}])
def test_a_loop_over_blocks_is_the_blocks_by_the_same_parameters(fields):
    """With gradients, and with the projections of context and timestep made before."""
    dit, params, z, t, conditioning = network(context=5, depth=3)
    looped = dit.clone(scan=True, **fields)
    of_loop = jax.eval_shape(looped.init, jax.random.key(0), z, t, conditioning)["params"]
    assert jax.tree.map(jnp.shape, of_loop) == jax.tree.map(jnp.shape, params)

    def answer(net):
        def loss(params):
            out = net.apply({"params": params}, z, t, conditioning)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    grads, out = answer(dit)
    got, seen = answer(looped)
    np.testing.assert_allclose(seen, out, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, grads)
    made = ["of_context", "of_timestep"]
    _, known = looped.apply({"params": params}, z, t, conditioning, mutable=made)
    nothing = Conditioning(context=jnp.zeros_like(conditioning.context))
    again = jax.jit(looped.apply)({"params": params, **known}, z, 0 * t, nothing)
    np.testing.assert_allclose(again, out, atol=1e-5)
    programs = [
        str(jax.make_jaxpr(net.apply)({"params": params}, z, t, conditioning))
        for net in (dit, looped)
    ]
    assert [program.count("tanh") for program in programs] == [3, 1]  # a GELU for each block


def test_sit_sees_the_share_of_data_and_points_to_it():
    """At t the share of data is alpha, and x − e of SiT is minus our flow e − x."""
    schedule = make_schedule("rectified_flow", 1000)
    dit, params, z, t, _ = network()
    here = dit.clone(sit=True).apply({"params": params}, z, t)
    theirs = dit.apply({"params": params}, z, schedule.alpha_t(t))
    np.testing.assert_allclose(here, -theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": (4, 5)}, "latent of 4×5 must be divisible by patch_size=2"),
        ({"num_heads": 3}, "width=16 must be divisible by 4 and by num_heads=3"),
        (
            {"vector": 8},
            "vector has width 8; the conditioner's width must be the transformer's, 16",
        ),
        ({"remat": "some"}, "dit.remat"),
    ],
)
def test_one_line_for_what_does_not_fit(changed, message):
    with pytest.raises(ValueError, match=message):
        network(**changed)


@pytest.mark.parametrize("variant", ["text", "class", "v", "smoke"])
def test_the_experiment_of_a_transformer_takes_a_step(variant):
    config = openmoji_dit.get_config(variant)
    task, spec = TASKS[config.task](config), batch_spec(config)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    state, constants = jax.eval_shape(task.init, rng, spec)
    after, _ = jax.eval_shape(task.train_step, state, constants, spec, rng)
    assert jax.tree.map(jnp.shape, after.params) == jax.tree.map(jnp.shape, state.params)
    assert ("class_label" in spec) == (variant == "class")


def test_a_transformer_trains_samples_and_moves_between_workdirs_like_a_unet(tmp_path):
    config = several.make_config(backbone="dit", num_steps=2)
    config.dit.update({"width": 16, "depth": 1, "num_heads": 2, "base_size": 4, "patch_size": 4})
    config.conditioners = ConfigDict(
        {"class_label": {"num_classes": 4, "width": 16, "route": "vector"}}
    )
    state = loop.train(config, tmp_path / "run")
    model = ldm.load(tmp_path / "run")
    assert model.denoiser.name == "dit" and "dit" in state.params
    model.save(tmp_path / "saved", "orbax")
    pictures = model.sample(jax.random.key(0), class_labels=[0, 2], num_steps=2)
    again = ldm.load(tmp_path / "saved")
    np.testing.assert_array_equal(
        pictures, again.sample(jax.random.key(0), class_labels=[0, 2], num_steps=2)
    )
    config.init_from, config.dit.width = str(tmp_path / "saved"), 8
    assert init_from.resolve(config).dit.width == 16


def model_with(**fields):
    """A model of classes with random parameters, without a first stage."""
    fields = {"out_channels": 4, **fields}
    dit, params, *_ = network(channels=4, size=(4, 4), **fields)
    table = jax.random.normal(jax.random.key(5), (6, dit.width))
    classes = {"num_classes": 5, "width": dit.width, "route": "vector"}
    denoiser = Denoiser(
        {"dit": params, "conditioner": {"class_label": {"embedding": {"embedding": table}}}},
        make_schedule("rectified_flow" if dit.sit else "sqrt_linear"),
        dit,
        make_conditioner({"class_label": classes}),
        "flow" if dit.sit else "eps",
        "dit",
    )
    return Model(denoiser=denoiser, origin={"diffusion": _SIT if dit.sit else DIFFUSION})


@pytest.mark.parametrize(
    ("format", "path", "fields"),
    [
        ("diffusers", "folder", {"frequency_shift": 1, "mlp_norm_eps": 1e-5}),
        ("compvis", "dit.safetensors", {"width": 384, "num_heads": 6, "depth": 1}),
        ("compvis", "SiT-S-2.safetensors", {"width": 384, "num_heads": 6, "depth": 1, "sit": True}),
    ],
)
def test_other_formats_hold_every_array_bitwise(format, path, fields, tmp_path):
    model = model_with(learned_variance=True, **fields)
    model.save(tmp_path / path, format)
    read = ldm.load(tmp_path / path)
    assert read.denoiser.network == model.denoiser.network
    assert read.denoiser.conditioner == model.denoiser.conditioner
    jax.tree.map(np.testing.assert_array_equal, read.denoiser.params, model.denoiser.params)


def test_a_single_file_of_a_kind_without_yaml_and_averages_takes_neither(tmp_path, caplog):
    path = tmp_path / "dit.safetensors"
    model_with(width=384, num_heads=6, depth=1).save(path, "compvis")
    other = tmp_path / "other.yaml"
    other.write_text("model: {target: ldm.models.diffusion.ddpm.LatentDiffusion}")
    with pytest.raises(ValueError, match="ema=True is for files with a U-Net, of which there are"):
        ldm.load(path, ema=True)
    with pytest.raises(ValueError, match=f"config={other} is for kinds of files that have a yaml"):
        ldm.load(path, config=other)
    other.rename(path.with_suffix(".yaml"))
    ldm.load(path)
    assert f"{path.with_suffix('.yaml')} isn't used" in caplog.text


def test_a_loaded_model_loops_over_its_blocks_where_it_is_asked_to(tmp_path):
    model_with(depth=3).save(tmp_path / "folder", "diffusers")
    z, t, vector = (
        jax.random.normal(jax.random.key(6), size) for size in ((2, 4, 4, 4), 2, (2, 16))
    )
    answers = {}
    for scan in (None, False, True):
        denoiser = ldm.load(tmp_path / "folder", scan=scan).denoiser
        answer = jax.jit(lambda z, t, of=denoiser: of.denoise(z, t, Conditioning(vector=vector)))
        program = answer.lower(z, t)
        assert ("stablehlo.while" in program.as_text()) is bool(scan)
        answers[scan] = program.compile()(z, t)
    np.testing.assert_allclose(answers[True], answers[False], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "path", "fields", "message"),
    [
        ("compvis", "dit.safetensors", {}, "DiT's format has no width=16 with num_heads=2"),
        ("compvis", "dit.safetensors", {"sit": True}, "the name of SiT's files, and of no others"),
        ("diffusers", "folder", {"mlp_ratio": 2.0}, "mlp_ratio=4 and no sit; save it"),
    ],
)
def test_a_format_refuses_what_it_cannot_say(format, path, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        model_with(**fields).save(tmp_path / path, format)


def test_a_format_with_other_frequencies_says_so(tmp_path, caplog):
    model_with().save(tmp_path / "folder", "diffusers")
    assert "dit.frequency_shift=1, here 0" in caplog.text


def test_a_transformer_alone_has_the_noise_of_the_released_ones(tmp_path, caplog):
    model = model_with(width=384, num_heads=6, depth=1, frequency_shift=1)
    model.save(tmp_path / "folder", "diffusers")
    assert not caplog.records
    other = model.replace(denoiser=model.denoiser.replace(prediction="v"))
    other.save(tmp_path / "folder", "diffusers")
    assert "a network alone doesn't say its noise; load takes schedule=sqrt_linear" in caplog.text
    with pytest.raises(ValueError, match=r"released models .*prediction=eps\); save it as orbax"):
        other.save(tmp_path / "dit.safetensors", "compvis")
