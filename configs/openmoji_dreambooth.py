"""A subject that the demo's text model learns from five pictures without forgetting the others.

The pictures are in the folder `data.dir`; the captions beside them (see `data.captions`) have a
word for the subject, which may be new, and one for its class: "it face". Before training, the model
draws pictures of the class and of other things, which are half of each batch (Ruiz et al. 2023).
The captions of these pictures are OpenMoji's, so that the config needs the extra `openmoji`.

Command   python train.py --config=configs/openmoji_dreambooth.py --workdir=runs/subject
          --config.data.dir=DIR, after configs/openmoji_text.py in runs/demo/denoiser; then
          python sample.py --workdir=runs/subject --prompts="it face" --out=…
Cost      a minute on two CPU cores
Expected  83 % of samples are nearest to the subject, with :lora 38 %; other tones and groups lose
          4 points, with :lora 3 (docs/adapters.md)
Variants  :lora (a low-rank adaptation of U-Net and text encoder, which adds no words)
          :smoke (a few steps; needs the smoke run of configs/openmoji_text.py)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_text

PER_GROUP = 38  # captions of each of the nine groups


def class_prompts() -> str:
    """The captions of the prior: "face", and others evenly spaced over the groups.

    With pictures of only the subject's class, so small a model remembers that class and forgets the
    others.
    """
    from latent_diffusion.data import openmoji

    training = [emoji for emoji in openmoji.catalogue() if emoji.split == "train"]
    captions = ["face"]
    for label in range(len(openmoji.GROUPS)):
        of_group = [emoji.caption for emoji in training if emoji.class_label == label]
        captions += [of_group[i * len(of_group) // PER_GROUP] for i in range(PER_GROUP)]
    return ";".join(captions)


def get_config(variant: str = "") -> ConfigDict:
    c = openmoji_text.get_config("smoke" if variant == "smoke" else "")
    c.init_from = "runs/demo/denoiser"
    c.dreambooth.class_prompt = "face" if variant == "smoke" else class_prompts()
    c.dreambooth.prior_weight = 2.0
    c.dreambooth.num_images = len(c.dreambooth.class_prompt.split(";"))
    c.data.name = "image_folder"
    c.data.test_split = "train"
    c.first_stage.cache = False  # pictures of two sources
    c.batch_size = 8
    c.num_steps = 250
    c.optimizer.learning_rate = 8e-5
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.ema_decay = 0.99
    return default.apply_variant(c, variant, {"lora": lora, "smoke": smoke})


def lora(c: ConfigDict) -> None:
    """Only factors are trained, also for the text encoder."""
    c.lora.rank = 8
    c.lora.alpha = 8.0
    c.lora.targets = (r"unet/.*attn\d/to_", r"conditioner/text/.*to_")
    c.optimizer.learning_rate = 2e-3
    c.dreambooth.prior_weight = 3.0
    c.num_steps = 400


def smoke(c: ConfigDict) -> None:
    """A few steps."""
    c.batch_size = 4
    c.num_steps = 2
    c.dreambooth.num_images = 4
