"""A LoRA of Stable Diffusion XL: a style or a subject from a few pictures, on one device.

The adaptation trains the U-Net's attention; U-Net, text encoders and first stage are frozen.

Command   python train.py --config=configs/sdxl_lora.py --workdir=runs/sdxl_lora
          --config.data.dir=IMAGES_WITH_CAPTIONS --config.init_from=SDXL
          --config.first_stage.path=SDXL
          python -m latent_diffusion.convert runs/sdxl_lora style.safetensors --to=lora
          SDXL is a folder of diffusers or a single file
Cost      23.2 M parameters; the frozen parts in float32 take 13 GiB
Expected  no number is published
"""

from ml_collections import ConfigDict

from configs import default, sdxl


def get_config(variant: str = "") -> ConfigDict:
    c = sdxl.get_config()
    c.batch_size, c.num_steps = 4, 2000
    c.pretrained = ConfigDict()  # the encoders come with the rest, which an adaptation freezes
    c.unet.scan = False  # the loops would copy all frozen parameters, on one device
    c.lora.update({"rank": 16, "alpha": 16.0})
    c.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 100, "grad_clip": 1.0})
    c.ema_decay = 0.0
    c.checkpoint.every_steps = 500
    return default.apply_variant(c, variant, {})
