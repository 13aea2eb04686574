"""Compile steps for their devices."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latent_diffusion.core.types import PyTree
from latent_diffusion.runtime import processes, programs
from latent_diffusion.runtime.parallel.modes import AXIS_NAME, BATCH_SPEC, resolve, resolve_mode
from latent_diffusion.runtime.parallel.placement import (
    local_rows,
    place,
    place_batch,
    put,
    replicated,
)
from latent_diffusion.runtime.parallel.rules import Rules, infer_shardings, shapes_of

Step = Callable[..., Any]
# On CPUs JAX 0.10 computes products, reductions and convolutions by YNNPACK. Eigen is faster for
# convolutions, above all for gradients: a step of perceptual compression takes a quarter less time
# (docs/benchmarks.md).
_NO_YNN_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step bound to its devices: `compiled(state, constants, host_batch, rng)`."""

    run: Callable[..., Any]
    arguments: Callable[..., Any]  # the same arguments -> the program's inputs, on the devices
    lower: Callable[..., Any]  # the same arguments -> jax.stages.Lowered, to inspect the HLO

    def __call__(self, state: PyTree, constants: PyTree, host_batch: PyTree, rng: Any) -> Any:
        """Place the process-local numpy batch and run."""
        return self.run(state, constants, host_batch, rng)


def compile_step(
    step: Step,
    mode: str,
    *,
    mesh: Mesh | None = None,
    rules: Rules = (),
    donate_state: bool = True,
) -> CompiledStep:
    """Compile a training step; returns `f(state, constants, host_batch, rng) -> (state, metrics)`.

    host_batch: this process's part of the global batch, numpy with leading axis B; pictures may be
    bytes, 0 ... 255, which become [-1, 1] on the devices. rng: a typed key, the same on all
    processes. donate_state: the caller's arrays of the state are deleted. Metrics must be the same
    on all devices (the step averages them over `axis_name`).
    """
    mode, mesh = resolve(mode, mesh)
    donate = (0,) if donate_state else ()

    def build(state: PyTree) -> Any:
        if mode == "pmap":
            return _pmap(step, out_axes=None, donate_argnums=donate)
        # With the inputs' shardings for outputs, donation reuses memory, and the next step has the
        # same program.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        out = (shardings, replicated(mode, mesh))
        return _jit(step, mesh, out_shardings=out, donate_argnums=donate)

    return _bind(build, lambda out: out, mode, mesh, rules)


def compile_eval(
    step: Step,
    mode: str,
    *,
    mesh: Mesh | None = None,
    rules: Rules = (),
    description: str | None = None,
) -> CompiledStep:
    """Compile a step whose outputs all have a leading axis B: one value, image... per example.

    `f(state, constants, host_batch, rng)` returns them as numpy arrays for the whole global batch,
    in its order, on every process. The state is not donated. This is for evaluation and sampling.
    description: with this text the program of one device is stored on disk; see `programs.find`.
    """
    mode, mesh = resolve(mode, mesh)

    def build(state: PyTree) -> Any:
        if mode == "pmap":
            return _pmap(step, out_axes=0)
        return _jit(step, mesh, out_shardings=NamedSharding(mesh, BATCH_SPEC) if mesh else None)

    gather = functools.partial(gathered, mode=mode)
    return _bind(build, gather, mode, mesh, rules, description if mode == "single" else None)


def compile_part(
    step: Step, mode: str, entry: str, *, description: str | None = None
) -> CompiledStep:
    """Compile a step like `compile_eval`, but its outputs stay on the devices, for further steps.

    Outputs of any shape are allowed; those with a leading axis B, which batch[entry] has, are cut
    like the batch. The batch of a further step has these outputs beside a batch that `place_batch`
    has put on the devices.
    """
    mode, mesh = resolve(mode, None)

    def build(state: PyTree) -> Any:
        if mode == "pmap":
            return _pmap(step, out_axes=0)
        return _jit(_cut_outputs(step, mesh, entry) if mesh else step, mesh)

    return _bind(build, lambda out: out, mode, mesh, (), description if mode == "single" else None)


def gathered(tree: PyTree, mode: str) -> PyTree:
    """Numpy arrays [B ...] of the whole global batch on every process, from a step's outputs."""
    if resolve_mode(mode) == "pmap":
        tree = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


def lower_for(
    devices: Sequence[Any],
    step: Step,
    mode: str,
    args: Sequence[PyTree],
    *,
    mesh: Mesh | None = None,
    rules: Rules = (),
    evaluate: bool = False,
) -> Any:
    """Lower a step for devices that may be absent: a `jax.stages.Lowered` to compile.

    mode: "pmap" or "mesh", with a mesh over `devices`. args: (state, constants, batch, rng), arrays
    or ShapeDtypeStructs; the batch is global. evaluate: lower like `compile_eval`, else like
    `compile_step`.
    """
    state, constants, batch, rng = args
    donate = () if evaluate else (0,)
    if mode == "pmap":
        count = len(devices)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, len(x) // count, *x.shape[1:]), x.dtype), batch
        )
        options = {"out_axes": 0 if evaluate else None, "donate_argnums": donate}
        mapped = _pmap(step, devices=devices, **options)
        return mapped.lower(shapes_of(state), (shapes_of(constants), batch, shapes_of(rng)))
    assert mesh is not None
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, BATCH_SPEC)
    shardings = infer_shardings(state, mesh, rules)

    def laid_out(tree: PyTree, sharding: Any) -> PyTree:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes_of(tree)
        )

    state = jax.tree.map(laid_out, state, shardings)
    rest = (laid_out(constants, whole), laid_out(batch, rows), laid_out(rng, whole))
    out = rows if evaluate else (shardings, whole)
    function = _flat(_cut_by_rows(step, mesh))
    return jax.jit(function, out_shardings=out, donate_argnums=donate).lower(state, rest)


def _flat(step: Step, **options: Any) -> Step:
    """The step as a function of (state, (constants, batch, rng)), where pictures may be bytes."""

    def scaled(x: Any) -> Any:
        return x.astype(np.float32) / np.float32(127.5) - 1 if x.dtype == np.uint8 else x

    @functools.wraps(step)
    def function(state: PyTree, rest: tuple) -> Any:
        constants, batch, rng = rest
        return step(state, constants, jax.tree.map(scaled, batch), rng, **options)

    return function


def _cut_by_rows(step: Step, mesh: Mesh) -> Step:
    """The step with embeddings (`nn.Embed`) and kernels (`on_rows`) that are cut along the batch.

    Otherwise XLA cuts them and all later activations along features, as the table is cut: under
    FSDP a text transformer would send its activations, many times the bytes of its parameters.
    """
    rows = NamedSharding(mesh, BATCH_SPEC)

    def keep(call: Step, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = call(*args, **kwargs)
        looked_up = isinstance(context.module, nn.Embed) and context.method_name == "__call__"
        return jax.lax.with_sharding_constraint(out, rows) if looked_up else out

    @functools.wraps(step)
    def function(*args: Any) -> Any:
        with nn.intercept_methods(keep), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*args)

    return function


def _cut_outputs(step: Step, mesh: Mesh, entry: str) -> Step:
    """The step with outputs whose sharding doesn't depend on the compiler.

    Otherwise the next step would be compiled again wherever they differ.
    """

    @functools.wraps(step)
    def function(state: PyTree, constants: PyTree, batch: PyTree, rng: Any) -> Any:
        size = batch[entry].shape[0]

        def cut(x: Any) -> Any:
            spec = BATCH_SPEC if x.ndim and x.shape[0] == size else P()
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        return jax.tree.map(cut, step(state, constants, batch, rng))

    return function


def compile_local(function: Callable[[PyTree, PyTree], PyTree], constants: PyTree) -> Any:
    """Compile `function(constants, batch)` for the devices of this process; returns `f(batch)`.

    Every device computes its part of the rows; no other process takes part. batch: numpy arrays
    whose leading axis divides over the local devices.
    """
    whole, rows = replicated("pmap", None), local_rows()
    compiled = jax.jit(
        function,
        in_shardings=(whole, rows),
        out_shardings=rows,
        compiler_options=_compiler_options(),
    )
    constants = jax.tree.map(lambda leaf: put(leaf, whole), constants)
    return lambda batch: jax.tree.map(np.asarray, compiled(constants, jax.device_put(batch, rows)))


def _compiler_options() -> dict[str, Any] | None:
    concerned = jax.default_backend() == "cpu" and jax.__version_info__[:2] == (0, 10)
    return _NO_YNN_CONVOLUTIONS if concerned else None


def _jit(step: Step, mesh: Mesh | None, **options: Any) -> Any:
    step = _cut_by_rows(step, mesh) if mesh else step
    return jax.jit(_flat(step), compiler_options=_compiler_options(), **options)


def _pmap(step: Step, **options: Any) -> Any:
    # in_axes is nested, since JAX 0.10 takes a flat tuple as an entry for each *leaf* if the
    # arguments have as many leaves as there are arguments.
    in_axes = (None, (None, 0, None))
    return jax.pmap(_flat(step, axis_name=AXIS_NAME), AXIS_NAME, in_axes=in_axes, **options)


def _bind(
    build: Callable[[PyTree], Any],
    finish: Callable[[Any], Any],
    mode: str,
    mesh: Mesh | None,
    rules: Rules,
    description: str | None = None,
) -> CompiledStep:
    """A step that places its arguments. build: compiles for the shardings of the first state."""
    function: Any = None
    stored: dict[Any, Any] = {}  # structure and types of arguments -> their program
    compiled: set[Any] = set()  # shapes of batches that have a program
    placed: list[PyTree] = []  # [the caller's constants, the same on the devices]

    def arguments(state: PyTree, constants: PyTree, host_batch: PyTree, rng: Any) -> tuple:
        nonlocal function
        batch = place_batch(host_batch, mode, mesh)
        if function is None:
            state = place(state, mode, mesh, rules)
            function = build(state)
        if not placed or placed[0] is not constants:
            placed[:] = [constants, _place_constants(constants, mode, mesh)]
        return state, (placed[1], batch, put(rng, replicated(mode, mesh)))

    def run(*args: Any) -> Any:
        args = arguments(*args)
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(args[1][1]))
        # Some hosts compile faster than others, and collectives soon time out.
        if jax.process_count() > 1 and shapes not in compiled:
            function.lower(*args).compile()  # cached for the call below
            processes.barrier("compiled")
            compiled.add(shapes)
        return finish(program(args)(*args))

    def program(args: tuple) -> Any:
        if description is None:
            return function
        key = jax.tree.structure(args), programs.types_of(args)
        if key not in stored:
            stored[key] = programs.find(function, args, description)
        return stored[key]

    def lower(*args: Any) -> Any:
        args = arguments(*args)
        return function.lower(*args)

    return CompiledStep(run, arguments, lower)


def _place_constants(constants: PyTree, mode: str, mesh: Mesh | None) -> PyTree:
    """Replicate leaves that aren't on all devices; the others keep their shardings."""
    target = replicated(mode, mesh)

    def replicate(leaf: Any) -> Any:
        placed = isinstance(leaf, jax.Array) and leaf.sharding.device_set == target.device_set
        return leaf if placed else put(leaf, target)

    return jax.tree.map(replicate, constants)
