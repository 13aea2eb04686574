"""VQ first stage, f=16, 16,384 codes of 8 channels (Rombach et al. 2022, Tab. 8).

Command   python train.py --config=configs/vq_f16.py --workdir=runs/vq_f16 --config.data.dir=IMAGES
Cost      69.59 M parameters; the released weights saw 1,101,166 batches of 14 images per device
Expected  rFID 5.15, PSNR 20.8 on ImageNet-val at 256²
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_first_stage("vq", batch_size=14, num_steps=1_101_166)
    c.autoencoder.update(
        {
            "z_channels": 8,
            "embed_dim": 8,
            "channel_mult": (1, 1, 2, 2, 4),
            "attn_resolutions": (16,),
            "num_codes": 16384,
        }
    )
    c.autoencoding.discriminator.num_layers = 2
    c.autoencoding.disc_start = c.autoencoding.adversarial_start = 250_001
    c.autoencoding.adversarial_weight = 0.75
    return default.apply_variant(c, variant, {})
