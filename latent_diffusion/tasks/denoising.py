"""Latent denoising: train the conditional network (Rombach et al. 2022, sections 3.2 and 3.3).

    L = E over z_0 = E(x), t, eps of  w_t · ‖ target(z_0, eps, t) − network(z_t, t, conditioning) ‖²

The first stage and pretrained conditioners are frozen. They are part of `constants`, so they have
no gradient, no optimiser state and no moving average.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from latent_diffusion.core.rng import (
    bernoulli_per_example,
    example_keys,
    normal_per_example,
    pmean,
    sampling_keys,
    split_per_example,
)
from latent_diffusion.core.types import (
    Array,
    Axis,
    Batch,
    Conditioning,
    Config,
    Keys,
    Params,
    Rng,
    lookup,
)
from latent_diffusion.models.denoiser import Denoiser, make_denoiser
from latent_diffusion.models.first_stage import FirstStage, init_first_stage, make_autoencoder
from latent_diffusion.models.sampling import sample
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.control import ControlNet, control_net, init_control
from latent_diffusion.optimisation import low_rank
from latent_diffusion.optimisation.micro_batches import value_and_grad_in_parts
from latent_diffusion.optimisation.optimizers import ema_update, global_norm, make_optimizer
from latent_diffusion.process import objectives
from latent_diffusion.process.diffusion import prediction_target, prior_bits_per_dim, q_sample
from latent_diffusion.process.guidance import paste
from latent_diffusion.process.hints import HINTS
from latent_diffusion.process.learned_variance import bound
from latent_diffusion.process.options import check_ranges
from latent_diffusion.process.plan import plan
from latent_diffusion.tasks import beside

Metrics = dict[str, jax.Array]
RANGES = {
    "diffusion.drop_rate": "[0, 1]",
    "diffusion.max_noise": "(0, 1]",
    "diffusion.shift": "(0, inf)",
    "diffusion.huber_c": "(0, inf)",
    "unet.dropout": "[0, 1)",
}


class State(flax.struct.PyTreeNode):
    """Everything that training changes.

    params: {the backbone's name, "conditioner"}, or for an adaptation {"lora": the same keys}; and
    "logvar" [T] if it is learned. squares: [T] average squared objective (with all its weights) of
    each timestep, if importance sampling follows the loss; else None. target: in a distillation,
    another average of the parameters, which makes the targets; else None.
    """

    step: Any
    params: Params
    ema_params: Params
    opt_state: Any
    squares: Any = None
    target: Any = None

    def updated(
        self, tx: optax.GradientTransformation, grads: Params, ema_decay: float | int
    ) -> "State":
        """The state after a step: with new parameters, and an average that includes them."""
        updates, opt_state = tx.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        return self.replace(
            step=self.step + 1,
            params=params,
            ema_params=ema_update(self.ema_params, params, self.step, ema_decay),
            opt_state=opt_state,
        )


class Constants(flax.struct.PyTreeNode):
    """Everything that training reads and never changes.

    conditioner: parameters of pretrained conditioners, by name. base: the parameters that an
    adaptation builds on; it trains only its own. teacher: the backbone's parameters of a
    distillation's teacher; None if they are those of `base`.
    """

    first_stage: FirstStage
    conditioner: Params = flax.struct.field(default_factory=dict)
    base: Params = None
    teacher: Params = None


@dataclass(frozen=True)
class Denoising:
    """The static parts of latent denoising; see `configs/default.py` for the fields."""

    denoiser: Denoiser  # without parameters, which are in the state
    autoencoder: nn.Module
    tx: optax.GradientTransformation
    image_shape: tuple[int, int, int]
    sampling: Config
    loss: str = "l2"
    loss_weight: str = "simple"
    timestep_sampling: str = "uniform"  # a name of TIMESTEP_SAMPLING, or "loss"
    elbo_weight: float = 0.0
    learn_logvar: bool = False
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    drop_rate: float = 0.1
    ema_decay: float = 0.9999
    lora: Config | None = None
    pretrained: frozenset[str] = frozenset()  # names of conditioners that are frozen
    grad_accumulation: int = 1
    huber_c: float = 1e-3
    max_noise: float | int = 1.0  # the share of the timesteps, from the clean end, that are drawn
    control: str = ""  # a name of HINTS: only a control net is trained
    new_vectors: int = 0  # only so many vectors of a new word are trained
    shift: float | int = 1.0  # strength of a shift of the drawn timesteps towards noise
    variance_weight: float = 0.0  # weight of the bound that trains the network's variance

    def init(self, rng: jax.Array, batch_spec: Batch) -> tuple[State, Constants]:
        """Fresh state, and constants with random weights that the loop replaces.

        batch_spec: arrays or ShapeDtypeStructs of one batch.
        """
        key_f, key_c, key_u = jax.random.split(rng, 3)
        image = jnp.zeros((1, *self.image_shape))
        first_stage = init_first_stage(self.autoencoder, key_f, image)
        z = first_stage.encode({"image": image})
        name, network = self.denoiser.name, self.denoiser.network
        conditioning, conditioners = self.denoiser.conditioner.init_from_spec(
            key_c, batch_spec, first_stage, z.shape[1:3]
        )
        params = {
            name: network.init(key_u, z, jnp.zeros(1), conditioning)["params"],
            "conditioner": {k: v for k, v in conditioners.items() if k not in self.pretrained},
        }
        base = None
        if self.lora is not None:
            base = params
            params = {"lora": low_rank.init(jax.random.fold_in(rng, 1), base, self.lora)}
        if self.new_vectors:
            base = params
            params = {"words": beside.fresh_words(conditioners, self.new_vectors)}
        if self.control:
            base, key = params, jax.random.fold_in(rng, 1)
            net = init_control(self._control_net(z.shape[1]), key, params[name], z, conditioning)
            params = {"control": net}
        num_timesteps = self.denoiser.schedule.num_timesteps
        if self.learn_logvar:
            params["logvar"] = jnp.zeros(num_timesteps)
        state = State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=jax.tree.map(jnp.copy, params),
            opt_state=self.tx.init(params),
            squares=jnp.ones(num_timesteps) if self.timestep_sampling == "loss" else None,
        )
        frozen = {k: v for k, v in conditioners.items() if k in self.pretrained}
        return state, Constants(first_stage, frozen, base)

    def components(self, state: State, constants: Constants) -> dict[str, Params]:
        """The parts whose parameters `--dry_run` counts, by name."""
        name = self.denoiser.name
        if constants.base is None:
            parts = {"denoiser": state.params[name], "conditioner": state.params["conditioner"]}
        else:
            trained = next(iter(state.params.keys() - {"logvar"}))
            parts = {trained: state.params[trained], "denoiser (frozen)": constants.base[name]}
            parts["conditioner (frozen)"] = constants.base["conditioner"]
        parts |= {f"{name} (frozen)": tree for name, tree in constants.conditioner.items()}
        return {**parts, "first stage (frozen)": constants.first_stage.params}

    def train_step(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> tuple[State, Metrics]:
        """One update of network and conditioner. axis_name: the mapped axis under pmap."""
        rng = jax.random.fold_in(rng, state.step)
        keys = example_keys(rng, batch_size(batch), axis_name)

        def loss_fn(params: Params, batch: Batch, keys: Keys):
            dropout = {"dropout": keys[0]}  # one mask per device and micro-batch
            per_example = self._loss(params, state.squares, constants, batch, keys, dropout)
            return jnp.mean(per_example["loss"]), per_example

        value_and_grad = value_and_grad_in_parts(loss_fn, self.grad_accumulation)
        (loss, values), grads = value_and_grad(state.params, batch, keys)
        loss, grads = pmean((loss, grads), axis_name)
        squares = self._update_squares(state.squares, values, axis_name)
        state = state.updated(self.tx, grads, self.ema_decay).replace(squares=squares)
        simple = pmean(jnp.mean(values["simple"]), axis_name)
        return state, {"loss": loss, "simple": simple, "grad_norm": global_norm(grads)}

    def eval_step(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> Metrics:
        """Per-example [B] losses of the averaged parameters; no conditions are dropped.

        prior_bits: the bits per dimension of information about the image that are left in z_T.
        """
        keys = example_keys(rng, batch_size(batch), axis_name)
        values = self._loss(state.ema_params, state.squares, constants, batch, keys)
        return {name: values[name] for name in ("loss", "simple", "prior_bits")}

    def show(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> dict[str, jax.Array]:
        """Images for the log: samples for the batch's conditions, by the averaged parameters."""
        size = batch_size(batch)
        denoiser = self.with_params(state.ema_params, constants)
        keys = sampling_keys(example_keys(rng, size, axis_name))
        timesteps, options = plan(denoiser.schedule, denoiser.prediction, self.sampling, {})
        first_stage, latent = constants.first_stage, self._latent(constants)
        first_stage = first_stage.in_tiles(options.tile_size, options.tile_overlap)
        entries = denoiser.conditioner.prepare(batch, first_stage, latent[:2], keys.conditions)
        drops = (jnp.zeros(size, bool), jnp.ones(size, bool))
        conditioning, null = (
            self._hinted(denoiser.condition(entries, drop), state.ema_params, constants, batch)
            for drop in drops
        )
        z_0 = sample(
            *(denoiser, keys, conditioning, null, timesteps, latent, options),
            nearest=first_stage.nearest if options.quantize_x0 else None,
            tile=first_stage.tile,
        )
        images = {"samples": first_stage.decode(z_0)}
        if "mask" in entries:
            images["samples"] = paste(images["samples"], batch["image"], batch["mask"])
        if self.control:
            images["hints"] = 2 * HINTS[self.control](batch["image"]) - 1
        return {"inputs": batch["image"], **images} if "image" in batch else images

    def with_params(self, params: Params, constants: Constants) -> Denoiser:
        """The denoiser with its trained (or adapted) parameters and the frozen conditioners."""
        if self.lora is not None:
            params = low_rank.merge(constants.base, params["lora"], self.lora["alpha"])
        model = constants.base if self.control or self.new_vectors else params
        conditioner = {**model.get("conditioner", {}), **constants.conditioner}
        model = {**model, "conditioner": conditioner}
        if self.control:
            net = self._control_net(self._latent(constants)[0])
            return beside.with_control(self.denoiser, net, params["control"], model)
        if self.new_vectors:
            return beside.with_words(self.denoiser, params["words"], model)
        return self.denoiser.replace(params=model)

    def _control_net(self, latent_height: int) -> ControlNet:
        """The control net. latent_height: height of a training picture's latent."""
        unet: Any = self.denoiser.network
        return control_net(unet, self.image_shape[0] // latent_height)

    def _hinted(
        self, conditioning: Conditioning, params: Params, constants: Constants, batch: Batch
    ) -> Conditioning:
        """The conditioning, with the hints of the pictures if a control net is trained."""
        if not self.control:
            return conditioning
        net = self._control_net(self._latent(constants)[0])
        return beside.hinted(
            conditioning, net, params["control"], HINTS[self.control](batch["image"])
        )

    def _latent(self, constants: Constants) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a training picture."""
        image = jnp.zeros((1, *self.image_shape))
        _, *shape = jax.eval_shape(constants.first_stage.encode, {"image": image}).shape
        h, w, c = shape
        return h, w, c

    def _loss(
        self,
        params: Params,
        squares: Array | None,
        constants: Constants,
        batch: Batch,
        keys: Keys,
        dropout: dict[str, jax.Array] | None = None,
    ) -> dict[str, Array]:
        """Eq. 3 of the paper, per example. dropout: the keys of training; None in evaluation.

        Training minimises "loss", which includes the batch's `example_weight`; "simple" is the
        error without weights.
        """
        first_stage, train = constants.first_stage, dropout is not None
        schedule, kind = self.denoiser.schedule, self.denoiser.prediction
        denoiser = self.with_params(params, constants)
        if self.variance_weight:
            denoiser = denoiser.with_variance("diffusion.variance_weight")
        k_z, k_t, k_eps, k_drop, k_offset, k_input, k_cond = split_per_example(keys, 7)
        z_0 = first_stage.encode(batch, k_z)
        t, unbias = self.timesteps(k_t, squares if train else None)
        eps = normal_per_example(k_eps, z_0.shape[1:])
        if self.offset_noise:
            eps = objectives.offset_noise(k_offset, eps, self.offset_noise)
        noise = eps
        if train and self.input_perturbation:
            noise = objectives.perturb_input(k_input, eps, self.input_perturbation)
        z_t = q_sample(schedule, z_0, t, noise)
        entries = denoiser.conditioner.prepare(batch, first_stage, z_t.shape[1:3], k_cond)
        drop = bernoulli_per_example(k_drop, self.drop_rate if train else 0.0)
        conditioning = self._hinted(denoiser.condition(entries, drop), params, constants, batch)
        pred = denoiser.denoise(z_t, t, conditioning, train, dropout)
        pred, variance = pred[..., : z_t.shape[-1]], pred[..., z_t.shape[-1] :]
        target = prediction_target(kind, schedule, z_0, eps, t)
        simple = objectives.make_loss(self.loss, self.huber_c)(pred, target)
        weights = lookup(objectives.LOSS_WEIGHTS, self.loss_weight, "loss_weight")(schedule, kind)
        loss = weights[t] * simple
        if self.learn_logvar:
            loss = objectives.weigh_by_logvar(loss, params["logvar"][t])
        if self.elbo_weight:
            loss = loss + self.elbo_weight * objectives.elbo(schedule, kind)[t] * simple
        if self.variance_weight:
            weight = self.variance_weight * schedule.num_timesteps
            loss = loss + weight * bound(schedule, kind, pred, variance, z_0, z_t, t)
        weighted = unbias * loss * batch.get("example_weight", 1.0)
        values = {"loss": weighted, "objective": loss, "simple": simple, "t": t}
        return {**values, "prior_bits": prior_bits_per_dim(schedule, z_0)}

    def timesteps(self, keys: Keys, squares: Array | None) -> tuple[Array, Array | float]:
        """Timesteps [B], and the factor [B] that keeps the mean of their losses unbiased."""
        schedule = self.denoiser.schedule
        if self.timestep_sampling != "loss":
            draw = lookup(objectives.TIMESTEP_SAMPLING, self.timestep_sampling, "timestep_sampling")
            t = draw(keys, schedule)
            t = t if self.shift == 1 else objectives.shift_timesteps(t, schedule, self.shift)
            return (t if self.max_noise == 1 else (t * self.max_noise).astype(t.dtype)), 1.0
        for name in ("max_noise", "shift"):
            if getattr(self, name) != 1:
                raise ValueError(
                    f"diffusion.{name}={getattr(self, name)} needs another timestep_sampling than "
                    "'loss'"
                )
        if squares is None:  # evaluation: the plain mean
            return objectives.uniform(keys, schedule), 1.0
        density = objectives.loss_density(squares)
        t = objectives.importance(keys, schedule, density=density)
        return t, objectives.importance_weights(density)[t]

    def _update_squares(
        self, squares: Array | None, values: dict[str, Array], axis_name: str | None
    ) -> Array | None:
        """Add the global batch's losses to the averages by which further timesteps are drawn."""
        if squares is None:
            return None
        t, losses = values["t"], values["objective"]
        if axis_name is not None:
            t, losses = (jax.lax.all_gather(x, axis_name, tiled=True) for x in (t, losses))
        return objectives.update_squares(squares, t, losses)


def batch_size(batch: Batch) -> int:
    """The number of examples in a batch."""
    return next(iter(batch.values())).shape[0]


def _check(config: Config, denoiser: Denoiser) -> None:
    """Raise ValueError for fields that don't go together."""
    name, guided = config["backbone"], getattr(denoiser.network, "guidance_dim", None)
    if guided is not None and config["task"] != "distillation":
        raise ValueError(
            f"{name}.guidance_dim={guided}: the guidance scale is an input of distilled networks; "
            f"the task {config['task']!r} doesn't train it"
        )
    for part in ("start", "end", "strength"):
        if config["sampling"].get(part) is not None:
            raise ValueError(
                f"sampling.{part}={config['sampling'][part]}: a run's samples have all steps; give "
                f"{part} to Model.sample"
            )
    ends_in_noise = float(denoiser.schedule.alphas[-1]) == 0
    if config["diffusion"]["variance_weight"] and denoiser.prediction == "eps" and ends_in_noise:
        raise ValueError(
            "diffusion.variance_weight needs an estimate of z_0 at each timestep, which 'eps' "
            "doesn't give at the last with diffusion.zero_terminal_snr: predict v or x0"
        )


def make_denoising(config: Config) -> Denoising:
    """Build the task from a resolved experiment config."""
    check_ranges(config, RANGES)
    autoencoder = make_autoencoder(config["autoencoder"])
    conditioner = make_conditioner(config["conditioners"])
    size = config["data"]["image_size"]
    names = Denoising.__dataclass_fields__.keys()
    denoiser = make_denoiser(config, conditioner, out_channels=autoencoder.latent_channels)
    # Raise errors for bad options now, not during training.
    _, options = plan(denoiser.schedule, denoiser.prediction, config["sampling"], {})
    for field, value in (
        ("diffusion.variance_weight", config["diffusion"]["variance_weight"]),
        ("sampling.learned_variance", options.learned_variance),
    ):
        if value:
            denoiser.with_variance(field)
    _check(config, denoiser)
    return Denoising(
        denoiser=denoiser,
        autoencoder=autoencoder,
        tx=make_optimizer(config["optimizer"], config["num_steps"]),
        image_shape=(size, size, config["autoencoder"]["image_channels"]),
        sampling=config["sampling"],
        ema_decay=config["ema_decay"],
        lora=config["lora"] if config["lora"]["rank"] else None,
        control=beside.hint_of(config),
        new_vectors=beside.new_vectors(config, conditioner.config),
        pretrained=frozenset(config["pretrained"]),
        grad_accumulation=config["grad_accumulation"],
        **{name: value for name, value in config["diffusion"].items() if name in names},
    )
