"""A classifier of noisy latents: guides the unconditional OpenMoji model to one of nine groups.

Command   python train.py --config=configs/openmoji_classifier.py --workdir=runs/gallery/classifier
          (needs the model that configs/openmoji_unconditional.py trains)
Cost      2 to 5 minutes on two CPU cores
Expected  the pictures of docs/gallery.md
Variants  :smoke (synthetic shapes, a few steps)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_unconditional


def get_config(variant: str = "") -> ConfigDict:
    c = openmoji_unconditional.without_condition(variant, num_steps=600)
    c.task = "classifying"
    c.first_stage.path = "runs/gallery/unconditional"
    c.first_stage.trained_by = f"openmoji_unconditional.py:{variant}".rstrip(":")
    c.autoencoder = openmoji_unconditional.get_config(variant).autoencoder
    c.classifier.num_classes = 9
    c.unet.num_head_channels = 16
    return default.apply_variant(c, variant, {"smoke": smoke})


def smoke(c: ConfigDict) -> None:
    """A few steps."""
    c.num_steps = 4
    c.unet.num_head_channels = 8
