"""Fourfold super-resolution, 64² to 256², on VQ latents, f=4 (Rombach et al. 2022, Tab. 5).

Command   python train.py --config=configs/super_resolution.py --workdir=runs/super_resolution
          --config.data.dir=IMAGES --config.first_stage.path=WORKDIR_OF_vq_f4
Variants  :bicubic (the paper's comparison with SR3; without it, BSRGAN's degradation, as released)
Cost      113.62 M parameters; 860,000 batches of 64
Expected  bicubic, ImageNet-val: FID 2.8, IS 166.3, PSNR 24.4, SSIM 0.69 (100 steps)
"""

from ml_collections import ConfigDict

from configs import default, vq_f4


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_denoiser(vq_f4, batch_size=64, num_steps=860_000)
    default.unconditional(c)  # the small picture suffices
    c.data.crop = "random"
    c.data.low_res = "bsrgan_light"
    c.conditioners = ConfigDict({"low_res": {}})
    c.unet.update({"model_channels": 160, "channel_mult": (1, 2, 2, 4), "num_head_channels": 32})
    c.unet.attention_resolutions = (16, 8)  # the U-Net has no level 16
    c.diffusion.beta_end = 0.0155
    c.sampling.num_steps = 100
    c.optimizer.learning_rate = 1e-6 * c.batch_size
    return default.apply_variant(c, variant, {"bicubic": bicubic})


def bicubic(c: ConfigDict) -> None:
    """Antialiased bicubic downsampling."""
    c.data.low_res = "bicubic"
