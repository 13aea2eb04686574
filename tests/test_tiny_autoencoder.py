"""The tiny autoencoder: its formula, its names in the original's files, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import latent_diffusion as ldm
from latent_diffusion import convert
from latent_diffusion.convert import autoencoder_tiny
from latent_diffusion.convert.bundle import Bundle, as_part, flat
from latent_diffusion.core.rng import init_key
from latent_diffusion.generation.loading import as_model
from latent_diffusion.nets.tiny_autoencoder import TinyAutoencoder, TinyDecoder

FIELDS = {"channels": 4, "encoder_blocks": (1, 2), "decoder_blocks": (2, 1), "embed_dim": 2}
FIELDS |= {"image_channels": 3, "regularization": "tiny"}


def numbers(first, last):
    return set(range(first, last + 1))


def original_names(half):
    """The tensors of taesd_encoder and taesd_decoder, by the code of TAESD."""
    ends, plain = {"encoder": ({0, 14}, {2, 6, 10}), "decoder": ({1, 19}, {7, 12, 17})}[half]
    blocks = {
        "encoder": {1} | numbers(3, 5) | numbers(7, 9) | numbers(11, 13),
        "decoder": numbers(3, 5) | numbers(8, 10) | numbers(13, 15) | {18},
    }[half]
    both = ("weight", "bias")
    names = {f"{i}.{leaf}" for i in ends for leaf in both} | {f"{i}.weight" for i in plain}
    return names | {f"{i}.conv.{j}.{leaf}" for i in blocks for j in (0, 2, 4) for leaf in both}


def as_original(params):
    """Two files of the original: the layers of a decoder count from 1."""
    bundle = Bundle(autoencoder=as_part(FIELDS, params))
    _, tensors = autoencoder_tiny.as_component(bundle)
    files = {"encoder": {}, "decoder": {}}
    for name, tensor in tensors.items():
        half, _, layer, *rest = name.split(".")
        number = int(layer) + (half == "decoder")
        files[half][".".join([str(number), *rest])] = np.ascontiguousarray(tensor.read())
    return files


def made(fields=FIELDS):
    """Random parameters."""
    module = TinyAutoencoder(**fields)
    side = module.downsampling
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes["params"])


def test_the_names_and_the_size_are_those_of_taesd():
    params = made({**FIELDS, "channels": 64, "embed_dim": 4, "encoder_blocks": (1, 3, 3, 3),
                   "decoder_blocks": (3, 3, 3, 1)})  # fmt: skip
    for half, count in (("encoder", 1_222_532), ("decoder", 1_222_531)):
        assert sum(leaf.size for leaf in jax.tree.leaves(params[half])) == count
    for half, tensors in as_original(params).items():
        assert tensors.keys() == original_names(half)


def test_a_decoder_without_blocks_is_a_line_behind_a_soft_clamp():
    decoder, z = TinyDecoder(1, 1, (0,)), jnp.array([-9.0, 0.3, 50.0]).reshape(3, 1, 1, 1)
    params = decoder.init(init_key(0), z)["params"]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    first, last = (params[name] for name in ("layers_0", "layers_2"))
    first["kernel"], last["kernel"] = (x["kernel"].at[1, 1].set(w) for x, w in
                                       ((first, 2.0), (last, 0.5)))  # fmt: skip
    last["bias"] = jnp.array([0.1])
    want = 2 * (0.5 * np.maximum(2 * 3 * np.tanh(np.array([-3.0, 0.1, 50 / 3])), 0) + 0.1) - 1
    np.testing.assert_allclose(decoder.apply({"params": params}, z)[:, 0, 0, 0], want, rtol=1e-5)


def test_it_is_read_from_both_files_and_written_for_diffusers_and_for_us(tmp_path):
    params = made()
    for half, tensors in as_original(params).items():
        save_file(tensors, tmp_path / f"taesd_{half}.safetensors")
    model = ldm.load(tmp_path / "taesd_decoder.safetensors")
    module = model.first_stage.module
    assert {name: getattr(module, name) for name in FIELDS} == FIELDS
    images = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (1, 4, 4, 3)), jnp.float32)
    answer = TinyAutoencoder(**FIELDS).apply({"params": params}, images)
    np.testing.assert_allclose(model.decode(model.encode(images)), answer, rtol=1e-5, atol=1e-6)
    for format in ("diffusers", "orbax"):
        model.save(tmp_path / format, format=format)
        again = ldm.load(tmp_path / format)
        assert again.first_stage.module == module
        got, want = (flat(m.first_stage.params) for m in (again, model))
        assert got.keys() == want.keys()
        assert all(np.array_equal(got[name], want[name]) for name in want)
        np.testing.assert_array_equal(again.encode(images), model.encode(images))
    (tmp_path / "taesd_encoder.safetensors").unlink()
    with pytest.raises(ValueError, match="its encoder must lie beside it, as in taesd_decoder"):
        ldm.load(tmp_path / "taesd_decoder.safetensors")


def test_scale_and_shift_of_its_latents_are_settings_of_diffusers(tmp_path):
    bundle = Bundle(autoencoder=as_part(FIELDS, made()), scale_factor=2.0, shift=0.5)
    convert.write(bundle, tmp_path / "tiny", "diffusers")
    read = convert.read(tmp_path / "tiny")
    assert (read.scale_factor, read.shift) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("act_fn", "silu", "act_fn='silu'; supported: 'relu'"),
        ("upsampling_scaling_factor", 4, "supported: 2"),
        ("decoder_block_out_channels", [64, 64, 64, 32], "supported: one for all levels"),
        ("num_decoder_blocks", [3, 1], "decoder_block_out_channels and num_decoder_blocks differ"),
        ("out_channels", 4, "out_channels=4; supported: in_channels"),
    ],
)
def test_settings_that_it_can_not_express_are_one_line(setting, value, message):
    config = {"_class_name": "AutoencoderTiny", setting: value}
    with pytest.raises(ValueError, match=message):
        autoencoder_tiny.fields_from_diffusers(config)


def test_it_decodes_the_latents_of_another_first_stage_while_it_samples():
    """A preview sees scaled latents, which are those of the tiny decoder."""
    model = as_model(Bundle(autoencoder=as_part(FIELDS, made())))
    z_0 = jnp.asarray(np.random.default_rng(2).normal(size=(1, 2, 2, 2)), jnp.float32)
    images = model.decode(z_0)
    assert images.shape == (1, 4, 4, 3) and float(jnp.abs(images).max()) > 0
