"""Image prompts of a sampling call: pictures, their embeddings, and tokens for cross-attention."""

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
    """The parameters of an IP-Adapter, and the attentions of the U-Net that use its tokens."""

    params: Params
    module: ImageProjection | Resampler = flax.struct.field(pytree_node=False)
    attentions: tuple[Attention, ...] = flax.struct.field(pytree_node=False)


def bound(model: Any, image_prompts: Sequence[Any]) -> list[tuple[ImagePrompt, Bound]]:
    """Each adapter, and its inputs of the compiled program; ValueError for another U-Net."""
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
    batch = {}
    for i, (adapter, pictures, _) in enumerate(checked(image_prompts)):
        if not len(pictures):
            raise ValueError(f"{adapter.path}: no picture")
        listed = isinstance(pictures, list | tuple) and np.ndim(pictures[0]) > 0
        try:
            several = [_embedded(adapter, x) for x in (pictures if listed else [pictures])]
            rows = [conditions.for_all({"pictures": x}, total)["pictures"] for x in several]
        except ValueError as error:
            start = "" if str(error).startswith(adapter.path) else f"{adapter.path}: "
            raise ValueError(f"{start}{error}") from error
        batch[f"image_prompt_{i}"] = np.stack(rows, axis=1)
    return batch


def numbers_of(
    adapters: Sequence[tuple[ImagePrompt, Bound]], image_prompts: Sequence[Any]
) -> list[dict[str, Any]]:
    """Inputs of the compiled program: scales of all attentions, the null's embedding."""
    numbers = []
    for (adapter, inputs), (_, _, weight) in zip(adapters, image_prompts, strict=True):
        names = [attention.name for attention in inputs.attentions]
        null = _null(adapter)
        numbers.append({"scales": weight_of_names(names, weight, adapter.path), "null": null})
    return numbers


def _embedded(adapter: ImagePrompt, values: Any) -> np.ndarray:
    """Embeddings [N E], or the encoder's tokens [N L E], of pictures or embeddings."""
    values = np.asarray(values, np.float32)
    if values.ndim not in (3, 4) or values.shape[-1] != 3:
        shape = (None, adapter.width) if adapter.plus else (adapter.width,)
        return conditions.numbers("embeddings", values, shape)
    pictures = conditions.numbers("pictures", values, (None, None, 3), -1, 1)
    side = adapter.module.image_size
    if pictures.shape[1:3] != (side, side):
        pictures = np.stack([_cut(image, side) for image in to_uint8(pictures)])
    return np.asarray(_encode(adapter.module, adapter.encoder, pictures, adapter.plus))


def _cut(image: UInt8[np.ndarray, "H W 3"], side: int) -> Float[np.ndarray, "S S 3"]:
    """The middle square of a picture, resized to `side` pixels, in [-1, 1]."""
    box = windows.window(image.shape[:2], (side, side), "center", side, np.random.default_rng())
    return to_float(windows.cut(image, box, (side, side)))


def _null(adapter: ImagePrompt) -> np.ndarray:
    """The embedding of the unconditional: zeros, or the encoder's tokens of its mean picture."""
    if not adapter.plus:
        return np.zeros(adapter.width, np.float32)
    picture = mean_picture(adapter.module.image_size)
    return np.asarray(_encode(adapter.module, adapter.encoder, picture, True)[0])


@functools.partial(jax.jit, static_argnames=("module", "tokens"))
def _encode(module: ClipImage, params: Params, pictures: Array, tokens: bool) -> Array:
    """The embeddings [N E] of pictures, or the tokens [N L E] of the last but one layer."""
    drop, variables = jnp.zeros(len(pictures), bool), {"params": params}
    out: Any
    out, stored = module.apply(variables, {"image": pictures}, drop, mutable=["intermediates"])
    chosen: Array = stored["intermediates"]["penultimate"][0] if tokens else out.context[:, 0]
    return chosen


def inputs(
    adapters: Sequence[Bound], batch: Batch, numbers: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the `Conditioning`, and of the null: keys and values of every attention."""
    conditional: dict[str, Any] = {}
    null: dict[str, Any] = {}
    for i, (adapter, number) in enumerate(zip(adapters, numbers, strict=True)):
        pictures = batch[f"image_prompt_{i}"]
        rows, several = pictures.shape[:2]
        prompt = _tokens(adapter, pictures.reshape(-1, *pictures.shape[2:])).reshape(
            rows, -1, adapter.module.width
        )
        without = jnp.tile(_tokens(adapter, number["null"][None]), (rows, several, 1))
        for total, tokens in ((conditional, prompt), (null, without)):
            for j, (attention, scale) in enumerate(
                zip(adapter.attentions, number["scales"], strict=True)
            ):
                maps = adapter.params[str(j)]
                key = tokens @ maps["to_k_ip"]["kernel"]
                value = scale * (tokens @ maps["to_v_ip"]["kernel"])
                inside = total.setdefault(attention.block, {})
                inside[attention.inner] = (*inside.get(attention.inner, ()), (key, value))
    return {"image_context": conditional or None}, {"image_context": null or None}


def _tokens(adapter: Bound, embeddings: Array) -> Array:
    """The tokens [N S D] of embeddings."""
    tokens: Any = adapter.module.apply({"params": adapter.params[PROJECTION]}, embeddings)
    return tokens
