"""Class-conditional ImageNet at 256² with classifier-free guidance, f=4 (Rombach et al. 2022).

Command   python train.py --config=configs/cin256_v2.py --workdir=runs/cin256_v2
          --config.data.dir=IMAGES_IN_A_FOLDER_PER_CLASS --config.first_stage.path=WORKDIR_OF_vq_f4
Cost      400.92 M parameters and 0.51 M of classes; 178,000 batches of 1,200: 271 V100-days
Expected  FID 10.56, IS 103.5 (50,000 samples, 250 steps); 3.60, 247.7 with guidance 1.5
"""

from ml_collections import ConfigDict

from configs import default, vq_f4


def get_config() -> ConfigDict:
    c = default.paper_denoiser(vq_f4, batch_size=1200, num_steps=178_000)
    c.conditioners = ConfigDict({"class_label": {"num_classes": 1000, "width": 512}})
    c.unet.update({"model_channels": 192, "channel_mult": (1, 2, 3, 5), "num_heads": 1})
    c.unet.attention_resolutions = (8, 4, 2)
    c.sampling.update({"num_steps": 250, "guidance_scale": 1.5})
    return c
