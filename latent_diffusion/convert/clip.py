"""A whole CLIP, which maps pictures and texts to vectors of one space (Radford et al. 2021).

Its two encoders are also conditioners; here the outputs of both are projected. It is for scores of
samples (`evaluate --metrics=clip`) and databases of neighbours (`python -m
latent_diffusion.training.embed`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.convert import as_params
from latent_diffusion.convert.components import STEMS
from latent_diffusion.convert.pretrained import read_pretrained
from latent_diffusion.core.types import Array, Float, Int, Params
from latent_diffusion.data.tokenizers import ClipTokenizer
from latent_diffusion.files.tensors import find_weights, open_tensors
from latent_diffusion.nets.conditioners.clip_image import ClipImage
from latent_diffusion.nets.conditioners.clip_text import ClipText

BATCH = 64  # number of texts that are embedded at a time


@dataclass(frozen=True)
class Clip:
    """Both encoders with their weights. params: {"image", "text", "projection" [width D]}."""

    image: ClipImage
    text: ClipText
    tokenizer: ClipTokenizer
    params: Params

    def of_images(self, params: Params, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Embeddings of pictures in [-1, 1], not normalised; for use under jit."""
        never = jnp.zeros(len(images), bool)
        output: Any = self.image.apply({"params": params["image"]}, {"image": images}, never)
        return output.context[:, 0]

    def of_tokens(self, params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B D"]:
        """Embeddings of texts, not normalised: the state at the end of the text, projected."""
        never = jnp.zeros(len(tokens), bool)
        output: Any = self.text.apply({"params": params["text"]}, {"tokens": tokens}, never)
        end = jnp.argmax(tokens == self.tokenizer.empty[1], axis=1)
        return output.context[jnp.arange(len(tokens)), end] @ params["projection"]

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Embeddings of many texts, not normalised; texts that are too long are cut."""
        apply, tokens, batches = jax.jit(self.of_tokens), self.tokenizer(list(texts)), []
        for start in range(0, len(tokens), BATCH):
            index = np.minimum(np.arange(start, start + BATCH), len(tokens) - 1)
            batches.append(np.asarray(apply(self.params, tokens[index])))
        return np.concatenate(batches)[: len(tokens)]


def load_clip(path: str | Path) -> Clip:
    """Read the folder of a CLIPModel of transformers, with its tokenizer.

    Raises a ValueError of one line that names an absent part.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder of a CLIPModel (config.json, weights, tokenizer)")
    image, text = (read_pretrained(name, path, {}) for name in ("clip_image", "clip_text"))
    weights = find_weights(path, STEMS)
    tensors = open_tensors(weights).tensors if weights is not None else {}
    if "text_projection.weight" not in tensors:
        raise ValueError(f"{path} is no whole CLIP: it has no text_projection.weight")
    projection = np.asarray(tensors["text_projection.weight"].read(), np.float32).T
    params = {"image": as_params(image), "text": as_params(text), "projection": projection}
    module = ClipText(**text.fields)
    tokenizer = ClipTokenizer.read(path, max_length=module.max_length)
    return Clip(ClipImage(**image.fields), module, tokenizer, jax.tree.map(jnp.asarray, params))
