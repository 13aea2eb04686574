"""The experiments of adapters run, and go on, in smoke variants, on the text model's smoke run."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_stop import compiled_once

import latent_diffusion as ldm
from configs import (
    openmoji_control,
    openmoji_dreambooth,
    openmoji_style_lora,
    openmoji_text,
    openmoji_textual_inversion,
)
from demo import folders
from latent_diffusion.runtime import workdir
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
    return loop.train(config, directory)


def run_twice(config, directory, capfd, **fields):
    """A run, and the same stopped after a step, which goes on: they end alike, bitwise."""
    stopped = directory.with_name("stopped")
    with compiled_once():
        whole = run(config, directory, **{**fields, "checkpoint.every_steps": 1})
        shutil.copytree(directory, stopped)
        for step in range(2, config.num_steps + 1):
            shutil.rmtree(stopped / "checkpoints" / str(step))
        again = loop.train(config, stopped)
    assert "resuming from step 1" in capfd.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, whole.ema_params, again.ema_params)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "base"
    run(openmoji_text.get_config("smoke"), path, **{"first_stage.num_batches": 1})
    return path


def moved(base, directory):
    """The parameters, by path, that a run left other than it found them."""
    before, after = (
        flatten_dict(ldm.load(path).denoiser.params, sep="/") for path in (base, directory)
    )
    return {path for path in before if not np.array_equal(before[path], after[path])}, {*before}


def dreambooth_lora(variant):
    config = openmoji_dreambooth.get_config(variant)
    openmoji_dreambooth.lora(config)
    openmoji_dreambooth.smoke(config)  # again: an adaptation takes more steps
    return config


CASES = {
    "control": (openmoji_control.get_config, None),
    "word": (openmoji_textual_inversion.get_config, "<it>"),
    "dreambooth": (openmoji_dreambooth.get_config, "it circle"),
    "dreambooth lora": (dreambooth_lora, "red circle"),
    "style": (openmoji_style_lora.get_config, "red circle"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_experiment_runs_on_the_base_and_goes_on_after_a_stop(case, base, tmp_path, capfd):
    experiment, caption = CASES[case]
    config, directory = experiment("smoke"), tmp_path / "run"
    assert config.num_steps <= 4
    fields = {"init_from": str(base)}
    if caption is not None:
        folders.write_subject(tmp_path / "pictures", "twemoji", "lion", caption)
        fields["data.dir"] = str(tmp_path / "pictures")
    if config.lora.rank:
        fields["lora.targets"] = config.lora.targets[:1]  # the second is of the text's layers
        run(config, directory, **fields)
    else:
        run_twice(config, directory, capfd, **fields)
    assert (directory / workdir.BASE).is_file() == (case != "dreambooth")  # which trains it all
    options = {"num_images": 1, "num_steps": 1, "mode": "single"}
    if case == "control":
        hint = 1.0 * (ldm.load(base).sample(RNG, ["red circle"], **options) > 0)
        net = ldm.load_adapter(directory)
        options["controls"] = [(net, hint, 1.0)]
        ldm.load(base).sample(RNG, ["red circle"], **options)
        return
    if case == "word":  # in prompts and negatives; few steps have moved little
        model, options["guidance_scale"] = ldm.load(directory), 3.0
        pairs = [("red", "red"), ("<it>", "red"), ("red", "<it>")]
        plain, *images = (
            model.sample(RNG, [one], negative_prompts=[other], **options) for one, other in pairs
        )
        assert plain.shape == (1, 8, 8, 3)
        assert not any(np.array_equal(image, plain) for image in images)
        began = json.loads((directory / workdir.BASE).read_text())
        assert began.keys() == flatten_dict(ldm.load(base).denoiser.params, sep="/").keys()
        (directory / workdir.BASE).write_text(json.dumps(began | {"unet/out_2/bias": "other"}))
        with pytest.raises(ValueError, match=r"^init_from=.*: 1 of .* differ, e.g. unet/out_2/bi"):
            loop.train(config, directory)
        (directory / workdir.BASE).unlink()  # as in runs of earlier versions
        loop.train(config, directory)
        return
    model = ldm.load(directory)
    assert model.sample(RNG, [caption], **options).shape == (1, 8, 8, 3)
    changed, every = moved(base, directory)
    if case == "dreambooth":
        assert every == changed
    else:
        aims = [re.compile(target) for target in config.lora.targets]
        kernels = {path for path in every if path.endswith("/kernel")}
        assert changed == {path for path in kernels if any(aim.match(path) for aim in aims)}
