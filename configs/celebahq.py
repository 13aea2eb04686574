"""Unconditional CelebA-HQ at 256² on VQ latents, f=4 (Rombach et al. 2022, Tab. 1 and 14).

Command   python train.py --config=configs/celebahq.py --workdir=runs/celebahq
          --config.data.dir=IMAGES --config.first_stage.path=WORKDIR_OF_vq_f4
Variants  :f1 :f2 :f4 :f8 :f16 :f32, the comparison of compression rates (500,000 steps each)
Cost      274.06 M parameters, 410,000 batches of 48: 14.4 V100-days
Expected  FID 5.11, precision 0.72, recall 0.49 (50,000 samples, 500 steps)
"""

from ml_collections import ConfigDict

from configs import default, vq_f2, vq_f4, vq_f8, vq_f16, vq_f32


def get_config(variant: str = "") -> ConfigDict:
    c = faces(batch_size=48, num_steps=410_000, learning_rate=9.6e-5)
    if variant:
        row(c, variant)
    return c


def faces(batch_size: int, num_steps: int, learning_rate: float) -> ConfigDict:
    """The U-Net and recipe that CelebA-HQ, FFHQ and LSUN bedrooms share."""
    c = default.paper_denoiser(vq_f4, batch_size, num_steps)
    default.unconditional(c)
    c.data.flip = True
    c.unet.update({"model_channels": 224, "channel_mult": (1, 2, 3, 4)})
    c.unet.update({"attention_resolutions": (8, 4, 2), "num_head_channels": 32})
    c.optimizer.learning_rate = learning_rate
    return c


def row(c: ConfigDict, variant: str) -> None:
    """A row of Tab. 14: f, channels, multipliers, batch and learning rate."""
    rows = {
        "f1": (192, (1, 1, 2, 2, 4, 4), 9, 9e-5),
        "f2": (192, (1, 2, 2, 4, 4), 11, 1.1e-4),
        "f4": (224, (1, 2, 3, 4), 48, 9.6e-5),
        "f8": (256, (1, 2, 4), 96, 9.6e-5),
        "f16": (256, (1, 2, 4), 128, 1.3e-4),
        "f32": (256, (1, 2, 4), 128, 1.3e-4),
    }
    default.apply_variant(c, variant, {name: lambda c: None for name in rows})
    compress(c, variant)
    c.unet.attention_resolutions = attended(variant)
    c.unet.model_channels, c.unet.channel_mult, c.batch_size, lr = rows[variant]
    c.optimizer.learning_rate, c.num_steps = lr, 500_000
    c.first_stage.normalization = "none"


def compress(c: ConfigDict, variant: str) -> None:
    """Set the first stage of a compression rate: VQ of the paper's Tab. 8, or pixels."""
    modules = {"f2": vq_f2, "f4": vq_f4, "f8": vq_f8, "f16": vq_f16, "f32": vq_f32}
    if variant == "f1":
        c.autoencoder = ConfigDict({"regularization": "identity", "image_channels": 3})
        c.first_stage.trained_by = ""
    else:
        c.autoencoder = modules[variant].get_config().autoencoder
        c.first_stage.trained_by = f"vq_{variant}.py"


def attended(variant: str) -> tuple[int, ...]:
    """Downsampling factors with attention: at sizes 32, 16 and 8, or the last three levels."""
    return {"f1": (32, 16, 8), "f2": (16, 8, 4), "f4": (8, 4, 2)}.get(variant, (4, 2, 1))
