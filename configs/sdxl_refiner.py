"""Stable Diffusion XL's refiner: details of pictures that have little noise left.

Its conditions are the second text encoder's, and an aesthetic score instead of the target size.
Metadata files have the `aesthetic_score` of each picture. It trains on the last fifth of the noise.

Command   python train.py --config=configs/sdxl_refiner.py --workdir=runs/sdxl_refiner
          --config.data.dir=IMAGES_WITH_CAPTIONS_AND_SCORES --config.init_from=REFINER
          --config.first_stage.path=REFINER --config.tokenizer.path=REFINER/tokenizer_2
          --config.pretrained.clip_text_2=REFINER
          --config.parallel.mode=mesh --config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1
          REFINER is a diffusers folder; without init_from the U-Net starts at random
Cost      2,259.53 M parameters, 694.66 M frozen
Expected  no number is published
"""

from ml_collections import ConfigDict

from configs import default, sdxl


def get_config(variant: str = "") -> ConfigDict:
    c = sdxl.recipe()
    c.conditioners = ConfigDict({"clip_text_2": sdxl.BIG_G, "sizes": {"aesthetic_score": True}})
    c.pretrained.clip_text_2 = ""
    c.unet.update({"model_channels": 384, "channel_mult": (1, 2, 4, 4), "transformer_depth": 4})
    c.diffusion.max_noise = 0.2
    return default.apply_variant(c, variant, {})
