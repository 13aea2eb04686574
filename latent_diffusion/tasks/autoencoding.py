"""Perceptual compression: train the first stage (Rombach et al. 2022, section 3.1 and App. G).

A step updates generator and discriminator with one forward and one backward pass of the generator.
With x̂ the reconstruction and W the last decoder kernel:

    L_G = rec(x̂) + reg_weight·reg + gate_adv · λ · (−mean D(x̂)),
    λ = adversarial_weight · ‖∂rec/∂W‖ / (‖∂adv/∂W‖ + 1e-4),
    L_D = gate_disc · D_loss(D(x), D(x̂)).

The adaptive weight averages the last-layer gradients over all devices before it takes norms, so it
doesn't depend on the number of devices. The discriminator is trained on this step's
reconstructions; the original recomputes them after the generator's update.

A preview has a frozen first stage: its decoder learns to decode the scaled latents z of that first
stage, and its encoder E learns to predict z; reg is then the mean over images of ‖E(x) − z‖².

With `grad_accumulation` encoder, decoder and LPIPS run on a part of the batch at a time. The
discriminator, whose batch norm needs the whole batch, and the regulariser run on all of it: they
are small.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from latent_diffusion.core.rng import example_keys, pmean
from latent_diffusion.core.types import Array, Axis, Batch, Config, Float, Keys, Params, Rng, lookup
from latent_diffusion.models.first_stage import init_first_stage, make_autoencoder
from latent_diffusion.nets.autoencoder import latent_statistics
from latent_diffusion.nets.discriminator import PatchGAN
from latent_diffusion.nets.losses.adversarial import D_LOSSES, adaptive_weight, gate, generator_loss
from latent_diffusion.nets.losses.perceptual import LPIPS
from latent_diffusion.nets.losses.similarity import psnr
from latent_diffusion.nets.quantizer import with_moved_codes
from latent_diffusion.optimisation.micro_batches import in_parts
from latent_diffusion.optimisation.optimizers import (
    ema_update,
    global_norm,
    make_optimizer,
    path_mask,
)
from latent_diffusion.process.options import check_ranges

Metrics = dict[str, jax.Array]
RANGES = {
    "autoencoding.gumbel_temperature": "(0, inf)",
    "autoencoder.codebook_ema_decay": "[0, 1]",
    "autoencoder.dropout": "[0, 1)",
}


class State(flax.struct.PyTreeNode):
    """Everything that training changes.

    params: {"autoencoder", "logvar"}. codebook: sums and uses of codes that are moving averages.
    """

    step: Any
    params: Params
    ema_params: Params | None
    opt_state: Any
    codebook: Params
    disc_params: Params
    disc_stats: Params
    disc_opt_state: Any


class Constants(flax.struct.PyTreeNode):
    """Everything that training reads and never changes.

    lpips: None without a perceptual loss. first_stage: None except for a preview.
    """

    lpips: Params | None
    first_stage: Params | None = None


def _sum_per_image(values: Float[Array, "B H W C"]) -> Float[Array, ""]:
    return jnp.sum(values) / values.shape[0]


REDUCTIONS = {"sum": _sum_per_image, "mean": jnp.mean}


@dataclass(frozen=True)
class Autoencoding:
    """The static parts of perceptual compression; see `configs/default.py` for the fields."""

    autoencoder: nn.Module
    discriminator: PatchGAN
    perceptual: LPIPS | None
    tx: optax.GradientTransformation
    disc_tx: optax.GradientTransformation
    reduction: str = "sum"
    perceptual_weight: float = 1.0
    reg_weight: float = 1e-6
    gumbel_temperature: tuple[float, float] = (1.0, 1.0)
    logvar_init: float = 0.0
    learn_logvar: bool = True
    disc_condition: str = ""
    disc_loss: str = "hinge"
    disc_start: int = 0
    adversarial_start: int = 0
    adversarial_weight: float = 0.5
    adversarial_ramp: int = 0
    ema_decay: float = 0.0
    grad_accumulation: int = 1
    num_steps: int = 1
    first_stage: nn.Module | None = None  # a preview decodes its latents
    fixed: tuple[str, ...] = ()  # paths of parameters that neither optimiser nor averages move

    def init(self, rng: jax.Array, batch_spec: Batch) -> tuple[State, Constants]:
        """Fresh state, and constants with random weights that the loop replaces.

        batch_spec: arrays or ShapeDtypeStructs of one batch.
        """
        key_g, key_d, key_p = jax.random.split(rng, 3)
        example = {key: jnp.zeros((1, *x.shape[1:]), x.dtype) for key, x in batch_spec.items()}
        image = example["image"]
        generator = self.autoencoder.init(key_g, image)
        disc = self.discriminator.init(key_d, self._beside_condition(image, example), train=True)
        params = {"autoencoder": generator["params"], "logvar": jnp.full((), self.logvar_init)}
        lpips = None
        if self.perceptual is not None:
            lpips = self.perceptual.init(key_p, image, image)["params"]
        first_stage = None
        if self.first_stage is not None:
            first_stage = init_first_stage(self.first_stage, key_p, image)
        state = State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=jax.tree.map(jnp.copy, params) if self.ema_decay else None,
            opt_state=self.tx.init(params),
            codebook=generator.get("codebook", {}),
            disc_params=disc["params"],
            disc_stats=disc.get("batch_stats", {}),
            disc_opt_state=self.disc_tx.init(disc["params"]),
        )
        return state, Constants(lpips, first_stage)

    def components(self, state: State, constants: Constants) -> dict[str, Params]:
        """The parts whose parameters `--dry_run` counts, by name."""
        parts = {
            "autoencoder": state.params["autoencoder"],
            "discriminator": state.disc_params,
            "lpips (frozen)": constants.lpips,
        }
        if constants.first_stage is not None:
            parts["first stage (frozen)"] = constants.first_stage.params
        return parts

    def train_step(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> tuple[State, Metrics]:
        """One update of generator and discriminator. axis_name: the mapped axis under pmap."""
        x = batch["image"]
        rng = jax.random.fold_in(rng, state.step)
        keys = example_keys(rng, x.shape[0], axis_name)
        discriminator = self.discriminator.clone(axis_name=axis_name)

        def discriminate(params: Params, stats: Params, image: jax.Array):
            """Patch logits in training mode, and the updated batch statistics."""
            variables = {"params": params, "batch_stats": stats}
            logits, moved = discriminator.apply(
                variables, self._beside_condition(image, batch), train=True, mutable=["batch_stats"]
            )
            return logits, moved.get("batch_stats", {})

        (x_rec, reg), generator_vjp, (reg_metrics, codebook) = jax.vjp(
            lambda params: self._generate(params, state, constants, x, keys, rng, axis_name),
            state.params["autoencoder"],
            has_aux=True,
        )
        (_, rec_metrics), (d_rec, d_logvar) = jax.value_and_grad(
            self._reconstruction_loss, argnums=(0, 1), has_aux=True
        )(x_rec, state.params["logvar"], x, constants)

        def adversarial_loss(x_rec: jax.Array):
            logits, _ = discriminate(state.disc_params, state.disc_stats, x_rec)
            return generator_loss(logits)

        g_loss, d_adv = jax.value_and_grad(adversarial_loss)(x_rec)

        def last_layer(d_image: jax.Array) -> jax.Array:
            # Only this kernel's gradient is used, so the compiler removes the rest of the pass.
            (grads,) = generator_vjp((d_image, jnp.zeros_like(reg)))
            return grads["decoder"][self.autoencoder.last_layer]["kernel"]

        d_weight = self.adversarial_weight * adaptive_weight(
            *pmean((last_layer(d_rec), last_layer(d_adv)), axis_name)
        )
        adversarial_factor = gate(state.step, self.adversarial_start, self.adversarial_ramp)
        disc_factor = gate(state.step, self.disc_start)
        g_weight = d_weight * adversarial_factor
        (g_grads,) = generator_vjp((d_rec + g_weight * d_adv, jnp.full_like(reg, self.reg_weight)))
        grads = {"autoencoder": g_grads, "logvar": d_logvar * self.learn_logvar}

        def disc_loss(disc_params: Params):
            # Real and fake images run separately, so that batch statistics don't mix.
            real, stats = discriminate(disc_params, state.disc_stats, x)
            fake, stats = discriminate(disc_params, stats, x_rec)
            loss = lookup(D_LOSSES, self.disc_loss, "disc_loss")(real, fake)
            logits = {"logits_real": jnp.mean(real), "logits_fake": jnp.mean(fake)}
            return loss * disc_factor, (loss, stats, logits)

        disc_grads, (d_loss, disc_stats, logits) = jax.grad(disc_loss, has_aux=True)(
            state.disc_params
        )
        grads, disc_grads = pmean((grads, disc_grads), axis_name)
        metrics = {
            "loss": rec_metrics["nll_loss"] + self.reg_weight * reg + g_weight * g_loss,
            **rec_metrics,
            "reg_loss": reg,
            "g_loss": g_loss,
            "disc_loss": d_loss,
            "d_weight": d_weight,
            "disc_factor": disc_factor,
            "adversarial_factor": adversarial_factor,
            **logits,
            **reg_metrics,
        }
        metrics = _with_latent_std(pmean(metrics, axis_name)) | {
            "grad_norm": global_norm(grads),
            "logvar": state.params["logvar"],
        }
        state = state.replace(codebook=codebook, disc_stats=pmean(disc_stats, axis_name))
        return self._update(state, grads, disc_grads), metrics

    def _generate(
        self,
        params: Params,
        state: State,
        constants: Constants,
        x: Float[Array, "B H W C"],
        keys: Keys,
        rng: jax.Array,
        axis_name: str | None,
    ):
        """((x_rec, reg), (metrics, updated codebook)) of a training forward pass.

        Encoder and decoder run in micro-batches; the regulariser runs on the whole batch.
        """

        def network(method: str):
            def run(params: Params, x: jax.Array, keys: Keys):
                rngs = {"dropout": keys[0]}  # one mask per device and micro-batch
                return self.autoencoder.apply({"params": params}, x, True, method=method, rngs=rngs)

            return in_parts(run, self.grad_accumulation)

        moments = network("encode")(params, x, keys)
        if constants.first_stage is not None:
            z = constants.first_stage.encode({"image": x}, keys)
            x_rec = network("decode_codes")(params, z, keys)
            error = _sum_per_image(jnp.square(moments - z))
            return (x_rec, error), (latent_statistics(z), {})
        autoencoder = self.autoencoder.clone(axis_name=axis_name)
        (z, reg, metrics), moved = autoencoder.apply(
            {"params": params, "codebook": state.codebook},
            moments,
            keys,
            True,
            self._temperature(state.step),
            method="regularize",
            rngs={"codebook": rng},
            mutable=["codebook"],
        )
        x_rec = network("decode_codes")(params, z, keys)
        return (x_rec, reg), (metrics, moved.get("codebook", {}))

    def eval_step(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> Metrics:
        """Per-example [B] errors of the posterior mode's reconstruction, by averaged parameters."""
        x = batch["image"]
        x_rec = self.reconstruct(state, constants, x)
        values = {"l1": jnp.mean(jnp.abs(x - x_rec), (1, 2, 3)), "psnr": psnr(x, x_rec)}
        if self.perceptual is not None:
            values["lpips"] = self._distance(constants, x, x_rec)
        return values

    def show(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> dict[str, jax.Array]:
        """Images for the log: inputs above their reconstructions."""
        x = batch["image"]
        return {"inputs": x, "reconstructions": self.reconstruct(state, constants, x)}

    def reconstruct(
        self, state: State, constants: Constants, x: Float[Array, "B H W C"]
    ) -> Float[Array, "B H W C"]:
        """Decode the posterior's mode with the averaged parameters, if there are any."""
        params = state.params if state.ema_params is None else state.ema_params
        variables = {"params": params["autoencoder"]}
        if constants.first_stage is not None:
            z = constants.first_stage.encode({"image": x})
            preview: Any = self.autoencoder.apply(variables, z, method="decode")
            return preview
        out: Any = self.autoencoder.apply(variables, x)
        return out.x

    def _beside_condition(self, image: jax.Array, batch: Batch) -> jax.Array:
        """The discriminator's input: the image, and the channels of a condition if there is one."""
        if not (name := self.disc_condition):
            return image
        if name not in batch or batch[name].shape[:-1] != image.shape[:-1]:
            entries = ", ".join(f"{key} {list(x.shape)}" for key, x in sorted(batch.items()))
            raise ValueError(
                f"autoencoding.disc_condition={name!r} must be a picture of the image's size, such "
                f"as a mask (data.mask); the batch has {entries}"
            )
        return jnp.concatenate([image, batch[name].astype(image.dtype)], -1)

    def _temperature(self, step: jax.Array) -> jax.Array:
        """The Gumbel softmax's temperature at a step; each step changes it by the same factor."""
        first, last = self.gumbel_temperature
        return first * (last / first) ** jnp.minimum(step / max(self.num_steps - 1, 1), 1.0)

    def _distance(self, constants: Constants, x: jax.Array, x_rec: jax.Array) -> Any:
        """LPIPS [B]."""
        return self.perceptual.apply({"params": constants.lpips}, x, x_rec)  # type: ignore

    def _reconstruction_loss(
        self,
        x_rec: Float[Array, "B H W C"],
        logvar: Float[Array, ""],
        x: Float[Array, "B H W C"],
        constants: Constants,
    ):
        """Negative log-likelihood of a Laplacian with learned scale: rec/exp(λ) + λ."""
        l1 = jnp.abs(x - x_rec)
        metrics = {"l1": jnp.mean(l1)}
        rec = l1
        if self.perceptual is not None:
            distance = in_parts(self._distance, self.grad_accumulation)(constants, x, x_rec)
            metrics["lpips"] = jnp.mean(distance)
            rec = l1 + self.perceptual_weight * distance[:, None, None, None]
        reduce = lookup(REDUCTIONS, self.reduction, "autoencoding.reduction")
        nll = reduce(rec / jnp.exp(logvar) + logvar)
        return nll, metrics | {"rec_loss": jnp.mean(rec), "nll_loss": nll}

    def _update(self, state: State, grads: Params, disc_grads: Params) -> State:
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        moved = with_moved_codes(params["autoencoder"], state.codebook)
        params = {**params, "autoencoder": moved}
        params = jax.tree.map(
            lambda is_fixed, old, new: old if is_fixed else new,
            path_mask(self.fixed)(params),
            state.params,
            params,
        )
        disc_updates, disc_opt_state = self.disc_tx.update(
            disc_grads, state.disc_opt_state, state.disc_params
        )
        begun = gate(state.step, self.disc_start)  # weight decay needs no gradient
        disc_updates = jax.tree.map(lambda update: begun * update, disc_updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = ema_update(ema_params, params, state.step, self.ema_decay)
        return state.replace(
            step=state.step + 1,
            params=params,
            ema_params=ema_params,
            opt_state=opt_state,
            disc_params=optax.apply_updates(state.disc_params, disc_updates),
            disc_opt_state=disc_opt_state,
        )


def _with_latent_std(metrics: Metrics) -> Metrics:
    """Replace the per-channel moments of the latents by their standard deviations."""
    metrics = dict(metrics)
    mean, mean_square = metrics.pop("latent_mean"), metrics.pop("latent_mean_square")
    # By rounding, the variance of a constant channel may be negative.
    overall = jnp.sqrt(jnp.maximum(jnp.mean(mean_square) - jnp.square(jnp.mean(mean)), 0))
    std = jnp.sqrt(jnp.maximum(mean_square - jnp.square(mean), 0))
    return metrics | {"latent_std": overall, **{f"latent_std_{i}": s for i, s in enumerate(std)}}


def make_autoencoding(config: Config) -> Autoencoding:
    """Build the task from a resolved experiment config."""
    check_ranges(config, RANGES)
    fields = dict(config["autoencoding"])
    disc, net = dict(fields.pop("discriminator")), fields.pop("perceptual")
    fields.pop("perceptual_path")  # read by the loop, which loads the weights
    disc_optimizer = dict(config["optimizer"]) | {
        "averages": (),
        "learning_rate": fields.pop("disc_learning_rate") or config["optimizer"]["learning_rate"],
    }
    frozen = config["first_stage"]["autoencoder"]
    fixed = [*config["optimizer"]["frozen"], *([] if fields["learn_logvar"] else ["^logvar$"])]
    return Autoencoding(
        fixed=tuple(fixed),
        first_stage=make_autoencoder(frozen) if frozen else None,
        autoencoder=make_autoencoder(config["autoencoder"]),
        discriminator=PatchGAN(**disc),
        perceptual=None if net == "none" else LPIPS(net),
        tx=make_optimizer(config["optimizer"], config["num_steps"]),
        disc_tx=make_optimizer(disc_optimizer, config["num_steps"]),
        ema_decay=config["ema_decay"],
        grad_accumulation=config["grad_accumulation"],
        num_steps=config["num_steps"],
        **fields,
    )
