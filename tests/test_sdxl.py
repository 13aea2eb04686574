"""Stable Diffusion XL: its networks, conditioners, files and sampling."""

import math

import jax
import pytest

from latent_diffusion.convert import unet, unet_compvis, unet_diffusers
from latent_diffusion.nets.unet import UNet

BASE = {
    "model_channels": 320,
    "channel_mult": (1, 2, 4),
    "attention_resolutions": (2, 4),
    "num_head_channels": 64,
    "transformer_depth": (1, 2, 10),
    "vector_projection": True,
}
REFINER = {**BASE, "model_channels": 384, "channel_mult": (1, 2, 4, 4), "transformer_depth": 4}
# fields, widths of the inputs (latent, context, vector), parameters
UNETS = {
    "base": (BASE, (4, 2048, 2816), 2_567_463_684),
    "inpainting": (BASE, (9, 2048, 2816), 2_567_478_084),
    "refiner": (REFINER, (4, 1280, 2560), 2_259_526_660),
}


def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", UNETS)
def test_unets_have_the_parameters_of_the_released_ones(name):
    fields, widths, parameters = UNETS[name]
    assert size(unet.shapes(fields, *widths)) == parameters


def test_settings_of_the_original_are_those_of_diffusers():
    """The yaml of the original's base and refiner, and diffusers' config.json, in facts."""
    yaml = {
        "adm_in_channels": 2816, "num_classes": "sequential", "use_checkpoint": True,
        "in_channels": 4, "out_channels": 4, "model_channels": 320, "context_dim": 2048,
        "attention_resolutions": [4, 2], "num_res_blocks": 2, "channel_mult": [1, 2, 4],
        "num_head_channels": 64, "use_linear_in_transformer": True,
        "transformer_depth": [1, 2, 10], "spatial_transformer_attn_type": "softmax-xformers",
    }  # fmt: skip
    config = {
        "_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
    }  # fmt: skip
    shared = {**BASE, "middle_depth": None}
    for fields in (
        unet_compvis.fields_from_yaml(yaml, linear=True),
        unet_diffusers.fields_from_diffusers(config),
    ):
        module = UNet(**fields)
        assert shared == {
            name: tuple(sorted(value)) if name == "attention_resolutions" else value
            for name in shared
            for value in [getattr(module, name)]
        }
    refiner = {
        "adm_in_channels": 2560, "model_channels": 384, "channel_mult": [1, 2, 4, 4],
        "context_dim": [1280] * 4, "transformer_depth": 4,
    }  # fmt: skip
    module = UNet(**unet_compvis.fields_from_yaml({**yaml, **refiner}, linear=True))
    assert module.depths == (4,) * 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transformer_depth": (1, 2)}, r"transformer_depth=\(1, 2\).*or 3 that are at least 1"),
        ({"transformer_depth": (1, 2, 0)}, "at least 1 where a level has attention"),
        ({"middle_depth": 0}, "middle_depth=0"),
    ],
)
def test_depths_that_no_transformer_has_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**BASE, **fields}).depths  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"addition_embed_type": "image"}, "addition_embed_type='image'; supported: None or"),
        ({"addition_embed_type": "text_time"}, "needs addition_time_embed_dim"),
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
             "class_embed_type": "projection"},
            "class_embed_type='projection'; supported: None",
        ),
        ({"transformer_layers_per_block": [1, 2]}, r"blocks; expected 4 numbers"),
        ({"transformer_layers_per_block": [1, [2], 1, 1]}, "transformer_layers_per_block="),
    ],
)  # fmt: skip
def test_settings_of_other_unets_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        unet_diffusers.fields_from_diffusers({"_class_name": "UNet2DConditionModel", **settings})
