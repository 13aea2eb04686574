"""Priors over the codes of a VQ first stage, on OpenMoji pictures of 32×32: 64 codes of 512.

Command   python train.py --config=configs/openmoji_prior.py:first_stage
          --workdir=runs/prior/first_stage
          then python train.py --config=configs/openmoji_prior.py --workdir=runs/prior/causal
Variants  the default is causal, without a condition; :masked as well
          :mirrored (causal; also trained on mirror images, and memorises less)
          :class (causal, of nine groups, with guidance)
          :diffusion (latent diffusion in the same latents, for the comparison in docs/priors.md)
          :layout :segmentation (causal, of scenes; after :first_stage_scenes, which continues
          runs/prior/first_stage, in runs/prior/first_stage_scenes)
          :smoke (causal, of classes, on synthetic shapes, a few steps; after
          :first_stage_smoke)
Cost      the first stage, each prior and :diffusion about 13 minutes on two CPU cores
Expected  the tables of docs/priors.md (held-out bits per code: 6.32, :mirrored 5.99, masked 6.88,
          :class 6.33, :layout 6.03, :segmentation 5.73)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_autoencoder, openmoji_first_stages, openmoji_unconditional

CODES = 512


def get_config(variant: str = "") -> ConfigDict:
    others = {
        "first_stage": first_stage,
        "first_stage_scenes": first_stage_scenes,
        "first_stage_smoke": first_stage_smoke,
        "diffusion": diffusion,
    }
    if variant in others:
        return others[variant]()
    c = default.get_config()
    c.task = "prior"
    autoencoding = first_stage()
    c.autoencoder, c.data = autoencoding.autoencoder, autoencoding.data
    c.first_stage.path = "runs/prior/first_stage"
    c.first_stage.trained_by = "openmoji_prior.py:first_stage"
    c.first_stage.normalization = "none"
    c.first_stage.cache = True
    c.batch_size = 32
    c.num_steps = 2800
    c.conditioners = ConfigDict({"start": {"token": CODES}})
    # Rows for the codes, the start and the token of masked codes, which a causal prior ignores.
    c.transformer.update({"vocab_size": CODES + 2, "max_length": 64, "width": 128, "depth": 4})
    c.transformer.update({"num_heads": 4, "dropout": 0.1})
    c.optimizer.update({"learning_rate": 1e-3, "b1": 0.9, "b2": 0.95, "weight_decay": 0.01})
    c.optimizer.no_decay = ("bias", "scale", "embedding", "pos_emb")  # as in minGPT
    c.optimizer.update({"schedule": "cosine", "warmup_steps": 100, "end_factor": 0.02})
    c.optimizer.grad_clip = 1.0
    c.ema_decay = 0.995
    c.log.images_every_steps = 800
    c.checkpoint.every_steps = 800
    variants = {
        "masked": masked,
        "mirrored": mirrored,
        "class": of_class,
        "layout": layout,
        "segmentation": segmentation,
        "smoke": smoke,
    }
    return default.apply_variant(c, variant, variants)


def first_stage() -> ConfigDict:
    """Perceptual compression with a codebook of moving averages."""
    c = openmoji_autoencoder.get_config()
    openmoji_first_stages.vq(c)
    return c


def first_stage_scenes() -> ConfigDict:
    """Continue the training of the first stage on scenes."""
    c = first_stage()
    openmoji_autoencoder.scenes(c)
    c.init_from = "runs/prior/first_stage"
    c.num_steps = 1200
    return c


def first_stage_smoke() -> ConfigDict:
    """A few steps on synthetic shapes."""
    c = openmoji_autoencoder.get_config("smoke")
    openmoji_first_stages.vq(c)
    c.autoencoder.num_codes = 16
    return c


def diffusion() -> ConfigDict:
    """Latent diffusion in the same latent space, for the comparison with the priors."""
    num_steps = 7200  # the time of 2,800 steps of the priors
    c = openmoji_unconditional.without_condition("", num_steps)
    c.autoencoder = first_stage().autoencoder
    c.first_stage.path = "runs/prior/first_stage"
    c.first_stage.trained_by = "openmoji_prior.py:first_stage"
    return c


def masked(c: ConfigDict) -> None:
    """MaskGIT's recipe: no token in front, smoothed labels, 12 steps."""
    c.conditioners = ConfigDict()
    c.transformer.causal = False
    c.prior.label_smoothing = 0.1


def mirrored(c: ConfigDict) -> None:
    """Also mirror images, so pictures are encoded in each step."""
    c.data.flip = True
    c.first_stage.cache = False
    c.transformer.dropout = 0.12


def of_class(c: ConfigDict) -> None:
    """A class token in front of the codes, which is dropped in a tenth of the examples."""
    c.conditioners = ConfigDict(
        {"class_token": {"num_classes": 9, "offset": CODES, "null": CODES + 9}}
    )
    c.transformer.vocab_size = CODES + 11
    c.prior.drop_rate = 0.1
    c.prior.sampling.guidance_scale = 2.0


def of_scenes(c: ConfigDict) -> None:
    """Change the data to scenes, with the first stage of scenes."""
    c.data.name = "openmoji_scenes"
    c.first_stage.path = "runs/prior/first_stage_scenes"
    c.first_stage.trained_by = "openmoji_prior.py:first_stage_scenes"
    c.num_steps = 1400
    c.prior.drop_rate = 0.1


def layout(c: ConfigDict) -> None:
    """Four objects of three tokens in front of the codes."""
    of_scenes(c)
    c.conditioners = ConfigDict(
        {"layout_tokens": {"vocab_size": 1024, "max_length": 12, "offset": CODES}}
    )
    c.data.layout.update({"vocab_size": 1024, "max_objects": 4, "encode_crop": False})
    c.transformer.update({"vocab_size": CODES + 1025, "max_length": 76})


def segmentation(c: ConfigDict) -> None:
    """A class token for each code, in front of the codes: sixteen subjects and the ground."""
    of_scenes(c)
    c.conditioners = ConfigDict(
        {
            "segmentation_tokens": {
                "num_classes": 17,
                "factor": 4,
                "offset": CODES,
                "null": CODES + 17,
            }
        }
    )
    c.transformer.update({"vocab_size": CODES + 19, "max_length": 128})


def smoke(c: ConfigDict) -> None:
    """All parts of the full run, on synthetic shapes, in seconds."""
    tiny = first_stage_smoke()
    c.autoencoder, c.data, c.batch_size = tiny.autoencoder, tiny.data, 8
    c.first_stage.trained_by = "openmoji_prior.py:first_stage_smoke"
    of_class(c)
    c.conditioners.class_token.update({"offset": 16, "null": 25})
    c.transformer.update({"vocab_size": 27, "max_length": 65, "width": 16, "depth": 1})
    c.transformer.num_heads = 2
    c.num_steps = 4
    c.log.every_steps = 1
    c.log.num_images = 4
    c.log.eval_batches = 1
    c.checkpoint.every_steps = 2
