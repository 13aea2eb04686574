"""Latent denoising: train the conditional U-Net (Rombach et al. 2022, sections 3.2 and 3.3).

    L = E over z_0 = E(x), t, eps of  w_t · ‖ target(z_0, eps, t) − unet(z_t, t, conditioning) ‖²

The first stage is frozen: it travels in `constants`, so it has no gradient, no optimiser slot and
no moving average. The order of `train_step` is fixed, and nothing else draws noise.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from latent_diffusion.conditioners import make_conditioner
from latent_diffusion.denoiser import Denoiser, make_denoiser
from latent_diffusion.diffusion import (
    LOSS_WEIGHTS,
    LOSSES,
    TIMESTEP_SAMPLING,
    prediction_target,
    q_sample,
)
from latent_diffusion.first_stage import FirstStage, init_first_stage, make_autoencoder
from latent_diffusion.optim import ema_update, global_norm, make_optimizer
from latent_diffusion.rng import (
    bernoulli_per_example,
    device_key,
    example_keys,
    normal_per_example,
    pmean,
    split_per_example,
)
from latent_diffusion.schedules import spacing
from latent_diffusion.types import Array, Batch, Config, Float, Keys, Params, lookup

Metrics = dict[str, jax.Array]


class State(flax.struct.PyTreeNode):
    """Everything that training changes. params: {"unet", "conditioner"}."""

    step: Any
    params: Params
    ema_params: Params
    opt_state: Any


class Constants(flax.struct.PyTreeNode):
    """Everything that training uses and never changes."""

    first_stage: FirstStage


@dataclass(frozen=True)
class Denoising:
    """The static parts of latent denoising; see `configs/default.py` for the fields."""

    denoiser: Denoiser  # without parameters: those are the state's
    autoencoder: nn.Module
    tx: optax.GradientTransformation
    image_shape: tuple[int, int, int]
    sampling: Config
    loss: str = "l2"
    loss_weight: str = "simple"
    timestep_sampling: str = "uniform"
    drop_rate: float = 0.1
    ema_decay: float = 0.9999

    def init(self, rng: jax.Array, batch_spec: Batch) -> tuple[State, Constants]:
        """Fresh state, and constants with random weights that the loop replaces.

        batch_spec: arrays or ShapeDtypeStructs of one batch.
        """
        key_f, key_c, key_u = jax.random.split(rng, 3)
        one = {key: jnp.zeros((1, *x.shape[1:]), x.dtype) for key, x in batch_spec.items()}
        image = self._image(1)
        first_stage = init_first_stage(self.autoencoder, key_f, image)
        z = first_stage.encode({"image": image})
        conditioner, drop = self.denoiser.conditioner, jnp.zeros(1, bool)
        conditioning, variables = conditioner.init_with_output(key_c, one, drop)
        params = {
            "unet": self.denoiser.unet.init(key_u, z, jnp.zeros(1), conditioning)["params"],
            "conditioner": variables.get("params", {}),
        }
        state = State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=jax.tree.map(jnp.copy, params),
            opt_state=self.tx.init(params),
        )
        return state, Constants(first_stage)

    def components(self, state: State, constants: Constants) -> dict[str, Params]:
        """The parts that a reader wants counted, by name."""
        return {
            "denoiser": state.params["unet"],
            "conditioner": state.params["conditioner"],
            "first stage (frozen)": constants.first_stage.params,
        }

    def train_step(
        self,
        state: State,
        constants: Constants,
        batch: Batch,
        rng: jax.Array,
        *,
        axis_name: str | None = None,
    ) -> tuple[State, Metrics]:
        """One update of U-Net and conditioner. axis_name: the mapped axis under pmap."""
        rng = jax.random.fold_in(rng, state.step)
        keys = example_keys(rng, _batch_size(batch), axis_name)

        def loss_fn(params: Params):
            dropout = {"dropout": device_key(rng, axis_name)}
            return jnp.mean(self._loss(params, constants, batch, keys, dropout))

        loss, grads = pmean(jax.value_and_grad(loss_fn)(state.params), axis_name)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(
            step=state.step + 1,
            params=params,
            ema_params=ema_update(state.ema_params, params, state.step, self.ema_decay),
            opt_state=opt_state,
        )
        return state, {"loss": loss, "grad_norm": global_norm(grads)}

    def eval_step(
        self,
        state: State,
        constants: Constants,
        batch: Batch,
        rng: jax.Array,
        *,
        axis_name: str | None = None,
    ) -> Metrics:
        """Per-example [B] loss of the averaged parameters, conditioning never dropped."""
        keys = example_keys(rng, _batch_size(batch), axis_name)
        return {"loss": self._loss(state.ema_params, constants, batch, keys)}

    def show(
        self,
        state: State,
        constants: Constants,
        batch: Batch,
        rng: jax.Array,
        *,
        axis_name: str | None = None,
    ) -> dict[str, jax.Array]:
        """Images to look at: samples for the batch's conditions, by the averaged parameters."""
        size = _batch_size(batch)
        denoiser = self.denoiser.replace(params=state.ema_params)
        conditioning = denoiser.condition(batch, jnp.zeros(size, bool))
        null = denoiser.condition(batch, jnp.ones(size, bool))
        options = dict(self.sampling)
        timesteps = spacing(options.pop("spacing"), denoiser.schedule, options.pop("num_steps"))
        latent = jax.eval_shape(constants.first_stage.encode, {"image": self._image(1)})
        z_0 = denoiser.sample(
            example_keys(rng, size, axis_name),
            conditioning,
            null,
            timesteps,
            latent.shape[1:],
            **options,
        )
        images = {"samples": constants.first_stage.decode(z_0)}
        return {"inputs": batch["image"], **images} if "image" in batch else images

    def _image(self, batch_size: int) -> Float[Array, "B H W C"]:
        return jnp.zeros((batch_size, *self.image_shape))

    def _loss(
        self,
        params: Params,
        constants: Constants,
        batch: Batch,
        keys: Keys,
        dropout: dict[str, jax.Array] | None = None,
    ) -> Float[Array, " B"]:
        """Eq. 3 of the paper, per example. dropout: the keys of training; None in evaluation."""
        train = dropout is not None
        schedule = self.denoiser.schedule
        denoiser = self.denoiser.replace(params=params)
        k_z, k_t, k_eps, k_drop = split_per_example(keys, 4)
        z_0 = constants.first_stage.encode(batch, k_z)
        t = lookup(TIMESTEP_SAMPLING, self.timestep_sampling, "timestep_sampling")(k_t, schedule)
        eps = normal_per_example(k_eps, z_0.shape[1:])
        z_t = q_sample(schedule, z_0, t, eps)
        drop = bernoulli_per_example(k_drop, self.drop_rate if train else 0.0)
        pred = denoiser.denoise(z_t, t, denoiser.condition(batch, drop), train, dropout)
        target = prediction_target(denoiser.prediction, schedule, z_0, eps, t)
        weight = lookup(LOSS_WEIGHTS, self.loss_weight, "loss_weight")(
            schedule, denoiser.prediction
        )
        return weight[t] * lookup(LOSSES, self.loss, "loss")(pred, target)


def _batch_size(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def make_denoising(config: Config) -> Denoising:
    """Build the task from a resolved experiment config."""
    autoencoder = make_autoencoder(config["autoencoder"])
    conditioner = make_conditioner(config["conditioners"])
    own, size = config["diffusion"], config["data"]["image_size"]
    return Denoising(
        denoiser=make_denoiser(config, conditioner, out_channels=autoencoder.latent_channels),
        autoencoder=autoencoder,
        tx=make_optimizer(config["optimizer"], config["num_steps"]),
        image_shape=(size, size, config["autoencoder"]["image_channels"]),
        sampling=config["sampling"],
        loss=own["loss"],
        loss_weight=own["loss_weight"],
        timestep_sampling=own["timestep_sampling"],
        drop_rate=own["drop_rate"],
        ema_decay=config["ema_decay"],
    )
