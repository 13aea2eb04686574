"""Semantic synthesis: scenes of OpenMoji drawings from their label maps.

Command   python train.py --config=configs/openmoji_semantic.py --workdir=runs/gallery/semantic
          after configs/openmoji_autoencoder.py:scenes in runs/gallery/scenes
Cost      2 to 5 minutes on two CPU cores
Expected  the pictures of docs/gallery.md
Variants  :smoke (a few steps)

The label map shows sixteen subjects and the ground. It becomes one-hot, is halved twice to the
size of the latent, and is projected to 8 channels.
"""

from ml_collections import ConfigDict

from configs import default
from configs.openmoji_unconditional import of_scenes, without_condition


def get_config(variant: str = "") -> ConfigDict:
    c = without_condition(variant, num_steps=1200)
    of_scenes(c, variant)
    c.conditioners = ConfigDict({"spatial_rescaler": {"num_classes": 17, "out_channels": 8}})
    return default.apply_variant(c, variant, {"smoke": lambda c: None})
