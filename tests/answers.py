"""Networks whose answer is a formula, so that whole calls have results to compute by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.data.tokenizers import WordTokenizer
from latent_diffusion.generation.model import Model
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process.schedules import make_schedule

SIDE = 4
PATTERN = np.random.default_rng(3).normal(size=(SIDE, SIDE, 3)).astype(np.float32)
RNG = jax.random.key(5)
SCALE, SHIFT = 2.0, 0.1
TEXT = {"text": {"vocab_size": 16, "max_length": 3, "width": 6, "depth": 0}}
CLASS = {"class_label": {"num_classes": 3, "width": 6}}


class Answering(UNet):
    """A network that answers gain · z_t + (bias + c) · PATTERN; c is read from the context."""

    @nn.compact
    def __call__(self, z_t, t, conditioning=None, train=False):
        gain, bias = (self.param(name, nn.initializers.zeros, ()) for name in ("gain", "bias"))
        return gain * z_t + ((bias + read(conditioning))[:, None, None, None]) * PATTERN


def read(conditioning):
    """The number [B] that the network reads."""
    return 0.1 * conditioning.context[:, :, 0].mean(1)


def first_stage():
    """Pixels as latents, at another scale."""
    module = make_autoencoder({"regularization": "identity", "image_channels": 3})
    return FirstStage({}, jnp.array(SCALE), jnp.array(SHIFT), module)


def params_of(conditioner, gain=0.0, bias=0.0, seed=0):
    """Random conditions, and these numbers of the network."""
    batch = {"tokens": jnp.zeros((1, 3), jnp.int32), "class_label": jnp.zeros(1, jnp.int32)}
    shapes = jax.eval_shape(conditioner.init, RNG, batch, jnp.zeros(1, bool))["params"]
    rng = np.random.default_rng(seed)
    random = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)
    return {"unet": {"gain": jnp.array(gain), "bias": jnp.array(bias)}, "conditioner": random}


def denoiser(conditions, **numbers):
    """It predicts z_0, so that without gain one step of DDIM ends at the answer."""
    conditioner = make_conditioner(conditions)
    return Denoiser(
        params_of(conditioner, **numbers), make_schedule(), Answering(), conditioner, "x0"
    )


def model(conditions, **numbers):
    """All of it, for one step of DDIM."""
    tokenizer = WordTokenizer.train(["red blue green cat dog"], 16, 3)
    defaults = {"sampler": "ddim", "num_steps": 1, "spacing": "trailing", "guidance_scale": 1.0}
    return Model(first_stage(), denoiser(conditions, **numbers), tokenizer, defaults, SIDE)


def pixels(numbers):
    """The pictures that the network's answers `numbers` decode to."""
    z_0 = np.asarray(numbers, np.float32)[:, None, None, None] * PATTERN
    return z_0 / SCALE + SHIFT
