"""Inpainting of OpenMoji pictures with holes as in LaMa: strokes and boxes.

Command   python train.py --config=configs/openmoji_inpainting.py --workdir=runs/gallery/inpainting
          after configs/openmoji_autoencoder.py in runs/demo/first_stage
Cost      2 to 5 minutes on two CPU cores
Expected  the pictures of docs/gallery.md
Variants  :smoke (synthetic shapes, a few steps)
"""

from ml_collections import ConfigDict

from configs import default
from configs.openmoji_unconditional import without_condition


def get_config(variant: str = "") -> ConfigDict:
    c = without_condition(variant, num_steps=1000)
    c.data.mask = "lama"
    c.conditioners = ConfigDict({"masked_image": {}})
    return default.apply_variant(c, variant, {"smoke": lambda c: None})
