"""The experiments of adapters run, in their smoke variants, on the text model's smoke run."""

import jax
import pytest

import latent_diffusion as ldm
from configs import (
    openmoji_control,
    openmoji_dreambooth,
    openmoji_style_lora,
    openmoji_text,
    openmoji_textual_inversion,
)
from demo import folders
from latent_diffusion.training import loop

RNG = jax.random.key(0)
SMALL = {  # no first stage has to be trained
    "autoencoder.regularization": "identity", "data.image_size": 8, "parallel.mode": "single",
    "log.images_every_steps": 0, "log.eval_every_steps": 0, "log.num_images": 1,
    "unet.model_channels": 8, "unet.channel_mult": (1,), "unet.num_groups": 4,
    "unet.attention_resolutions": (1,), "conditioners.text.depth": 0,
}  # fmt: skip


def run(config, directory, **fields):
    config.update_from_flattened_dict({**SMALL, **fields})
    loop.train(config, directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "base"
    run(openmoji_text.get_config("smoke"), path, **{"first_stage.num_batches": 1})
    return path


@pytest.mark.parametrize(
    ("experiment", "caption"),
    [
        (openmoji_control, None),
        (openmoji_textual_inversion, "<it>"),
        (openmoji_dreambooth, "it circle"),
        (openmoji_style_lora, "red circle"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_experiment_runs_on_the_base(experiment, caption, base, tmp_path):
    config = experiment.get_config("smoke")
    assert config.num_steps <= 4
    fields = {"init_from": str(base)}
    if caption is not None:
        folders.write_subject(tmp_path / "pictures", "twemoji", "lion", caption)
        fields["data.dir"] = str(tmp_path / "pictures")
    run(config, tmp_path / "run", **fields)
    options = {"num_images": 1, "num_steps": 1, "mode": "single"}
    if caption is None:
        hint = 1.0 * (ldm.load(base).sample(RNG, ["red circle"], **options) > 0)
        net = ldm.load_adapter(tmp_path / "run")
        options["controls"] = [(net, hint, 1.0)]
        ldm.load(base).sample(RNG, ["red circle"], **options)
    else:
        model = ldm.load(tmp_path / "run")
        assert model.sample(RNG, [caption], **options).shape == (1, 8, 8, 3)
