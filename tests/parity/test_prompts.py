"""Weighted prompts against compel's, with a small random CLIP.

Its `(words)1.3` are our `(words:1.3)`, and its conjunctions are our sections. Its prompts are cut
into chunks here without regard to words, and the chunks keep their own end tokens. Weights below 1
mean something else there: compel also blends in the prompt without these words. Its package names
an old transformers as a dependency: `pip install --no-deps compel pyparsing`.
"""

import os

import jax.numpy as jnp
import pytest
from test_encoders import below, close, make_clip_text, params_of, tensors_of
from test_tokenizers import learn_merges

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
compel = pytest.importorskip("compel")

from compel.embeddings_provider import EmbeddingsProvider, SplitLongTextMode

from latent_diffusion.convert import clip_text
from latent_diffusion.convert.tokenizers import write_tokenizer
from latent_diffusion.data.tokenizers import ClipTokenizer
from latent_diffusion.data.tokenizers.clip import BYTE_CHARACTERS
from latent_diffusion.data.tokenizers.weights import parse
from latent_diffusion.nets.conditioners.clip_text import ClipText

LENGTH = 9
PROMPTS = [
    "a red cat",
    "a (red cat:1.3) on (mars:2.0)",
    "((photo)) of a (dog:1.7), house",
    "a photo of the cat dog house tree (red blue:1.5) smiling woman riding horse on Mars",
    "a (cat:1.2) BREAK the red (dog:1.6) house",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_weights_and_chunks(prompt, tmp_path):
    merges = learn_merges(80)
    single = list(BYTE_CHARACTERS.values())
    words = [*single, *(c + "</w>" for c in single), *(m.replace(" ", "") for m in merges)]
    ours = ClipTokenizer([*words, "<|startoftext|>", "<|endoftext|>"], merges, LENGTH)
    write_tokenizer(ours, tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ids = {
        "bos_token_id": ours.empty[0],
        "eos_token_id": ours.empty[1],
        "pad_token_id": ours.pad_id,
    }
    sizes = {"vocab_size": ours.vocab_size, "max_position_embeddings": LENGTH}
    encoder = make_clip_text(**sizes, **ids)
    provider = EmbeddingsProvider(
        theirs, encoder, truncate=False, split_long_text_mode=SplitLongTextMode.BRUTAL
    )
    sections = parse(prompt)
    with torch.no_grad():
        want = provider.get_embeddings_for_weighted_prompt_fragments(
            [[text for text, _ in section] for section in sections],
            [[weight for _, weight in section] for section in sections],
        )
    fields = clip_text.fields_from_config(encoder.config.to_dict())
    tensors = below(tensors_of(encoder), "text_model.")
    params = params_of(clip_text, clip_text.transformers_table, fields, tensors)
    tokens, weights = ours.weighted([prompt], len(ours.chunks(prompt)))
    batch = {"tokens": jnp.asarray(tokens), "tokens_weights": jnp.asarray(weights)}
    got = ClipText(**fields).apply({"params": params}, batch, jnp.zeros(1, bool)).context
    close(got, want)
