"""Adapters of Stable Diffusion XL against diffusers: pictures of its pipelines, to 1e-4."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from safetensors.numpy import load_file, save_file
from test_control import close
from test_pipelines import PROMPTS, RNG, F, modes, randomised, to_torch
from test_sdxl import BASE, SIZE, make, size, z

import latent_diffusion as ldm

__all__ = ["modes"]  # a fixture of every test
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
HINTS = np.random.default_rng(0).uniform(size=(2, SIZE[0] * F, SIZE[1] * F, 3)).astype("f4")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make(BASE, tmp_path_factory.mktemp("base"))


def ours(model, prompts=PROMPTS, **options):
    options |= {"mode": "single", "num_steps": 10, "image_size": (SIZE[0] * F, SIZE[1] * F)}
    return (model.sample(RNG, prompts, z_T=z(), **options) + 1) / 2


def theirs(pipeline, prompts=PROMPTS, **own):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts, latents=to_torch(z()), num_inference_steps=10, output_type="np", **size(), **own
    ).images


def test_a_control_net_that_sees_the_sizes_and_the_pooled_text(base, tmp_path):
    pipeline, model = base
    channels = {"conditioning_embedding_out_channels": (16, 32)}
    net = randomised(diffusers.ControlNetModel.from_unet(pipeline.unet, **channels), 1, 0.1)
    net.save_pretrained(tmp_path / "net")
    kind = diffusers.StableDiffusionXLControlNetPipeline
    steered = kind(**pipeline.components, controlnet=net, add_watermarker=False)
    want = theirs(
        steered, image=to_torch(HINTS), controlnet_conditioning_scale=0.8, original_size=(30, 50)
    )
    adapter = ldm.load_adapter(tmp_path / "net")
    got, plain = (
        ours(model, controls=[(adapter, HINTS, weight)], original_size=(30, 50))
        for weight in (0.8, 0.0)
    )
    close("XL", got, want)
    assert np.abs(plain - want).max() > 1e-2


def test_a_t2i_adapter_of_xl(base, tmp_path):
    pipeline, model = base
    net = randomised(diffusers.T2IAdapter(3, [16, 32], 2, 2 * F, "full_adapter_xl"), 2, 0.1)
    net.save_pretrained(tmp_path / "net")
    steered = diffusers.StableDiffusionXLAdapterPipeline(**pipeline.components, adapter=net)
    want = theirs(steered, image=list(to_torch(HINTS)), adapter_conditioning_scale=0.7)
    adapter = ldm.load_adapter(tmp_path / "net")
    got, plain = (ours(model, controls=[(adapter, HINTS, weight)]) for weight in (0.7, 0.0))
    close("XL", got, want)
    assert np.abs(plain - want).max() > 1e-2


def test_a_word_with_vectors_of_both_encoders(base, tmp_path):
    """Last, since diffusers' encoders keep it."""
    pipeline, model = base
    encoders = pipeline.text_encoder, pipeline.text_encoder_2
    rng, tokenizers = np.random.default_rng(3), (pipeline.tokenizer, pipeline.tokenizer_2)
    widths = (encoder.config.hidden_size for encoder in encoders)
    vectors = [(0.3 * rng.normal(size=(2, width))).astype(np.float32) for width in widths]
    save_file(dict(zip(("clip_l", "clip_g"), vectors, strict=True)), tmp_path / "<it>.safetensors")
    word = ldm.load_adapter(tmp_path / "<it>.safetensors")
    texts, negative = ["a <it> cat", "two dogs"], ["dogs", "a <it>, far"]
    for name, encoder, tokenizer in zip(("clip_l", "clip_g"), encoders, tokenizers, strict=True):
        read = torch.from_numpy(load_file(tmp_path / "<it>.safetensors")[name])
        pipeline.load_textual_inversion(
            read, token="<it>", text_encoder=encoder, tokenizer=tokenizer
        )
    want = theirs(pipeline, texts, negative_prompt=negative)
    got, zeros = (
        ours(model, texts, adapters=[(word, weight)], negative_prompts=negative)
        for weight in (1.0, 0.0)
    )
    close("XL", got, want)
    assert np.abs(zeros - want).max() > 1e-2
