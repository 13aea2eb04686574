"""PyTorch's side of the benchmark: diffusers' networks, and usual training steps with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import reference
from benchmarks.measure import Call

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensor(x: np.ndarray) -> torch.Tensor:
    """Images become NCHW."""
    x = x.transpose(0, 3, 1, 2) if x.ndim == 4 else x
    return torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE)


def array(x: torch.Tensor) -> np.ndarray:
    """Images become NHWC."""
    x = x.detach().permute(0, 2, 3, 1) if x.ndim == 4 else x.detach()
    return x.cpu().numpy()


def inputs(quick: bool) -> dict[str, torch.Tensor]:
    """The inputs of `reference`."""
    return {key: tensor(x) for key, x in reference.inputs(quick).items()}


def load_unet(folder: Path) -> nn.Module:
    """diffusers' U-Net."""
    return diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").to(DEVICE)


def load_vae(folder: Path) -> nn.Module:
    """diffusers' autoencoder."""
    return diffusers.AutoencoderKL.from_pretrained(folder / "vae").to(DEVICE)


def matmul(folder: Path, quick: bool) -> Call:
    """A product of two square matrices, which measures the machine."""
    x = torch.ones((256 if quick else 2048,) * 2, device=DEVICE)
    return Call(lambda: float((x @ x)[0, 0]))


def unet_forward(folder: Path, quick: bool) -> Call:
    """One evaluation of the U-Net."""
    unet, arrays = load_unet(folder), inputs(quick)
    return _call(lambda: unet(arrays["z_t"], arrays["t"], arrays["context"]).sample)


def ddim_50_cfg(folder: Path, quick: bool) -> Call:
    """Guided DDIM in latent space from stored noise."""
    unet = load_unet(folder)
    z_T, context = (inputs(quick)[key][: reference.GUIDED] for key in ("z_t", "context"))
    return _call(lambda: sample(unet, z_T, context, quick))


def sample(unet: nn.Module, z_T: torch.Tensor, context: torch.Tensor, quick: bool) -> torch.Tensor:
    """The loop of diffusers' pipelines."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(2 if quick else reference.STEPS, device=DEVICE)
    both, z = torch.cat([torch.zeros_like(context), context]), z_T
    for t in scheduler.timesteps:
        null, cond = unet(torch.cat([z, z]), t, both).sample.chunk(2)
        z = scheduler.step(null + reference.SCALE * (cond - null), t, z).prev_sample
    return z


@torch.inference_mode()
def first_image(folder: Path, quick: bool) -> np.ndarray:
    """One guided sample, decoded."""
    arrays, vae = inputs(quick), load_vae(folder)
    z = sample(load_unet(folder), arrays["z_t"][:1], arrays["context"][:1], quick)
    return array(vae.decode(z).sample)


def encode(folder: Path, quick: bool) -> Call:
    """Pixels to the posterior's mode."""
    vae, image = load_vae(folder), inputs(quick)["image"]
    return _call(lambda: vae.encode(image).latent_dist.mode())


def decode(folder: Path, quick: bool) -> Call:
    """Latents to pixels."""
    vae, z = load_vae(folder), inputs(quick)["z_t"]
    return _call(lambda: vae.decode(z).sample)


def denoising_step(folder: Path, quick: bool) -> Call:
    """A training step of latent denoising: AdamW and moving average."""
    arrays, config = inputs(quick), reference.denoising(quick)
    z_0, context = arrays["z_t"], arrays["context"]
    unet = load_unet(folder).train()
    ema = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema_decay)
    )
    tx = torch.optim.AdamW(
        unet.parameters(),
        config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, device=DEVICE) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0)

    def step() -> float:
        t = torch.randint(0, 1000, (len(z_0),), device=DEVICE)
        keep = torch.rand(len(z_0), 1, 1, device=DEVICE) >= config.diffusion.drop_rate
        eps = torch.randn_like(z_0)
        a = alphas_cumprod[t][:, None, None, None]
        pred = unet(a.sqrt() * z_0 + (1 - a).sqrt() * eps, t, context * keep).sample
        loss = F.mse_loss(pred, eps)
        tx.zero_grad()
        loss.backward()
        tx.step()
        ema.update_parameters(unet)
        return loss.item()

    return Call(step)


def autoencoding_step(folder: Path, quick: bool) -> Call:
    """A training step of perceptual compression: both players, LPIPS, adaptive weight."""
    from benchmarks.torch_lpips import make_lpips
    from latent_diffusion.nets.losses.perceptual import load_lpips_params

    x, config = inputs(quick)["image"], reference.autoencoding(quick)
    fields, betas = config.autoencoding, (config.optimizer.b1, config.optimizer.b2)
    vae, disc = load_vae(folder).train(), _discriminator(folder, fields.discriminator)
    lpips = make_lpips(fields.perceptual, load_lpips_params(fields.perceptual)).to(DEVICE)
    lpips.requires_grad_(False)
    logvar = nn.Parameter(torch.zeros((), device=DEVICE))
    players = ([*vae.parameters(), logvar], disc.parameters())
    tx, disc_tx = (
        torch.optim.Adam(params, config.optimizer.learning_rate, betas, fused=True)
        for params in players
    )
    last = vae.decoder.conv_out.weight

    def step() -> float:
        posterior = vae.encode(x).latent_dist
        x_rec = vae.decode(posterior.sample()).sample
        rec = (x - x_rec).abs() + fields.perceptual_weight * lpips(x_rec, x)
        nll = (rec / logvar.exp() + logvar).sum() / len(x)
        disc.requires_grad_(False)
        g_loss = -disc(x_rec).mean()
        (of_rec,) = torch.autograd.grad(nll, last, retain_graph=True)
        (of_adv,) = torch.autograd.grad(g_loss, last, retain_graph=True)
        weight = (of_rec.norm() / (of_adv.norm() + 1e-4)).clamp(0, 1e4).detach()
        loss = nll + fields.reg_weight * posterior.kl().mean()
        loss = loss + fields.adversarial_weight * weight * g_loss
        tx.zero_grad()
        loss.backward()
        tx.step()

        disc.requires_grad_(True)
        real, fake = disc(x), disc(x_rec.detach())
        disc_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        disc_tx.zero_grad()
        disc_loss.backward()
        disc_tx.step()
        return loss.item()

    return Call(step)


def _discriminator(folder: Path, fields: Any) -> nn.Module:
    """PatchGAN with our parameters, layer by layer."""
    widths = [fields.channels * min(2**n, 8) for n in range(fields.num_layers + 1)]
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
    for n in range(1, fields.num_layers + 1):
        stride = 2 if n < fields.num_layers else 1
        layers += [
            nn.Conv2d(widths[n - 1], widths[n], 4, stride, 1, bias=False),
            nn.BatchNorm2d(widths[n]),
            nn.LeakyReLU(0.2),
        ]
    net = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
    names = [f"{kind}{n}" for n in range(1, fields.num_layers + 1) for kind in ("conv", "norm")]
    with_params = [layer for layer in net if list(layer.parameters())]
    with np.load(folder / "discriminator.npz") as arrays:
        for name, layer in zip(["conv_in", *names, "conv_out"], with_params, strict=True):
            for leaf, p in layer.named_parameters():
                leaf = "bias" if leaf == "bias" else "scale" if "norm" in name else "kernel"
                x = arrays[f"{name}/{leaf}"]
                p.data = torch.from_numpy(x.transpose(3, 2, 0, 1).copy() if x.ndim == 4 else x)
    return net.to(DEVICE)


def _call(function: Callable[[], torch.Tensor]) -> Call:
    return Call(lambda: array(torch.inference_mode()(function)()))


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
    )
}
