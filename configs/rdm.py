"""Retrieval-augmented generation at 768² on KL latents, f=16 (Blattmann et al. 2022).

Command   python train.py --config=configs/rdm.py --workdir=runs/rdm
          --config.data.dir=IMAGES --config.first_stage.path=WORKDIR_OF_kl_f16
          --config.data.embedding_path=FOLDER
          after python -m latent_diffusion.training.embed --config=configs/rdm.py --clip=CLIP
          --out=FOLDER --config.data.dir=IMAGES
          (the released model has embeddings of CLIP ViT-L/14, 768 numbers)
Cost      1335.48 M parameters; learning rate 1e-4
Expected  no number is published for the 768² model
"""

from ml_collections import ConfigDict

from configs import default, kl_f16


def get_config() -> ConfigDict:
    c = default.paper_denoiser(kl_f16, batch_size=64, num_steps=1_000_000)
    c.data.update({"image_size": 768, "num_neighbours": 4, "embedding": "precomputed"})
    c.conditioners = ConfigDict({"neighbours": {"num_neighbours": 4, "width": 768}})
    c.unet.update({"model_channels": 448, "channel_mult": (1, 2, 3, 4), "num_head_channels": 32})
    c.unet.remat = "full"
    c.diffusion.beta_end = 0.015
    return c
