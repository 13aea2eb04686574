"""Text to image, learned from the pictures in a folder and their captions.

Command   python train.py --config=configs/images_text.py:64 --workdir=runs/mine/denoiser
          --config.data.dir=PICTURES
          after configs/images_autoencoder.py of the same variant in runs/mine/first_stage
Variants  :64 (two CPU cores) :128 :256 (one GPU) :smoke (32×32, a few steps)
Cost      :64 four times the work of configs/openmoji_text.py, which takes 8 to 12 minutes on two
          CPU cores; :128 and :256 were not timed
Expected  samples in images/, and eval_loss in metrics.jsonl
"""

from ml_collections import ConfigDict

from configs import default, images_autoencoder, openmoji_text


def get_config(variant: str = "64") -> ConfigDict:
    """The recipe of OpenMoji's texts, for any folder."""
    variants = {"64": lambda c: None, "128": gpu_128, "256": gpu_256, "smoke": lambda c: None}
    c = openmoji_text.get_config("smoke" if variant == "smoke" else "")
    default.find_variant(variant, variants)
    first_stage = images_autoencoder.get_config(variant)
    c.data = first_stage.data
    c.autoencoder = first_stage.autoencoder
    c.first_stage.path = "runs/mine/first_stage"
    c.first_stage.trained_by = f"images_autoencoder.py:{variant}"
    side = c.data.image_size // 4  # the latent's side
    c.conditioners.word_map.update({"height": side, "width": side})
    return default.apply_variant(c, variant, variants)


def gpu_128(c: ConfigDict) -> None:
    """Long captions and a deeper transformer; no maps of words, which only help short runs."""
    c.tokenizer.update({"vocab_size": 8192, "max_length": 32})
    text = {"vocab_size": 8192, "max_length": 32, "width": 512, "depth": 6}
    c.conditioners = ConfigDict({"text": text | {"num_heads": 8, "head_dim": 64}})
    c.first_stage.update({"normalization": "scalar", "cache": False})
    c.unet.update({"model_channels": 128, "channel_mult": (1, 2, 4), "num_res_blocks": 2})
    c.unet.update({"attention_resolutions": (4, 2), "num_head_channels": 64, "num_groups": 32})
    c.unet.dtype = "bfloat16"
    c.optimizer.update({"learning_rate": 2e-4, "b2": 0.999, "warmup_steps": 1000})
    c.batch_size, c.num_steps = 64, 100_000
    c.ema_decay = 0.9999
    c.sampling.update({"guidance_scale": 4.0, "num_steps": 50})
    c.log.images_every_steps = c.checkpoint.every_steps = c.log.eval_every_steps = 2000


def gpu_256(c: ConfigDict) -> None:
    """Latents of 32×32."""
    gpu_128(c)
    c.unet.update({"model_channels": 192, "channel_mult": (1, 2, 4, 4)})
    c.unet.attention_resolutions = (4, 2, 1)
    c.optimizer.learning_rate = 1e-4
    c.num_steps = 300_000
