"""Unconditional LSUN bedrooms at 256² on VQ latents, f=4 (Rombach et al. 2022, Tab. 1).

Command   python train.py --config=configs/bedrooms.py --workdir=runs/bedrooms
          --config.data.dir=IMAGES --config.first_stage.path=WORKDIR_OF_vq_f4
Cost      274.06 M parameters, 1,900,000 batches of 48: 60 V100-days
Expected  FID 2.95, precision 0.66, recall 0.48 (50,000 samples, 200 steps)
"""

from ml_collections import ConfigDict

from configs import celebahq


def get_config() -> ConfigDict:
    return celebahq.faces(batch_size=48, num_steps=1_900_000, learning_rate=9.6e-5)
