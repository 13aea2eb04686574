"""VQ first stage, f=2, 2,048 codes of 2 channels (Rombach et al. 2022, Tab. 8).

Command   python train.py --config=configs/vq_f2.py --workdir=runs/vq_f2 --config.data.dir=IMAGES
Variants  :n64 (64 codes)
Cost      the paper states neither levels, batch nor steps; they follow vq_f4
Expected  rFID 0.16, PSNR 30.9 on ImageNet-val at 256² (64 codes: 0.40, 29.1)
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_first_stage("vq", batch_size=8, num_steps=533_066)
    c.autoencoder.update(
        {"z_channels": 2, "embed_dim": 2, "channel_mult": (1, 2), "num_codes": 2048}
    )
    c.autoencoding.disc_start = c.autoencoding.adversarial_start = 50_001
    c.autoencoding.adversarial_weight = 0.75
    return default.apply_variant(c, variant, {"n64": n64})


def n64(c: ConfigDict) -> None:
    """64 codes."""
    c.autoencoder.num_codes = 64
