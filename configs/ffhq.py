"""Unconditional FFHQ at 256² on VQ latents, f=4 (Rombach et al. 2022, Tab. 1).

Command   python train.py --config=configs/ffhq.py --workdir=runs/ffhq
          --config.data.dir=IMAGES --config.first_stage.path=WORKDIR_OF_vq_f4
Cost      274.06 M parameters, 635,000 batches of 42: 26 V100-days
Expected  FID 4.98, precision 0.73, recall 0.50 (50,000 samples, 200 steps)
"""

from ml_collections import ConfigDict

from configs import celebahq


def get_config() -> ConfigDict:
    return celebahq.faces(batch_size=42, num_steps=635_000, learning_rate=8.4e-5)
