"""KL first stage, f=4, 3 latent channels (Rombach et al. 2022, Tab. 8).

Command   python train.py --config=configs/kl_f4.py --workdir=runs/kl_f4 --config.data.dir=IMAGES
Cost      55.31 M parameters; the released weights saw 176,991 batches of 10 images per device
Expected  rFID 0.27, PSNR 27.5 on ImageNet-val at 256²
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_first_stage("kl", batch_size=10, num_steps=176_991)
    c.autoencoder.update({"z_channels": 3, "embed_dim": 3, "channel_mult": (1, 2, 4)})
    return default.apply_variant(c, variant, {})
