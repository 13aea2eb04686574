"""Our side of the benchmark: the calls by name, each compiled as a user's would be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from PIL import Image

import latent_diffusion as ldm
from benchmarks import reference
from benchmarks.measure import Call
from latent_diffusion import data
from latent_diffusion.core.rng import example_keys, sampling_keys
from latent_diffusion.models import sampling
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.nets.losses.perceptual import load_lpips_params
from latent_diffusion.process.plan import plan
from latent_diffusion.runtime import parallel
from latent_diffusion.runtime.startup import quiet_and_cached
from latent_diffusion.tasks import TASKS


def denoiser(folder: Path, quick: bool) -> Denoiser:
    """The U-Net with the schedule and the conditioner of the training."""
    config = reference.denoising(quick)
    unet = ldm.load(folder / "unet").denoiser
    task: Any = TASKS[config.task](config)
    return task.denoiser.replace(params=unet.params, network=unet.network)


def first_image(folder: Path, quick: bool) -> np.ndarray:
    """One guided sample through the public API."""
    quiet_and_cached()
    size = reference.autoencoding(quick).data.image_size
    model = ldm.load(folder / "vae").replace(denoiser=denoiser(folder, quick), image_size=size)
    context = reference.inputs(quick)["context"][:1]
    steps = 2 if quick else reference.STEPS
    return model.sample(
        jax.random.key(0), neighbours=context, num_steps=steps, guidance_scale=reference.SCALE
    )


def _call(function: Callable[..., Any], params: Any, *args: Any, flops: float) -> Call:
    """As the package compiles sampling and evaluation: function(params, *args), arrays [B …]."""

    def step(state: Any, constants: Any, batch: Any, rng: Any) -> Any:
        return function(constants, *batch)

    compiled = parallel.compile_eval(step, "single")
    return Call(lambda: compiled({}, params, args, jax.random.key(0)), flops)


def count(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs by XLA's analysis, of a function without loops."""
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def matmul(folder: Path, quick: bool) -> Call:
    """A product of two square matrices, which measures the machine."""
    x = jnp.ones((256 if quick else 2048,) * 2)
    product = jax.jit(jnp.matmul)
    return Call(lambda: float(product(x, x)[0, 0]), 2.0 * len(x) ** 3)


def unet_forward(folder: Path, quick: bool) -> Call:
    """One evaluation of the U-Net."""
    arrays, network = reference.inputs(quick), denoiser(folder, quick)
    inputs = arrays["z_t"], arrays["t"], ldm.Conditioning(context=arrays["context"])
    return _call(Denoiser.denoise, network, *inputs, flops=_flops_of_unet(network, *inputs))


def ddim_50_cfg(folder: Path, quick: bool) -> Call:
    """Guided DDIM in latent space from stored noise."""
    arrays, network = reference.inputs(quick), denoiser(folder, quick)
    arrays = {key: x[: reference.GUIDED] for key, x in arrays.items()}
    settings = {"num_steps": 2 if quick else reference.STEPS, "guidance_scale": reference.SCALE}
    timesteps, options = plan(network.schedule, network.prediction, {}, settings)

    def sample(network, z_T, context):
        cond, null = (ldm.Conditioning(context=c) for c in (context, jnp.zeros_like(context)))
        keys = sampling_keys(example_keys(jax.random.key(0), len(z_T)))
        given = (keys, cond, null, timesteps, z_T.shape[1:], options)
        return sampling.sample(network, *given, z_T=z_T)

    z_t, t, context = (np.concatenate([arrays[key]] * 2) for key in ("z_t", "t", "context"))
    once = _flops_of_unet(network, z_t, t, ldm.Conditioning(context=context))
    flops = once * (len(timesteps) - 1)
    return _call(sample, network, arrays["z_t"], arrays["context"], flops=flops)


def encode(folder: Path, quick: bool) -> Call:
    """Pixels to the posterior's mode."""
    return _first_stage(folder, lambda stage, x: stage.encode({"image": x}), "image", quick)


def decode(folder: Path, quick: bool) -> Call:
    """Latents to pixels."""
    return _first_stage(folder, lambda stage, z: stage.decode(z), "z_t", quick)


def input_pipeline(folder: Path, quick: bool) -> Call:
    """Batches of the stage-1 step, from JPEG files of 256×256 pixels, without a cache."""
    config = reference.autoencoding(quick)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(reference.PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(pictures / f"{i}.jpg")
    config.data.update({"name": "image_folder", "dir": str(pictures), "train_split": "all"})
    config.data.update({"crop": "random", "flip": True})
    source = data.make_source(config.data, "train")
    source.max_bytes = 0
    transform = data.make_transform(config.data, train=True)
    batches = data.iterate(source, transform, batch_size=config.batch_size, seed=0)

    def run() -> None:
        for _ in range(reference.PICTURES // config.batch_size):
            next(batches)

    return Call(run)


def denoising_step(folder: Path, quick: bool) -> Call:
    """A training step of latent denoising: AdamW and moving average."""
    arrays = reference.inputs(quick)
    params = {"unet": ldm.load(folder / "unet").denoiser.params["unet"]}
    config = reference.denoising(quick)
    batch = {"image": arrays["z_t"], "neighbours": arrays["context"]}

    def start(state):
        return state.replace(params={**state.params, **params})

    return _training(config, batch, start)


def autoencoding_step(folder: Path, quick: bool) -> Call:
    """A training step of perceptual compression: both players, LPIPS, adaptive weight."""
    params = ldm.load(folder / "vae").first_stage.params
    with np.load(folder / "discriminator.npz") as arrays:
        disc = jax.tree.map(jnp.asarray, unflatten_dict(dict(arrays), sep="/"))
    config = reference.autoencoding(quick)

    def start(state):
        return state.replace(params={**state.params, "autoencoder": params}, disc_params=disc)

    return _training(config, {"image": reference.inputs(quick)["image"]}, start)


def _training(config: Any, batch: dict[str, np.ndarray], start: Callable[[Any], Any]) -> Call:
    """Step after step of a task, as the loop compiles it."""
    task: Any = TASKS[config.task](config)
    rng = jax.random.key(0)
    init_rng = jax.random.key(0, impl="unsafe_rbg")
    state, constants = jax.jit(lambda rng: task.init(rng, batch))(init_rng)
    if config.task == "autoencoding":
        lpips = load_lpips_params(config.autoencoding.perceptual)
        constants = constants.replace(lpips=jax.tree.map(jnp.asarray, lpips))
    now = [start(state)]
    config.unet.attention = config.autoencoder.attention = "xla"
    flops = count(TASKS[config.task](config).train_step, now[0], constants, batch, rng)
    step = parallel.compile_step(task.train_step, "single")

    def run() -> float:
        now[0], metrics = step(now[0], constants, batch, rng)
        jax.block_until_ready(now[0])
        return float(metrics["loss"])

    return Call(run, flops)


def _first_stage(folder: Path, method: Any, key: str, quick: bool) -> Call:
    stage = ldm.load(folder / "vae").first_stage
    plain = stage.replace(module=stage.module.clone(attention="xla"))
    x = reference.inputs(quick)[key]
    return _call(method, stage, x, flops=count(method, plain, x))


def _flops_of_unet(network: Denoiser, *inputs: Any) -> float:
    """Without the loops of blockwise attention, whose rounds the analysis doesn't count."""
    plain = network.replace(network=network.network.clone(attention="xla"))
    return count(Denoiser.denoise, plain, *inputs)


CALLS = {
    call.__name__: call
    for call in (
        matmul,
        unet_forward,
        ddim_50_cfg,
        denoising_step,
        autoencoding_step,
        encode,
        decode,
        input_pipeline,
    )
}
