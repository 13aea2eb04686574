"""A tiny decoder of the latents of configs/openmoji_text.py, for previews and fast sampling.

Its architecture is TAESD's. The decoder learns to decode the frozen first stage's latents, and the
encoder learns the latents.

Command   python train.py --config=configs/openmoji_preview.py --workdir=runs/demo/preview
          after configs/openmoji_text.py in runs/demo/denoiser
Cost      12 minutes on two CPU cores
Expected  PSNR 21.2 dB on held-out pictures, 2.0 dB below the full decoder; 5.1 times its speed
Variants  :smoke (synthetic shapes, a few steps)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_autoencoder


def get_config(variant: str = "") -> ConfigDict:
    c = openmoji_autoencoder.get_config("smoke" if variant == "smoke" else "")
    c.first_stage.path = "runs/demo/denoiser"  # it has the latents' scale, too
    c.first_stage.autoencoder = c.autoencoder  # the fields of the path's model replace it
    c.autoencoder = ConfigDict(
        {
            "regularization": "tiny",
            "channels": 16,
            "encoder_blocks": (1, 1, 2),
            "decoder_blocks": (4, 2, 0),
            "embed_dim": 4,
            "image_channels": 3,
            "dtype": None,
        }
    )
    c.num_steps = 12_000
    c.batch_size = 16
    c.autoencoding.reg_weight = 1.0
    c.autoencoding.disc_start = c.autoencoding.adversarial_start = 10**9  # no adversary
    return default.apply_variant(c, variant, {"smoke": smoke})


def smoke(c: ConfigDict) -> None:
    """All parts of the full run, on synthetic shapes, in seconds."""
    c.batch_size = 8
    c.num_steps = 4
    c.autoencoder.update({"channels": 8, "encoder_blocks": (1, 0, 0), "decoder_blocks": (1, 0, 0)})
    c.autoencoding.disc_start, c.autoencoding.adversarial_start = 1, 2
