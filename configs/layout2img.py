"""Layout to image at 256² on VQ latents, f=4: OpenImages (Rombach et al. 2022, Tab. 9 and 15).

Command   python train.py --config=configs/layout2img.py --workdir=runs/layout2img
          --config.data.dir=IMAGES_WITH_boxes_AND_labels
          --config.first_stage.path=WORKDIR_OF_vq_f4
Cost      246.28 M parameters and 54.66 M of layout transformer; 4,400,000 batches of 24
Expected  FID 32.02 on OpenImages (200 steps, eta 0)
"""

from ml_collections import ConfigDict

from configs import default, vq_f4


def get_config() -> ConfigDict:
    c = default.paper_denoiser(vq_f4, batch_size=24, num_steps=4_400_000)
    c.data.flip = True
    c.data.layout.vocab_size = 8192
    layout = {"vocab_size": 8192, "max_length": 92, "width": 512, "depth": 16}
    layout["dtype"] = "bfloat16"
    c.conditioners = ConfigDict({"layout": layout})
    c.unet.update({"model_channels": 128, "channel_mult": (1, 2, 3, 4), "num_head_channels": 32})
    c.unet.update({"attention_resolutions": (8, 4, 2), "transformer_depth": 3})
    c.diffusion.update({"loss": "l1", "beta_end": 0.0205})
    c.sampling.eta = 0.0
    c.optimizer.learning_rate = 2e-6 * c.batch_size
    return c
