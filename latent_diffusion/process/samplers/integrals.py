"""Integrals of interpolated predictions, shared by the multistep and exponential integrators."""

import math

import jax.numpy as jnp
from jaxtyping import Shaped

from latent_diffusion.core.types import Array, Bool, Float, Int


def phi(k: int, x: Float[Array, " S"]) -> Float[Array, " S"]:
    """phi_k(x) = ∫_0^1 e^{(1−u)x} u^{k−1}/(k−1)! du; phi_1(x) = (e^x − 1)/x."""
    # The recursion cancels near 0, where the series converges fast.
    series = sum(jnp.clip(x, -1, 1) ** j / float(math.factorial(j + k)) for j in range(10))
    far = jnp.where(jnp.abs(x) < 1, 1.0, x)
    value = jnp.expm1(far) / far
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / far
    return jnp.where(jnp.abs(x) < 1, series, value)


def interpolation_weights(
    nodes: list[Array], usable: list[Array], moments: list[Array]
) -> Float[Array, "S K"]:
    """Weights w_j = ∫ L_j of the Lagrange polynomials through K nodes, for each of S steps.

    nodes, usable: K arrays [S] each. A node that is not usable is left out of the polynomials, and
    its weight is 0. moments: K arrays [S], the integrals of u^0 … u^{K−1}.
    """
    weights = []
    for j, node in enumerate(nodes):
        powers = [jnp.ones_like(node)] + [jnp.zeros_like(node)] * (len(nodes) - 1)
        for m, other in enumerate(nodes):
            if m == j:
                continue
            use = usable[m] & usable[j]
            gap = jnp.where(use, node - other, 1.0)
            shifted = [jnp.zeros_like(node), *powers[:-1]]
            powers = [
                jnp.where(use, (up - other * p) / gap, p)
                for up, p in zip(shifted, powers, strict=True)
            ]
        weight = sum(p * moment for p, moment in zip(powers, moments, strict=True))
        weights.append(jnp.where(usable[j], weight, 0.0))
    return jnp.stack(weights, axis=1)


def past_nodes(
    x: Float[Array, " S"], step: Float[Array, " S"], order: Array, count: int
) -> tuple[list[Array], list[Bool[Array, " S"]]]:
    """Positions of the last `count` evaluations in units of the step, and whether to use them.

    x: the coordinate of the evaluations. order: the largest number of them to use. Evaluations
    before a repeated timestep aren't used, since no polynomial passes through both.
    """
    step = jnp.where(step == 0, 1.0, step)
    nodes = [(lagged(x, k) - x) / step for k in range(count)]
    usable = [jnp.ones(x.shape, bool)]
    for k in range(1, count):
        distinct = lagged(x, k) != lagged(x, k - 1)
        exists = jnp.arange(x.shape[0]) >= k
        usable.append(usable[-1] & distinct & exists & (k < order))
    return nodes, usable


def multistep_orders(count: int, order: int, lower_order_final: bool) -> Int[Array, " S"]:
    """The orders of `count` steps: they rise at the start and, for count < 15, fall at the end."""
    row = jnp.arange(count)
    orders = jnp.minimum(order, row + 1)
    return jnp.minimum(orders, count - row) if lower_order_final and count < 15 else orders


def lagged(x: Shaped[Array, " S"], k: int) -> Shaped[Array, " S"]:
    """x of k steps ago; the first k steps have x[0]."""
    return jnp.concatenate([jnp.repeat(x[:1], k), x])[: x.shape[0]]


def ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, 0 where the denominator is 0 (a timestep that occurs twice)."""
    zero = denominator == 0
    return jnp.where(zero, 0.0, numerator / jnp.where(zero, 1.0, denominator))
