"""Retrieval-augmented OpenMoji: a picture from the embeddings of its nearest training pictures.

Command   python train.py --config=configs/openmoji_retrieval.py --workdir=runs/gallery/retrieval
          after configs/openmoji_autoencoder.py:fine in runs/gallery/fine
Cost      about 50 minutes on two CPU cores
Expected  the pictures of docs/gallery.md
Variants  :smoke (synthetic shapes, a few steps)
"""

from ml_collections import ConfigDict

from configs import default
from configs.openmoji_unconditional import for_longer, with_context


def get_config(variant: str = "") -> ConfigDict:
    c = with_context(variant, 8000, "neighbours", num_neighbours=4, width=1152)
    for_longer(c, variant)
    c.data.embedding = "alexnet"
    c.data.num_neighbours = 4
    return default.apply_variant(c, variant, {"smoke": lambda c: None})
