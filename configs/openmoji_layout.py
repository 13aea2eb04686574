"""Layout to image: scenes of OpenMoji drawings from their boxes.

Command   python train.py --config=configs/openmoji_layout.py --workdir=runs/gallery/layout
          after configs/openmoji_autoencoder.py:scenes in runs/gallery/scenes
Cost      2 to 5 minutes on two CPU cores
Expected  the pictures of docs/gallery.md
Variants  :smoke (a few steps)

The layout of a scene is four objects of three tokens each, on a grid of 32×32 positions. In a few
minutes, cross-attention alone doesn't learn the positions, so maps of filled boxes are also
concatenated with the latent.
"""

from ml_collections import ConfigDict

from configs import default
from configs.openmoji_unconditional import of_scenes, with_context


def get_config(variant: str = "") -> ConfigDict:
    layout = {"vocab_size": 1024, "max_length": 12, "width": 128, "depth": 2}
    c = with_context(variant, 1500, "layout", **layout, num_heads=4, head_dim=32)
    of_scenes(c, variant)
    c.conditioners.layout_map = ConfigDict({"vocab_size": 1024, "max_length": 12})
    c.data.layout.update({"vocab_size": 1024, "max_objects": 4, "encode_crop": False})
    return default.apply_variant(c, variant, {"smoke": smoke})


def smoke(c: ConfigDict) -> None:
    """A smaller transformer."""
    c.conditioners.layout.update({"width": 16, "depth": 1})
