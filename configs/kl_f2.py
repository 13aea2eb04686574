"""KL first stage, f=2, 2 latent channels (Rombach et al. 2022, Tab. 8).

Command   python train.py --config=configs/kl_f2.py --workdir=runs/kl_f2 --config.data.dir=IMAGES
Cost      the paper states neither levels, batch nor steps; they follow kl_f4
Expected  rFID 0.086, PSNR 32.5 on ImageNet-val at 256²
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_first_stage("kl", batch_size=10, num_steps=176_991)
    c.autoencoder.update({"z_channels": 2, "embed_dim": 2, "channel_mult": (1, 2)})
    return default.apply_variant(c, variant, {})
