"""Perceptual compression of the pictures in a folder: KL, f=4 at 64 pixels, f=8 above.

Command   python train.py --config=configs/images_autoencoder.py:64 --workdir=runs/mine/first_stage
          --config.data.dir=PICTURES
Variants  :64 (0.68 M parameters; two CPU cores) :128 (20.95 M; one GPU) :256 (83.65 M; one GPU)
          :smoke (32×32, a few steps)
Cost      :64 three times the steps of configs/openmoji_first_stages.py:kl_f4, which takes 7 minutes
          on two CPU cores; :128 and :256 were not timed
Expected  reconstructions of test pictures in images/, and their eval_psnr in metrics.jsonl
"""

from ml_collections import ConfigDict

from configs import default, openmoji_autoencoder


def get_config(variant: str = "64") -> ConfigDict:
    """OpenMoji's recipe for any folder; for larger pictures, that of the paper."""
    variants = {"64": cpu_64, "128": gpu_128, "256": gpu_256, "smoke": lambda c: None}
    c = openmoji_autoencoder.get_config("smoke" if variant == "smoke" else "")
    c.data.name = "image_folder"
    return default.apply_variant(c, variant, variants)


def steps(c: ConfigDict, num_steps: int) -> None:
    """A run of this length, with the adversarial loss from 60 % of it on."""
    c.num_steps = num_steps
    c.autoencoding.disc_start = num_steps // 2
    c.autoencoding.adversarial_start = num_steps * 3 // 5
    c.autoencoding.adversarial_ramp = num_steps // 6


def cpu_64(c: ConfigDict) -> None:
    """The network and the number of steps of the demo, for pictures of twice the size."""
    c.data.image_size = c.autoencoder.resolution = 64
    steps(c, 3600)


def gpu_128(c: ConfigDict) -> None:
    """Half the channels of Stable Diffusion's autoencoder."""
    c.data.image_size = c.autoencoder.resolution = 128
    c.autoencoder.update({"channels": 64, "channel_mult": (1, 2, 4, 4), "num_res_blocks": 2})
    c.autoencoder.update({"num_groups": 32, "dtype": "bfloat16"})
    c.autoencoding.update({"perceptual": "vgg", "perceptual_weight": 1.0})
    c.autoencoding.adversarial_weight = 0.5
    c.autoencoding.discriminator.update({"channels": 64, "num_layers": 3})
    c.optimizer.update({"learning_rate": 2e-4, "b1": 0.5, "b2": 0.9, "warmup_steps": 500})
    c.batch_size = 16
    steps(c, 60_000)
    c.ema_decay = 0.999
    c.log.images_every_steps = c.checkpoint.every_steps = c.log.eval_every_steps = 2000


def gpu_256(c: ConfigDict) -> None:
    """Stable Diffusion's autoencoder."""
    gpu_128(c)
    c.data.image_size = c.autoencoder.resolution = 256
    c.autoencoder.channels = 128
    c.optimizer.learning_rate = 1e-4
    c.batch_size = 8
    steps(c, 120_000)
