"""Inpainting at 256² on VQ latents without attention, f=4 (Rombach et al. 2022, Tab. 6, 7, 15).

Command   python train.py --config=configs/inpainting.py --workdir=runs/inpainting
          --config.data.dir=IMAGES --config.first_stage.path=WORKDIR_OF_vq_f4_noattn
Variants  :small (215.3 M parameters, attention in the middle only)
Cost      387.25 M parameters; 360,000 batches of 128 (small), 8 V100
Expected  Places, 30,000 test images at 512²: FID 1.50, LPIPS 0.137 (big)
"""

from ml_collections import ConfigDict

from configs import default, vq_f4_noattn


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_denoiser(vq_f4_noattn, batch_size=128, num_steps=360_000)
    default.unconditional(c)  # the visible pixels suffice
    c.data.update({"crop": "random", "flip": True, "mask": "lama"})
    c.conditioners = ConfigDict({"masked_image": {}})
    c.unet.update({"model_channels": 256, "channel_mult": (1, 2, 3, 4), "num_heads": 8})
    c.unet.update({"attention_resolutions": (8, 4, 2), "resblock_updown": True})
    c.diffusion.update({"loss": "l1", "beta_end": 0.0205})
    c.sampling.num_steps = 50
    c.optimizer.update({"learning_rate": 1e-6 * c.batch_size, "schedule": "cosine"})
    return default.apply_variant(c, variant, {"small": small})


def small(c: ConfigDict) -> None:
    """The model of the paper's efficiency analysis."""
    c.unet.update({"model_channels": 128, "channel_mult": (1, 4, 8)})
    c.unet.update({"attention_resolutions": (), "resblock_updown": False})
