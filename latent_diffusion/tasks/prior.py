"""Training a prior over the codes of a frozen first stage (Esser et al. 2021; Chang et al. 2022).

    causal   L = E over codes c of  Σ_i −log p(c_i | c_<i, conditioning) / L
    masked   L = E over c and masks M of  Σ_{i ∈ M} −log p(c_i | c outside M, conditioning) / |M|

The share of masked codes is cos(π/2 · u), u uniform. A masked prior's evaluation draws |M|
uniformly from 1 … L instead: then the mean is a bound on the negative log-likelihood per code
(Uria et al. 2014), so that the bits per code of both kinds are comparable.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from latent_diffusion.core.rng import (
    bernoulli_per_example,
    example_keys,
    pmean,
    sampling_keys,
    split_per_example,
    uniform_per_example,
)
from latent_diffusion.core.types import Array, Axis, Batch, Bool, Config, Int, Keys, Params, Rng
from latent_diffusion.models.first_stage import init_first_stage, make_autoencoder
from latent_diffusion.models.prior import Prior, check_null, check_size, make_prior
from latent_diffusion.optimisation.micro_batches import value_and_grad_in_parts
from latent_diffusion.optimisation.optimizers import global_norm, make_optimizer
from latent_diffusion.process.decoding import masked_share
from latent_diffusion.process.options import check_ranges
from latent_diffusion.process.plan import plan_prior
from latent_diffusion.tasks.denoising import Constants, Metrics, State

RANGES = {
    "prior.pkeep": "[0, 1]",
    "prior.label_smoothing": "[0, 1)",
    "prior.min_masked": "[0, 1]",
    "prior.drop_rate": "[0, 1]",
    "transformer.dropout": "[0, 1)",
}


@dataclass(frozen=True)
class PriorTraining:
    """The static parts of training a prior; see `configs/default.py` for the fields."""

    prior: Prior  # without parameters, which are in the state
    autoencoder: nn.Module
    tx: optax.GradientTransformation
    image_shape: tuple[int, int, int]
    sampling: Config
    pkeep: float = 1.0
    label_smoothing: float = 0.0
    min_masked: float = 0.0
    drop_rate: float = 0.0
    ema_decay: float = 0.9999
    pretrained: frozenset[str] = frozenset()  # names of conditioners that are frozen
    grad_accumulation: int = 1

    def init(self, rng: jax.Array, batch_spec: Batch) -> tuple[State, Constants]:
        """Fresh state, and constants with random weights that the loop replaces."""
        key_f, key_c, key_t = jax.random.split(rng, 3)
        image = jnp.zeros((1, *self.image_shape))
        first_stage = init_first_stage(self.autoencoder, key_f, image)
        codes = first_stage.indices({"image": image})
        conditioning, conditioners = self.prior.conditioner.init_from_spec(
            key_c, batch_spec, first_stage, codes.shape[1:]
        )
        flat = codes.reshape(1, -1)
        params = {
            "transformer": self.prior.transformer.init(key_t, flat, conditioning)["params"],
            "conditioner": {k: v for k, v in conditioners.items() if k not in self.pretrained},
        }
        state = State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=jax.tree.map(jnp.copy, params),
            opt_state=self.tx.init(params),
        )
        frozen = {k: v for k, v in conditioners.items() if k in self.pretrained}
        return state, Constants(first_stage, frozen)

    def components(self, state: State, constants: Constants) -> dict[str, Params]:
        """The parts whose parameters `--dry_run` counts, by name."""
        return {
            "prior": state.params["transformer"],
            "conditioner": state.params["conditioner"],
            **{f"{name} (frozen)": tree for name, tree in constants.conditioner.items()},
            "first stage (frozen)": constants.first_stage.params,
        }

    def train_step(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> tuple[State, Metrics]:
        """One update of transformer and conditioner. axis_name: the mapped axis under pmap."""
        rng = jax.random.fold_in(rng, state.step)
        codes = constants.first_stage.indices(batch)
        keys = example_keys(rng, codes.shape[0], axis_name)

        def loss_fn(params: Params, batch: Batch, codes: Array, keys: Keys):
            dropout = {"dropout": keys[0]}  # one mask per device and micro-batch
            values = self._loss(params, constants, batch, codes, keys, dropout)
            return jnp.mean(values["loss"]), values

        value_and_grad = value_and_grad_in_parts(loss_fn, self.grad_accumulation)
        (_, values), grads = value_and_grad(state.params, batch, codes, keys)
        metrics = pmean({name: jnp.mean(value) for name, value in values.items()}, axis_name)
        grads = pmean(grads, axis_name)
        metrics["perplexity"] = jnp.exp2(metrics["bits_per_code"])
        state = state.updated(self.tx, grads, self.ema_decay)
        return state, {**metrics, "grad_norm": global_norm(grads)}

    def eval_step(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> Metrics:
        """Per-example [B] losses of the averaged parameters; no conditions are dropped."""
        codes = constants.first_stage.indices(batch)
        keys = example_keys(rng, codes.shape[0], axis_name)
        return self._loss(state.ema_params, constants, batch, codes, keys)

    def show(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> dict[str, jax.Array]:
        """Images for the log: samples for the batch's conditions, by the averaged parameters."""
        codes = constants.first_stage.indices(batch)
        count, size = codes.shape[0], codes.shape[1:]
        prior = self._with_params(state.ema_params, constants)
        keys = sampling_keys(example_keys(rng, count, axis_name))
        options = plan_prior(self.sampling, {}, prior.transformer.causal)
        entries = prior.conditioner.prepare(batch, constants.first_stage, size, keys.conditions)
        conditioning = prior.condition(entries, jnp.zeros(count, bool))
        null = prior.condition(entries, jnp.ones(count, bool))
        grid = (size[0], size[1])
        made = prior.sample(keys.steps, conditioning, null, grid, size[0], options)
        images = {"samples": constants.first_stage.decode_indices(made)}
        return {"inputs": batch["image"], **images} if "image" in batch else images

    def _with_params(self, params: Params, constants: Constants) -> Prior:
        conditioner = {**params["conditioner"], **constants.conditioner}
        return self.prior.replace(params={**params, "conditioner": conditioner})

    def _loss(
        self,
        params: Params,
        constants: Constants,
        batch: Batch,
        codes: Int[Array, "B h w"],
        keys: Keys,
        dropout: dict[str, jax.Array] | None = None,
    ) -> Metrics:
        """Per example: the smoothed cross-entropy of the predicted codes, and their bits per code.

        dropout: the keys of training; None in evaluation.
        """
        train = dropout is not None
        k_inputs, k_drop, k_cond = split_per_example(keys, 3)
        prior = self._with_params(params, constants)
        entries = prior.conditioner.prepare(batch, constants.first_stage, codes.shape[1:], k_cond)
        drop = bernoulli_per_example(k_drop, self.drop_rate if train else 0.0)
        codes = codes.reshape(codes.shape[0], -1)
        inputs, predicted = self._inputs(codes, k_inputs, train)
        logits = prior.logits(inputs, prior.condition(entries, drop), train, dropout)
        log_probs = jax.nn.log_softmax(logits)
        nats = -jnp.take_along_axis(log_probs, codes[..., None], -1)[..., 0]
        smoothing = self.label_smoothing if train else 0.0
        loss = (1 - smoothing) * nats - smoothing * jnp.mean(log_probs, -1)

        def mean(values: Array) -> Array:
            return jnp.sum(values * predicted, 1) / jnp.sum(predicted, 1)

        return {"loss": mean(loss), "bits_per_code": mean(nats) / jnp.log(2.0)}

    def _inputs(
        self, codes: Int[Array, "B L"], keys: Keys, train: bool
    ) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
        """The transformer's input: noised or masked codes; and the codes that the loss counts."""
        transformer, shape = self.prior.transformer, codes.shape[1:]
        k_where, k_what = split_per_example(keys, 2)
        draws = uniform_per_example(k_where, shape)
        if transformer.causal:
            everything = jnp.ones(codes.shape, bool)
            if not train or self.pkeep >= 1:
                return codes, everything
            others = uniform_per_example(k_what, shape) * transformer.num_codes
            return jnp.where(draws < self.pkeep, codes, others.astype(jnp.int32)), everything
        u = uniform_per_example(k_what)
        share = u if not train else jnp.maximum(masked_share(u), self.min_masked)
        count = jnp.clip(jnp.ceil(share * shape[0]), 1, shape[0])
        rank = jnp.argsort(jnp.argsort(draws, 1), 1)
        masked = rank < count[:, None]
        return jnp.where(masked, transformer.mask_token, codes), masked


def make_prior_training(config: Config) -> PriorTraining:
    """Build the task from a resolved experiment config; ValueError for parts that don't fit."""
    fields, size = config["prior"], config["data"]["image_size"]
    check_ranges(config, RANGES)
    if "code_map" in config["conditioners"] and "code_map" not in config["pretrained"]:
        raise ValueError(
            "conditioners.code_map needs pretrained.code_map: the first stage of its maps, trained "
            "before (a workdir or a file, with a codebook)"
        )
    autoencoder = make_autoencoder(config["autoencoder"])
    prior = make_prior(config["transformer"], config["conditioners"], autoencoder)
    side = size // autoencoder.downsampling
    check_size(prior.transformer, (side, side), side)
    options = plan_prior(fields["sampling"], {}, prior.transformer.causal)  # or raises errors
    if (scale := options.guidance_scale) is not None:
        check_null(prior.conditioner, f"prior.sampling.guidance_scale={scale:g}")
    if fields["drop_rate"]:
        check_null(prior.conditioner, f"prior.drop_rate={fields['drop_rate']}")
    return PriorTraining(
        prior=prior,
        autoencoder=autoencoder,
        tx=make_optimizer(config["optimizer"], config["num_steps"]),
        image_shape=(size, size, config["autoencoder"]["image_channels"]),
        sampling=fields["sampling"],
        pkeep=fields["pkeep"],
        label_smoothing=fields["label_smoothing"],
        min_masked=fields["min_masked"],
        drop_rate=fields["drop_rate"],
        ema_decay=config["ema_decay"],
        pretrained=frozenset(config["pretrained"]),
        grad_accumulation=config["grad_accumulation"],
    )
