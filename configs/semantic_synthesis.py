"""Landscapes from label maps, on VQ latents, f=4 (Rombach et al. 2022, section 4.3.2, Tab. 15).

Command   python train.py --config=configs/semantic_synthesis.py --workdir=runs/semantic_synthesis
          --config.data.dir=IMAGES_WITH_segmentation --config.first_stage.path=WORKDIR_OF_vq_f4
Variants  :512 (finetuned on larger crops: --config.init_from=WORKDIR_OF_THIS)
Cost      215.23 M parameters; 360,000 batches of 48
Expected  no number is published; the model also samples at 512×1024 and above
"""

from ml_collections import ConfigDict

from configs import default, vq_f4


def get_config(variant: str = "") -> ConfigDict:
    c = default.paper_denoiser(vq_f4, batch_size=48, num_steps=360_000)
    default.unconditional(c)  # the label map suffices
    c.data.update({"crop": "random", "shorter_side": 384, "flip": True})
    c.conditioners = ConfigDict({"spatial_rescaler": {"num_classes": 182, "out_channels": 3}})
    c.unet.update({"model_channels": 128, "channel_mult": (1, 4, 8), "num_heads": 8})
    c.unet.attention_resolutions = ()  # in the middle only
    c.diffusion.update({"loss": "l1", "beta_end": 0.0205})
    c.optimizer.learning_rate = 1e-6 * c.batch_size
    return default.apply_variant(c, variant, {"512": large})


def large(c: ConfigDict) -> None:
    """512² crops of 768² pictures."""
    c.data.update({"image_size": 512, "shorter_side": 768})
    c.batch_size = 8
    c.optimizer.learning_rate = 1e-6 * c.batch_size
