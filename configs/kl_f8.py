"""KL first stage, f=8, 4 latent channels (Rombach et al. 2022, Tab. 8).

Command   python train.py --config=configs/kl_f8.py --workdir=runs/kl_f8 --config.data.dir=IMAGES
Cost      83.65 M parameters; the released weights saw 246,803 batches of 4 images per device
Expected  rFID 0.90, PSNR 24.2 on ImageNet-val at 256²
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_first_stage("kl", batch_size=4, num_steps=246_803)
    c.autoencoder.update({"z_channels": 4, "embed_dim": 4, "channel_mult": (1, 2, 4, 4)})
    return default.apply_variant(c, variant, {})
