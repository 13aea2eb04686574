"""OpenMoji by its nine groups: smileys, people, animals, food, places, activities, objects …

Command   python train.py --config=configs/openmoji_class.py --workdir=runs/gallery/class
          after configs/openmoji_autoencoder.py:fine in runs/gallery/fine
Cost      about 40 minutes on two CPU cores
Expected  the pictures and distances of docs/gallery.md
Variants  :smoke (synthetic shapes, a few steps)
"""

from ml_collections import ConfigDict

from configs import default
from configs.openmoji_unconditional import for_longer, with_context


def get_config(variant: str = "") -> ConfigDict:
    c = with_context(variant, 10000, "class_label", num_classes=9, width=128)
    for_longer(c, variant)
    return default.apply_variant(c, variant, {"smoke": lambda c: None})
