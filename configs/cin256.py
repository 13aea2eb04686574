"""Class-conditional ImageNet at 256² on VQ latents (Rombach et al. 2022, Tab. 3 and 13).

Command   python train.py --config=configs/cin256.py --workdir=runs/cin256
          --config.data.dir=IMAGES_IN_A_FOLDER_PER_CLASS --config.first_stage.path=WORKDIR_OF_vq_f8
Variants  :f1 :f2 :f4 :f8 :f16 :f32, the comparison of compression rates (2,000,000 steps each)
Cost      394.98 M parameters and 0.51 M of classes; 2,900,000 batches of 64: 79 V100-days
Expected  FID 17.41, IS 72.9 (50,000 samples, 200 steps); 8.11, 190.4 with classifier guidance 10
"""

from ml_collections import ConfigDict

from configs import celebahq, default, vq_f8


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_denoiser(vq_f8, batch_size=64, num_steps=2_900_000)
    c.conditioners = ConfigDict({"class_label": {"num_classes": 1000, "width": 512}})
    c.unet.update({"model_channels": 256, "channel_mult": (1, 2, 4), "num_head_channels": 32})
    c.optimizer.learning_rate = 6.4e-5
    if variant:
        row(c, variant)
    return c


def row(c: ConfigDict, variant: str) -> None:
    """A row of Tab. 13: f, channels, multipliers, batch and learning rate; one head."""
    rows = {
        "f1": (192, (1, 1, 2, 2, 4, 4), 7, 4.9e-5),
        "f2": (192, (1, 2, 2, 4, 4), 9, 6.3e-5),
        "f4": (192, (1, 2, 3, 5), 40, 8e-5),
        "f8": (256, (1, 2, 4), 64, 6.4e-5),
        "f16": (256, (1, 2, 4), 112, 4.5e-5),
        "f32": (256, (1, 2, 4), 112, 4.5e-5),
    }
    default.apply_variant(c, variant, {name: lambda c: None for name in rows})
    celebahq.compress(c, variant)
    c.unet.attention_resolutions = celebahq.attended(variant)
    c.unet.model_channels, c.unet.channel_mult, c.batch_size, lr = rows[variant]
    c.unet.num_heads, c.unet.num_head_channels = 1, None
    c.optimizer.learning_rate, c.num_steps = lr, 2_000_000
    if variant == "f32":  # no row of the paper's Tab. 8 has so many channels
        c.autoencoder.z_channels = c.autoencoder.embed_dim = 32
        c.first_stage.trained_by = ""
