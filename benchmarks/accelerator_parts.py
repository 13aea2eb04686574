"""The parts of `benchmarks.accelerator`, each of which has a process for itself."""

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import reference
from benchmarks.compression_timing import median_seconds, seconds_of
from latent_diffusion.core.types import Conditioning
from latent_diffusion.nets import dot_product_attention
from latent_diffusion.runtime import parallel
from latent_diffusion.runtime.parallel.chips import CHIPS
from latent_diffusion.runtime.startup import quiet_and_cached
from latent_diffusion.tasks import TASKS
from latent_diffusion.tasks.denoising import Constants, State
from latent_diffusion.training import planning
from latent_diffusion.training.batch_spec import batch_spec

BATCHES = {"sd_v1": 16, "sdxl": 4, "dit_xl_2": 64, "kl_f8": 8}  # of a training step
SAMPLED = {"sd_v1": (1, 8), "sdxl": (1, 4)}
ROUNDS = 5
STEPS = 10  # train steps that follow each other, as in a run
# (tokens, keys, heads, width): Stable Diffusion 1 at 512², XL at 1,024², a first stage
SIZES = ((4096, 4096, 8, 40), (1024, 1024, 8, 80), (256, 256, 8, 160), (4096, 77, 8, 40))
SIZES += ((4096, 4096, 10, 64), (1024, 1024, 20, 64), (4096, 4096, 1, 512))
NAMES = {"h100": "h100", "h200": "h200", "a100": "a100", "v5 lite": "v5e", "v5e": "v5e"}
NAMES |= {"v6 lite": "v6e", "v6e": "v6e", "v5": "v5p", "v4": "v4"}


def measure(name: str, tiny: bool) -> dict[str, Any]:
    """The rows of a part, on the first of JAX's default devices."""
    quiet_and_cached()
    kind, _, what = name.partition("_")
    rows = {
        "parity": lambda: parity(),
        "attention": lambda: attention(tiny),
        "train": lambda: train(what, tiny),
        "sample": lambda: sample(what, tiny),
        "pytorch": lambda: pytorch(what, tiny),
        "first": lambda: first_image(tiny),
    }[kind]()
    return {"device": jax.devices()[0].device_kind, "rows": rows}


def peak_flops() -> float | None:
    """The published bfloat16 peak of this machine's device, if it is a known one."""
    kind = jax.devices()[0].device_kind.lower()
    known = (CHIPS[chip] for part, chip in NAMES.items() if part in kind)
    return next((1e12 * chip.tflops for chip in known), None)


def seconds(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """The median of several calls, after a first one, which compiles."""
    return median_seconds(lambda: jax.block_until_ready(call()), rounds)


def first_seconds(call: Callable[[], Any]) -> float:
    """The time of a first call, most of which is compilation."""
    return seconds_of(lambda: jax.block_until_ready(call()))


def parity() -> list[dict[str, Any]]:
    """A small text U-Net and decoder here against this machine's CPU in float32."""
    cpu = jax.devices("cpu")[0]
    rows = []
    inputs = reference.inputs(True)
    for dtype in (None, "bfloat16"):
        for what, config in (
            ("unet", reference.denoising(True)),
            ("first stage", reference.autoencoding(True)),
        ):
            call, params = _network(what, config, dtype, inputs)
            exact, _ = _network(what, config, None, inputs)
            got = np.asarray(jax.jit(call)(params), np.float32)
            with jax.default_device(cpu), jax.default_matmul_precision("highest"):
                expected = np.asarray(jax.jit(exact)(jax.device_put(params, cpu)))
            worst = float(np.abs(got - expected).max() / expected.std())
            rows.append({"network": what, "dtype": dtype or "float32", "worst_of_std": worst})
    return rows


def _network(what: str, config: ConfigDict, dtype: str | None, inputs: Any) -> tuple[Any, Any]:
    """A network's call on the inputs, and random parameters."""
    part = config.unet if what == "unet" else config.autoencoder
    part.dtype = dtype
    task: Any = TASKS[config.task](config)
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch_spec(config))[0].params
    image, z_t, t, context = (jnp.asarray(inputs[k]) for k in ("image", "z_t", "t", "context"))
    if what == "unet":
        network, text = task.denoiser.network, Conditioning(context=context)
        return (
            lambda p: network.apply({"params": p}, z_t, t, text),
            reference.drawn(1, shapes["unet"]),
        )
    module = task.autoencoder
    return (
        lambda p: module.apply({"params": p}, image, method="encode"),
        reference.drawn(2, shapes["autoencoder"]),
    )


def attention(tiny: bool) -> list[dict[str, Any]]:
    """Every implementation at the sizes of released models: forward, and with gradients."""
    rows = []
    machine = dot_product_attention.this_machine()
    for length, keys, heads, width in ((64, 64, 2, 8),) if tiny else SIZES:
        chosen = dot_product_attention.choose(machine, jnp.bfloat16, length, keys, width)
        for name in dot_product_attention.IMPLEMENTATIONS:
            row = {"L": length, "S": keys, "heads": heads, "width": width, "implementation": name}
            row["auto"] = "yes" if name == chosen else ""
            try:
                rows.append(row | _attention(name, length, keys, heads, width, 1 if tiny else 4))
            except Exception as error:
                rows.append(row | {"failed": str(error).splitlines()[0][:80]})
    return rows


def _attention(name: str, length: int, keys: int, heads: int, width: int, batch: int) -> Any:
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((batch, n, heads, width), np.float32), jnp.bfloat16)
        for n in (length, keys, keys)
    )

    def loss(q, k, v):
        return jnp.sum(dot_product_attention.attend(q, k, v, name).astype(jnp.float32) ** 2)

    forward = jax.jit(lambda *qkv: dot_product_attention.attend(*qkv, name))
    both = jax.jit(jax.grad(loss, (0, 1, 2)))
    planned = both.lower(q, k, v).compile().memory_analysis()
    return {
        "forward_ms": 1e3 * seconds(lambda: forward(q, k, v)),
        "with_gradient_ms": 1e3 * seconds(lambda: both(q, k, v)),
        "temporary_mib": planned.temp_size_in_bytes / 2**20,
    }


def experiment(name: str, tiny: bool) -> ConfigDict:
    """The config of a run on one device, which recomputes nothing but XL's activations.

    tiny: the benchmark's quick networks in its place.
    """
    if tiny:
        config = reference.autoencoding(True) if name == "kl_f8" else reference.denoising(True)
        config.sampling.num_steps = 2
    else:
        config = importlib.import_module(f"configs.{name}").get_config()
        config.batch_size = BATCHES[name]
        if name != "sdxl":
            config.unet.remat = "none"
    config.parallel.mode = "single"
    return config


def started(config: ConfigDict) -> tuple[Any, Any, Any, Any]:
    """The task of a config, a state and constants of random weights, and a random batch."""
    task: Any = TASKS[config.task](config)
    spec = batch_spec(config)
    state, constants = filled(jax.eval_shape(task.init, jax.random.key(0), spec))
    placed = (parallel.place(tree, "single") for tree in (state, constants))
    return task, *placed, drawn_batch(spec)


def loaded(config: ConfigDict) -> tuple[Any, Any, Any, Any]:
    """As `started`, with no more than sampling needs, as `load(dtype="bfloat16")` has it."""
    task: Any = TASKS[config.task](config)
    spec = batch_spec(config)
    state, constants = jax.eval_shape(task.init, jax.random.key(0), spec)
    first_stage, *parts = filled((constants.first_stage, state.ema_params, constants.conditioner))
    params, conditioner = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parts)
    state = State(step=jnp.zeros((), jnp.int32), params=None, ema_params=params, opt_state=None)
    placed = (
        parallel.place(tree, "single") for tree in (state, Constants(first_stage, conditioner))
    )
    return task, *placed, drawn_batch(spec)


def filled(shapes: Any) -> Any:
    """Arrays in the host's memory, which need no program: random weights, and zeros elsewhere.

    No weight is zero, as some of fresh networks are, because a GPU multiplies zeros faster. The
    averages are the parameters.
    """
    rng, weights = np.random.default_rng(0), {}

    def fill(path: Any, x: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path).replace(".ema_params", ".params")
        if "opt_state" in name or not jnp.issubdtype(x.dtype, jnp.floating):
            return np.zeros(x.shape, x.dtype)
        if name not in weights:
            weights[name] = reference.weight(rng, name, x.shape).astype(x.dtype)
        return weights[name]

    return jax.tree_util.tree_map_with_path(fill, shapes)


def drawn_batch(spec: Any) -> Any:
    """Random numbers for floats, and small ones for integers: classes, tokens, sizes."""
    rng = np.random.default_rng(0)

    def draw(x: Any) -> np.ndarray:
        if np.issubdtype(x.dtype, np.integer):
            return rng.integers(1, 100, x.shape, x.dtype)
        return rng.uniform(-1, 1, x.shape).astype(x.dtype)

    return jax.device_put({name: draw(x) for name, x in spec.items()})


def peak_gib() -> float | None:
    """The device's peak of memory so far."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return peak and peak / 2**30


def train(name: str, tiny: bool) -> list[dict[str, Any]]:
    """Images a second of the train step, its share of the peak, and the cores that feed it."""
    config = experiment(name, tiny)
    facts = planning.count(config)
    task, state, constants, batch = started(config)
    step, now = parallel.compile_step(task.train_step, "single"), [state]
    del state

    def steps(number: int) -> Any:
        for _ in range(number):
            now[0], metrics = step(now[0], constants, batch, jax.random.key(0))
        return metrics

    first = first_seconds(lambda: steps(1))
    rate = STEPS * config.batch_size / seconds(lambda: steps(STEPS), 1 if tiny else ROUNDS)
    peak = peak_flops()
    return [
        {
            "batch": config.batch_size,
            "images_per_second": rate,
            "tflop_per_image": facts.flops / 1e12,
            "share_of_peak": peak and rate * facts.flops / peak,
            "peak_gib": peak_gib(),
            "cores_for_input": rate / facts.images_per_core,
            "first_seconds": first,
        }
    ]


def sample(name: str, tiny: bool) -> list[dict[str, Any]]:
    """Seconds of the config's guided sampler with the first stage, for one picture and several."""
    rows = []
    for size in (1,) if tiny else SAMPLED[name]:
        config = experiment(name, tiny)
        config.batch_size = size
        task, state, constants, batch = loaded(config)
        show = parallel.compile_eval(task.show, "single")

        def call() -> Any:
            return show(state, constants, batch, jax.random.key(0))  # noqa: B023

        first = first_seconds(call)
        used = seconds(call, rounds=2)
        row = {"pictures": size, "steps": config.sampling.num_steps, "seconds": used}
        rows.append(row | {"peak_gib": peak_gib(), "first_seconds": first})
        del state, constants, call
    return rows


def pytorch(name: str, tiny: bool) -> list[dict[str, Any]]:
    """PyTorch's side of `train` and `sample`."""
    from benchmarks import accelerator_pytorch

    if tiny:
        return accelerator_pytorch.rows("tiny", 1, (1,), rounds=1, steps=1)
    return accelerator_pytorch.rows(name, BATCHES[name], SAMPLED[name], ROUNDS, STEPS)


def first_image(tiny: bool) -> list[dict[str, Any]]:
    """From the command to the first guided picture, of `benchmarks.reference`'s networks.

    This process doesn't use the device before, since a TPU serves one process at a time.
    """
    from benchmarks import first_image as timing
    from benchmarks.measure import Setting, in_own_process

    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    platform = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[-1]
    with tempfile.TemporaryDirectory() as folder:
        in_own_process(reference.write, Path(folder), tiny)
        row = timing.compare(("ours",), Setting(Path(folder), platform, tiny))
    return [{"warm_seconds": row["ours_seconds"], "cold_seconds": row["ours_cold_seconds"]}]
