"""OpenMoji without a condition.

Command   python train.py --config=configs/openmoji_unconditional.py
          --workdir=runs/gallery/unconditional
          (needs the first stage that configs/openmoji_autoencoder.py trains)
Variants  :smoke (synthetic shapes, a few steps)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_text


def get_config(variant: str = "") -> ConfigDict:
    c = without_condition(variant)
    return default.apply_variant(c, variant, {"smoke": lambda c: None})


def of_scenes(c: ConfigDict) -> None:
    """Draw scenes, on their own first stage."""
    c.data.name = "openmoji_scenes"
    c.first_stage.path = "runs/gallery/scenes"


def without_condition(variant: str = "") -> ConfigDict:
    """The text experiment's first stage, U-Net, data and recipe, told nothing yet."""
    c = openmoji_text.get_config(variant)
    c.tokenizer.name = "none"
    c.conditioners = ConfigDict()
    c.unet.transformer_depth = 0
    c.sampling.guidance_scale = 1.0
    return c


def with_context(variant: str, name: str, **fields: object) -> ConfigDict:
    """The same, attending to the tokens of one conditioner."""
    c = without_condition(variant)
    c.conditioners = ConfigDict({name: fields})
    c.unet.transformer_depth = 1
    c.sampling.guidance_scale = 2.0
    return c
