"""How much should the first stage compress? The paper's Figs. 6 and 7 on OpenMoji at 64×64.

Command   python -m benchmarks.compression (each denoiser for the same time)
Variants  :first_stage_f2 … :first_stage_f16, and on their latents :f2 … :f16; :f1 is pixel space
Cost      5 minutes for each first stage on two CPU cores, and --minutes for each denoiser
Expected  after 20 minutes each FD 10, 5.4, 4.8, 6.0, 7.8 for f = 1 … 16; see docs/compression.md

All denoisers share the recipe and, except for its first and last convolution, the U-Net. Latents
have the numbers of channels of the paper's comparison (Tab. 13).
"""

from ml_collections import ConfigDict

from configs import default, openmoji_first_stages
from configs.openmoji_unconditional import without_condition

FACTORS = (1, 2, 4, 8, 16)
CHANNEL_MULT = {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 4), 16: (1, 2, 4, 4, 4)}
LATENT_CHANNELS = {2: 2, 4: 3, 8: 4, 16: 8}


def get_config(variant: str = "f4") -> ConfigDict:
    variants = {f"first_stage_f{f}": first_stage for f in FACTORS[1:]}
    variants |= {f"f{f}": denoiser for f in FACTORS}
    make = default.find_variant(variant, variants)
    return make(int(variant.rpartition("f")[2]))


def first_stage(f: int) -> ConfigDict:
    """Perceptual compression by f along each side."""
    c = openmoji_first_stages.get_config()
    c.num_steps = 800
    c.autoencoder.channel_mult = CHANNEL_MULT[f]
    c.autoencoder.z_channels = c.autoencoder.embed_dim = LATENT_CHANNELS[f]
    c.autoencoding.update({"disc_start": 400, "adversarial_start": 450, "adversarial_ramp": 100})
    return c


def denoiser(f: int) -> ConfigDict:
    """Unconditional denoising in its latents. num_steps: benchmarks/compression.py sets it."""
    c = without_condition("", num_steps=2000)
    c.batch_size = 16
    c.data.image_size = 64
    c.first_stage.path = f"runs/compression/first_stage_f{f}"
    c.first_stage.trained_by = f"openmoji_compression.py:first_stage_f{f}"
    if f == 1:
        c.autoencoder = default.autoencoder()
        c.autoencoder.regularization = "identity"
        c.first_stage.path = c.first_stage.trained_by = ""
    else:
        c.autoencoder = first_stage(f).autoencoder
    c.unet.update({"model_channels": 32, "channel_mult": (1, 2, 4), "num_groups": 8})
    c.unet.update({"attention_resolutions": (4,), "num_head_channels": 32})
    c.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 20})
    c.log.update({"num_images": 8, "images_every_steps": 0, "eval_batches": 1})
    return c
