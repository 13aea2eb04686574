"""Text to OpenMoji and Twemoji at 64×64: the demo's experiment with two hours instead of minutes.

Captions may name the style ("twemoji red heart"). The first stage has eight channels, since the
colours of two styles need them (docs/first_stages.md).

Commands  python train.py --config=configs/openmoji_autoencoder.py:64
          --workdir=runs/demo_64/first_stage
          python train.py --config=configs/openmoji_text_64.py --workdir=runs/demo_64/denoiser
          python -m demo.openmoji --workdir=runs/demo_64
Cost      65 minutes on two CPU cores, after 40 minutes for the first stage
Expected  a PSNR of 29.8 dB, a skin tone of 62 % on held-out combinations, a group of 54 % on
          training captions, 94 % of the colours and 98 % of the styles (docs/gallery.md)
Variants  :smoke (synthetic shapes, a few steps)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_autoencoder, openmoji_text


def get_config(variant: str = "") -> ConfigDict:
    c = openmoji_text.get_config("two_styles")
    first_stage = openmoji_autoencoder.get_config("64")
    c.autoencoder, c.data = first_stage.autoencoder, first_stage.data
    c.first_stage.path = "runs/demo_64/first_stage"
    c.first_stage.trained_by = "openmoji_autoencoder.py:64"
    c.num_steps = 8000
    c.conditioners.word_map.update({"height": 16, "width": 16})
    c.unet.channel_mult = (1, 2, 3)
    c.unet.attention_resolutions = (2, 4)
    c.ema_decay = 0.998
    return default.apply_variant(c, variant, {"smoke": smoke})


def smoke(c: ConfigDict) -> None:
    """All parts of the full run, on synthetic shapes, in seconds."""
    openmoji_text.smoke(c)
    first_stage = openmoji_autoencoder.get_config("smoke")
    c.autoencoder, c.data = first_stage.autoencoder, first_stage.data
    c.first_stage.trained_by = "openmoji_autoencoder.py:smoke"
    c.conditioners.word_map.update({"height": 8, "width": 8})
