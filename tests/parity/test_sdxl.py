"""Stable Diffusion XL: tiny random pipelines of diffusers give the same pictures here."""

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import test_pipelines as tiny
from test_pipelines import BETAS, PROMPTS, RNG, F, draw, modes, randomised, to_torch

import latent_diffusion as ldm

__all__ = ["modes"]  # a fixture of every test
pytestmark = tiny.pytestmark
SIZE = (8, 12)  # of the latents: not square
WIDTHS = (32, 24)  # of the text's vector, of the second encoder's context
EULER = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}
SCHEDULERS = {
    "euler": lambda: diffusers.EulerDiscreteScheduler(**EULER),
    "karras": lambda: diffusers.DPMSolverMultistepScheduler(
        **BETAS, use_karras_sigmas=True, steps_offset=1
    ),
    "turbo": lambda: diffusers.EulerAncestralDiscreteScheduler(
        **BETAS, timestep_spacing="trailing"
    ),
}


def make_texts(folder, *names):
    """The text encoders "1" and "2" with their tokenizers, which differ in their padding."""
    parts = {}
    for name in names:
        made = tiny.make_clip(folder / name, num_hidden_layers=3)
        tokenizer, config = made["tokenizer"], made["text_encoder"].config
        if name == "1":
            parts |= {"text_encoder": made["text_encoder"], "tokenizer": tokenizer}
            continue
        tokenizer.pad_token = "!"
        config = transformers.CLIPTextConfig(
            **{**config.to_dict(), "hidden_size": WIDTHS[1], "projection_dim": WIDTHS[0],
               "hidden_act": "gelu"}
        )  # fmt: skip
        torch.manual_seed(11)
        encoder = transformers.CLIPTextModelWithProjection(config)
        parts |= {"text_encoder_2": randomised(encoder, 6, 0.1), "tokenizer_2": tokenizer}
    return parts


def make_unet(context, sizes=6, **own):
    fields = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTHS[0] + sizes * 8,
    )
    return tiny.make_unet(**{**fields, **own})


def make(kind, folder, scheduler="euler", refiner=False, **own):
    """A pipeline of diffusers, and the model loaded from its folder."""
    texts = make_texts(folder / "words", *("2" if refiner else "12"))
    none = {"text_encoder": None, "tokenizer": None} if refiner else {}
    unet = make_unet(WIDTHS[1], 5) if refiner else make_unet(32 + WIDTHS[1], **own)
    index = {"force_zeros_for_empty_prompt": not refiner}
    if kind is not diffusers.StableDiffusionXLPipeline:
        index["requires_aesthetics_score"] = refiner
    pipeline = kind(
        vae=tiny.make_vae(0.13), unet=unet, scheduler=SCHEDULERS[scheduler](), **none, **texts,
        **index, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "pipeline")
    return pipeline, ldm.load(folder / "pipeline")


def size(of=SIZE):
    return {"height": of[0] * F, "width": of[1] * F}


def z(number=2, seed=0):
    return draw(seed, number, *SIZE, 4)


@pytest.mark.parametrize(
    ("scheduler", "steps", "ours", "theirs"),
    [
        ("euler", 10, {}, {}),
        (
            "euler",
            20,
            {"original_size": (30, 50), "crop_top_left": (3, 7), "target_size": (12, 24)},
            {"original_size": (30, 50), "crops_coords_top_left": (3, 7), "target_size": (12, 24)},
        ),
        (
            "karras",
            50,
            {"negative_prompts": ["grey"]},
            {"negative_prompt": ["grey"] * 2},
        ),
        ("karras", 20, {"guidance_scale": 1.0}, {"guidance_scale": 0.0}),
        ("euler", 10, {"negative_prompts": [""]}, {"negative_prompt": ["", ""]}),
    ],
)
def test_text_to_image(scheduler, steps, ours, theirs, tmp_path):
    pipeline, model = make(diffusers.StableDiffusionXLPipeline, tmp_path, scheduler)
    want = pipeline(
        PROMPTS, latents=to_torch(z()), num_inference_steps=steps, output_type="np",
        **size(), **theirs,
    ).images  # fmt: skip
    got = model.sample(
        RNG, PROMPTS, mode="single", z_T=z(), num_steps=steps,
        image_size=(SIZE[0] * F, SIZE[1] * F), **ours,
    )  # fmt: skip
    tiny.check(got, want)
