"""Stable Diffusion 1's U-Net in PyTorch: diffusers' module, SDPA, torch.compile, bfloat16."""

from typing import Any

import diffusers
import torch

from benchmarks.compression_timing import median_seconds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 50


def rows(tiny: bool, batch: int, sampled: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """A train step of the U-Net (AdamW), and guided DDIM in latent space."""
    torch.backends.cuda.matmul.allow_tf32 = True
    sizes: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}
    if tiny:
        sizes = {"cross_attention_dim": 8, "sample_size": 8, "norm_num_groups": 4}
        sizes |= {"block_out_channels": (8, 8), "attention_head_dim": 2, "layers_per_block": 1}
        sizes |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        sizes |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
        batch, sampled, rounds = 1, (1,), 1
    unet: Any = diffusers.UNet2DConditionModel(**sizes).to(DEVICE)
    compiled = unet if tiny else torch.compile(unet)
    side, width = sizes["sample_size"], sizes["cross_attention_dim"]
    found = [_train(unet, compiled, batch, side, width, rounds)]
    unet.zero_grad(set_to_none=True)
    unet = unet.to(torch.bfloat16)
    for size in sampled:
        used = median_seconds(lambda: _sample(compiled, size, side, width, tiny), rounds)  # noqa: B023
        found.append({"what": "sample", "batch": size, "seconds": used, "peak_gib": _peak()})
    return found


def _train(unet: Any, compiled: Any, batch: int, side: int, width: int, rounds: int) -> Any:
    tx = torch.optim.AdamW(unet.parameters(), 1e-4, fused=DEVICE.type == "cuda")
    z, context = _inputs(batch, side, width, torch.float32)
    t = torch.full((batch,), 500, device=DEVICE)

    def step() -> float:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = torch.nn.functional.mse_loss(compiled(z, t, context).sample.float(), z)
        tx.zero_grad()
        loss.backward()
        tx.step()
        return loss.item()

    used = median_seconds(step, rounds)
    return {"what": "train the U-Net", "batch": batch, "seconds": used, "peak_gib": _peak()}


@torch.inference_mode()
def _sample(unet: Any, batch: int, side: int, width: int, tiny: bool) -> float:
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(2 if tiny else STEPS, device=DEVICE)
    z, _ = _inputs(batch, side, width, torch.bfloat16)
    _, context = _inputs(2 * batch, side, width, torch.bfloat16)
    for t in scheduler.timesteps:
        null, cond = unet(torch.cat([z, z]), t, context).sample.chunk(2)
        z = scheduler.step(null + 7.5 * (cond - null), t, z).prev_sample
    return z.float().mean().item()


def _inputs(batch: int, side: int, width: int, dtype: Any) -> tuple[Any, Any]:
    options = {"device": DEVICE, "dtype": dtype}
    return torch.randn(batch, 4, side, side, **options), torch.randn(batch, 77, width, **options)


def _peak() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None
