"""VQ first stage, f=8, 16,384 codes of 4 channels (Rombach et al. 2022, Tab. 8).

Command   python train.py --config=configs/vq_f8.py --workdir=runs/vq_f8 --config.data.dir=IMAGES
Cost      67.72 M parameters; the released weights saw 971,043 batches of 10 images per device
Start     the released run was resumed, so its discriminator starts at step 1; from scratch, set
          autoencoding.disc_start and autoencoding.adversarial_start (50,001 in KL models)
Expected  rFID 1.14, PSNR 23.1 on ImageNet-val at 256²
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_first_stage("vq", batch_size=10, num_steps=971_043)
    c.autoencoder.update(
        {
            "z_channels": 4,
            "embed_dim": 4,
            "channel_mult": (1, 2, 2, 4),
            "attn_resolutions": (32,),
            "num_codes": 16384,
        }
    )
    c.autoencoding.discriminator.num_layers = 2
    c.autoencoding.disc_start = c.autoencoding.adversarial_start = 1
    c.autoencoding.adversarial_weight = 0.6
    return default.apply_variant(c, variant, {})
