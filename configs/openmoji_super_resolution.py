"""Fourfold super-resolution of OpenMoji: 8×8 pixels to 32×32.

Command   python train.py --config=configs/openmoji_super_resolution.py
          --workdir=runs/gallery/super_resolution
          after configs/openmoji_autoencoder.py in runs/demo/first_stage
Cost      2 to 5 minutes on two CPU cores
Expected  the pictures of docs/gallery.md
Variants  :bsr (degraded as in BSRGAN instead of bicubic) :smoke (synthetic shapes, a few steps)

With f=4 the small picture has the size of the latent and is concatenated with it, unchanged.
"""

from ml_collections import ConfigDict

from configs import default
from configs.openmoji_unconditional import without_condition


def get_config(variant: str = "") -> ConfigDict:
    c = without_condition("" if variant == "bsr" else variant, num_steps=1000)
    c.data.low_res = "bicubic"
    c.conditioners = ConfigDict({"low_res": {}})
    return default.apply_variant(c, variant, {"bsr": bsr, "smoke": lambda c: None})


def bsr(c: ConfigDict) -> None:
    """Light blur, noise and JPEG compression in random order."""
    c.data.low_res = "bsrgan_light"
