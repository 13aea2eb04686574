"""Every tensor of every public checkpoint has a place here, and comes out under its name again.

The files have the names and shapes of the real ones (`keys/`), and no weights. Tracing the large
networks takes seconds each, so that all but a few are left to `parity/test_key_lists.py`.
"""

import key_lists
import pytest


@pytest.mark.parametrize("name", ["celeba256", "cin256-v2"])
def test_checkpoints_of_the_original(name, tmp_path):
    key_lists.check_checkpoint(name, tmp_path)


@pytest.mark.parametrize("name", ["kl-f8"])
def test_first_stages_of_the_original(name, tmp_path):
    key_lists.check_first_stage(name, tmp_path)


@pytest.mark.parametrize("name", ["diffusers-sd-v1-unet", "diffusers-ldm-vqvae"])
def test_components_of_diffusers(name, tmp_path):
    key_lists.check_component(name, tmp_path)


@pytest.mark.parametrize("name", ["control-sd-v1", "t2i-canny", "diffusers-t2i-light"])
def test_control_nets_and_t2i_adapters(name, tmp_path, monkeypatch):
    key_lists.check_hinted(name, tmp_path, monkeypatch)
