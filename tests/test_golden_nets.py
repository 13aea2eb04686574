"""Numbers of small networks, stored when `make parity` held them equal to diffusers' and others'.

Whatever changes a network's mathematics (the order of heads, a gate, a norm's epsilon) changes one
of these, also where PyTorch isn't installed. Parameters are drawn by their paths.
"""

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax.traverse_util import flatten_dict, unflatten_dict

from latent_diffusion.core.types import Conditioning
from latent_diffusion.nets.attention import GEGLU
from latent_diffusion.nets.autoencoder import Autoencoder
from latent_diffusion.nets.conditioners import CONDITIONERS
from latent_diffusion.nets.discriminator import PatchGAN
from latent_diffusion.nets.dit import DiT
from latent_diffusion.nets.image_prompt import ImageProjection, Resampler
from latent_diffusion.nets.layers import GroupNorm
from latent_diffusion.nets.losses.perceptual import LPIPS
from latent_diffusion.nets.mmdit import MMDiT
from latent_diffusion.nets.t2i_adapter import T2IAdapter
from latent_diffusion.nets.unet import UNet

SMALL = {"channels": 8, "num_res_blocks": 1, "num_groups": 4, "z_channels": 2, "embed_dim": 2}


def draw(name, *shape):
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def told(context=None, vector=None, guidance=None):
    return Conditioning(
        context=context and jnp.asarray(draw("context", 2, 3, context)),
        vector=vector and jnp.asarray(draw("vector", 2, vector)),
        guidance=guidance and jnp.asarray(guidance, jnp.float32),
    )


def unet(context=None, vector=None, guidance=None, **fields):
    fields = {"num_heads": 2, "channel_mult": (1, 2), "num_res_blocks": 1, "num_groups": 4} | fields
    module = UNet(2, 8, attention_resolutions=(2,), **fields)
    return module, (draw("z", 2, 8, 8, 2), T, told(context, vector, guidance))


def transformer(module, **own):
    sizes = {"width": 16, "depth": 2, "num_heads": 2, "base_size": 4}
    return module(2, **sizes, **own), (draw("z", 2, 8, 8, 2), T, told(6, 16))


def autoencoder(regularization, **fields):
    fields = {"channel_mult": (1, 2), "attn_resolutions": ()} | SMALL | fields
    return Autoencoder(regularization=regularization, **fields), (draw("image", 2, 16, 16, 3),)


def conditioner(name, batch, **fields):
    return CONDITIONERS[name](**fields), (batch, jnp.array([False, True]))


T = np.array([3.0, 700.0], np.float32)
TOKENS = {"tokens": jnp.array([[1, 5, 2, 0], [3, 3, 0, 0]], jnp.int32)}
PICTURE = draw("picture", 2, 32, 32, 3)
EMPTY = {"empty": (7, 8), "pad_id": 8}
ENCODER = {"vocab_size": 9, "width": 16, "depth": 1, "num_heads": 2}
VISION = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2}
VISION |= {"projection_dim": 6}
NOISE = {"noise_level": jnp.array([0, 7]), "embedding_noise": draw("noise", 2, 6)}
NETS = {
    "unet": lambda: unet(context=6),
    "unet of depth 2, attention to the context alone": lambda: unet(
        context=6, transformer_depth=2, disable_self_attentions=(False, True)
    ),
    "unet without context": lambda: unet(transformer_depth=0, num_head_channels=4),
    "unet of other heads": lambda: unet(transformer_depth=0, legacy_qkv_order=False),
    "unet with scales and shifts": lambda: unet(
        context=6, use_scale_shift_norm=True, resblock_updown=True
    ),
    "unet with a vector": lambda: unet(context=6, vector=5, vector_projection=True),
    "autoencoder": lambda: autoencoder("kl", attn_resolutions=(8,), resolution=16),
    "autoencoder with codes": lambda: autoencoder("vq", num_codes=7),
    "discriminator": lambda: (PatchGAN(4, 2), (PICTURE,)),
    "lpips": lambda: (LPIPS("alex"), (PICTURE[:1], PICTURE[1:])),
    "text": lambda: conditioner("text", TOKENS, **ENCODER, max_length=4, head_dim=8),
    "bert": lambda: conditioner("bert", TOKENS, **ENCODER, max_positions=4, empty=(7, 8)),
    "clip_text": lambda: conditioner("clip_text", TOKENS, **ENCODER, max_length=4, **EMPTY),
    "clip_text with a vector": lambda: conditioner(
        *("clip_text", TOKENS), **{**ENCODER, "depth": 2}, max_length=4, **EMPTY, skip_last=1,
        activation="gelu", final_norm=False, projection_dim=6,
    ),
    "clip_image": lambda: conditioner("clip_image", {"image": PICTURE}, **VISION),
    "clip_image with noise": lambda: conditioner(
        *("clip_image", {"image": PICTURE, **NOISE}), **VISION, num_levels=9
    ),
    "t5_text": lambda: conditioner(
        *("t5_text", TOKENS), **ENCODER, max_length=4, head_dim=8, mlp_width=24, buckets=4,
        max_distance=4, empty=(7,),
    ),
    "unet with guidance": lambda: unet(context=6, guidance=[1.5, 4.0], guidance_dim=6),
    "dit": lambda: transformer(DiT),
    "mmdit": lambda: transformer(MMDiT, qk_norm=True, dual_attention=(0,), max_positions=6),
    "t2i": lambda: (T2IAdapter("full", (8, 12), 1, 2), (PICTURE,)),
    "t2i of few channels": lambda: (T2IAdapter("light", (8, 12), 1, 2), (PICTURE,)),
    "image prompt": lambda: (ImageProjection(2, 6), (draw("embedding", 2, 5),)),
    "resampler": lambda: (Resampler(2, 6, 8, 1, 2), (draw("tokens", 2, 3, 5),)),
}  # fmt: skip


def numbers(name):
    """Mean, spread, and a projection of what the network answers."""
    module, arguments = NETS[name]()
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)
    flat = flatten_dict(shapes, sep="/")
    variables = unflatten_dict(
        {path: 0.3 * draw(path, *leaf.shape) for path, leaf in flat.items()}, sep="/"
    )
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(np.square, variables["batch_stats"])
    out = jax.jit(module.apply)(variables, *arguments)
    out = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(out)]).astype(np.float64)
    return [out.mean(), out.std(), out @ draw("projection", len(out)) / len(out) ** 0.5]


GOLDEN = {
    "unet": [0.367731, 0.445285, 0.646189],
    "unet of depth 2, attention to the context alone": [0.357493, 0.437763, 0.669168],
    "unet without context": [0.404522, 0.647969, 1.09214],
    "unet of other heads": [0.390694, 0.542642, 0.890891],
    "unet with scales and shifts": [0.440848, 0.448978, 0.253921],
    "unet with a vector": [0.359805, 0.48292, 0.599195],
    "autoencoder": [0.00221322, 1.64371, -0.381857],
    "autoencoder with codes": [-0.0513792, 0.250664, 0.255255],
    "discriminator": [53.8022, 309.038, 378.232],
    "lpips": [0.0331512, 0.0, 0.00239161],
    "text": [-0.0164707, 0.362543, 0.603812],
    "bert": [-0.0854925, 0.417775, 0.359238],
    "clip_text": [0.0645037, 0.411033, 0.120952],
    "clip_text with a vector": [-0.0421427, 0.876401, 0.342251],
    "clip_image": [0.151835, 0.527771, 0.189638],
    "clip_image with noise": [0.199746, 0.476255, -0.0179646],
    "t5_text": [-0.00640993, 0.376017, 0.152638],
    "unet with guidance": [0.356997, 0.453949, 0.644125],
    "dit": [0.435484, 4.08308, -2.51393],
    "mmdit": [0.87131, 2.42718, -2.67035],
    "t2i": [0.228292, 5.68937, -5.42181],
    "t2i of few channels": [0.165868, 0.612967, -0.549679],
    "image prompt": [-0.113094, 0.381572, -0.127621],
    "resampler": [-0.0182073, 0.358678, -0.215224],
}


@pytest.mark.parametrize("name", NETS)
def test_a_network_gives_the_numbers_that_it_gave(name):
    got = numbers(name)
    np.testing.assert_allclose(got, GOLDEN[name], rtol=5e-4, atol=5e-4 * GOLDEN[name][1])


# The epsilon of every norm, and of norms with another name.
UNET = {"": 1e-5, "norm": 1e-6}  # in front of a transformer
EPSILONS = {
    "unet": UNET,
    "unet without context": {"": 1e-5},
    "autoencoder": {"": 1e-6},
    "discriminator": {"": 1e-5},
    "text": {"": 1e-5},
    "bert": {"": 1e-12},
    "clip_text": {"": 1e-5},
    "clip_image": {"": 1e-5},
    "t5_text": {"": 1e-6},
    "dit": {"": 1e-6},
    "mmdit": {"": 1e-6},
    "resampler": {"": 1e-5},
}


@pytest.mark.parametrize("name", EPSILONS)
def test_norms_have_the_epsilons_of_the_released_networks(name):
    """At usual activations no number shows them."""
    module, arguments = NETS[name]()
    seen = {}

    def look(call, args, kwargs, context):
        if (epsilon := getattr(context.module, "epsilon", None)) and context.method_name != "setup":
            seen[context.module.path] = epsilon
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        jax.eval_shape(module.init, jax.random.key(0), *arguments)
    norms = {path: epsilon for path, epsilon in seen.items() if path}  # T5 itself has the field
    wanted = EPSILONS[name]
    assert norms == {path: wanted.get(path[-1], wanted[""]) for path in norms} and len(norms) > 1


@pytest.mark.parametrize(
    ("name", "curve"),
    [("unet", "erf"), ("text", "erf"), ("bert", "erf"), ("resampler", "erf"), ("t5_text", "tanh"),
     ("clip_text with a vector", "erf"), ("dit", "tanh"), ("mmdit", "tanh")],
)  # fmt: skip
def test_a_gelu_is_that_of_the_released_network(name, curve):
    """Its approximation by a tangent differs by 0.0005 at most."""
    module, arguments = NETS[name]()
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)
    program = str(jax.make_jaxpr(module.apply)(shapes, *arguments))
    assert [word for word in ("erf", "tanh") if word in program] == [curve]


def test_a_gate_is_an_exact_gelu():
    """The first half of the inner width is the value, the second its gate (Shazeer 2020)."""
    x, w, out = draw("x", 1, 4, 2), draw("in", 2, 16), draw("out", 8, 2)
    params = {
        "proj_in": {"kernel": w, "bias": draw("b", 16)},
        "proj_out": {"kernel": out, "bias": np.zeros(2, np.float32)},
    }
    value, gate = np.split(x.astype(np.float64) @ w + draw("b", 16), 2, -1)
    expected = value * gate * 0.5 * (1 + scipy.special.erf(gate / 2**0.5)) @ out
    got = GEGLU().apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_group_norm_of_small_numbers():
    x = 1e-2 * draw("x", 2, 5, 4).astype(np.float64)
    groups = x.reshape(2, 5, 2, 2)
    mean, variance = (f(groups, (1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    params = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    got = GroupNorm(2).apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, atol=1e-4)
