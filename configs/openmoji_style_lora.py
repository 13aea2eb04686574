"""Another style for the demo's text model: a LoRA of a few drawings of Twemoji.

The adapted model only knows OpenMoji, whose drawings have black outlines; the pictures of the
folder `data.dir` have flat colours. Their captions don't name the style: the adaptation adds it.
The first stage knows both styles, as Stable Diffusion's knows all kinds of pictures. That of the
demo would give outlines to whatever it decodes.

Command   python -m demo.folders --out=runs/style/pictures --style=twemoji --count=200
          python train.py --config=configs/openmoji_style_lora.py --workdir=runs/style/lora
          after configs/openmoji_autoencoder.py:two_styles in runs/two_styles/first_stage, and
          configs/openmoji_text.py:style_base in runs/style/base; then
          python -m demo.adapters --base=runs/style/base --style=runs/style/lora
Cost      2 minutes on two CPU cores
Expected  99 % of samples in the style, but subjects are lost (docs/adapters.md)
Variants  :smoke (a few steps; needs the smoke run of configs/openmoji_text.py)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_text


def get_config(variant: str = "") -> ConfigDict:
    c = openmoji_text.get_config("smoke" if variant == "smoke" else "style_base")
    c.init_from = "runs/style/base"
    c.data.name = "image_folder"
    c.data.dir = "runs/style/pictures"
    c.data.test_split = "train"
    c.lora.rank = 16
    c.lora.alpha = 16.0
    c.lora.targets = (r"unet/.*kernel",)
    c.batch_size = 16
    c.num_steps = 1500
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 50
    c.ema_decay = 0.99
    return default.apply_variant(c, variant, {"smoke": smoke})


def smoke(c: ConfigDict) -> None:
    """A few steps."""
    c.batch_size = 4
    c.num_steps = 2
    c.optimizer.warmup_steps = 0
