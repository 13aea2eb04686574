"""One step, three callers: the same numbers, nothing copied, nothing compiled twice."""

import contextlib
import functools
import importlib.util
import itertools
import os
import re
import socket
import subprocess
import sys
from collections import Counter

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from programs import host_transfers
from slices import SLICES, Chip, chips_of
from tiny import make_config

from latent_diffusion.core import rng as rng_lib
from latent_diffusion.core.rng import init_key
from latent_diffusion.data.transforms import to_float
from latent_diffusion.nets.conditioners.text import TextTransformer
from latent_diffusion.nets.dot_product_attention import attend
from latent_diffusion.runtime import parallel
from latent_diffusion.runtime.parallel import hlo, initialisation
from latent_diffusion.runtime.parallel.chips import topology_devices
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec

BATCH = 16
MODES = {
    "single": ("single", None, ()),
    "pmap": ("pmap", None, ()),
    "mesh data 8": ("mesh", {"data": 8}, ()),
    "mesh data 2 × fsdp 4": ("mesh", {"data": 2, "fsdp": -1}, ((".*", "fsdp(min_mb=0)"),)),
    "mesh data 2 × fsdp 2 × tensor 2": (
        "mesh",
        {"data": 2, "fsdp": 2, "tensor": 2},
        (("Dense_0.*kernel", "tensor(-1)"), (".*", "fsdp(min_mb=0)")),
    ),
}
EVALUATED = ("single", "pmap", "mesh data 2 × fsdp 2 × tensor 2")  # compiling is what costs here


class MLP(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=True):
        # No bias: before a BatchNorm its gradient is rounding noise, which Adam would blow up.
        x = nn.Dense(32, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
        return nn.Dense(8)(nn.silu(x))


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    ema_params: dict
    batch_stats: dict
    opt_state: optax.OptState


TX = optax.adam(1e-2)


@jax.jit
def initial_state():
    variables = MLP().init(jax.random.key(0), jnp.zeros((2, 8)))
    params = variables["params"]
    ema = jax.tree.map(jnp.copy, params)
    return State(jnp.zeros((), jnp.int32), params, ema, variables["batch_stats"], TX.init(params))


def train_step(state, constants, batch, rng, *, axis_name=None):
    keys = rng_lib.example_keys(rng, len(batch["x"]), axis_name)
    x = batch["x"] + rng_lib.normal_per_example(keys, (8,)) * constants["sigma"]

    def loss_fn(params):
        out, new = MLP(axis_name).apply(
            {"params": params, "batch_stats": state.batch_stats}, x, mutable=["batch_stats"]
        )
        return jnp.mean((out - batch["x"]) ** 2), new["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    loss, grads = rng_lib.pmean((loss, grads), axis_name)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema_params, params)
    return State(state.step + 1, params, ema, stats, opt_state), {"loss": loss}


def eval_step(state, constants, batch, rng, *, axis_name=None):
    variables = {"params": state.ema_params, "batch_stats": state.batch_stats}
    noise = rng_lib.normal_per_example(rng_lib.example_keys(rng, len(batch["x"]), axis_name), ())
    error = MLP().apply(variables, batch["x"], train=False) - batch["x"]
    return {"mse": jnp.mean(error**2, axis=-1), "noise": noise, "index": batch["index"]}


def host_batch(step):
    x = np.random.default_rng(step).normal(size=(BATCH, 8)).astype(np.float32)
    return {"x": x, "index": np.arange(BATCH, dtype=np.int32)}


def build(name):
    mode, sizes, rules = MODES[name]
    return mode, parallel.make_mesh(sizes) if sizes else None, rules


@contextlib.contextmanager
def compilations():
    """Collects an entry for every XLA compilation inside the block."""
    seen = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


CONSTANTS = {"sigma": np.float32(0.3)}


@pytest.fixture(scope="module")
def runs():
    """Five steps in every mode, once: state, losses, evaluation, compilations, deletions."""
    results = {}
    for name in MODES:
        mode, mesh, rules = build(name)
        step = parallel.compile_step(train_step, mode, mesh=mesh, rules=rules)
        state = parallel.place(initial_state(), mode, mesh, rules)
        losses, deleted, counts = [], [], []
        for i in range(5):
            before = state
            batch, key = host_batch(i), jax.random.key(i)
            with compilations() as compiled:
                state, metrics = step(state, CONSTANTS, batch, key)
            counts.append(len(compiled))
            losses.append(float(metrics["loss"]))
            deleted.append(all(leaf.is_deleted() for leaf in jax.tree.leaves(before)))
        evaluation = {}
        if name in EVALUATED:
            evaluate = parallel.compile_eval(eval_step, mode, mesh=mesh, rules=rules)
            evaluation = evaluate(state, CONSTANTS, host_batch(9), jax.random.key(9))
        results[name] = (state, losses, evaluation, counts, deleted)
    return results


@pytest.mark.parametrize("name", list(MODES)[1:])
def test_modes_agree(runs, name):
    expected, got = runs["single"], runs[name]
    both = zip(jax.tree.leaves(expected[:2]), jax.tree.leaves(got[:2]), strict=True)
    for a, b in both:
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.max(np.abs(a - b)) <= 1e-6 * max(1.0, np.max(np.abs(a)))


@pytest.mark.parametrize("name", MODES)
def test_step_compiles_once_and_donates(runs, name):
    state, losses, _, counts, deleted = runs[name]
    assert counts[0] >= 1 and counts[1:] == [0] * 4
    assert deleted == [True] * 5  # and no warning: they are errors here
    assert int(state.step) == 5
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", list(MODES)[:4])
def test_gradients_cross_the_network_once(name):
    mode, mesh, rules = build(name)
    state = parallel.place(initial_state(), mode, mesh, rules)
    step = parallel.compile_step(train_step, mode, mesh=mesh, rules=rules)
    program = step.lower(state, CONSTANTS, host_batch(0), jax.random.key(0)).compile().as_text()
    traffic = hlo.total_bytes(program)
    gradients, loss, statistics = parallel.num_bytes(state.params), 4, 2 * 2 * 32 * 4
    if name == "single":
        assert traffic == {}
    elif "fsdp" in name:  # parameters forward and backward, gradients back: at most
        assert traffic.keys() == {"all-gather", "all-reduce"}
        assert sum(traffic.values()) <= 3 * gradients + loss + statistics
    else:  # in one operation, less what BatchNorm holds up
        assert gradients + loss <= traffic.pop("all-reduce") <= gradients + loss + statistics
        assert traffic == {}
        kernels = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params) if leaf.ndim == 2)
        assert max(c.num_bytes for c in hlo.collectives(program)) >= kernels + loss


def test_fsdp_sends_parameters_of_a_text_encoder_not_its_activations():
    net = TextTransformer(
        vocab_size=100, max_length=16, width=64, depth=2, num_heads=2, head_dim=32
    )
    batch = {"tokens": np.ones((128, 16), np.int32), "drop": np.zeros(128, bool)}

    def step(params, constants, batch, rng, *, axis_name=None):
        def loss(params):
            return jnp.mean(net.apply(params, batch, batch["drop"]).context ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - g, params, grads), {"loss": value}

    mesh, rules = parallel.make_mesh({"fsdp": 8}), ((".*", "fsdp(min_mb=0)"),)
    params = net.init(init_key(0), *jax.tree.map(jnp.asarray, (batch, batch["drop"])))
    params = parallel.place(params, "mesh", mesh, rules)
    compiled = parallel.compile_step(step, "mesh", mesh=mesh, rules=rules)
    lowered = compiled.lower(params, {}, batch, jax.random.key(0))
    traffic = hlo.total_bytes(lowered.compile().as_text())
    # Forward, backward, and gradients back
    assert sum(traffic.values()) <= 3 * parallel.num_bytes(params)


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_returns_the_global_batch_in_order(runs, name):
    evaluation = runs[name][2]
    np.testing.assert_allclose(evaluation["mse"], runs["single"][2]["mse"], rtol=1e-5)
    np.testing.assert_allclose(evaluation["noise"], runs["single"][2]["noise"], rtol=1e-6)
    assert all(isinstance(leaf, np.ndarray) for leaf in evaluation.values())
    assert evaluation["index"].tolist() == list(range(BATCH))
    assert len(np.unique(evaluation["noise"])) == BATCH


def test_loops_and_kernels_on_rows_send_nothing_over_a_mesh():
    """Attention by blocks; and where rows don't divide over the devices, XLA cuts its own."""
    mesh = parallel.make_mesh({"data": 2, "fsdp": 4})
    q = np.random.default_rng(0).normal(size=(16, 12, 2, 4)).astype(np.float32)

    def step(state, constants, batch, rng):
        del constants, rng
        return attend(state * batch["q"], batch["q"], batch["q"], "blocks")

    layout = {"mesh": mesh, "rules": ((".*", "replicate"),)}
    compiled = parallel.compile_eval(step, "mesh", **layout)
    args = (np.float32(1), {}, {"q": q}, jax.random.key(0))
    text = compiled.lower(*args).compile().as_text()
    assert "while(" in text and not hlo.collectives(text)
    expected = jax.nn.dot_product_attention(q, q, q)
    np.testing.assert_allclose(compiled(*args), expected, atol=1e-5)

    for rows, by_blocks in ((jnp.asarray(q), True), (jnp.asarray(q[:4]), False)):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            program = str(jax.make_jaxpr(lambda q: attend(q, q, q, "blocks"))(rows))
        assert ("scan" in program) == ("shard_map" in program) == by_blocks


def test_python_scalars_and_weak_types_become_arrays():
    placed = parallel.place({"step": 0, "scale": jnp.asarray(1.0)}, "single")
    assert placed["step"].dtype == jnp.int32
    assert not any(leaf.weak_type for leaf in placed.values())


@pytest.mark.parametrize("name", ["single", "pmap", "mesh data 8"])
def test_ema_may_start_as_the_very_parameters(name):
    mode, mesh, rules = build(name)

    def step(state, constants, batch, rng, *, axis_name=None):
        return jax.tree.map(lambda leaf: leaf + 1, state), {}

    params = {"w": jnp.ones((4,)), "b": jnp.zeros(())}
    compiled = parallel.compile_step(step, mode, mesh=mesh)
    state = parallel.place({"params": params, "ema_params": params}, mode, mesh, rules)
    state, _ = compiled(state, {}, host_batch(0), jax.random.key(0))
    assert state["params"]["w"][0] == state["ema_params"]["w"][0] == 2


@pytest.mark.parametrize("name", MODES)
def test_abstract_is_where_place_puts_it(name):
    state = {"params": {"Dense_0": {"kernel": jnp.ones((8, 16))}}, "rng": jax.random.key(0)}
    where = build(name)
    wanted = parallel.abstract(state, *where)
    placed = parallel.place(state, *where)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(placed), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.sharding == b.sharding


def test_undonated_state_survives_and_hlo_can_be_read():
    def step(state, constants, batch, rng, *, axis_name=None):
        return state + rng_lib.pmean(batch["x"].sum(), axis_name), {}

    compiled = parallel.compile_step(step, "pmap", donate_state=False)
    state = parallel.place(np.float32(0), "pmap")
    args = (state, {}, host_batch(0), jax.random.key(0))
    compiled(*args)
    assert not state.is_deleted()
    assert "all-reduce" in compiled.lower(*args).compile().as_text()


@pytest.mark.parametrize("mode", ["single", "pmap", "mesh"])
def test_pictures_in_bytes_are_scaled_on_the_devices(mode):
    """As on the host but for a rounding: XLA multiplies by 1/127.5. In training and evaluation."""
    levels = np.arange(192, dtype=np.uint8).reshape(8, 2, 4, 3)

    def step(state, constants, batch, rng, *, axis_name=None):
        return {"image": batch["image"], "label": batch["label"]}

    def train(state, constants, batch, rng, *, axis_name=None):
        return state, {"low": rng_lib.pmean(batch["image"].mean(), axis_name)}

    batch = {"image": levels, "label": np.arange(8, dtype=np.int32)}
    seen = parallel.compile_eval(step, mode)({}, {}, batch, jax.random.key(0))
    expected = np.stack([to_float(image) for image in levels])
    np.testing.assert_allclose(seen["image"], expected, rtol=0, atol=1.3e-7)
    assert seen["label"].tolist() == list(range(8))
    compiled = parallel.compile_step(train, mode)
    _, metrics = compiled(np.float32(0), {}, batch, jax.random.key(0))
    assert float(metrics["low"]) == pytest.approx(95.5 / 127.5 - 1, rel=1e-5)


def test_auto_takes_pmap_on_several_devices():
    assert parallel.resolve_mode("auto") == "pmap"
    assert parallel.resolve_mode("single") == "single"


def test_devices_reads_a_config():
    settings = ConfigDict({"mode": "mesh", "mesh": {"data": -1, "fsdp": 4, "tensor": 1}})
    mode, mesh = parallel.devices(settings)
    assert (mode, dict(mesh.shape)) == ("mesh", {"data": 2, "fsdp": 4, "tensor": 1})
    settings.mode = "auto"
    assert parallel.devices(settings) == ("pmap", None)


def test_collectives_in_loops_count_as_often_as_they_run():
    text = """
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r.2 = f32[8]{0} all-reduce(%x), channel_id=1, to_apply=%add.1
}
ENTRY %main.9 (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %g = (bf16[2,4]{1,0}, bf16[4,4]{1,0}) all-gather-start(%y), dimensions={0}
  %h = bf16[4,4]{1,0} all-gather-done(%g)
  %s = (f32[8]{0}, f32[2]{0}, pred[3]{0}) all-reduce-start(%a, %b, %c), to_apply=%add.1
  %d = (f32[8]{0}, f32[2]{0}, pred[3]{0}) all-reduce-done(%s)
  %r = ((f32[2], f32[4]), (f32[8], f32[16])) reduce-scatter-start(%a, %y), dimensions={0}
  %e = (f32[8]{0}, f32[16]{0}) reduce-scatter-done(%r)
}
"""  # noqa: E501
    parts = {"all-reduce": 5 * 32 + 32 + 8 + 3, "all-gather": 32, "reduce-scatter": 32 + 64}
    assert hlo.total_bytes(text) == parts
    assert host_transfers(text + '  %s = f32[] custom-call(), custom_call_target="callback"')


def test_the_state_is_made_in_its_parts():
    """No device has more than its share and the array being drawn, nor other numbers."""
    names, mesh, rules = "abcdefgh", parallel.make_mesh({"fsdp": 8}), ((".*", "fsdp(min_mb=0)"),)

    def init(rng):
        keys = jax.random.split(rng, len(names))
        params = {n: jax.random.normal(k, (512, 512)) for n, k in zip(names, keys, strict=True)}
        ema_params = jax.tree.map(jnp.copy, params)
        return {"params": params, "ema": ema_params, "opt": TX.init(params)}, {
            "frozen": jnp.ones(2)
        }

    rng = init_key(0)
    program = parallel.compile_init(init, rng, "mesh", mesh=mesh, rules=rules)
    state, constants = program(rng)
    share = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    whole = parallel.num_bytes(state)
    assert share <= whole / 8 + 8  # the optimiser's count is whole
    assert program.lower(rng).compile().memory_analysis().peak_memory_in_bytes <= 1.3 * share
    expected = jax.jit(init)(rng)
    for a, b in zip(jax.tree.leaves((state, constants)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    placed = parallel.place(state, "mesh", mesh, rules)
    assert jax.tree.leaves(placed)[0] is jax.tree.leaves(state)[0]


def pointer(array):
    return array.addressable_shards[0].data.unsafe_buffer_pointer()


@pytest.mark.parametrize("mode", ["single", "mesh"])
def test_a_gpu_draws_the_state_array_by_array_to_the_same_numbers(mode, monkeypatch):
    """As many programs as kinds of arrays; the forward pass of the networks is in none of them."""
    config = make_config("denoising", **{"unet.remat": "full", "unet.num_res_blocks": 3})
    task = TASKS["denoising"](config)
    init, rng = functools.partial(task.init, batch_spec=batch_spec(config)), init_key(3)
    layout = {}
    if mode == "mesh":
        rules = ((r"in_layers.*kernel", "fsdp(min_mb=0)"), (".*", "replicate"))
        layout = {"mesh": parallel.make_mesh({"data": 2, "fsdp": 4}), "rules": rules}
    programs = {}
    monkeypatch.setattr(initialisation, "_programs", programs)
    expected = parallel.initialise(init, rng, mode, **layout)
    assert not programs  # a CPU has one for all
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = parallel.initialise(init, rng, mode, **layout)
    monkeypatch.undo()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert 10 < len(programs) < len(jax.tree.leaves(found)) / 10
    copies = zip(
        jax.tree.leaves(found[0].params), jax.tree.leaves(found[0].ema_params), strict=True
    )
    for leaf, copy in copies:  # a step may donate both
        assert pointer(leaf) != pointer(copy)


# ------------------------------------------------------------------------ rows of processes


def meshes_of(count):
    """Every mesh whose sizes are powers of two."""
    sizes = [2**i for i in range(count.bit_length())]
    for fsdp, tensor in itertools.product(sizes, sizes):
        if fsdp * tensor <= count:
            yield {"data": -1, "fsdp": fsdp, "tensor": tensor}


def rows_needed(mesh):
    """Process -> the parts of a global batch that its devices hold, one part a (data, fsdp) row."""
    needed = {}
    for part, peers in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])):
        for device in peers:
            needed.setdefault(device.process_index, set()).add(part)
    return needed


def rows_loaded(mesh):
    """Process -> the parts that it loads."""
    loaded, parts = {}, mesh.shape["data"] * mesh.shape["fsdp"]
    for process in {device.process_index for device in mesh.devices.flat}:
        index, count = parallel.process_shard("mesh", mesh, process)
        assert 0 <= index < count and parts % count == 0
        loaded[process] = set(range(index * parts // count, (index + 1) * parts // count))
    return loaded


@pytest.mark.parametrize("topology", SLICES)
def test_every_mesh_of_a_slice_starts(topology):
    """Each process loads the rows of its devices, no others, and no row is forgotten."""
    chips = chips_of(topology)
    for sizes in meshes_of(len(chips)):
        mesh = parallel.make_mesh(sizes, chips)
        loaded = rows_loaded(mesh)
        assert loaded == rows_needed(mesh), sizes
        times = Counter(row for rows in loaded.values() for row in rows)
        hosts_a_row = max(1, mesh.shape["tensor"] // 4)  # they share the row, and all load it
        assert times == dict.fromkeys(range(mesh.size // mesh.shape["tensor"]), hosts_a_row), sizes
        together = mesh.devices.reshape(-1, mesh.shape["tensor"])[:, :4]
        assert all(len({chip.process_index for chip in peers}) == 1 for peers in together)


def test_rows_of_a_tensor_axis_that_hosts_do_not_divide_are_loaded_by_all_that_share_them():
    chips = [Chip(i, i // 4) for i in range(24)]
    mesh = parallel.make_mesh({"data": -1, "tensor": 6}, chips)
    needed, loaded = rows_needed(mesh), rows_loaded(mesh)
    assert needed == {0: {0}, 1: {0, 1}, 2: {1}, 3: {2}, 4: {2, 3}, 5: {3}}
    assert loaded == {process: {0, 1} if process < 3 else {2, 3} for process in range(6)}


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu describes them")
@pytest.mark.parametrize("topology", SLICES)
def test_libtpu_describes_the_same_slices(topology):
    devices = topology_devices(topology)
    described = {Chip(device.id, device.process_index) for device in devices}
    assert described == set(chips_of(topology))
    for sizes in meshes_of(len(devices)):
        mesh = parallel.make_mesh(sizes, devices)
        cut = NamedSharding(mesh, P(("data", "fsdp"))).devices_indices_map((len(devices),))
        rows = {}
        for device, (where,) in cut.items():
            part = where.indices(len(devices))[0] // mesh.shape["tensor"]
            rows.setdefault(device.process_index, set()).add(part)
        assert rows_loaded(mesh) == rows, sizes


def test_two_processes_share_a_batch_over_any_mesh():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{sock.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    env["PYTHONPATH"] = str(ROOT)
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / "sharing.py", str(i), coordinator],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], results
    counts = re.compile(r"\d+ \d+ \d+")  # beside them the runtime speaks of its connections
    assert [list(filter(counts.fullmatch, out.splitlines())) for out, _ in results] == [
        ["6 0 2", "12 0 1", "12 0 1", "6 0 2"],
        ["6 1 2", "12 0 1", "12 0 1", "6 1 2"],
    ]


# ---------------------------------------------------------------------------- sharding rules

TREE = {
    "params": {
        "attn": {"to_q": {"kernel": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}},
        "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 6, 1024), jnp.float32)},
        "norm": {"bias": jax.ShapeDtypeStruct((6,), jnp.float32)},
    },
    "opt_state": {
        "mu": {"attn": {"to_q": {"kernel": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}}}
    },
}
RULES = (("attn.*kernel", "tensor(-1)"), ("bias", "replicate"), (".*", "fsdp(min_mb=0.1)"))


def test_first_rule_wins_and_optimizer_state_follows():
    mesh = parallel.make_mesh({"data": -1, "fsdp": 2, "tensor": 2})
    shardings = parallel.infer_shardings(TREE, mesh, RULES)
    specs = jax.tree.map(lambda s: tuple(s.spec), shardings)
    assert specs["params"]["attn"]["to_q"]["kernel"] == (None, "tensor")
    assert specs["params"]["conv"]["kernel"] == (None, None, None, "fsdp")
    assert specs["params"]["norm"]["bias"] == ()
    assert specs["opt_state"]["mu"]["attn"] == specs["params"]["attn"]


def test_fsdp_leaves_small_and_indivisible_arrays_whole():
    mesh = parallel.make_mesh({"fsdp": 8})
    tree = {
        "small": jax.ShapeDtypeStruct((1024,), jnp.float32),
        "odd": jax.ShapeDtypeStruct((1023, 1025), jnp.float32),
        "exact": jax.ShapeDtypeStruct((1024, 256), jnp.float32),  # a MiB
        "large": jax.ShapeDtypeStruct((1024, 1031), jnp.float32),
    }
    shardings = parallel.infer_shardings(tree, mesh, [(".*", "fsdp(min_mb=1)")])
    assert jax.tree.map(lambda s: tuple(s.spec), shardings) == {
        "small": (),
        "odd": (),
        "exact": ("fsdp", None),
        "large": ("fsdp", None),
    }
    usual = {n: jax.ShapeDtypeStruct((n, 1024), jnp.float32) for n in (1016, 1024)}  # up to 4 MiB
    shardings = parallel.infer_shardings(usual, mesh, [(".*", "fsdp")])
    assert [tuple(s.spec) for s in shardings.values()] == [(), ("fsdp", None)]


def test_describe_counts_bytes_per_device():
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    table = parallel.describe(parallel.infer_shardings(TREE, mesh, RULES), TREE).splitlines()
    conv = next(line for line in table if line.startswith("params/conv/kernel"))
    assert "3×3×6×1024" in conv and "fsdp" in conv and conv.endswith(f"{3 * 3 * 6 * 512 * 4:,}")
    assert table[-1].endswith(f"{2 * 512 * 512 * 4 + 3 * 3 * 6 * 512 * 4 + 6 * 4:,}")


# ---------------------------------------------------------------------------- bad input


def rules_error(rules):
    return lambda: parallel.infer_shardings(
        TREE, parallel.make_mesh({"tensor": 4, "data": 2}), rules
    )


def batch_error(name, size):
    mode, mesh, _ = build(name)
    return lambda: parallel.place_batch({"x": np.zeros((size, 2))}, mode, mesh)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parallel.resolve_mode("ddp"), ["'ddp'", "auto, mesh, pmap, single"]),
        (lambda: parallel.make_mesh({"data": 3}), ["data 3", "needs 3", "are 8"]),
        (lambda: parallel.make_mesh({"data": -1, "fsdp": 3}), ["fsdp 3", "are 8"]),
        (lambda: parallel.make_mesh({"data": -1, "fsdp": 16}), ["fsdp 16", "are 8"]),
        (lambda: parallel.make_mesh({"data": -1, "fsdp": -1}), ["at most one"]),
        (lambda: parallel.make_mesh({"data": 0}), ["positive"]),
        (lambda: parallel.make_mesh({"model": 2}), ["'model'", "data, fsdp, tensor"]),
        (lambda: parallel.make_mesh(None, [Chip(0, 0), Chip(1, 0), Chip(2, 1)]), ["not [1, 2]"]),
        (rules_error([("attn", "replicate")]), ["'params/conv/kernel'", "no sharding rule"]),
        (rules_error([("lora", "replicate"), *RULES]), ["'lora'", "matches nothing"]),
        (rules_error([(".*", "zero3")]), ["'zero3'", "fsdp, replicate, tensor"]),
        (rules_error([(".*", "tensor(")]), ["'tensor('"]),
        (rules_error([(".*", "fsdp(max_mb=1)")]), ["'fsdp(max_mb=1)'", "max_mb"]),
        (rules_error([(".*", "tensor(-1)")]), ["'params/norm/bias'", "(6,)", "4 devices"]),
        (lambda: parallel.check_batch_size(12, "pmap"), ["batch_size=12", "8 devices"]),
        (
            lambda: parallel.check_batch_size(16, "pmap", micro_batches=4),
            ["batch_size=16", "8 devices × 4 micro-batches"],
        ),
        (lambda: parallel.check_batch_size(8, "single", micro_batches=0), ["grad_accumulation=0"]),
        (batch_error("pmap", 12), ["12 examples", "8 devices"]),
        (batch_error("mesh data 2 × fsdp 2 × tensor 2", 10), ["10 examples", "4 devices"]),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.skipif(jax.__version_info__[:2] != (0, 10), reason="later JAX chooses well itself")
def test_convolutions_of_a_step_on_a_cpu_are_not_ynnpacks():
    """They are by default in JAX 0.10, which costs a training step a quarter of its time."""

    def step(state, constants, batch, rng, *, axis_name=None):
        return state, jax.lax.conv(batch.transpose(0, 3, 1, 2), state, (1, 1), "SAME")

    kernel, x = jnp.ones((32, 32, 3, 3)), np.ones((1, 16, 16, 32), np.float32)
    lowered = parallel.compile_step(step, "single").lower(kernel, {}, x, jax.random.key(0))
    assert "ynn_fusion" not in lowered.compile().as_text()
