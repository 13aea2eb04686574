"""The lists in `tests/keys/` are those of diffusers' own modules, and all of them are covered."""

import os

import key_lists as here
import pytest
from key_lists import read_key_list

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import public_keys
import taming_files
from diffusers.loaders import single_file_utils


@pytest.mark.parametrize("name", public_keys.LISTS)
def test_the_lists_are_what_they_say(name):
    assert read_key_list(name) == public_keys.LISTS[name]()


UNETS = ["sd-v1", "sd-v2", "sd-v2-unclip-h", "sd-x4-upscaler", "sdxl", "sdxl-refiner"]


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_turns_the_originals_names_into_its_own(name):
    """So that our spelling of the original's rules is checked by somebody else's converter."""
    keys = read_key_list(f"unet-{name}")
    theirs = {f"model.diffusion_model.{k}": torch.empty(s, device="meta") for k, s in keys.items()}
    make = public_keys.DIFFUSERS[f"diffusers-{name}-unet"]
    with torch.device("meta"):
        config = dict(make().config)
    made = single_file_utils.convert_ldm_unet_checkpoint(theirs, config)
    want = read_key_list(f"diffusers-{name}-unet")
    assert {k: tuple(v.shape) for k, v in made.items()} | _as_linear(made, want) == want


@pytest.mark.parametrize("name", public_keys.CONTROLS)
def test_diffusers_turns_a_control_nets_names_into_its_own(name):
    keys = read_key_list(f"control-{name}")
    theirs = {f"control_model.{k}": torch.empty(s, device="meta") for k, s in keys.items()}
    with torch.device("meta"):
        config = dict(public_keys.DIFFUSERS[f"diffusers-control-{name}"]().config)
    made = single_file_utils.convert_controlnet_checkpoint(theirs, config)
    want = read_key_list(f"diffusers-control-{name}")
    assert {k: tuple(v.shape) for k, v in made.items()} | _as_linear(made, want) == want


def _as_linear(made, want):
    """Linear maps that the one keeps as convolutions."""
    return {k: want[k] for k, v in made.items() if tuple(v.shape) == (*want[k], 1, 1)}


def test_diffusers_turns_the_first_stages_names_into_its_own():
    keys = read_key_list("first-stage-kl-f8")
    theirs = {f"first_stage_model.{k}": torch.empty(s, device="meta") for k, s in keys.items()}
    config = {**public_keys.SD_VAE, "sample_size": 512}
    made = single_file_utils.convert_ldm_vae_checkpoint(theirs, config)
    want = read_key_list("diffusers-sd-vae")
    assert {k: tuple(v.shape) for k, v in made.items()} | _as_linear(made, want) == want


@pytest.mark.parametrize("name", here.CHECKPOINTS)
def test_checkpoints(name, tmp_path):
    here.check_checkpoint(name, tmp_path)


@pytest.mark.parametrize("name", here.FIRST_STAGES)
def test_first_stages(name, tmp_path):
    here.check_first_stage(name, tmp_path)


@pytest.mark.parametrize("name", here.COMPONENTS)
def test_components(name, tmp_path):
    here.check_component(name, tmp_path)


@pytest.mark.parametrize("name", here.HINTED)
def test_control_nets_and_t2i_adapters(name, tmp_path, monkeypatch):
    here.check_hinted(name, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", taming_files.RELEASED)
def test_priors(name, tmp_path):
    taming_files.check_prior(name, tmp_path)
