"""Text to OpenMoji by a transformer over the latent's positions instead of the U-Net.

Every block attends to the trained text encoder's tokens. Everything but the backbone is as in
configs/openmoji_text.py.

Command   python train.py --config=configs/openmoji_dit.py --workdir=runs/backbones/dit
          after configs/openmoji_autoencoder.py in runs/demo/first_stage
Cost      minutes on two CPU cores
Expected  the pictures of a run of configs/openmoji_text.py
Variants  :text (this), :class (the nine groups), :v (diffusion by v-prediction), :smoke (shapes)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_text


def get_config(variant: str = "") -> ConfigDict:
    c = openmoji_text.get_config("smoke" if variant == "smoke" else "")
    c.backbone = "dit"
    c.dit.update({"width": 192, "depth": 6, "num_heads": 6, "patch_size": 1, "base_size": 8})
    c.optimizer.learning_rate = 1e-3
    variants = {
        "text": lambda c: None,
        "class": of_classes,
        "v": openmoji_text.of_v,
        "smoke": smoke,
    }
    return default.apply_variant(c, variant, variants)


def of_classes(c: ConfigDict) -> None:
    """A class vector, which is added to the timestep's embedding, and no text."""
    c.tokenizer.name = "none"
    classes = {"num_classes": 9, "width": c.dit.width, "route": "vector"}
    c.conditioners = ConfigDict({"class_label": classes})


def smoke(c: ConfigDict) -> None:
    """All parts of the full run, on synthetic shapes, in seconds."""
    c.dit.update({"width": 16, "depth": 1, "num_heads": 2, "patch_size": 2})
