"""Trainings that add to a frozen model: a control net, or the vectors of a new word.

base: the model's parameters {name of the network, "conditioner"}, which are constants.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from latent_diffusion.core.types import Array, Conditioning, Config, Control, Float, Params, lookup
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.nets.conditioners import make_conditioner, tables, with_rows
from latent_diffusion.nets.control import HINT, Controlled, ControlNet, controlled_params
from latent_diffusion.process.hints import HINTS


def hint_of(config: Config) -> str:
    """The field `control`; ValueError for an unknown hint, and for fields that exclude hints."""
    if not config["control"]:
        return ""
    lookup(HINTS, config["control"], "control")
    if config["lora"]["rank"] or config["backbone"] != "unet":
        raise ValueError(
            f"control={config['control']!r} trains a control net of a U-Net, so lora.rank is 0 and "
            "backbone 'unet'"
        )
    if config["first_stage"]["cache"]:
        raise ValueError(
            f"control={config['control']!r} is computed from pictures: set first_stage.cache=False"
        )
    return str(config["control"])


def new_vectors(config: Config, conditioners: Config) -> int:
    """The number of vectors of `textual_inversion.word`; ValueError if it can't be trained."""
    fields = config["textual_inversion"]
    if not fields["word"]:
        return 0
    setting = f"textual_inversion.word={fields['word']!r}"
    if not tables(conditioners):
        raise ValueError(f"{setting} needs a conditioner that reads words")
    if config["lora"]["rank"] or config["control"]:
        raise ValueError(f"{setting} trains its vectors alone: set lora.rank=0 and control=''")
    count = int(fields["num_vectors"])
    if count < 1:
        raise ValueError(f"textual_inversion.num_vectors={count} must be at least 1")
    return count


def fresh_words(conditioners: Params, count: int) -> Params:
    """Zeros [count, width] for every word embedding table, by conditioner."""
    flat = flatten_dict(conditioners, sep="/")
    widths = {n: flat[f"{n}/{t}"].shape[1] for n, t in tables(conditioners).items()}
    return {name: jnp.zeros((count, width)) for name, width in widths.items()}


def with_words(denoiser: Denoiser, words: Params, base: Params) -> Denoiser:
    """The denoiser with further rows in its word embedding tables."""
    config, flat = denoiser.conditioner.config, flatten_dict(base["conditioner"], sep="/")
    for name, table in tables(config).items():
        path = f"{name}/{table}"
        flat[path] = jnp.concatenate([flat[path], words[name]])
    grown = make_conditioner(with_rows(config, len(next(iter(words.values())))))
    params = {**base, "conditioner": unflatten_dict(flat, sep="/")}
    return denoiser.replace(conditioner=grown, params=params)


def with_control(denoiser: Denoiser, net: ControlNet, control: Params, base: Params) -> Denoiser:
    """The denoiser with a control net. control: the net's parameters."""
    network: Any = Controlled(denoiser.network, (net,))  # type: ignore[arg-type]
    params = {**base, denoiser.name: controlled_params(base[denoiser.name], [control])}
    return denoiser.replace(network=network, params=params)


def hinted(
    conditioning: Conditioning, net: ControlNet, control: Params, hint: Float[Array, "B H W 3"]
) -> Conditioning:
    """The conditioning with the inputs of a control net, which has scale 1 at every step."""
    blocks = [name for name in control if name.startswith("zero_convs")]
    inputs = Control(
        hint=net.hint_net.apply({"params": control[HINT]}, hint),  # type: ignore
        scales=jnp.ones((len(hint), len(blocks) + 1)),
        window=jnp.broadcast_to(jnp.array([-jnp.inf, jnp.inf]), (len(hint), 2)),
    )
    return dataclasses.replace(conditioning, controls=(inputs,))
