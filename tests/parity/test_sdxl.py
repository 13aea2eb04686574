"""Stable Diffusion XL: tiny random pipelines of diffusers give the same pictures here."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import jax
import test_pipelines as tiny
from safetensors.numpy import load_file, save_file
from test_few_steps import with_our_noise
from test_pipelines import BETAS, PROMPTS, RNG, F, draw, modes, picture, randomised, to_torch

import latent_diffusion as ldm
from latent_diffusion import convert
from latent_diffusion.convert import compvis
from latent_diffusion.core.rng import normal_per_example, sampling_keys
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.nets.autoencoder import Identity
from latent_diffusion.nets.conditioners.clip_text import ClipText
from latent_diffusion.process.diffusion import q_sample

__all__ = ["modes"]  # a fixture of every test
pytestmark = tiny.pytestmark
BASE = diffusers.StableDiffusionXLPipeline
SIZE = (8, 12)  # of the latents: not square
WIDTHS = (32, 24)  # of the text's vector, of the second encoder's context
EULER = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}
SCHEDULERS = {
    "euler": lambda: diffusers.EulerDiscreteScheduler(**EULER),
    "karras": lambda: diffusers.DPMSolverMultistepScheduler(
        **BETAS, use_karras_sigmas=True, steps_offset=1
    ),
    "lightning": lambda: diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    "one step": lambda: diffusers.EulerDiscreteScheduler(
        **BETAS, timestep_spacing="trailing", prediction_type="sample"
    ),
    "turbo": lambda: diffusers.EulerAncestralDiscreteScheduler(
        **BETAS, timestep_spacing="trailing"
    ),
}


def make_texts(folder, *names, widths=(32, WIDTHS[1]), heads=(2, 2)):
    """The text encoders "1" and "2" with their tokenizers, which differ in their padding."""
    parts = {}
    for name in names:
        own = {"hidden_size": widths[0], "num_attention_heads": heads[0]}
        made = tiny.make_clip(folder / name, num_hidden_layers=3, **own)
        tokenizer, config = made["tokenizer"], made["text_encoder"].config
        if name == "1":
            parts |= {"text_encoder": made["text_encoder"], "tokenizer": tokenizer}
            continue
        tokenizer.pad_token = "!"
        config = transformers.CLIPTextConfig(
            **{**config.to_dict(), "hidden_size": widths[1], "num_attention_heads": heads[1],
               "projection_dim": WIDTHS[0], "hidden_act": "gelu"}
        )  # fmt: skip
        torch.manual_seed(11)
        encoder = transformers.CLIPTextModelWithProjection(config)
        parts |= {"text_encoder_2": randomised(encoder, 6, 0.1), "tokenizer_2": tokenizer}
    return parts


def make_unet(context, sizes=6, time_width=8, **own):
    fields = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=WIDTHS[0] + sizes * time_width,
    )
    return tiny.make_unet(**{**fields, **own})


# What sgm's code has: norms of 32 groups, text encoders with heads of 64 channels.
GROUPS = {"block_out_channels": (32, 64), "norm_num_groups": 32}
HEADS = {"widths": (64, 128), "heads": (1, 2)}


def make(kind, folder, scheduler="euler", refiner=False, sgm=False, **own):
    """A pipeline of diffusers, and the model loaded from its folder. sgm: may be a single file."""
    groups, heads = (GROUPS, HEADS) if sgm else ({}, {})
    texts = make_texts(folder / "words", *("2" if refiner else "12"), **heads)
    none = {"text_encoder": None, "tokenizer": None} if refiner else {}
    encoders = [part for name, part in texts.items() if name.startswith("text_encoder")]
    context = sum(encoder.config.hidden_size for encoder in encoders)
    unet = make_unet(context, 5 if refiner else 6, **groups, **own)
    index = {"force_zeros_for_empty_prompt": not refiner}
    if kind is not BASE:
        index["requires_aesthetics_score"] = refiner
    pipeline = kind(
        vae=tiny.make_vae(0.13, **groups), unet=unet, scheduler=SCHEDULERS[scheduler](),
        **none, **texts, **index, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "pipeline")
    return pipeline, ldm.load(folder / "pipeline")


def size(of=SIZE):
    return {"height": of[0] * F, "width": of[1] * F}


def z(number=2, seed=0, of=SIZE):
    return draw(seed, number, *of, 4)


@pytest.mark.parametrize(
    ("scheduler", "steps", "ours", "theirs"),
    [
        (
            "euler",
            20,
            {"original_size": (30, 50), "crop_top_left": (3, 7), "target_size": (12, 24)},
            {"original_size": (30, 50), "crops_coords_top_left": (3, 7), "target_size": (12, 24)},
        ),
        ("karras", 20, {"guidance_scale": 1.0}, {"guidance_scale": 0.0}),
        ("euler", 10, {"negative_prompts": [""]}, {"negative_prompt": ["", ""]}),
    ],
)
def test_text_to_image(scheduler, steps, ours, theirs, tmp_path):
    pipeline, model = make(BASE, tmp_path, scheduler)
    want = pipeline(
        PROMPTS, latents=to_torch(z()), num_inference_steps=steps, output_type="np",
        **size(), **theirs,
    ).images  # fmt: skip
    got = model.sample(
        RNG, PROMPTS, mode="single", z_T=z(), num_steps=steps,
        image_size=(SIZE[0] * F, SIZE[1] * F), **ours,
    )  # fmt: skip
    tiny.check(got, want)


LATENTS = FirstStage({}, 256.0, 0.0, Identity(4))  # pictures that are latents / 256


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The base with one scheduler or another, and the same model of `LATENTS`."""
    made = {}
    for name in ("euler", "karras", "turbo"):
        folder = tmp_path_factory.mktemp(name)
        pipeline, model = make(BASE, folder, name)
        made[name] = pipeline, model.replace(first_stage=LATENTS)
    return made


def sample_latents(model, steps, of=SIZE, **options):
    """Of `LATENTS`, told the size of the picture."""
    sizes = dict.fromkeys(("original_size", "target_size"), (of[0] * F, of[1] * F))
    return model.sample(
        RNG, PROMPTS, mode="single", z_T=z(of=of), num_steps=steps, image_size=of, **sizes,
        **options,
    )  # fmt: skip


def check_latents(got, want):
    """Ours [N h w 4] / 256 against theirs: within 1e-4 of their scale, and not two alike."""
    want = want.numpy().transpose(0, 2, 3, 1)
    scale = np.abs(want).max()
    difference = np.abs(256 * got - want).max() / scale
    print(f"latents differ by {difference:.2e} of their scale {scale:.2f}")
    assert difference <= 1e-4
    assert scale < 256 and np.abs(want[0] - want[-1]).max() > 0.1 * scale


@pytest.mark.parametrize("negative", [None, "grey"])
@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("scheduler", ["euler", "karras"])
def test_the_last_latents(scheduler, steps, negative, bases):
    """Without a negative prompt, guidance is from a condition of zeros."""
    pipeline, model = bases[scheduler]
    want = pipeline(
        PROMPTS, latents=to_torch(z()), num_inference_steps=steps, output_type="latent",
        negative_prompt=negative and [negative] * 2, **size(),
    ).images  # fmt: skip
    check_latents(sample_latents(model, steps, negative_prompts=negative and [negative]), want)


def test_latents_with_odd_sides(bases, monkeypatch):
    """As of a picture of 104 × 72 pixels and a first stage with f = 8; that of the test has 2."""
    pipeline, model = bases["euler"]
    monkeypatch.setattr(pipeline, "check_inputs", lambda *args, **options: None)
    odd = (13, 9)
    want = pipeline(
        PROMPTS, latents=to_torch(z(of=odd)), num_inference_steps=5, output_type="latent",
        **size(odd),
    ).images  # fmt: skip
    check_latents(sample_latents(model, 5, odd), want)


@pytest.mark.parametrize("scheduler", ["euler", "karras"])
def test_the_refiner_goes_on_where_the_base_stops(scheduler, tmp_path):
    """Base and refiner share the noise 4 : 1; the latents in between are an array."""
    base, ours = make(BASE, tmp_path / "base", scheduler)
    refiner, ours_2 = make(
        diffusers.StableDiffusionXLImg2ImgPipeline, tmp_path / "refiner", scheduler, refiner=True
    )
    image_size = (SIZE[0] * F, SIZE[1] * F)
    common = {"num_inference_steps": 20}
    between = base(
        PROMPTS, latents=to_torch(z()), output_type="latent", denoising_end=0.8, **size(), **common
    ).images
    want = refiner(PROMPTS, image=between, denoising_start=0.8, output_type="np", **common).images
    options = {"mode": "single", "num_steps": 20, "image_size": image_size}
    latents = ours.sample(RNG, PROMPTS, z_T=z(), end=0.2, **options)
    theirs = between.numpy().transpose(0, 2, 3, 1)
    if scheduler == "euler":  # whose latents are z_0 + sigma·eps
        sigma = base.scheduler.sigmas[int((base.scheduler.timesteps >= 200).sum())].item()
        theirs = theirs / (1 + sigma**2) ** 0.5
    scale = np.abs(theirs).max()
    print(f"latents differ by {np.abs(latents - theirs).max() / scale:.2e} of their scale")
    np.testing.assert_allclose(latents, theirs, atol=1e-4 * scale)
    np.save(tmp_path / "latents.npy", latents)
    got = ours_2.sample(RNG, PROMPTS, z_T=np.load(tmp_path / "latents.npy"), start=0.2, **options)
    tiny.check(got, want)
    both = ours.sample(RNG, PROMPTS, z_T=z(), refiner=(ours_2, 0.2), **options)
    np.testing.assert_array_equal(both, got)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_turbo_draws_without_guidance(steps, bases, monkeypatch):
    """Euler's ancestral steps with trailing timesteps, which the pipeline brings."""
    pipeline, model = bases["turbo"]
    with_our_noise(monkeypatch, pipeline, steps, z().shape[1:])
    want = pipeline(
        PROMPTS, latents=to_torch(z()), num_inference_steps=steps, guidance_scale=0.0,
        output_type="latent", **size(),
    ).images  # fmt: skip
    assert model.defaults["sampler"] == "euler_ancestral"
    assert model.defaults["spacing"] == "trailing"
    check_latents(sample_latents(model, steps, guidance_scale=1.0), want)


def test_lightning_as_a_lora(tmp_path):
    """A LoRA of the U-Net on the base; sampler and spacing are named, since no file names them."""
    pytest.importorskip("peft")
    pipeline, model = make(BASE, tmp_path)
    _save_lora(tmp_path, {"unet": pipeline.unet}, "kohya")
    pipeline.load_lora_weights(tmp_path, weight_name=STYLE)
    pipeline.scheduler = SCHEDULERS["lightning"]()
    want = pipeline(
        PROMPTS, latents=to_torch(z()), num_inference_steps=4, guidance_scale=0.0,
        output_type="np", **size(),
    ).images  # fmt: skip
    got = model.sample(
        RNG, PROMPTS, mode="single", z_T=z(), num_steps=4, guidance_scale=1.0, sampler="euler",
        spacing="trailing", image_size=(SIZE[0] * F, SIZE[1] * F),
        adapters=[(ldm.load_adapter(tmp_path / STYLE), 1.0)],
    )  # fmt: skip
    tiny.check(got, want)


@pytest.mark.parametrize("steps", [1, 4])
def test_lightning_as_a_checkpoint(steps, tmp_path):
    """Trailing steps of Euler without guidance; the model of one step predicts x0."""
    kind = "lightning" if steps > 1 else "one step"
    pipeline, model = make(BASE, tmp_path, kind)
    want = pipeline(
        PROMPTS, latents=to_torch(z()), num_inference_steps=steps, guidance_scale=0.0,
        output_type="np", **size(),
    ).images  # fmt: skip
    got = model.sample(
        RNG, PROMPTS, mode="single", z_T=z(), num_steps=steps, guidance_scale=1.0,
        image_size=(SIZE[0] * F, SIZE[1] * F),
    )  # fmt: skip
    tiny.check(got, want)


@pytest.fixture(params=["base", "refiner"])
def single(request, tmp_path, monkeypatch):
    """A pipeline, and a single file of it without a yaml, whose sizes are "released" here."""
    refiner = request.param == "refiner"
    kind = diffusers.StableDiffusionXLImg2ImgPipeline if refiner else BASE
    pipeline, _ = make(kind, tmp_path, refiner=refiner, sgm=True, time_width=256)
    known = (32, 128 if refiner else 64 + 128, 4)
    settings = compvis.Released(0.00085, 0.012, {"num_head_channels": 16}, 0.13)
    monkeypatch.setitem(compvis.RELEASED, known, settings)
    file = tmp_path / "model.safetensors"
    convert.write(convert.read(tmp_path / "pipeline"), file, "compvis")
    file.with_suffix(".yaml").unlink()
    return pipeline, tmp_path / "pipeline", file


def from_single_file(pipeline, folder, file, **parts):
    made = type(pipeline).from_single_file(
        file, config=str(folder), local_files_only=True, add_watermarker=False, **parts
    )
    made.set_progress_bar_config(disable=True)
    return made


def test_single_files_are_those_that_diffusers_reads(single):
    """Of ours diffusers makes its own pipeline again, bitwise; and so does this library."""
    pipeline, folder, file = single
    made = from_single_file(*single)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            want, got = part.state_dict(), getattr(made, name).state_dict()
            assert want.keys() == got.keys()
            for key, tensor in want.items():
                torch.testing.assert_close(got[key], tensor, rtol=0, atol=0)
    ours, want = convert.read(file), convert.read(folder)
    for (name, part), (_, other) in zip(ours.parts(), want.parts(), strict=True):
        assert part.params.keys() == other.params.keys(), name
        if name.startswith("clip_text"):
            assert ClipText(**part.fields) == ClipText(**other.fields)
        for path, tensor in part.params.items():
            np.testing.assert_array_equal(tensor.read(), other.params[path].read())


@pytest.mark.parametrize("single", ["base"], indirect=True)
def test_a_single_file_draws_what_diffusers_draws_from_it(single):
    """One step of Lightning, which predicts x0, and v with a last timestep of noise alone.

    The markers of v are by the names of two tensors, which diffusers ignores: it is told.
    """
    _, folder, file = single
    tokenizer = folder / "tokenizer"
    told = {"scheduler": SCHEDULERS["one step"]()}
    want = from_single_file(*single, **told)(
        PROMPTS, latents=to_torch(z()), num_inference_steps=1, guidance_scale=0.0,
        output_type="np", **size(),
    ).images  # fmt: skip
    model = ldm.load(file, tokenizer=tokenizer)
    got = model.replace(denoiser=model.denoiser.replace(prediction="x0")).sample(
        RNG, PROMPTS, mode="single", z_T=z(), num_steps=1, guidance_scale=1.0, sampler="euler",
        spacing="trailing", image_size=(SIZE[0] * F, SIZE[1] * F),
    )  # fmt: skip
    tiny.check(got, want)

    markers = dict.fromkeys(("v_pred", "ztsnr"), np.zeros(0, np.float32))
    save_file(load_file(file) | markers, file)
    told["scheduler"] = diffusers.DDIMScheduler(
        **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    want = from_single_file(*single, **told)(
        PROMPTS, latents=to_torch(z()), num_inference_steps=10, output_type="latent", **size()
    ).images
    model = ldm.load(file, tokenizer=tokenizer).replace(first_stage=LATENTS)
    check_latents(sample_latents(model, 10), want)


LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj", "out_proj", "fc1", "proj_in")
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

STYLE = "style.safetensors"


def _save_lora(folder, networks, kind):
    """A file with random pairs for the maps of `networks`, in the names of `kind`."""
    tensors, count = {}, 0
    for prefix, network in networks.items():
        for name, module in network.named_modules():
            if not name.endswith(LINEAR):
                continue
            count += 1
            if prefix != "unet" and not name.startswith("text_model"):
                name = f"text_model.{name}"
            out, into = module.weight.shape
            down, up = 0.3 * draw(2 * count, 2, into), 0.3 * draw(2 * count + 1, out, 2)
            key, ends = f"{prefix}.{name}", ("lora_A.weight", "lora_B.weight")
            if kind == "kohya":
                key = f"{KOHYA[prefix]}_{name.replace('.', '_')}"
                ends = ("lora_down.weight", "lora_up.weight")
                tensors[f"{key}.alpha"] = np.asarray(1.5, np.float32)
            tensors |= {f"{key}.{ends[0]}": down, f"{key}.{ends[1]}": up}
    save_file(tensors, folder / STYLE)


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_a_lora_of_the_unet_and_both_encoders(kind, tmp_path):
    """Merged and unmerged; the first encoder's last layer, which is in the file, has no effect."""
    pytest.importorskip("peft")
    pipeline, model = make(BASE, tmp_path)
    file = tmp_path / STYLE
    _save_lora(tmp_path, {name: getattr(pipeline, name) for name in KOHYA}, kind)
    options = {"z_T": z(), "num_steps": 10, "mode": "single"}
    options["image_size"] = (SIZE[0] * F, SIZE[1] * F)
    plain = model.sample(RNG, PROMPTS, **options)
    pipeline.load_lora_weights(tmp_path, weight_name=STYLE, adapter_name="style")
    pipeline.set_adapters("style", 0.7)
    want = pipeline(
        PROMPTS, latents=to_torch(z()), num_inference_steps=10, output_type="np", **size()
    ).images
    assert np.abs((plain + 1) / 2 - want).max() > 5 / 255
    tiny.check(
        model.sample(RNG, PROMPTS, adapters=[(ldm.load_adapter(file), 0.7)], **options), want
    )
    tiny.check(
        ldm.load(tmp_path / "pipeline", lora={file: 0.7}).sample(RNG, PROMPTS, **options), want
    )


@pytest.mark.parametrize("refiner", [True, False])
def test_a_picture_is_changed(refiner, tmp_path, monkeypatch):
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    pipeline, model = make(kind, tmp_path, refiner=refiner)
    image = np.tanh(draw(1, 2, SIZE[0] * F, SIZE[1] * F, 3))
    tiny.in_order(monkeypatch, pipeline, tiny.start_noise(2, *SIZE, 4))
    own = {"aesthetic_score": 7.0, "negative_aesthetic_score": 1.5} if refiner else {}
    want = pipeline(
        PROMPTS, image=picture(image), strength=0.4, num_inference_steps=20, output_type="np", **own
    ).images
    got = model.sample(
        RNG, PROMPTS, mode="single", image=image, strength=0.4, num_steps=20,
        image_size=image.shape[1:3], **own,
    )  # fmt: skip
    tiny.check(got, want)


def test_inpainting_with_nine_channels(tmp_path, monkeypatch):
    pipeline, model = make(diffusers.StableDiffusionXLInpaintPipeline, tmp_path, in_channels=9)
    image = np.tanh(draw(1, 2, SIZE[0] * F, SIZE[1] * F, 3))
    mask = np.zeros((2, SIZE[0] * F, SIZE[1] * F, 1), np.float32)
    mask[0, 3:12, 5:] = mask[1, :, 9:] = 1.0
    tiny.in_order(monkeypatch, pipeline, z())
    want = pipeline(
        PROMPTS, image=picture(image), mask_image=to_torch(mask), num_inference_steps=20,
        output_type="np", strength=1.0, guidance_scale=7.5, **size(),
    ).images  # fmt: skip
    got = model.sample(
        RNG, PROMPTS, mode="single", image=image, mask=mask, z_T=z(), num_steps=20,
        image_size=image.shape[1:3],
    )  # fmt: skip
    tiny.check(got, want, np.broadcast_to(mask > 0.5, got.shape))


def test_inpainting_by_a_mask(tmp_path, monkeypatch):
    """The base keeps the part outside of the hole, noised to each timestep.

    diffusers has one noise for all timesteps and pastes after a step; this library draws noise for
    each timestep and pastes before its evaluation. So diffusers gets our noise, and starts from a
    z_T that is pasted already.
    """
    pipeline, model = make(diffusers.StableDiffusionXLInpaintPipeline, tmp_path)
    image = np.tanh(draw(1, 2, SIZE[0] * F, SIZE[1] * F, 3))
    holes = np.zeros((2, *SIZE, 1), np.float32)
    holes[0, 2:6, 3:] = holes[1, :, 5:] = 1.0
    mask = holes.repeat(F, 1).repeat(F, 2)
    hole = sampling_keys(tiny.image_keys(2)).hole
    known = np.asarray(model.encode(image))

    def noise(t):
        bits = np.float32(t).view(np.uint32)
        keys = jax.vmap(jax.random.fold_in, (0, None))(hole, bits)
        return np.asarray(normal_per_example(keys, known.shape[1:]))

    add_noise = pipeline.scheduler.add_noise
    monkeypatch.setattr(
        pipeline.scheduler, "add_noise", lambda x, _, t: add_noise(x, to_torch(noise(t.item())), t)
    )
    pipeline.scheduler.set_timesteps(20)
    first = pipeline.scheduler.timesteps[0].item()
    noised = np.asarray(q_sample(model.denoiser.schedule, known, first, noise(first)))
    want = pipeline(
        PROMPTS, image=picture(image), mask_image=to_torch(mask), num_inference_steps=20,
        latents=to_torch(holes * z() + (1 - holes) * noised), output_type="np", strength=1.0,
        guidance_scale=5.0, **size(),
    ).images  # fmt: skip
    got = model.sample(
        RNG, PROMPTS, mode="single", image=image, mask=mask, z_T=z(), num_steps=20,
        guidance_scale=5.0, image_size=image.shape[1:3],
    )  # fmt: skip
    tiny.check(got, want, np.broadcast_to(mask > 0.5, got.shape))


@pytest.mark.parametrize("refiner", [False, True])
def test_folders_are_written_as_diffusers_wrote_them(refiner, tmp_path):
    """The same tensors, bitwise, in half precision too; and diffusers loads them."""
    base, refined = BASE, diffusers.StableDiffusionXLImg2ImgPipeline
    pipeline, _ = make(refined if refiner else base, tmp_path, refiner=refiner)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    for name, variant in (("pipeline", None), ("half", "fp16")):
        read = convert.read(tmp_path / name, variant=variant)
        convert.write(read, tmp_path / f"{name} again", "diffusers")
        files = list((tmp_path / name).rglob("*.safetensors"))
        assert len(files) == (3 if refiner else 4)
        for file in files:
            stem = file.name.replace(".fp16", "")
            again = load_file(tmp_path / f"{name} again" / file.parent.name / stem)
            want = load_file(file)
            assert again.keys() == want.keys()
            for key, tensor in want.items():
                np.testing.assert_array_equal(again[key], tensor, strict=True)
        made = type(pipeline).from_pretrained(tmp_path / f"{name} again")
        assert made.config.force_zeros_for_empty_prompt == (not refiner)
        assert made.tokenizer_2.pad_token == "!"
