"""VQ first stage, f=8, 256 codes of 4 channels (Rombach et al. 2022, Tab. 8).

Command   python train.py --config=configs/vq_f8_n256.py --workdir=runs/vq_f8_n256
          --config.data.dir=IMAGES
Cost      67.65 M parameters; the released weights saw 1,608,649 batches of 10 images per device
Expected  rFID 1.49, PSNR 22.4 on ImageNet-val at 256²
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_first_stage("vq", batch_size=10, num_steps=1_608_649)
    c.autoencoder.update(
        {
            "z_channels": 4,
            "embed_dim": 4,
            "channel_mult": (1, 2, 2, 4),
            "attn_resolutions": (32,),
            "num_codes": 256,
        }
    )
    c.autoencoding.disc_start = c.autoencoding.adversarial_start = 250_001
    c.autoencoding.adversarial_weight = 0.75
    return default.apply_variant(c, variant, {})
