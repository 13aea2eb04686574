"""Averages of parameters whose width is chosen after the training (Karras et al. 2024, section 3).

The average of width s at step t weighs the parameters of step τ ≤ t by the profile
p(τ) = (γ + 1)/t · (τ/t)^γ, where s is the standard deviation of p divided by t. Training computes a
few such averages. A weighted sum of their snapshots approximates the average of any other width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_diffusion.core.types import Array, Int, Params, PyTree

WIDEST = 0.288  # γ = 0, the mean of all steps, has the width 12^(-1/2)


class PowerAverages(NamedTuple):
    """The optimiser's state with averages of the parameters after each of its updates."""

    step: Int[Array, ""]  # the number of updates
    inner: optax.OptState
    averages: dict[str, Params]  # by their width as a string


def exponent(width: float) -> float:
    """The γ of a relative width; ValueError for a width outside (0, WIDEST].

    width² = (γ + 1) / ((γ + 2)² (γ + 3)), a cubic equation with one root that isn't negative.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"the width of an average is {width}; it must lie in (0, {WIDEST}]")
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def with_power_averages(
    tx: optax.GradientTransformation, widths: Sequence[float]
) -> optax.GradientTransformation:
    """The same optimiser, whose state also has an average for each width."""
    exponents = {str(width): exponent(width) for width in widths}

    def init(params: Params) -> PowerAverages:
        averages = {name: jax.tree.map(jnp.copy, params) for name in exponents}
        return PowerAverages(jnp.zeros((), jnp.int32), tx.init(params), averages)

    def update(updates: Params, state: PowerAverages, params: Params) -> tuple:
        updates, inner = tx.update(updates, state.inner, params)
        new, step = optax.apply_updates(params, updates), state.step + 1
        averages = {}
        for name, gamma in exponents.items():
            # 1 - (1 - 1/step)^(gamma + 1), which is 1 at the first step, without cancellation
            rate = -jnp.expm1((gamma + 1) * jnp.log1p(-1.0 / step))
            averages[name] = jax.tree.map(
                lambda average, p, rate=rate: average + rate * (p - average),
                state.averages[name],
                new,
            )
        return updates, PowerAverages(step, inner, averages)

    return optax.GradientTransformation(init, update)


def averages_of(opt_state: PyTree) -> dict[str, Params]:
    """The averages in an optimiser's state, by width; {} if it has no averages."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, PowerAverages))
    states = [node for node in nodes if isinstance(node, PowerAverages)]
    return states[0].averages if states else {}


def weights(snapshots: Sequence[tuple[int, float]], step: int, width: float) -> np.ndarray:
    """The weights of snapshots whose sum has the profile nearest to that of (step, width).

    snapshots: (step, width) of each. The weights minimise the squared distance of the profiles,
    by a closed form of their inner products: solve (p_i · p_j) x = (p_i · p) (Karras et al. 2024,
    appendix C).
    """
    t = np.asarray([at for at, _ in snapshots], np.float64)
    gamma = np.asarray([exponent(own_width) for _, own_width in snapshots])
    gram = _inner_product(t[:, None], gamma[:, None], t[None], gamma[None])
    target = _inner_product(t, gamma, float(step), exponent(width))
    return np.linalg.lstsq(gram, target, rcond=None)[0]


def _inner_product(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> Any:
    """∫ p_a(τ) p_b(τ) dτ up to the smaller of the two steps; numbers or arrays that broadcast."""
    common = np.minimum(t_a, t_b)
    decay = gamma_a * np.log(common / t_a) + gamma_b * np.log(common / t_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * np.exp(decay) * common / (t_a * t_b)
