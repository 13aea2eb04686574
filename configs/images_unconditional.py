"""Pictures like those in a folder, without captions.

Command   python train.py --config=configs/images_unconditional.py:64 --workdir=runs/mine/denoiser
          --config.data.dir=PICTURES
          after configs/images_autoencoder.py of the same variant in runs/mine/first_stage
Variants  :64 (two CPU cores) :128 :256 (one GPU) :smoke (32×32, a few steps)
Cost      less than that of configs/images_text.py
Expected  samples in images/, and eval_loss in metrics.jsonl
"""

from ml_collections import ConfigDict

from configs import default, images_text


def get_config(variant: str = "64") -> ConfigDict:
    c = images_text.get_config(variant)
    c.tokenizer.name = "none"
    c.conditioners = ConfigDict()
    c.sampling.guidance_scale = 1.0
    default.unconditional(c)
    return c
