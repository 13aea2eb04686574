"""VQ first stage, f=4, 8,192 codes of 3 channels (Rombach et al. 2022, Tab. 8).

Command   python train.py --config=configs/vq_f4.py --workdir=runs/vq_f4 --config.data.dir=IMAGES
Variants  :n256 (256 codes)
Cost      55.32 M parameters; the released weights saw 533,066 batches of 8 images per device
Start     the released run was resumed, so its discriminator starts at step 0; from scratch, set
          autoencoding.disc_start and autoencoding.adversarial_start (50,001 in KL models)
Expected  rFID 0.58, PSNR 27.4 on ImageNet-val at 256² (256 codes: 0.47, 26.4)
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_first_stage("vq", batch_size=8, num_steps=533_066)
    c.autoencoder.update(
        {"z_channels": 3, "embed_dim": 3, "channel_mult": (1, 2, 4), "num_codes": 8192}
    )
    c.autoencoding.disc_start = c.autoencoding.adversarial_start = 0
    c.autoencoding.adversarial_weight = 0.75
    return default.apply_variant(c, variant, {"n256": n256})


def n256(c: ConfigDict) -> None:
    """256 codes."""
    c.autoencoder.num_codes = 256
