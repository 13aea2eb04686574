"""Image prompts of a sampling call: pictures, their embeddings, the tokens that are attended to."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from latent_diffusion.convert.adapters import Adapter, ImagePrompt
from latent_diffusion.convert.adapters.adapter import weight_of_names
from latent_diffusion.convert.adapters.image_prompt import PROJECTION, Attention
from latent_diffusion.core.types import Array, Batch, Params
from latent_diffusion.data import windows
from latent_diffusion.data.transforms import to_float
from latent_diffusion.generation import conditions
from latent_diffusion.nets.conditioners.clip_image import ClipImage, mean_picture
from latent_diffusion.nets.image_prompt import ImageProjection, Resampler
from latent_diffusion.runtime.metrics import to_uint8


def checked(image_prompts: Sequence[Any]) -> list[tuple[ImagePrompt, Any, Any]]:
    """The entries (adapter, pictures, weight); ValueError for anything else."""
    for entry in image_prompts:
        if not (isinstance(entry, tuple | list) and len(entry) == 3):
            raise ValueError(
                f"image_prompts are (adapter, pictures, weight), not {str(entry)[:80]}"
            )
        adapter = entry[0]
        if not isinstance(adapter, Adapter):
            raise ValueError(f"image_prompts come from load_adapter, not {str(adapter)[:80]}")
        if not isinstance(adapter, ImagePrompt):
            raise ValueError(f"{adapter.path}: give this adapter as {adapter.argument}=")
    return [(adapter, pictures, weight) for adapter, pictures, weight in image_prompts]


class Bound(flax.struct.PyTreeNode):
    """The parameters of an IP-Adapter, and the attentions of the U-Net that it is given to."""

    params: Params
    module: ImageProjection | Resampler = flax.struct.field(pytree_node=False)
    attentions: tuple[Attention, ...] = flax.struct.field(pytree_node=False)


def bound(model: Any, image_prompts: Sequence[Any]) -> list[tuple[ImagePrompt, Bound]]:
    """Each adapter, and what the compiled program takes of it; ValueError for another U-Net."""
    denoiser = model.denoiser
    return [
        (
            adapter,
            Bound(
                adapter.tree(),
                adapter.projection,
                adapter.attentions(denoiser.network, denoiser.params[denoiser.name]),
            ),
        )
        for adapter, *_ in checked(image_prompts)
    ]


def entries(image_prompts: Sequence[Any], total: int) -> dict[str, np.ndarray]:
    """The batch entries "image_prompt_0" … [total K …]: embeddings of K pictures for an image."""
    found = {}
    for i, (adapter, pictures, _) in enumerate(checked(image_prompts)):
        listed = isinstance(pictures, list | tuple) and np.ndim(pictures[0]) > 0
        try:
            several = [_embedded(adapter, x) for x in (pictures if listed else [pictures])]
            rows = [conditions.for_all({"pictures": x}, total)["pictures"] for x in several]
        except ValueError as error:
            start = "" if str(error).startswith(adapter.path) else f"{adapter.path}: "
            raise ValueError(f"{start}{error}") from error
        found[f"image_prompt_{i}"] = np.stack(rows, axis=1)
    return found


def numbers_of(
    adapters: Sequence[tuple[ImagePrompt, Bound]], image_prompts: Sequence[Any]
) -> list[dict[str, Any]]:
    """What varies without a new compilation: scales of all attentions, the null's embedding."""
    found = []
    for (adapter, own), (_, _, weight) in zip(adapters, image_prompts, strict=True):
        names = [attention.name for attention in own.attentions]
        null = _null(adapter)
        found.append({"scales": weight_of_names(names, weight, adapter.path), "null": null})
    return found


def _embedded(adapter: ImagePrompt, given: Any) -> np.ndarray:
    """Embeddings [N E], or the encoder's tokens [N L E], of pictures or of themselves."""
    given = np.asarray(given, np.float32)
    if given.ndim not in (3, 4) or given.shape[-1] != 3:
        shape = (None, adapter.width) if adapter.plus else (adapter.width,)
        return conditions.numbers("embeddings", given, shape)
    pictures = conditions.numbers("pictures", given, (None, None, 3), -1, 1)
    side = adapter.module.image_size
    if pictures.shape[1:3] != (side, side):
        pictures = np.stack([_cut(image, side) for image in to_uint8(pictures)])
    return np.asarray(_encode(adapter.module, adapter.encoder, pictures, adapter.plus))


def _cut(image: UInt8[np.ndarray, "H W 3"], side: int) -> Float[np.ndarray, "S S 3"]:
    """The middle of a picture whose shorter side becomes `side` pixels, in [-1, 1]."""
    where = windows.window(image.shape[:2], (side, side), "center", side, np.random.default_rng())
    return to_float(windows.cut(image, where, (side, side)))


def _null(adapter: ImagePrompt) -> np.ndarray:
    """The embedding of the unconditional: zeros, or the encoder's tokens of its mean picture."""
    if not adapter.plus:
        return np.zeros(adapter.width, np.float32)
    picture = mean_picture(adapter.module.image_size)
    return np.asarray(_encode(adapter.module, adapter.encoder, picture, True)[0])


@functools.partial(jax.jit, static_argnames=("module", "tokens"))
def _encode(module: ClipImage, params: Params, pictures: Array, tokens: bool) -> Array:
    """The embeddings [N E] of pictures, or the tokens [N L E] of the last but one layer."""
    never, variables = jnp.zeros(len(pictures), bool), {"params": params}
    out: Any
    out, seen = module.apply(variables, {"image": pictures}, never, mutable=["intermediates"])
    chosen: Array = seen["intermediates"]["penultimate"][0] if tokens else out.context[:, 0]
    return chosen


def inputs(
    adapters: Sequence[Bound], batch: Batch, numbers: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a `Conditioning`, and of the null one: keys and values of every attention."""
    given: dict[str, Any] = {}
    null: dict[str, Any] = {}
    for i, (own, number) in enumerate(zip(adapters, numbers, strict=True)):
        pictures = batch[f"image_prompt_{i}"]
        rows, several = pictures.shape[:2]
        told = _tokens(own, pictures.reshape(-1, *pictures.shape[2:])).reshape(
            rows, -1, own.module.width
        )
        without = jnp.tile(_tokens(own, number["null"][None]), (rows, several, 1))
        for total, tokens in ((given, told), (null, without)):
            for j, (attention, scale) in enumerate(
                zip(own.attentions, number["scales"], strict=True)
            ):
                maps = own.params[str(j)]
                key = tokens @ maps["to_k_ip"]["kernel"]
                value = scale * (tokens @ maps["to_v_ip"]["kernel"])
                inside = total.setdefault(attention.block, {})
                inside[attention.inner] = (*inside.get(attention.inner, ()), (key, value))
    return {"image_context": given or None}, {"image_context": null or None}


def _tokens(own: Bound, pictures: Array) -> Array:
    """[N S D] of embeddings."""
    tokens: Any = own.module.apply({"params": own.params[PROJECTION]}, pictures)
    return tokens
