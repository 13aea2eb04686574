"""Perceptual compression of OpenMoji pictures, small enough for two CPU cores: KL, f=4, 32×32.

Command   python train.py --config=configs/openmoji_autoencoder.py --workdir=runs/demo/first_stage
Cost      4 to 6 minutes on two CPU cores
Expected  PSNR 23.2 dB, AlexNet-LPIPS 0.018 on held-out pictures (eval_psnr, eval_lpips)
Variants  :scenes (the pictures of layout and semantic synthesis; 4 minutes)
          :fine (eight channels, PSNR 25.7 dB, for the gallery's class and unconditional models; 12
          minutes)
          :two_styles (OpenMoji and Twemoji, eight channels; 6 minutes, an experiment)
          :64 (both styles at 64×64, for configs/openmoji_text_64.py; 40 minutes)
          :smoke (synthetic shapes, a few steps)
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.get_config()
    c.task = "autoencoding"
    c.data.name = "openmoji"
    c.data.image_size = 32
    c.batch_size = 8
    c.num_steps = 3600

    c.autoencoder.channels = 16
    c.autoencoder.channel_mult = (1, 2, 4)
    c.autoencoder.num_res_blocks = 1
    c.autoencoder.num_groups = 8
    c.autoencoder.resolution = 32
    c.autoencoder.z_channels = 4
    c.autoencoder.embed_dim = 4

    c.autoencoding.perceptual = "alex"
    c.autoencoding.perceptual_weight = 0.1
    c.autoencoding.discriminator.channels = 16
    c.autoencoding.discriminator.num_layers = 2
    c.autoencoding.disc_start = 2000
    c.autoencoding.adversarial_start = 2200
    c.autoencoding.adversarial_ramp = 600
    c.autoencoding.adversarial_weight = 0.05

    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 50
    c.optimizer.end_factor = 0.05
    c.optimizer.b1 = 0.9
    c.ema_decay = 0.99
    c.log.images_every_steps = 1000
    c.checkpoint.every_steps = 1000
    variants = {"scenes": scenes, "fine": fine, "two_styles": two_styles, "64": of_64}
    return default.apply_variant(c, variant, {**variants, "smoke": smoke})


def scenes(c: ConfigDict) -> None:
    """Scenes of several drawings: coloured grounds and small objects."""
    c.data.name = "openmoji_scenes"
    c.num_steps = 2400


def fine(c: ConfigDict) -> None:
    """Twice the channels and steps."""
    c.num_steps = 7200
    c.autoencoder.update({"z_channels": 8, "embed_dim": 8})
    c.autoencoding.update({"disc_start": 4500, "adversarial_start": 5000})
    c.autoencoding.adversarial_ramp = 1000


def two_styles(c: ConfigDict) -> None:
    """Both styles; four channels lack the colours from green to purple (docs/first_stages.md)."""
    c.data.update({"name": "openmoji+twemoji", "balance": 0.5})
    c.num_steps = 4000
    c.autoencoder.update({"z_channels": 8, "embed_dim": 8})


def of_64(c: ConfigDict) -> None:
    """Both styles at 64×64, for forty minutes."""
    two_styles(c)
    fine(c)
    c.num_steps = 7000
    c.data.image_size = c.autoencoder.resolution = 64


def smoke(c: ConfigDict) -> None:
    """All parts of the full run, on synthetic shapes, in seconds."""
    c.data.name = "synthetic"
    c.batch_size = 8
    c.num_steps = 4
    c.autoencoder.channels = 8
    c.autoencoder.channel_mult = (1, 1, 2)
    c.autoencoding.perceptual = "none"
    c.autoencoding.discriminator.channels = 8
    c.autoencoding.disc_start = 1
    c.autoencoding.adversarial_start = 2
    c.autoencoding.adversarial_ramp = 0
    c.optimizer.schedule = "constant"  # one step to compile, however many are taken
    c.log.every_steps = 1
    c.log.num_images = 4
    c.log.eval_batches = 1
    c.checkpoint.every_steps = 2
