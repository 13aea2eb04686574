"""VQ first stage without attention, f=4, 8,192 codes of 3 channels (Rombach et al. 2022, Tab. 8).

Command   python train.py --config=configs/vq_f4_noattn.py --workdir=runs/vq_f4_noattn
          --config.data.dir=IMAGES
Cost      53.22 M parameters; the released weights saw 658,131 batches of 8 images per device
Start     the released run was resumed, so its discriminator starts at step 11; from scratch, set
          autoencoding.disc_start and autoencoding.adversarial_start (50,001 in KL models)
Expected  rFID 1.06, PSNR 25.2 on ImageNet-val at 256²
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_first_stage("vq", batch_size=8, num_steps=658_131)
    c.autoencoder.update(
        {
            "z_channels": 3,
            "embed_dim": 3,
            "channel_mult": (1, 2, 4),
            "attn_type": "none",
            "num_codes": 8192,
        }
    )
    c.autoencoding.disc_start = c.autoencoding.adversarial_start = 11
    c.autoencoding.adversarial_weight = 0.75
    return default.apply_variant(c, variant, {})
