"""The paper's four most used kinds of first stages on OpenMoji pictures of 64×64 pixels.

Command   python train.py --config=configs/openmoji_first_stages.py:kl_f4
          --workdir=runs/first_stages/kl_f4
Variants  :kl_f4 :kl_f8 :vq_f4 :vq_f8 (equal numbers of steps and channels)
Cost      7 minutes each on two CPU cores
Expected  PSNR 22.9 (kl_f4), 18.4 (kl_f8), 21.7 (vq_f4), 17.4 (vq_f8); see docs/first_stages.md
"""

from ml_collections import ConfigDict

from configs import default, openmoji_autoencoder


def get_config(variant: str = "kl_f4") -> ConfigDict:
    c = openmoji_autoencoder.get_config()
    c.data.image_size = c.autoencoder.resolution = 64
    c.num_steps = 1200
    c.autoencoding.disc_start = 700
    c.autoencoding.adversarial_start = 800
    c.autoencoding.adversarial_ramp = 200
    c.log.images_every_steps = 500
    c.checkpoint.every_steps = 500
    return default.apply_variant(
        c, variant, {"kl_f4": lambda c: None, "kl_f8": f8, "vq_f4": vq, "vq_f8": vq_f8}
    )


def f8(c: ConfigDict) -> None:
    """One level more."""
    c.autoencoder.channel_mult = (1, 2, 4, 4)


def vq(c: ConfigDict) -> None:
    """A codebook of moving averages, where restarts keep all codes in use."""
    c.autoencoder.update(
        {
            "regularization": "vq",
            "num_codes": 512,
            "codebook_ema_decay": 0.99,
            "codebook_restart_below": 0.1,
        }
    )
    c.autoencoding.update({"reduction": "mean", "reg_weight": 1.0, "learn_logvar": False})


def vq_f8(c: ConfigDict) -> None:
    """A codebook and one level more."""
    f8(c)
    vq(c)
