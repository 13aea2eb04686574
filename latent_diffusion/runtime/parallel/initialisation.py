"""Fresh states: by one program, or on GPUs by a small program for each kind of array.

A network has a thousand arrays of some fifty shapes. XLA compiles the draw of every array anew: for
Stable Diffusion 1 half a minute on two cores for a CPU, and more than six minutes for a GPU. There
an array has the program of its equations alone, which all arrays of its shape, initialiser and
sharding share. The 3,145 arrays of that state have 114 programs, which compile in 28 seconds.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jax.sharding import Mesh

from latent_diffusion.core.types import PyTree
from latent_diffusion.runtime.parallel.placement import put, state_shardings
from latent_diffusion.runtime.parallel.rules import Rules

Init = Callable[[jax.Array], tuple[PyTree, PyTree]]  # a key -> (state, constants)
SMALL = 16  # variables of at most so many numbers are computed before, such as keys

_programs: dict[Hashable, Any] = {}  # all that this process has compiled


def initialise(
    init: Init, rng: jax.Array, mode: str, *, mesh: Mesh | None = None, rules: Rules = ()
) -> tuple[PyTree, PyTree]:
    """The state and constants that `init(rng)` returns, with the shardings of compiled steps.

    The state is created sharded: a device has its share, and at most one whole array beside it.
    """
    if jax.default_backend() == "gpu":
        closed, shapes = jax.make_jaxpr(init, return_shape=True)(rng)
        shardings = _shardings(shapes, mode, mesh, rules)
        leaves = map(_Trace(closed, rng).create, closed.jaxpr.outvars, jax.tree.leaves(shardings))
        return jax.tree.unflatten(jax.tree.structure(shardings), list(leaves))
    return compile_init(init, rng, mode, mesh=mesh, rules=rules)(rng)


def compile_init(
    init: Init, rng: jax.Array, mode: str, *, mesh: Mesh | None = None, rules: Rules = ()
) -> Any:
    """Jit `init(rng) -> (state, constants)`; the results have the shardings of compiled steps."""
    return jax.jit(init, out_shardings=_shardings(jax.eval_shape(init, rng), mode, mesh, rules))


def _shardings(shapes: tuple[PyTree, PyTree], mode: str, mesh: Mesh | None, rules: Rules) -> Any:
    state, constants = shapes
    return state_shardings(state, mode, mesh, rules), state_shardings(constants, mode, mesh)


class _Trace:
    """The equations of a function, and the values of its variables that are known already."""

    def __init__(self, closed: Any, rng: jax.Array):
        self.jaxpr = closed.jaxpr
        self.values = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        self.values[self.jaxpr.invars[0]] = rng
        self.makers = {out: equation for equation in self.jaxpr.eqns for out in equation.outvars}
        self.small = set(self.values)  # variables that depend on small ones alone
        for equation in self.jaxpr.eqns:
            if self.small.issuperset(_read(equation)):
                self.small.update(v for v in equation.outvars if v.aval.size <= SMALL)

    def create(self, out: Any, sharding: Any) -> jax.Array:
        """The value of an output, which later outputs may use: averages copy parameters.

        Copies, zeros and ones need no program.
        """
        equations, inputs = self._needed(out)
        names = [equation.primitive.name for equation in equations]
        if names == ["copy"]:
            return jax.device_put(self.values[inputs[0]], sharding, may_alias=False)
        if names == ["broadcast_in_dim"] and not inputs:
            number = equations[0].invars[0].val
            return put(np.full(out.aval.shape, number, out.aval.dtype), sharding)
        kind = (sharding, *_kind(out, equations, inputs))
        if kind not in _programs:
            function = self._function(out, equations, inputs)
            _programs[kind] = jax.jit(function, out_shardings=sharding)
        (value,) = _programs[kind](*(self.values[v] for v in inputs))
        if not isinstance(out, Literal):
            self.values.setdefault(out, value)
        return value

    def _needed(self, out: Any) -> tuple[list[Any], list[Any]]:
        """The equations that make an output, in order, and the known variables that they read."""
        equations: dict[int, Any] = {}
        inputs: dict[Any, None] = {}

        def visit(variable: Any) -> None:
            if variable in self.values or (variable in self.small and variable is not out):
                self._compute(variable)
                inputs[variable] = None
            elif id(equation := self.makers[variable]) not in equations:
                for read in _read(equation):
                    visit(read)
                equations[id(equation)] = equation

        if not isinstance(out, Literal):
            visit(out)
        return list(equations.values()), list(inputs)

    def _compute(self, variable: Any) -> None:
        """Compute a small value here and now."""
        if variable not in self.values:
            equation = self.makers[variable]
            read = list(dict.fromkeys(_read(equation)))
            for needed in read:
                self._compute(needed)
            function = self._function(variable, [equation], read)
            (self.values[variable],) = function(*(self.values[v] for v in read))

    def _function(self, out: Any, equations: list[Any], inputs: list[Any]) -> Any:
        """The function from inputs to [an output]."""
        part = self.jaxpr.replace(constvars=[], invars=inputs, outvars=[out], eqns=equations)
        return jaxpr_as_fun(ClosedJaxpr(part, ()))


def _read(equation: Any) -> list[Any]:
    return [variable for variable in equation.invars if not isinstance(variable, Literal)]


def _kind(out: Any, equations: list[Any], inputs: list[Any]) -> tuple[Hashable, ...]:
    """All that makes an output, whatever the variables are called."""
    numbers = {variable: number for number, variable in enumerate(inputs)}

    def name(variable: Any) -> Hashable:
        if isinstance(variable, Literal):
            return str(variable.aval), str(variable.val)
        return numbers.setdefault(variable, len(numbers))

    steps: list[Hashable] = [str(variable.aval) for variable in inputs]
    for equation in equations:
        options: Hashable = tuple(sorted(equation.params.items()))
        try:
            hash(options)
        except TypeError:
            options = id(equation)
        variables = (*equation.invars, *equation.outvars)
        steps.append((equation.primitive, options, *map(name, variables)))
    return (*steps, name(out))
