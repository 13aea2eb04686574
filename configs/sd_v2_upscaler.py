"""Stable Diffusion v2's ×4 upscaler: text and a noised small picture, on KL latents, f=4.

Command   python train.py --config=configs/sd_v2_upscaler.py --workdir=runs/sd_v2_upscaler
          --config.data.dir=LARGE_IMAGES_WITH_CAPTIONS --config.first_stage.path=WORKDIR
          --config.pretrained.clip_text=OPENCLIP_VIT_H14 --config.tokenizer.path=ITS_TOKENIZER
Cost      472.38 M parameters, 1.02 M of noise levels and 340.39 M frozen; 1,250,000 steps
Expected  no number is published
"""

from ml_collections import ConfigDict

from configs import default, kl_f4, sd_v2


def get_config() -> ConfigDict:
    c = default.paper_denoiser(kl_f4, batch_size=2048, num_steps=1_250_000)
    sd_v2.open_clip(c)
    c.autoencoder.z_channels = c.autoencoder.embed_dim = 4
    c.first_stage.trained_by = ""  # kl_f4 has three channels
    c.data.update({"image_size": 512, "crop": "random", "shorter_side": 2048, "low_res": "bicubic"})
    c.conditioners.low_res = ConfigDict({"num_levels": 1000, "width": 1024, "keep": True})
    c.unet.update({"model_channels": 256, "channel_mult": (1, 2, 2, 4), "num_heads": 8})
    c.unet.attention_resolutions = (2, 4, 8)
    c.unet.disable_self_attentions = (True, True, True, False)
    c.unet.remat = "full"
    c.diffusion.update({"beta_start": 1e-4, "beta_end": 0.02, "prediction": "v"})
    return c
