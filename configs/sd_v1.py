"""Stable Diffusion v1: text to image at 512² on KL latents, f=8, with CLIP's frozen text encoder.

Command   python train.py --config=configs/sd_v1.py --workdir=runs/sd_v1
          --config.data.dir=IMAGES_WITH_CAPTIONS --config.first_stage.path=WORKDIR_OF_kl_f8
          --config.pretrained.clip_text=CLIP_VIT_L14 --config.tokenizer.path=CLIP_VIT_L14
Variants  :inpainting (mask and masked picture concatenated with the latent)
          :lora (a low-rank adaptation of released weights, from a few pictures; it needs only
          --config.init_from=SD, a folder of diffusers, beside the data)
Cost      859.52 M parameters, 123.06 M frozen; v1.2: 515,000 batches of 2,048 (150,000 A100-hours)
Expected  inpainting, Places: FID 1.00, LPIPS 0.141
"""

from ml_collections import ConfigDict

from configs import default, kl_f8


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_denoiser(kl_f8, batch_size=2048, num_steps=515_000)
    c.data.image_size = 512
    c.tokenizer.update({"name": "clip", "max_length": 77})
    c.conditioners = ConfigDict({"clip_text": {}})
    c.pretrained.clip_text = ""
    c.unet.remat = "full"
    c.diffusion.update({"beta_start": 0.00085, "beta_end": 0.012})
    c.sampling.update({"num_steps": 50, "eta": None, "guidance_scale": 7.5})
    c.optimizer.warmup_steps = 10_000
    return default.apply_variant(c, variant, {"inpainting": inpainting, "lora": lora})


def inpainting(c: ConfigDict) -> None:
    """Finetuned (--config.init_from) for 440,000 steps; a quarter of the masks hide everything."""
    masked = {"mask_first": True, "known_mask": 0.0, "hole": 0.0, "keep": True}
    c.conditioners.masked_image = ConfigDict(masked)
    c.data.mask = "lama_or_all"
    c.num_steps = 440_000


def lora(c: ConfigDict) -> None:
    """An adaptation of the U-Net's attention; everything else comes from init_from."""
    c.batch_size, c.num_steps = 4, 1000
    c.pretrained = ConfigDict()
    c.lora.update({"rank": 8, "alpha": 8.0})
    c.optimizer.warmup_steps = 100
    c.ema_decay = 0.0
    c.checkpoint.every_steps = 500
