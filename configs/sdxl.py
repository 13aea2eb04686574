"""Stable Diffusion XL's base: text to image at 1024² on KL latents, f=8, with two text encoders.

Both encoders are frozen; the pictures' original sizes and crops condition the U-Net, so no picture
is too small for training. Podell et al. 2023 trained at 256², then 512² (variants), then 1024².

Command   python train.py --config=configs/sdxl.py --workdir=runs/sdxl
          --config.data.dir=IMAGES_WITH_CAPTIONS --config.init_from=SDXL
          --config.first_stage.path=SDXL --config.tokenizer.path=SDXL/tokenizer
          --config.pretrained.clip_text=SDXL --config.pretrained.clip_text_2=SDXL
          --config.parallel.mode=mesh --config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1
          SDXL is a diffusers folder; without init_from the U-Net starts at random
Variants  :256 :512
Cost      2,567.46 M parameters, 810.63 M of encoders frozen; 41 GB of state in float32, of which
          FSDP gives each device its share; 25.6 TFLOP a picture, 5.0 of them in the frozen parts
          (without recomputing);
          the paper: 600,000 batches of 2,048 at 256², 200,000 at 512²
Expected  no number is published
"""

from ml_collections import ConfigDict

from configs import default, kl_f8

# The penultimate states of OpenAI's ViT-L/14 and OpenCLIP's ViT-bigG/14, without the final norm.
CLIP_L = {"skip_last": 1, "final_norm": False}
BIG_G = {
    **CLIP_L,
    "width": 1280,
    "depth": 32,
    "num_heads": 20,
    "activation": "gelu",
    "projection_dim": 1280,
    "pad_id": 0,
    "repad": True,
}


def get_config(variant: str = "") -> ConfigDict:
    c = recipe()
    c.conditioners = ConfigDict(
        {
            "clip_text": {**CLIP_L, "zero_null": True},
            "clip_text_2": {**BIG_G, "zero_null": True},
            "sizes": {},
        }
    )
    c.pretrained.update({"clip_text": "", "clip_text_2": ""})
    c.unet.channel_mult = (1, 2, 4)
    with c.ignore_type():  # the default is a number for all levels
        c.unet.transformer_depth = (1, 2, 10)
    return default.apply_variant(c, variant, {"256": at(256, 600_000), "512": at(512, 200_000)})


def recipe() -> ConfigDict:
    """The settings that base and refiner share: data, noise, precision and kind of U-Net."""
    c = default.paper_denoiser(kl_f8, batch_size=2048, num_steps=100_000)
    c.data.update({"image_size": 1024, "crop": "random", "sizes": True})
    c.tokenizer.update({"name": "clip", "max_length": 77})
    c.unet.update({"attention_resolutions": (4, 2), "num_head_channels": 64})
    c.unet.update({"vector_projection": True, "remat": "full"})
    c.unet.scan = True  # compiles in minutes; FSDP also shards the copies of parameters
    c.autoencoder.dtype = None  # activations of the first stage exceed 16 bits
    c.diffusion.update({"beta_start": 0.00085, "beta_end": 0.012, "offset_noise": 0.05})
    c.sampling.update({"sampler": "euler", "num_steps": 50, "eta": None, "guidance_scale": 5.0})
    c.optimizer.warmup_steps = 10_000
    return c


def at(image_size: int, num_steps: int):
    """An earlier phase of the training, without offset noise."""

    def change(c: ConfigDict) -> None:
        c.data.image_size, c.num_steps = image_size, num_steps
        c.diffusion.offset_noise = 0.0

    return change
