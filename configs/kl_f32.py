"""KL first stage, f=32, 64 latent channels (Rombach et al. 2022, Tab. 8).

Command   python train.py --config=configs/kl_f32.py --workdir=runs/kl_f32 --config.data.dir=IMAGES
Variants  :c16 (16 latent channels)
Cost      103.88 M parameters; the released weights saw 406,763 batches of 6 images per device
Expected  rFID 2.04, PSNR 22.3 on ImageNet-val at 256² (16 channels: 7.3, 20.4)
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_first_stage("kl", batch_size=6, num_steps=406_763)
    c.autoencoder.update(
        {
            "z_channels": 64,
            "embed_dim": 64,
            "channel_mult": (1, 1, 2, 2, 4, 4),
            "attn_resolutions": (16, 8),
        }
    )
    return default.apply_variant(c, variant, {"c16": c16})


def c16(c: ConfigDict) -> None:
    """16 latent channels."""
    c.autoencoder.update({"z_channels": 16, "embed_dim": 16})
