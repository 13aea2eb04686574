"""Stable Diffusion v2: text to image on KL latents, f=8, with OpenCLIP's frozen text encoder.

Command   python train.py --config=configs/sd_v2.py --workdir=runs/sd_v2
          --config.data.dir=IMAGES_WITH_CAPTIONS --config.first_stage.path=WORKDIR_OF_kl_f8
          --config.pretrained.clip_text=OPENCLIP_VIT_H14 --config.tokenizer.path=ITS_TOKENIZER
Variants  :768 (v-prediction, 768²) :inpainting :depth (a depth map with the latent)
Cost      865.91 M parameters and 340.39 M frozen; 850,000 batches of 2,048 at 512²
Expected  no number is published
"""

from ml_collections import ConfigDict

from configs import default, kl_f8


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_denoiser(kl_f8, batch_size=2048, num_steps=850_000)
    open_clip(c)
    c.data.image_size = 512
    c.unet.update({"num_head_channels": 64, "remat": "full"})
    c.diffusion.update({"beta_start": 0.00085, "beta_end": 0.012})
    c.optimizer.warmup_steps = 10_000
    variants = {"768": large, "inpainting": inpainting, "depth": depth}
    return default.apply_variant(c, variant, variants)


def open_clip(c: ConfigDict) -> None:
    """The penultimate layer of OpenCLIP's ViT-H/14, prompts padded with 0."""
    c.tokenizer.update({"name": "clip", "max_length": 77})
    fields = {"width": 1024, "depth": 24, "num_heads": 16, "activation": "gelu", "skip_last": 1}
    c.conditioners = ConfigDict({"clip_text": {**fields, "pad_id": 0}})
    c.pretrained.clip_text = ""
    c.sampling.update({"num_steps": 50, "eta": None, "guidance_scale": 9.0})


def large(c: ConfigDict) -> None:
    """Finetuned (--config.init_from): 150,000 steps, then 140,000 on 768² pictures."""
    c.data.image_size = 768
    c.diffusion.prediction = "v"
    c.num_steps = 290_000


def inpainting(c: ConfigDict) -> None:
    """Finetuned (--config.init_from) with LaMa's masks."""
    masked = {"mask_first": True, "known_mask": 0.0, "hole": 0.0, "keep": True}
    c.conditioners.masked_image = ConfigDict(masked)
    c.data.mask = "lama"
    c.num_steps = 200_000


def depth(c: ConfigDict) -> None:
    """Finetuned (--config.init_from) on data that have `depth`, from any estimator."""
    c.conditioners.depth = ConfigDict({"keep": True})
    c.num_steps = 200_000
