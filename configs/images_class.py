"""Pictures of classes, learned from a folder that has a folder for each class.

Command   python train.py --config=configs/images_class.py:64 --workdir=runs/mine/denoiser
          --config.data.dir=PICTURES --config.conditioners.class_label.num_classes=N
          after configs/images_autoencoder.py of the same variant in runs/mine/first_stage
Variants  :64 (two CPU cores) :128 :256 (one GPU) :smoke (32×32, a few steps)
Cost      about that of configs/images_text.py
Expected  samples in images/, and eval_loss in metrics.jsonl
"""

from ml_collections import ConfigDict

from configs import images_text


def get_config(variant: str = "64") -> ConfigDict:
    c = images_text.get_config(variant)
    width = c.conditioners.text.width
    c.tokenizer.name = "none"
    c.conditioners = ConfigDict({"class_label": {"num_classes": 10, "width": width}})
    return c
