"""Unconditional LSUN churches at 256² on KL latents, f=8 (Rombach et al. 2022, Tab. 1).

Command   python train.py --config=configs/churches.py --workdir=runs/churches
          --config.data.dir=IMAGES --config.first_stage.path=WORKDIR_OF_kl_f8
Cost      294.97 M parameters, 500,000 batches of 96: 18 V100-days
Expected  FID 4.02, precision 0.64, recall 0.52 (50,000 samples, 200 steps, eta 0)
"""

from ml_collections import ConfigDict

from configs import default, kl_f8


def get_config() -> ConfigDict:
    c = default.paper_denoiser(kl_f8, batch_size=96, num_steps=500_000)
    default.unconditional(c)
    c.data.flip = True
    c.unet.update({"model_channels": 192, "channel_mult": (1, 2, 2, 4, 4), "num_heads": 8})
    c.unet.attention_resolutions = (1, 2, 4, 8)
    c.unet.use_scale_shift_norm = c.unet.resblock_updown = True
    c.diffusion.update({"loss": "l1", "beta_end": 0.0155})
    c.sampling.eta = 0.0
    c.optimizer.update({"learning_rate": 5e-5, "warmup_steps": 10_000})
    return c
