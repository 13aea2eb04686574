"""One step function, three callers: the only place that says pmap, jit, Mesh or NamedSharding.

A step is `step(state, constants, batch, rng, *, axis_name=None) -> (state, metrics)`:

    single  `jax.jit` on one device
    pmap    every device runs the step on its part of the batch; the step averages over `axis_name`
    mesh    `jax.jit` over a (data, fsdp, tensor) mesh; arrays are global, rules over parameter
            paths say how the state is cut

The state has the same shapes in all three (no device axis), so checkpoints don't depend on them.
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from latent_diffusion.types import PyTree, lookup

AXIS_NAME = "batch"
MESH_AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = P(("data", "fsdp"))

Rules = Sequence[Sequence[str]]  # (regex, layout) pairs
DEFAULT_RULES = ((".*", "replicate"),)
Step = Callable[..., Any]


# ---------------------------------------------------------------------------- modes and meshes


def resolve_mode(mode: str) -> str:
    """Return "single", "pmap" or "mesh"; "auto" means single on one device, pmap on several."""
    known = {"single": "single", "pmap": "pmap", "mesh": "mesh"}
    known["auto"] = "single" if jax.device_count() == 1 else "pmap"
    resolved = lookup(known, mode, "parallel mode")
    if resolved == "single" and jax.process_count() > 1:
        raise ValueError(
            f"parallel mode 'single' can't span {jax.process_count()} processes; use pmap or mesh"
        )
    return resolved


def _resolve(mode: str, mesh: Mesh | None) -> tuple[str, Mesh | None]:
    """The mode, and the mesh in mode "mesh" (by default: all devices on "data")."""
    mode = resolve_mode(mode)
    return mode, (mesh or make_mesh()) if mode == "mesh" else None


def make_mesh(axis_sizes: Mapping[str, int] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices of all processes.

    axis_sizes: sizes by axis name; axes left out have size 1, one may be -1 (whatever is left).
    None means {"data": -1}. Raises ValueError where the product isn't the number of devices.
    """
    given = dict(axis_sizes) if axis_sizes else {"data": -1}
    for name in given:
        lookup(dict.fromkeys(MESH_AXES), name, "mesh axis")
    sizes = {name: int(given.get(name, 1)) for name in MESH_AXES}
    shown = " × ".join(f"{name} {size}" for name, size in sizes.items())
    count = jax.device_count()
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {shown}: sizes must be positive, and at most one may be -1")
    product = int(np.prod([size for size in sizes.values() if size != -1]))
    if free:
        sizes[free[0]] = count // product
        product *= sizes[free[0]]
    if product != count:
        raise ValueError(f"mesh {shown} needs {product or 'more'} devices, but there are {count}")
    # jax.make_mesh follows the topology; its default axis type, Explicit, would put shardings
    # into the types of the model's arrays.
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def devices(settings: Any) -> tuple[str, Mesh | None]:
    """(mode, mesh) from a config with the fields `mode` and `mesh` (sizes, used by "mesh" only)."""
    mode = resolve_mode(settings["mode"])
    return mode, make_mesh(dict(settings["mesh"])) if mode == "mesh" else None


def process_shard(mode: str, mesh: Mesh | None = None) -> tuple[int, int]:
    """(index, count): this process loads block `index` of `count` equal blocks of a global batch.

    Processes that share rows of the mesh (a tensor axis across hosts) get the same index.
    """
    mode, mesh = _resolve(mode, mesh)
    if mesh is None:
        return jax.process_index(), jax.process_count()
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    mine = [
        i for i, row in enumerate(rows) if any(d.process_index == jax.process_index() for d in row)
    ]
    index, rest = divmod(mine[0], len(mine))
    if rest or len(rows) % len(mine) or mine != list(range(mine[0], mine[0] + len(mine))):
        raise ValueError(f"process {jax.process_index()} owns scattered rows {mine} of the mesh")
    return index, len(rows) // len(mine)


# ---------------------------------------------------------------------------- sharding rules


def _replicate(leaf: Any, mesh: Mesh) -> P:
    return P()


def _tensor(leaf: Any, mesh: Mesh, axis: int) -> P:
    """Cut `axis` over "tensor"; scalars that share the path (step counts) are replicated."""
    if not leaf.shape:
        return P()
    if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] % mesh.shape["tensor"]:
        raise ValueError(
            f"axis {axis} of shape {leaf.shape} does not divide over {mesh.shape['tensor']} devices"
        )
    return _cut(leaf.ndim, axis % leaf.ndim, "tensor")


def _fsdp(leaf: Any, mesh: Mesh, min_mb: int | float = 4) -> P:
    """Cut the largest axis that divides over "fsdp", if the array has at least min_mb MiB."""
    divisible = [i for i, size in enumerate(leaf.shape) if size % mesh.shape["fsdp"] == 0]
    if not divisible or _num_bytes(leaf) < min_mb * 2**20:
        return P()
    return _cut(leaf.ndim, max(divisible, key=lambda i: leaf.shape[i]), "fsdp")


def _cut(ndim: int, axis: int, name: str) -> P:
    return P(*(name if i == axis else None for i in range(ndim)))


LAYOUTS = {"replicate": _replicate, "tensor": _tensor, "fsdp": _fsdp}


def _parse_layout(spec: str) -> Callable[[Any, Mesh], P]:
    """Read "replicate", "tensor(-1)" or "fsdp(min_mb=4)"."""
    try:
        node = ast.parse(spec, mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name = ast.unparse(call.func)
        args = [ast.literal_eval(arg) for arg in call.args]
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"can't read sharding layout {spec!r}") from error
    layout = lookup(LAYOUTS, name, "sharding layout")

    def apply(leaf: Any, mesh: Mesh) -> P:
        try:
            return layout(leaf, mesh, *args, **kwargs)
        except TypeError as error:
            raise ValueError(f"bad arguments in sharding layout {spec!r}: {error}") from error

    return apply


def infer_shardings(tree: PyTree, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """A NamedSharding for every leaf of `tree` (arrays or ShapeDtypeStructs).

    rules: (regex, layout) pairs. The regex is searched in the '/'-joined path, the first match
    wins; so optimiser moments and EMA copies, whose paths end like their parameter's, follow it.
    Layouts: "replicate", "tensor(axis)", "fsdp(min_mb=4)". No rules at all: replicate everything.

    Raises ValueError for a leaf that no rule matches, and for a rule that matches no leaf.
    """
    parsed = [(regex, spec, _parse_layout(spec)) for regex, spec in rules or DEFAULT_RULES]
    matched: set[str] = set()

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = path_string(path)
        hits = [rule for rule in parsed if re.search(rule[0], name)]
        matched.update(rule[0] for rule in hits)
        if not hits:
            raise ValueError(f"no sharding rule matches {name!r}; end with ('.*', 'replicate')")
        regex, layout, apply = hits[0]
        try:
            return NamedSharding(mesh, apply(leaf, mesh))
        except ValueError as error:
            raise ValueError(
                f"sharding rule ({regex!r}, {layout!r}) at {name!r}: {error}"
            ) from error

    shardings = jax.tree_util.tree_map_with_path(sharding, _shapes(tree))
    for regex, layout, _ in parsed:
        if regex not in matched and jax.tree.leaves(tree):
            raise ValueError(f"sharding rule ({regex!r}, {layout!r}) matches nothing")
    return shardings


def describe(shardings: PyTree, tree: PyTree) -> str:
    """A table: path, shape, dtype, how it is cut, and bytes per device; the last row is the sum."""
    rows = [("path", "shape", "dtype", "sharding", "bytes/device")]
    total = 0
    leaves = jax.tree_util.tree_leaves_with_path(_shapes(tree))
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        part = sharding.shard_shape(leaf.shape)
        num_bytes = int(np.prod(part)) * leaf.dtype.itemsize
        total += num_bytes
        spec = str(tuple(sharding.spec)) if getattr(sharding, "spec", None) else "replicate"
        shape = "×".join(map(str, leaf.shape)) or "scalar"
        rows.append((path_string(path), shape, str(leaf.dtype), spec, f"{num_bytes:,}"))
    rows.append(("total", "", "", "", f"{total:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i == 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def path_string(path: Any) -> str:
    """The '/'-joined form of a tree path: what the rules are searched in."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shapes(tree: PyTree) -> PyTree:
    return jax.eval_shape(lambda same: same, tree)


def _num_bytes(leaf: Any) -> int:
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize


# ---------------------------------------------------------------------------- placement


@functools.cache
def _local_mesh() -> Mesh:
    """What pmap itself uses: the devices of this process, in order."""
    return Mesh(np.asarray(jax.local_devices()), (AXIS_NAME,))


def _replicated(mode: str, mesh: Mesh | None) -> Sharding:
    if mode == "single":
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh or _local_mesh(), P())


def state_shardings(tree: PyTree, mode: str, mesh: Mesh | None = None, rules: Rules = ()) -> PyTree:
    """Where the compiled step wants every leaf of the state. Rules count in mode "mesh" only."""
    mode, mesh = _resolve(mode, mesh)
    if mesh is not None:
        return infer_shardings(tree, mesh, rules)
    return jax.tree.map(lambda _: _replicated(mode, mesh), tree)


def place(tree: PyTree, mode: str, mesh: Mesh | None = None, rules: Rules = ()) -> PyTree:
    """Put a fresh or restored state (or constants) where the compiled step wants it.

    Python scalars become arrays, so that the second step sees the types of the first; an array
    that occurs twice (EMA = params at the start) becomes two, so that both can be donated. The
    result may share memory with `tree`, which a donating step then deletes: use the result only.
    """
    seen: set[int] = set()

    def own(leaf: Any) -> Any:
        twice = id(leaf) in seen
        seen.add(id(leaf))
        return leaf.copy() if twice and isinstance(leaf, jax.Array) else leaf

    tree = jax.tree.map(_strong, jax.tree.map(own, tree))
    return jax.tree.map(_put, tree, state_shardings(tree, mode, mesh, rules))


def abstract(tree: PyTree, mode: str, mesh: Mesh | None = None, rules: Rules = ()) -> PyTree:
    """ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    tree = _shapes(tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        state_shardings(tree, mode, mesh, rules),
    )


def place_batch(host_batch: PyTree, mode: str, mesh: Mesh | None = None) -> PyTree:
    """Put this process's part of a global batch (numpy, leading axis B) on its devices.

    Raises ValueError where B doesn't divide over the devices. Batches already placed pass through,
    so a loader may place the next batch while a step runs.
    """
    mode, mesh = _resolve(mode, mesh)
    leaves = jax.tree.leaves(host_batch)
    if all(isinstance(leaf, jax.Array) for leaf in leaves):
        return host_batch
    if mode == "single":
        return jax.device_put(host_batch, _replicated(mode, mesh))
    parts = jax.local_device_count()
    if mesh is not None:
        parts = mesh.shape["data"] * mesh.shape["fsdp"] // process_shard(mode, mesh)[1]
    for leaf in leaves:
        if len(leaf) % parts:
            raise ValueError(f"a batch of {len(leaf)} examples doesn't divide over {parts} devices")
    if mesh is None:
        sharding = NamedSharding(_local_mesh(), P(AXIS_NAME))
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), host_batch)
        return jax.device_put(split, sharding)
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), host_batch)


def to_global(tree: PyTree, mode: str) -> PyTree:
    """View a pmapped state on several processes as one replicated global state, without copying.

    Checkpoint writers want global arrays; pmap returns arrays local to each process.
    """
    if mode != "pmap" or jax.process_count() == 1:
        return tree
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), (AXIS_NAME,)), P())

    def view(leaf: jax.Array) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                view(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
            )
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    return jax.tree.map(view, tree)


def _strong(leaf: Any) -> Any:
    """An array without weak type: x + 1.0 would strengthen it, and the next call recompile."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    return leaf.astype(leaf.dtype) if getattr(leaf, "weak_type", False) else leaf


def _put(leaf: Any, sharding: Sharding) -> jax.Array:
    # An uncommitted array would come back committed from step 1, and step 2 would recompile.
    if isinstance(leaf, jax.Array) and leaf.committed and leaf.sharding == sharding:
        return leaf
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # device_put would first compare the values of all processes, a collective for every leaf.
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(np.asarray(jax.random.key_data(leaf)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


# ---------------------------------------------------------------------------- compiled steps


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step bound to its devices: `compiled(state, constants, host_batch, rng)`."""

    run: Callable[..., Any]
    lower: Callable[..., Any]  # the same arguments -> jax.stages.Lowered, to look at the HLO

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

    host_batch: this process's part of the global batch, numpy with leading axis B.
    rng: one typed key, the same on all processes. The state is donated: the one passed in is
    deleted. Metrics must be the same on all devices (the step averages them over `axis_name`).
    """
    mode, mesh = _resolve(mode, mesh)
    donate = (0,) if donate_state else ()

    def build(state: PyTree) -> Any:
        if mode == "pmap":
            return _pmap(step, out_axes=None, donate_argnums=donate)
        # Outputs laid out like the inputs: donation can alias, and step 2 doesn't recompile.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        out = (shardings, _replicated(mode, mesh))
        return jax.jit(step, out_shardings=out, donate_argnums=donate)

    return _bind(build, lambda out: out, mode, mesh, rules)


def compile_eval(
    step: Step, mode: str, *, mesh: Mesh | None = None, rules: Rules = ()
) -> CompiledStep:
    """Compile a step whose outputs all have a leading axis B: one value, image... per example.

    `f(state, constants, host_batch, rng)` returns them as numpy arrays for the whole global batch,
    in its order, on every process. The state is not donated. Serves evaluation and sampling.
    """
    mode, mesh = _resolve(mode, mesh)

    def build(state: PyTree) -> Any:
        if mode == "pmap":
            return _pmap(step, out_axes=0)
        return jax.jit(step, out_shardings=NamedSharding(mesh, BATCH_SPEC) if mesh else None)

    def gather(out: PyTree) -> PyTree:
        if mode == "pmap":
            out = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), out)
        if jax.process_count() > 1:
            return multihost_utils.process_allgather(out, tiled=True)
        return jax.tree.map(np.asarray, out)

    return _bind(build, gather, mode, mesh, rules)


def _pmap(step: Step, **options: Any) -> Any:
    def per_device(state: PyTree, rest: tuple) -> Any:
        return step(state, *rest, axis_name=AXIS_NAME)

    # Nested in_axes: JAX 0.10's shortcut for a flat tuple takes one entry per *leaf* whenever the
    # arguments happen to have as many leaves in all as there are arguments (four).
    mapped = jax.pmap(per_device, AXIS_NAME, in_axes=(None, (None, 0, None)), **options)

    def function(state: PyTree, *rest: Any) -> Any:
        return mapped(state, rest)

    function.lower = lambda state, *rest: mapped.lower(state, rest)  # type: ignore[attr-defined]
    return function


def _bind(
    build: Callable[[PyTree], Any],
    finish: Callable[[Any], Any],
    mode: str,
    mesh: Mesh | None,
    rules: Rules,
) -> CompiledStep:
    """Put arguments in place; `build` waits for the first state, whose layout it copies."""
    function: Any = None
    constants_seen: list[PyTree] = []  # [given, placed]

    def arguments(state: PyTree, constants: PyTree, host_batch: PyTree, rng: Any) -> tuple:
        nonlocal function
        batch = place_batch(host_batch, mode, mesh)
        if function is None:
            state = place(state, mode, mesh, rules)
            function = build(state)
        if not constants_seen or constants_seen[0] is not constants:
            constants_seen[:] = [constants, _place_constants(constants, mode, mesh)]
        return state, constants_seen[1], batch, _put(rng, _replicated(mode, mesh))

    def run(*args: Any) -> Any:
        args = arguments(*args)
        return finish(function(*args))

    def lower(*args: Any) -> Any:
        args = arguments(*args)
        return function.lower(*args)

    return CompiledStep(run, lower)


def _place_constants(constants: PyTree, mode: str, mesh: Mesh | None) -> PyTree:
    """Replicate what isn't on all devices yet; leave what the caller has laid out on them."""
    target = _replicated(mode, mesh)

    def put(leaf: Any) -> Any:
        placed = isinstance(leaf, jax.Array) and leaf.sharding.device_set == target.device_set
        return leaf if placed else _put(leaf, target)

    return jax.tree.map(put, constants)
