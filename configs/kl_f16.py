"""KL first stage, f=16, 16 latent channels (Rombach et al. 2022, Tab. 8).

Command   python train.py --config=configs/kl_f16.py --workdir=runs/kl_f16 --config.data.dir=IMAGES
Variants  :c8 (8 latent channels)
Cost      69.61 M parameters; the released weights saw 442,998 batches of 6 images per device
Expected  rFID 0.87, PSNR 24.1 on ImageNet-val at 256² (8 channels: 2.63, 21.9)
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_first_stage("kl", batch_size=6, num_steps=442_998)
    c.autoencoder.update(
        {
            "z_channels": 16,
            "embed_dim": 16,
            "channel_mult": (1, 1, 2, 2, 4),
            "attn_resolutions": (16,),
        }
    )
    return default.apply_variant(c, variant, {"c8": c8})


def c8(c: ConfigDict) -> None:
    """8 latent channels."""
    c.autoencoder.update({"z_channels": 8, "embed_dim": 8})
