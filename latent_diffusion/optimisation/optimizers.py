"""Optimisers, learning-rate curves, and the exponential moving average of parameters."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from latent_diffusion.core.trees import path_string
from latent_diffusion.core.types import Array, Config, Float, Int, Params, lookup
from latent_diffusion.optimisation.averages import with_power_averages

Schedule = Callable[[Any], Any]


# (peak, steps of the decay, share of the peak at the end) -> the curve after the warm-up
LR_SCHEDULES: dict[str, Callable[[float, int, float], Schedule]] = {
    "constant": lambda peak, steps, end: optax.constant_schedule(peak),
    "cosine": lambda peak, steps, end: optax.cosine_decay_schedule(peak, steps, alpha=end),
    "linear": lambda peak, steps, end: optax.linear_schedule(peak, peak * end, steps),
}
OPTIMIZERS = {"adam": optax.scale_by_adam, "adamw": optax.scale_by_adam}


def learning_rate_schedule(config: Config, num_steps: int) -> Schedule:
    """Linear warm-up from 0, then the named curve down to `end_factor`·peak at `num_steps`."""
    curve = lookup(LR_SCHEDULES, config["schedule"], "optimizer.schedule")
    peak, warmup = config["learning_rate"], config["warmup_steps"]
    decay = curve(peak, max(num_steps - warmup, 1), config["end_factor"])
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def path_mask(patterns: Sequence[str]) -> Callable[[Params], Params]:
    """A function from a tree to booleans: whether any pattern occurs in the leaf's path."""
    compiled = [re.compile(pattern) for pattern in patterns]

    def mask(tree: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: any(p.search(path_string(path)) for p in compiled), tree
        )

    return mask


def make_optimizer(config: Config, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled weight decay, learning rate; no update if frozen.

    config: the `optimizer` fields of configs/default.py. As in the reference, `adamw` decays every
    parameter, norms and biases too, except paths that match `no_decay`. The optimiser's state has
    the averages of the widths in `averages`.
    """
    adam = lookup(OPTIMIZERS, config["name"], "optimizer.name")
    parts = [optax.clip_by_global_norm(config["grad_clip"])] if config["grad_clip"] else []
    parts.append(adam(b1=config["b1"], b2=config["b2"], eps=config["eps"]))
    if config["name"] == "adamw":
        no_decay = path_mask(config["no_decay"])
        parts.append(
            optax.add_decayed_weights(
                config["weight_decay"], lambda tree: jax.tree.map(lambda x: not x, no_decay(tree))
            )
        )
    parts.append(optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)))
    tx = optax.chain(*parts)
    if config["frozen"]:
        tx = _at_rest(tx, path_mask(config["frozen"]))
    return with_power_averages(tx, config["averages"]) if config["averages"] else tx


def _at_rest(
    tx: optax.GradientTransformation, frozen: Callable[[Params], Params]
) -> optax.GradientTransformation:
    """The same optimiser, which doesn't change leaves for which the mask `frozen` is true."""

    def labels(tree: Params) -> Params:
        return jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen(tree))

    return optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def ema_update(ema_params: Params, params: Params, step: Int[Array, ""], decay: float) -> Params:
    """Move the average towards the *new* parameters, with decay min(decay, (1 + n)/(10 + n)).

    step: the number of earlier updates, so n = step + 1 as in the reference. decay=0 copies.
    """
    n = step + 1
    rate = 1 - jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda ema, p: ema + rate * (p - ema), ema_params, params)


def global_norm(tree: Params) -> Float[Array, ""]:
    """L2 norm over all leaves."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
