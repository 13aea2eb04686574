"""Text to OpenMoji: a rectified flow in latents, by a U-Net that attends to a text transformer.

In a few minutes, cross-attention alone doesn't learn to which positions 1,600 words refer.
Therefore every word also has a small learned map, which is concatenated with the latent
(`word_map`).

Command   python train.py --config=configs/openmoji_text.py --workdir=runs/demo/denoiser
          after configs/openmoji_autoencoder.py in runs/demo/first_stage
Cost      8 to 12 minutes on two CPU cores
Expected  python -m demo.openmoji --workdir=runs/demo then measures a skin tone of 86 % on held-out
          combinations, a group of 89 % on training captions, and 96 % of the colours
Variants  :two_styles (OpenMoji and Twemoji; an experiment, which needs longer training)
          :style_base (OpenMoji alone, on latents of both styles; for the LoRA of a style)
          :v (diffusion by v-prediction, for docs/backbones.md)
          :smoke (synthetic shapes, a few steps)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_autoencoder


def get_config(variant: str = "") -> ConfigDict:
    c = default.get_config()
    of_first_stage = variant if variant in ("smoke", "two_styles") else ""
    first_stage = openmoji_autoencoder.get_config(of_first_stage)
    c.autoencoder = first_stage.autoencoder
    c.first_stage.path = "runs/demo/first_stage"
    c.first_stage.trained_by = f"openmoji_autoencoder.py:{of_first_stage}".rstrip(":")
    c.first_stage.normalization = "channel"
    c.first_stage.cache = True
    c.data = first_stage.data
    c.batch_size = 32
    c.num_steps = 5700

    c.tokenizer.name = "word"
    c.tokenizer.vocab_size = 2048
    c.tokenizer.max_length = 14
    c.conditioners = ConfigDict(
        {
            "text": {
                "vocab_size": 2048,
                "max_length": 14,
                "width": 128,
                "depth": 1,
                "num_heads": 4,
                "head_dim": 32,
            },
            "word_map": {"vocab_size": 2048, "height": 8, "width": 8, "channels": 8},
        }
    )
    c.unet.model_channels = 48
    c.unet.channel_mult = (1, 2)
    c.unet.num_res_blocks = 1
    c.unet.attention_resolutions = (2,)
    c.unet.num_heads = 3
    c.unet.use_scale_shift_norm = True
    c.unet.num_groups = 16

    c.diffusion.prediction = "flow"
    c.diffusion.schedule = "rectified_flow"
    c.diffusion.timestep_sampling = "logit_normal"
    c.diffusion.drop_rate = 0.1
    c.sampling.guidance_scale = 3.0
    c.sampling.num_steps = 25

    c.optimizer.learning_rate = 1.5e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.b2 = 0.99
    c.optimizer.warmup_steps = 100
    c.optimizer.end_factor = 0.02
    c.optimizer.grad_clip = 1.0
    c.ema_decay = 0.995
    c.log.images_every_steps = 800
    c.checkpoint.every_steps = 800
    variants = {"v": of_v, "smoke": smoke, "two_styles": two_styles, "style_base": style_base}
    return default.apply_variant(c, variant, variants)


def of_v(c: ConfigDict) -> None:
    """Diffusion with a cosine schedule, at uniform timesteps."""
    c.diffusion.update({"schedule": "cosine", "prediction": "v", "timestep_sampling": "uniform"})
    c.sampling.guidance_scale = 2.0


def two_styles(c: ConfigDict) -> None:
    """Captions may name the style: "twemoji red heart"."""
    c.first_stage.path = "runs/two_styles/first_stage"
    c.tokenizer.max_length = c.conditioners.text.max_length = 16


def style_base(c: ConfigDict) -> None:
    """OpenMoji's pictures, in the latents of a first stage that knows both styles."""
    c.autoencoder = openmoji_autoencoder.get_config("two_styles").autoencoder
    c.first_stage.path = "runs/two_styles/first_stage"
    c.first_stage.trained_by = "openmoji_autoencoder.py:two_styles"


def smoke(c: ConfigDict) -> None:
    """All parts of the full run, on synthetic shapes, in seconds."""
    c.batch_size = 8
    c.num_steps = 4
    c.first_stage.num_batches = 2
    c.tokenizer.max_length = 4
    c.conditioners.text.update({"max_length": 4, "width": 16, "depth": 1})
    c.conditioners.word_map.channels = 2
    c.unet.update({"model_channels": 16, "num_res_blocks": 1, "num_groups": 8, "num_heads": 2})
    c.sampling.num_steps = 4
    c.log.every_steps = 1
    c.log.num_images = 4
    c.log.eval_batches = 1
    c.checkpoint.every_steps = 2
