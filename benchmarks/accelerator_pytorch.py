"""Stable Diffusion 1 and XL in PyTorch: diffusers' modules, SDPA, torch.compile, bfloat16.

The work is that of `accelerator_parts`, but for texts, which are given as embeddings here.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from benchmarks.compression_timing import median_seconds, seconds_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
XL_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
XL_UP_BLOCKS = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
UNETS: dict[str, dict[str, Any]] = {
    "sd_v1": {"cross_attention_dim": 768, "sample_size": 64},
    "sdxl": {
        "cross_attention_dim": 2048,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": XL_BLOCKS,
        "up_block_types": XL_UP_BLOCKS,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "tiny": {
        "cross_attention_dim": 8,
        "sample_size": 8,
        "norm_num_groups": 4,
        "block_out_channels": (8, 8),
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}
STEPS = {"sd_v1": 50, "sdxl": 50, "tiny": 2}
GUIDANCE = 7.5


def rows(
    name: str, batch: int, sampled: tuple[int, ...], rounds: int, steps: int
) -> list[dict[str, Any]]:
    """A guided sampler with the decoder, and for Stable Diffusion 1 a train step before it.

    name: a key of `UNETS`. steps: train steps that follow each other.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    with DEVICE:
        unet: Any = diffusers.UNet2DConditionModel(**UNETS[name])
        vae: Any = first_stage(name == "tiny")
    unet, vae = (x.to(memory_format=torch.channels_last) for x in (unet, vae))
    vae.requires_grad_(False)
    if name != "sdxl":
        vae = vae.to(torch.bfloat16)
    found = []
    if name != "sdxl":
        found.append(_train(name, unet, vae, batch, rounds, steps))
    unet.zero_grad(set_to_none=True)
    unet = unet.to(torch.bfloat16).requires_grad_(False)
    denoiser = unet if name == "tiny" else torch.compile(unet)
    for size in sampled:
        _forget_peak()
        call = _sampling(name, denoiser, vae, size)
        first = seconds_of(call)
        used = median_seconds(call, 2)
        row = {"what": "sample", "batch": size, "seconds": used, "peak_gib": _peak()}
        found.append(row | {"first_seconds": first})
    return found


def first_stage(tiny: bool) -> Any:
    """The KL-regularised first stage with f = 8; tiny: f = 2."""
    widths = (8, 8) if tiny else (128, 256, 512, 512)
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1 if tiny else 2,
        norm_num_groups=4 if tiny else 32,
        latent_channels=4,
    )


def _train(name: str, unet: Any, vae: Any, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """Images a second: encoding, the U-Net's loss and gradients, AdamW, and averages."""
    tiny = name == "tiny"
    denoiser = unet if tiny else torch.compile(unet)
    encode = vae.encode if tiny else torch.compile(vae.encode)
    params = list(unet.parameters())
    averages = [p.detach().clone() for p in params]
    tx = torch.optim.AdamW(params, 1e-4, fused=DEVICE.type == "cuda")
    _, context, more = _inputs(name, batch, torch.float32)
    side = UNETS[name]["sample_size"] * (2 if tiny else 8)
    pixels = torch.rand(batch, 3, side, side, device=DEVICE, dtype=torch.bfloat16) * 2 - 1
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    t = torch.full((batch,), 500, device=DEVICE)

    def step() -> Any:
        with torch.no_grad():
            z = encode(pixels).latent_dist.sample().float() * 0.18215
        noise = torch.randn_like(z)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            predicted = denoiser(z + noise, t, context, **more).sample.float()
            loss = torch.nn.functional.mse_loss(predicted, noise)
        tx.zero_grad()
        loss.backward()
        tx.step()
        torch._foreach_lerp_(averages, params, 1e-3)
        return loss

    def several() -> float:
        losses = [step().detach() for _ in range(steps)]
        return losses[-1].item()

    first = seconds_of(lambda: step().item())
    _forget_peak()
    rate = steps * batch / median_seconds(several, rounds)
    row = {"what": "train", "batch": batch, "images_per_second": rate, "peak_gib": _peak()}
    return row | {"first_seconds": first}


def _sampling(name: str, unet: Any, vae: Any, batch: int) -> Callable[[], float]:
    """A call of the guided sampler, and of the decoder."""

    @torch.inference_mode()
    def call() -> float:
        kind = diffusers.EulerDiscreteScheduler if name == "sdxl" else diffusers.DDIMScheduler
        scheduler = kind(beta_schedule="scaled_linear")
        scheduler.set_timesteps(STEPS[name], device=DEVICE)
        z, _, _ = _inputs(name, batch, torch.bfloat16)
        _, context, more = _inputs(name, 2 * batch, torch.bfloat16)
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(torch.cat([z, z]), t)
            null, cond = unet(inputs, t, context, **more).sample.chunk(2)
            z = scheduler.step(null + GUIDANCE * (cond - null), t, z).prev_sample
        return vae.decode(z.to(vae.dtype) / 0.18215).sample.float().mean().item()

    return call


def _inputs(name: str, batch: int, dtype: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Latents, embeddings of texts, and XL's further conditions."""
    options: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
    side, width = UNETS[name]["sample_size"], UNETS[name]["cross_attention_dim"]
    z = torch.randn(batch, 4, side, side, **options).contiguous(memory_format=torch.channels_last)
    more: dict[str, Any] = {}
    if name == "sdxl":
        ids = torch.full((batch, 6), 1024.0, **options)
        pooled = torch.randn(batch, 1280, **options)
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    return z, torch.randn(batch, 77, width, **options), more


def _forget_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None
