"""Count the floating-point operations of a function in its jaxpr, without device or compiler."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Multiplications and additions in the matrix products and convolutions of `function(*args)`.

    args: arrays or ShapeDtypeStructs. The body of a `scan` counts as often as it runs, that of
    another loop once; of several branches the most expensive counts; recomputation counts again.
    Unused results don't count, since compilers remove them.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _count(jaxpr: Any) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * _size(equation.outvars[0]) * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        _, in_features, *window = (kernel[i] for i in numbers.rhs_spec)
        # Most elements of a dilated input are zeros, whose products implementations skip.
        taps = math.prod(window) / math.prod(params["lhs_dilation"])
        return round(2 * _size(equation.outvars[0]) * in_features * taps)
    inner = [_count(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "cond":
        return max(inner)
    return params["length"] * sum(inner) if name == "scan" else sum(inner)


def _jaxprs(params: Any) -> Iterator[Any]:
    """The functions that an equation calls."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)
