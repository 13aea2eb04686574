"""VQ first stage, f=32, 16,384 codes of 16 channels (Rombach et al. 2022, Tab. 8).

Command   python train.py --config=configs/vq_f32.py --workdir=runs/vq_f32 --config.data.dir=IMAGES
Cost      the paper states neither levels, batch nor steps; they follow kl_f32 and vq_f16
Expected  rFID 31.8, PSNR 17.5 on ImageNet-val at 256²
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_first_stage("vq", batch_size=14, num_steps=1_101_166)
    c.autoencoder.update(
        {
            "z_channels": 16,
            "embed_dim": 16,
            "channel_mult": (1, 1, 2, 2, 4, 4),
            "attn_resolutions": (16, 8),
            "num_codes": 16384,
        }
    )
    c.autoencoding.disc_start = c.autoencoding.adversarial_start = 250_001
    c.autoencoding.adversarial_weight = 0.75
    return default.apply_variant(c, variant, {})
