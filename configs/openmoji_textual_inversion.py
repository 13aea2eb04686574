"""A word for a subject: its vectors are trained for the demo's text model, which is frozen.

The pictures of the subject, five or so, are in the folder `data.dir`; the captions beside them
(see `data.captions`) have the word: "a drawing of <it>".

Command   python train.py --config=configs/openmoji_textual_inversion.py --workdir=runs/word
          --config.data.dir=DIR, after configs/openmoji_text.py in runs/demo/denoiser; then
          python sample.py --workdir=runs/word --prompts="<it>" --out=…
Cost      2 minutes on two CPU cores
Expected  98 % of samples are nearest to the subject, all else as before (docs/adapters.md)
Variants  :smoke (a few steps; needs the smoke run of configs/openmoji_text.py)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_text


def get_config(variant: str = "") -> ConfigDict:
    c = openmoji_text.get_config("smoke" if variant == "smoke" else "")
    c.init_from = "runs/demo/denoiser"
    c.textual_inversion.word = "<it>"
    c.textual_inversion.start = "face"
    c.textual_inversion.num_vectors = 2
    c.data.name = "image_folder"
    c.data.test_split = "train"
    c.first_stage.cache = False
    c.batch_size = 4
    c.num_steps = 2000
    c.optimizer.learning_rate = 5e-3
    c.optimizer.weight_decay = 0.0
    c.diffusion.drop_rate = 0.0
    return default.apply_variant(c, variant, {"smoke": smoke})


def smoke(c: ConfigDict) -> None:
    """A few steps; the synthetic captions are of coloured shapes."""
    c.num_steps = 2
    c.textual_inversion.start = "circle"
