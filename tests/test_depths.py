"""Files that claim more layers or positions than their tensors have are refused at once."""

import json
import time

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from test_prior_files import made as prior
from test_t2i_adapter import random_adapter
from test_tiny_autoencoder import as_original, made

from latent_diffusion import convert
from latent_diffusion.convert.adapters import read_adapter, write_t2i

HUGE = 10**9


def refused(read, path, message):
    start = time.process_time()
    with pytest.raises(ValueError, match=rf"^{path.parent}.*{message}"):
        read(path)
    assert time.process_time() - start < 5


def test_a_t2i_adapter_of_a_million_blocks(tmp_path):
    path = tmp_path / "folder"
    write_t2i(random_adapter(channels=(8,), num_res_blocks=1, downscale=1), path, "diffusers")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_res_blocks": 10**6}))
    refused(read_adapter, path, "tensors can't be 1000000 blocks")


def test_a_tiny_autoencoder_whose_layer_has_the_number_1e9(tmp_path):
    path = tmp_path / "taesd_decoder.safetensors"
    for half, tensors in as_original(made()).items():
        last = {f"{HUGE}.weight": np.zeros((1, 1, 3, 3), np.float32)} if half == "encoder" else {}
        save_file({**tensors, **last}, tmp_path / f"taesd_{half}.safetensors")
    refused(convert.read, path, "tensors can't be 1000000000 layers")


def test_a_control_net_with_a_thousand_widths_of_hints(tmp_path):
    config = {"_class_name": "ControlNetModel", "conditioning_embedding_out_channels": [8] * 1000}
    config |= {"block_out_channels": [8], "down_block_types": ["DownBlock2D"]}
    config |= {"layers_per_block": 1}
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    some = {f"x{i}": np.zeros(1, np.float32) for i in range(60)}
    save_file(some, tmp_path / "net" / "diffusion_pytorch_model.safetensors")
    refused(read_adapter, tmp_path / "net", "60 tensors can't be the layers of its hints")


def test_a_prior_of_a_million_layers(tmp_path):
    path = tmp_path / "prior.safetensors"
    prior({"class_token": {"num_classes": 5}}).save(path, format="compvis")
    config = yaml.safe_load(path.with_suffix(".yaml").read_text())
    config["model"]["params"]["transformer_config"]["params"]["n_layer"] = 10**6
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    refused(convert.read, path, "tensors can't be the 1000000 layers of its config")


def test_a_transformer_of_stable_diffusion_3_with_a_million_positions(tmp_path):
    config = {"_class_name": "SD3Transformer2DModel", "pos_embed_max_size": 10**6, "num_layers": 1}
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    for name, told in (("pos_embed.pos_embed", r"\(1, 4, 8\)"), ("x", "absent")):
        some = {f"x{i}": np.zeros(1, np.float32) for i in range(9)}
        some[name] = np.zeros((1, 4, 8), np.float32)
        save_file(some, tmp_path / "net" / "diffusion_pytorch_model.safetensors")
        message = rf"pos_embed_max_size=1000000, but pos_embed.pos_embed is {told}"
        refused(convert.read, tmp_path / "net", message)
