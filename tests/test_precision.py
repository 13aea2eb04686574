"""The paper's and Stable Diffusion's networks compute in bfloat16, and what must not in float32."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from jax.extend import core

from latent_diffusion.core.types import Conditioning
from latent_diffusion.tasks import TASKS

PAPER = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if "paper_" in path.read_text() and path.stem != "default"
)
OTHERS = ["sdxl_lora", "sdxl_refiner", "ffhq", "bedrooms"]
LARGE_ENCODERS = ("text", "layout", "t5_text")  # trained ones, and T5
IN_FLOAT32 = ("sdxl", "sdxl_lora", "sdxl_refiner")  # their first stage


@pytest.mark.parametrize("name", [*PAPER, *OTHERS])
def test_papers_networks_compute_in_bfloat16(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    if config.task != "autoencoding":
        assert config[config.backbone].dtype == "bfloat16"
    assert config.autoencoder.dtype == (None if name in IN_FLOAT32 else "bfloat16")
    for kind, fields in config.conditioners.items():
        computes = "bfloat16" if kind in LARGE_ENCODERS else None  # the others are small
        assert fields.get("dtype") == computes, kind


def products(jaxpr):
    """Operands' dtypes of all matrix products and convolutions."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield {str(variable.aval.dtype) for variable in equation.invars}
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    yield from products(inner.jaxpr)
                elif isinstance(inner, core.Jaxpr):
                    yield from products(inner)


SMALL = {  # config -> what makes its network small: (fields, width of the context, and the vector)
    "sd_v1": ({"unet.model_channels": 32, "unet.channel_mult": (1, 2), "unet.remat": "none"}, 768),
    "churches": ({"unet.model_channels": 32, "unet.channel_mult": (1, 2)}, None),
    "dit_xl_2": ({"dit.width": 64, "dit.depth": 2, "dit.num_heads": 4}, None),
}


@pytest.mark.parametrize("name", SMALL)
def test_no_product_of_a_network_is_in_float32(name):
    fields, context = SMALL[name]
    config = importlib.import_module(f"configs.{name}").get_config()
    config.update_from_flattened_dict(fields)
    if name == "dit_xl_2":
        config.conditioners.class_label.width = 64
    network = TASKS[config.task](config).denoiser.network
    z_t, t = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1)
    told = Conditioning(
        context=None if context is None else jnp.zeros((1, 7, context)),
        vector=jnp.zeros((1, 64)) if name == "dit_xl_2" else None,
    )
    params = jax.eval_shape(network.init, jax.random.key(0), z_t, t, told)
    program = jax.make_jaxpr(network.apply)(params, z_t, t, told)
    found = list(products(program.jaxpr))
    assert len(found) > 10 and all("float32" not in operands for operands in found)
    assert program.out_avals[0].dtype == jnp.float32  # schedules, guidance and losses
