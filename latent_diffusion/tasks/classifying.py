"""Noisy classification: a classifier of z_t, whose gradient guides a sampler.

    L = E over z_0, eps, t of  −log p(label | z_t, t)

`first_stage.path` names the workdir of the denoiser that the classifier will guide: both share its
latents, their scale and the noise. Training draws every timestep. The last timesteps hardly leave
anything of the image, so evaluation reports the accuracy at several timesteps.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from latent_diffusion.core.rng import (
    example_keys,
    normal_per_example,
    pmean,
    split_per_example,
    uniform_per_example,
)
from latent_diffusion.core.types import Array, Axis, Batch, Config, Keys, Params, Rng
from latent_diffusion.models.classifier import NoisyClassifier
from latent_diffusion.models.denoiser import make_network, schedule_of
from latent_diffusion.models.first_stage import init_first_stage, make_autoencoder
from latent_diffusion.optimisation.micro_batches import value_and_grad_in_parts
from latent_diffusion.optimisation.optimizers import global_norm, make_optimizer
from latent_diffusion.process.diffusion import q_sample
from latent_diffusion.tasks.denoising import Constants, Metrics, State

SHARES = (0.0, 0.25, 0.5, 0.75)  # evaluation is at these shares of the timesteps


@dataclass(frozen=True)
class Classifying:
    """The static parts of noisy classification."""

    classifier: NoisyClassifier  # without parameters, which are in the state
    autoencoder: nn.Module
    tx: optax.GradientTransformation
    image_shape: tuple[int, int, int]
    ema_decay: float = 0.9999
    grad_accumulation: int = 1

    def init(self, rng: jax.Array, batch_spec: Batch) -> tuple[State, Constants]:
        """Fresh state, and constants with random weights that the loop replaces."""
        key_f, key_u = jax.random.split(rng)
        image = jnp.zeros((1, *self.image_shape))
        first_stage = init_first_stage(self.autoencoder, key_f, image)
        z = first_stage.encode({"image": image})
        params = {"unet": self.classifier.unet.init(key_u, z, jnp.zeros(1))["params"]}
        state = State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=jax.tree.map(jnp.copy, params),
            opt_state=self.tx.init(params),
        )
        return state, Constants(first_stage)

    def components(self, state: State, constants: Constants) -> dict[str, Params]:
        """The parts whose parameters `--dry_run` counts, by name."""
        return {
            "classifier": state.params["unet"],
            "first stage (frozen)": constants.first_stage.params,
        }

    def train_step(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> tuple[State, Metrics]:
        """One update of the classifier. axis_name: the mapped axis under pmap."""
        rng = jax.random.fold_in(rng, state.step)
        labels = _labels(batch)
        keys = example_keys(rng, labels.shape[0], axis_name)
        k_z, k_t, k_eps = split_per_example(keys, 3)
        z_0 = constants.first_stage.encode(batch, k_z)
        num_timesteps = self.classifier.schedule.num_timesteps
        t = (uniform_per_example(k_t) * num_timesteps).astype(jnp.int32)

        def loss_fn(params: Params, z_0: Array, t: Array, keys: Keys, labels: Array):
            dropout = {"dropout": keys[0]}  # one mask per device and micro-batch
            values = self._scores(params, z_0, t, keys, labels, dropout)
            return jnp.mean(values["loss"]), values

        value_and_grad = value_and_grad_in_parts(loss_fn, self.grad_accumulation)
        (_, values), grads = value_and_grad(state.params, z_0, t, k_eps, labels)
        metrics = pmean({name: jnp.mean(value) for name, value in values.items()}, axis_name)
        grads = pmean(grads, axis_name)
        state = state.updated(self.tx, grads, self.ema_decay)
        return state, {**metrics, "grad_norm": global_norm(grads)}

    def eval_step(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> Metrics:
        """Per-example [B] loss and hits of the averaged parameters, at each of some timesteps."""
        labels = _labels(batch)
        keys = example_keys(rng, labels.shape[0], axis_name)
        z_0 = constants.first_stage.encode(batch)
        values: Metrics = {}
        for share in SHARES:
            at = int(share * self.classifier.schedule.num_timesteps)
            t = jnp.full(labels.shape, at)
            scores = self._scores(state.ema_params, z_0, t, keys, labels)
            values |= {f"{name}_{at}": value for name, value in scores.items()}
        return values

    def show(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> dict[str, jax.Array]:
        """Images for the log: inputs, and the inputs noised to the middle timestep."""
        keys = example_keys(rng, batch["class_label"].shape[0], axis_name)
        z_0 = constants.first_stage.encode(batch)
        t = jnp.full(z_0.shape[:1], self.classifier.schedule.num_timesteps // 2)
        noise = normal_per_example(keys, z_0.shape[1:])
        z_t = q_sample(self.classifier.schedule, z_0, t, noise)
        return {"inputs": batch["image"], "noised": constants.first_stage.decode(z_t)}

    def _scores(
        self,
        params: Params,
        z_0: Array,
        t: Array,
        keys: Keys,
        labels: Array,
        dropout: dict[str, jax.Array] | None = None,
    ) -> Metrics:
        """Cross-entropy, and whether the label has the best score, or one of the best five."""
        noise = normal_per_example(keys, z_0.shape[1:])
        z_t = q_sample(self.classifier.schedule, z_0, t, noise)
        classifier = self.classifier.replace(params=params["unet"])
        logits = classifier.logits(z_t, t, dropout is not None, dropout)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        label_logit = jnp.take_along_axis(logits, labels[:, None], 1)
        rank = jnp.sum(logits > label_logit, axis=1)
        hits = {"accuracy": rank < 1, "accuracy_5": rank < 5}
        return {"loss": loss, **{name: hit.astype(jnp.float32) for name, hit in hits.items()}}


def _labels(batch: Batch) -> Array:
    """The classes of a batch; ValueError for data without classes."""
    if "class_label" not in batch:
        raise ValueError(
            f"a classifier needs class_label; the batch has {', '.join(sorted(batch))}"
        )
    labels: Array = batch["class_label"]
    return labels


def make_classifying(config: Config) -> Classifying:
    """Build the task from a resolved experiment config."""
    size, fields = config["data"]["image_size"], config["classifier"]
    sizes = {"out_channels": fields["num_classes"], "pool": fields["pool"]}
    unet = make_network("unet", config["unet"], **sizes)
    return Classifying(
        classifier=NoisyClassifier({}, schedule_of(config["diffusion"]), unet),
        autoencoder=make_autoencoder(config["autoencoder"]),
        tx=make_optimizer(config["optimizer"], config["num_steps"]),
        image_shape=(size, size, config["autoencoder"]["image_channels"]),
        ema_decay=config["ema_decay"],
        grad_accumulation=config["grad_accumulation"],
    )
