"""Stable Diffusion 3 medium: text to image at 1024² on 16-channel latents, f=8, by an MMDiT.

The network learns a flow's velocity; timesteps are drawn around the middle and shifted towards
noise. The three text encoders and the first stage are frozen (Esser et al. 2024).

Command   python train.py --config=configs/sd3.py --workdir=runs/sd3
          --config.data.dir=IMAGES_WITH_CAPTIONS --config.init_from=SD3
          --config.first_stage.path=SD3 --config.tokenizer.path=SD3
          --config.pretrained.clip_text=SD3
          --config.pretrained.clip_text_2=SD3 --config.pretrained.t5_text=SD3
          --config.parallel.mode=mesh --config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1
          SD3 is a diffusers folder; without init_from the transformer starts at random
Variants  :medium (3.5 medium) :large (3.5 large) :lora (only attention, from a few pictures)
          :smoke (seconds on a CPU)
Cost      2,028.33 M trained parameters; :medium 2,243.17 M, :large 8,056.63 M; the batch and the
          length of training are a guess, since the paper doesn't state them for released models
Expected  no number is published
"""

from ml_collections import ConfigDict

from configs import default, kl_f8, openmoji_text, sdxl


def get_config(variant: str = "") -> ConfigDict:
    if variant == "smoke":
        return smoke()
    c = default.paper_denoiser(kl_f8, batch_size=1024, num_steps=500_000)
    c.data.update({"image_size": 1024, "crop": "random"})
    c.autoencoder.update({"z_channels": 16, "embed_dim": 16})
    c.first_stage.trained_by = ""  # kl_f8 has four channels
    c.tokenizer.update({"name": "clip_t5", "max_length": 77 + 256})
    c.conditioners = ConfigDict(
        {
            "clip_text": {**sdxl.CLIP_L, "projection_dim": 768},
            "clip_text_2": dict(sdxl.BIG_G),
            "t5_text": {"dtype": "bfloat16"},
        }
    )
    c.pretrained.update({"clip_text": "", "clip_text_2": "", "t5_text": ""})
    c.backbone = "mmdit"
    c.mmdit.update({"remat": "full", "dtype": "bfloat16", "scan": True})
    flow(c)
    c.sampling.update({"num_steps": 28, "eta": None, "guidance_scale": 7.0})
    c.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 1000})
    variants = {"medium": medium, "large": large, "lora": lora}
    return default.apply_variant(c, variant, {**variants, "smoke": lambda c: None})


def flow(c: ConfigDict) -> None:
    """A flow's velocity, at timesteps that are drawn around the middle and shifted to noise."""
    c.diffusion.update({"schedule": "rectified_flow", "prediction": "flow"})
    c.diffusion.update({"timestep_sampling": "logit_normal", "shift": 3.0})
    c.sampling.update({"spacing": "shifted", "shift": 3.0})


def medium(c: ConfigDict) -> None:
    """Stable Diffusion 3.5 medium: the first half of the blocks has dual attention."""
    c.mmdit.update({"qk_norm": True, "dual_attention": tuple(range(13)), "max_positions": 384})


def large(c: ConfigDict) -> None:
    """Stable Diffusion 3.5 large."""
    c.mmdit.update({"width": 2432, "depth": 38, "num_heads": 38, "qk_norm": True})


def lora(c: ConfigDict) -> None:
    """An adaptation of the attention; everything else comes from init_from."""
    c.batch_size, c.num_steps = 4, 2000
    c.pretrained = ConfigDict()
    c.mmdit.scan = False  # the loops would copy all frozen parameters, on one device
    c.lora.update({"rank": 16, "alpha": 16.0, "targets": (r"mmdit/.*attn2?_(qkv|proj)",)})
    c.optimizer.update({"warmup_steps": 100, "grad_clip": 1.0})
    c.ema_decay = 0.0
    c.checkpoint.every_steps = 500


def smoke() -> ConfigDict:
    """All parts of a run, on synthetic shapes and with a small text encoder, in seconds."""
    c = openmoji_text.get_config("smoke")
    c.backbone = "mmdit"
    c.mmdit.update({"width": 16, "depth": 2, "num_heads": 2, "max_positions": 8, "base_size": 8})
    flow(c)
    return c
