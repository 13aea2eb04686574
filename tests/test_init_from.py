"""Training that starts from parameters somebody trained: whole, in part, or with more inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import SIZE, make_config

import latent_diffusion as ldm
from latent_diffusion import convert
from latent_diffusion.nets.autoencoder import Autoencoder
from latent_diffusion.tasks import TASKS
from latent_diffusion.tasks.denoising import Constants
from latent_diffusion.training import init_from
from latent_diffusion.training.batch_spec import batch_spec


def make(task="denoising", **fields):
    """A config, and a state of its task that stands for a fresh one: nothing is compiled."""
    config = make_config(task, **fields)
    shapes, _ = jax.eval_shape(TASKS[task](config).init, jax.random.key(0), batch_spec(config))
    return config, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


@functools.cache
def source():
    """(config, a state whose every parameter is random)."""
    config, state = make(seed=7)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), state.params
    )
    return config, state.replace(params=params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """That model as one writes it for others: U-Net, text encoder and first stage."""
    config, state = source()
    autoencoder = config.autoencoder.to_dict()
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), "float32")
    shapes = jax.eval_shape(Autoencoder(**autoencoder).init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(1)
    random = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    unet = {**config.unet.to_dict(), "out_channels": autoencoder["embed_dim"]}
    bundle = convert.Bundle(
        autoencoder=convert.as_part(autoencoder, random),
        scale_factor=0.5,
        unet=convert.as_part(unet, state.params["unet"]),
        conditioners={
            "text": convert.as_part(
                config.conditioners.text.to_dict(), state.params["conditioner"]["text"]
            )
        },
        diffusion=config.diffusion.to_dict(),
    )
    path = tmp_path_factory.mktemp("source") / "model"
    convert.write(bundle, path, "diffusers")
    return path


def flat(state):
    return flatten_dict(state.params, sep="/")


def equal(a, b):
    return [path for path in a if path in b and np.array_equal(a[path], b[path])]


def test_the_whole_model_and_its_average_start_from_the_file(folder):
    _, theirs = source()
    config, fresh = make(init_from=str(folder))
    state = init_from.start_from(config, fresh, init_from.read(config))
    assert equal(flat(state), flat(theirs)) == list(flat(theirs))
    freed = jax.tree.leaves((fresh.params, fresh.ema_params))
    assert all(array.is_deleted() for array in freed)  # there is never room for both
    for ours, average in zip(*map(jax.tree.leaves, (state.params, state.ema_params)), strict=True):
        np.testing.assert_array_equal(ours, average)
    assert int(state.step) == 0


def test_a_part_by_its_path(folder):
    config, fresh = make(init_from=str(folder), init_from_only="^unet/")
    before = jax.tree.map(np.array, flat(fresh))
    state = init_from.start_from(config, fresh, init_from.read(config))
    _, theirs = source()
    assert equal(flat(state), flat(theirs)) == [k for k in flat(theirs) if k.startswith("unet/")]
    rest = [k for k in before if not k.startswith("unet/")]
    assert set(rest) <= set(equal(flat(state), before))


def test_input_channels_that_the_file_lacks_change_nothing_at_first(folder):
    inpainting = {"masked_image": {}, **source()[0].conditioners.to_dict()}
    config, fresh = make(init_from=str(folder), conditioners=inpainting)
    fresh = jax.tree.map(jnp.ones_like, fresh)
    state = init_from.start_from(config, fresh, init_from.read(config))
    z, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 2)), jnp.array([3.0, 700.0])
    context = jax.random.normal(jax.random.key(2), (2, 4, 16))
    concat = jax.random.normal(jax.random.key(3), (2, 8, 8, 3))
    unet = TASKS["denoising"](config).denoiser.network
    with jax.enable_x64(True):  # a convolution of more channels may add in another order
        z, context, concat, ours, theirs = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64),
            (z, context, concat, state.params["unet"], source()[1].params["unet"]),
        )
        unet = unet.clone(dtype=jnp.float64)
        got = unet.apply({"params": ours}, z, t, ldm.Conditioning(concat=concat, context=context))
        want = unet.apply({"params": theirs}, z, t, ldm.Conditioning(context=context))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.std(want) > 0.1


def test_the_first_stage_comes_along_with_its_scale(folder):
    config = make_config("denoising", init_from=str(folder))
    resolved = init_from.resolve(config)
    assert resolved.autoencoder.channel_mult == config.autoencoder.channel_mult
    first_stage = ldm.load(folder).first_stage
    taken = init_from.first_stage_of(resolved, init_from.read(resolved))
    assert float(taken.scale_factor) == 0.5
    jax.tree.map(np.testing.assert_array_equal, taken.params, first_stage.params)
    config.init_from_changes = ("first_stage.path",)
    resolved = init_from.resolve(config)
    assert resolved.first_stage.path == config.first_stage.path != str(folder)
    assert init_from.first_stage_of(resolved, init_from.read(resolved)) is None


def test_how_networks_compute_is_up_to_the_run(folder):
    own = {"unet.dtype": "bfloat16", "unet.remat": "full", "unet.dropout": 0.5}
    own |= {"autoencoder.dtype": "bfloat16", "unet.attention": "xla"}
    config = make_config("denoising", init_from=str(folder), **own, **{"unet.num_res_blocks": 7})
    resolved = init_from.resolve(config)
    assert resolved.unet.num_res_blocks == source()[0].unet.num_res_blocks != 7
    flattened = flatten_dict(resolved.to_dict(), sep=".")
    assert {name: flattened[name] for name in own} == own


def test_an_adaptation_is_of_a_whole_model(folder):
    config = make_config("denoising", init_from=str(folder), init_from_only="unet/")
    init_from.resolve(config)
    config.lora.rank = 1
    with pytest.raises(ValueError, match=r"^init_from_only='unet/': an adaptation is of the whole"):
        init_from.resolve(config)


def test_an_adaptation_adds_no_inputs(folder):
    conditioners = {"masked_image": {}, **source()[0].conditioners.to_dict()}
    config = make_config("denoising", init_from=str(folder), conditioners=conditioners)
    config.lora.rank = 1
    base = {"unet": {"input_blocks_0_0": {"kernel": jnp.zeros((3, 3, 5, 8))}}}
    with pytest.raises(ValueError, match=r"has 2 channels of latent and conditions, this run 5: "):
        init_from.base_from(config, Constants(None, base=base), init_from.read(config))
    base["unet"]["input_blocks_0_0"]["kernel"] = jnp.zeros((3, 3, 2, 9))  # of another width
    with pytest.raises(ValueError, match=r"does not fit: .*\(3, 3, 2, 9\)"):
        init_from.base_from(config, Constants(None, base=base), init_from.read(config))


def test_loaded_codes_count_as_used_once():
    codes = np.arange(6, dtype=np.float32).reshape(3, 2)
    fresh = {name: np.full(shape, 9.0) for name, shape in
             (("embedding", (3, 2)), ("total", (3, 2)), ("uses", (3,)))}  # fmt: skip
    state = init_from._restarted({"quantize": fresh}, {"quantize": {"embedding": codes}})
    for name, want in (("embedding", codes), ("total", codes), ("uses", np.ones(3))):
        np.testing.assert_array_equal(state["quantize"][name], want)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unet.model_channels": 16}, r"of another shape: unet/.*: ours .*16.*, there .*8"),
        ({"conditioners": {"class_label": {"num_classes": 3, "width": 16}}},
         "1 not in it: conditioner/class_label/embedding/embedding; take a part of it by init_fr"),
        ({"init_from_only": "unnet"}, "init_from_only='unnet' matches no parameter; they begin w"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(folder, fields, message):
    config, state = make(init_from=str(folder), **fields)
    with pytest.raises(ValueError, match=message):
        init_from.start_from(config, state, init_from.read(config))


def test_first_stages_start_from_a_file_too(folder):
    config, state = make("autoencoding", init_from=str(folder))
    state = init_from.start_from(config, state, init_from.read(config))
    theirs = ldm.load(folder).first_stage.params
    jax.tree.map(np.testing.assert_array_equal, state.params["autoencoder"], theirs)
