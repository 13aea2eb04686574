"""OpenMoji without a condition.

Command   python train.py --config=configs/openmoji_unconditional.py
          --workdir=runs/gallery/unconditional
          after configs/openmoji_autoencoder.py:fine in runs/gallery/fine
Cost      about 40 minutes on two CPU cores
Expected  the pictures and distances of docs/gallery.md
Variants  :smoke (synthetic shapes, a few steps)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_autoencoder, openmoji_text


def get_config(variant: str = "") -> ConfigDict:
    c = without_condition(variant, num_steps=12000)
    for_longer(c, variant)
    return default.apply_variant(c, variant, {"smoke": lambda c: None})


def of_scenes(c: ConfigDict, variant: str) -> None:
    """Change the data to scenes, with the first stage of scenes."""
    c.data.name = "openmoji_scenes"
    c.first_stage.path = "runs/gallery/scenes"
    c.first_stage.trained_by = f"openmoji_autoencoder.py:{variant or 'scenes'}"


def without_condition(variant: str, num_steps: int) -> ConfigDict:
    """The first stage, U-Net, data and recipe of the text experiment, without its conditions.

    The process is diffusion by v-prediction.
    """
    c = openmoji_text.get_config(variant)
    openmoji_text.of_v(c)
    if variant != "smoke":
        c.num_steps = num_steps
    c.tokenizer.name = "none"
    c.conditioners = ConfigDict()
    c.unet.transformer_depth = 0
    c.sampling.guidance_scale = 1.0
    return c


def for_longer(c: ConfigDict, variant: str) -> None:
    """For conditions that say little: a better first stage, a larger U-Net, an SDE's sampler.

    The averages are over more steps, too. A smoke run stays as it is.
    """
    if variant == "smoke":
        return
    c.autoencoder = openmoji_autoencoder.get_config("fine").autoencoder
    c.first_stage.path = "runs/gallery/fine"
    c.first_stage.trained_by = "openmoji_autoencoder.py:fine"
    c.unet.update({"model_channels": 64, "num_res_blocks": 2, "num_heads": 4})
    c.optimizer.learning_rate = 1e-3
    c.ema_decay = 0.999
    c.log.images_every_steps = 2000
    c.checkpoint.every_steps = 1000
    c.sampling.update({"sampler": "dpm_solver_pp_2m_sde", "num_steps": 30})


def with_context(variant: str, num_steps: int, name: str, **fields: object) -> ConfigDict:
    """The text experiment with another conditioner, to whose tokens the U-Net attends."""
    c = without_condition(variant, num_steps)
    c.conditioners = ConfigDict({name: fields})
    c.unet.transformer_depth = 1
    c.sampling.guidance_scale = 2.0
    return c
