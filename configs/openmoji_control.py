"""Edges to OpenMoji: a control net of the demo's text model, which is frozen.

Command   python train.py --config=configs/openmoji_control.py --workdir=runs/control
          after configs/openmoji_text.py in runs/demo/denoiser; then
          python sample.py --workdir=runs/demo/denoiser --control=runs/control:edges.png
          --prompts="red heart" --out=…; docs/adapters.md has the lines that draw edges.png
Cost      5 minutes on two CPU cores
Expected  F1 of edges 0.93 on held-out pictures (docs/adapters.md)
Variants  :smoke (synthetic shapes, a few steps; needs the smoke run of configs/openmoji_text.py)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_text


def get_config(variant: str = "") -> ConfigDict:
    c = openmoji_text.get_config("smoke" if variant == "smoke" else "")
    c.init_from = "runs/demo/denoiser"
    c.control = "edges"
    c.first_stage.cache = False  # hints are computed from the pictures
    c.num_steps = 1500
    c.optimizer.learning_rate = 3e-4
    c.diffusion.drop_rate = 0.5  # so that the net learns to draw from the hint without a text
    return default.apply_variant(c, variant, {"smoke": smoke})


def smoke(c: ConfigDict) -> None:
    """A few steps."""
    c.num_steps = 2
