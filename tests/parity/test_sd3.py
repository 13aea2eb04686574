"""Stable Diffusion 3 against diffusers' classes with random weights, and its files in and out."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import test_pipelines as tiny
from diffusers.loaders import single_file_utils
from t5_vocabulary import CHARSMAP, VOCABULARY
from test_pipelines import PROMPTS, RNG, draw, modes, picture, randomised, to_torch

import latent_diffusion as ldm
from latent_diffusion import convert
from latent_diffusion.convert.mmdit import as_original
from latent_diffusion.convert.scheduler import from_diffusers
from latent_diffusion.convert.scheduler_options import CURVES
from latent_diffusion.core.types import Conditioning
from latent_diffusion.models.denoiser import schedule_of
from latent_diffusion.nets.conditioners.t5_text import T5Text
from latent_diffusion.process.plan import plan

__all__ = ["modes"]  # a fixture of every test

diffusers.utils.logging.set_verbosity_error()
TINY = dict(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3,
    sample_size=8, patch_size=2, joint_attention_dim=12, caption_projection_dim=16,
    pooled_projection_dim=10, pos_embed_max_size=6,
)  # fmt: skip
KINDS = {
    "3": {},
    "3.5": {"qk_norm": "rms_norm"},
    "3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1), "pos_embed_max_size": 7},
}


def transformer(**fields):
    """A transformer whose every parameter is random."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**{**TINY, **fields})
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("attn.norm" in name), std=0.2)
    return model.eval()


def close(got, want, tolerance=1e-4):
    error = np.abs(got - want).max() / np.abs(want).std()
    print(f"max error {error:.1e} of the scale")
    assert error <= tolerance


def assert_same_files(*files):
    """Names and arrays are equal, bit by bit."""
    before, after = (safetensors.numpy.load_file(file) for file in files)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_and_its_folder(kind, tmp_path):
    model = transformer(**KINDS[kind])
    model.save_pretrained(tmp_path / "theirs")
    loaded = ldm.load(tmp_path / "theirs")
    keys = jax.random.split(jax.random.key(0), 3)
    z = jax.random.normal(keys[0], (2, 6, 10, 4))
    context, vector = jax.random.normal(keys[1], (2, 5, 12)), jax.random.normal(keys[2], (2, 10))
    sigma = np.array([0.003, 0.7], np.float32)
    with torch.no_grad():
        want = model(
            torch.from_numpy(np.array(z)).permute(0, 3, 1, 2),
            torch.from_numpy(np.array(context)),
            torch.from_numpy(np.array(vector)),
            torch.from_numpy(1000 * sigma),
        ).sample
    got = loaded.denoise(z, jnp.asarray(1000 * sigma - 1), Conditioning(None, context, vector))
    close(np.asarray(got), want.permute(0, 2, 3, 1).numpy())
    loaded.save(tmp_path / "ours", "diffusers")
    assert_same_files(
        *(tmp_path / f / "diffusion_pytorch_model.safetensors" for f in ("theirs", "ours"))
    )
    again = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "ours")
    config, ours = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (model, again))
    assert {**config, "dual_attention_layers": list(config["dual_attention_layers"])} == {
        **ours,
        "dual_attention_layers": list(ours["dual_attention_layers"]),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"out_channels": 8}, "out_channels=8; supported: 4"),
        ({"caption_projection_dim": 12}, "caption_projection_dim=12; supported: 16"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'; supported: None or 'rms_norm'"),
        ({"mmdit_version": 4}, "mmdit_version=4: this setting is unknown here"),
    ],
)
def test_what_ours_cannot_compute_is_refused_by_name(fields, message, tmp_path):
    model = transformer()
    model.register_to_config(**fields)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        ldm.load(tmp_path)


def test_the_names_of_single_files_are_those_that_diffusers_converts(tmp_path):
    """diffusers makes its own tensors, bit by bit, of those that we write under other names."""
    model = transformer(
        num_attention_heads=1, attention_head_dim=64, caption_projection_dim=64,
        **KINDS["3.5-medium"],
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    part = convert.read(tmp_path).mmdit
    single = {n: torch.from_numpy(np.array(t.read())) for n, t in as_original(part).items()}
    made = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(single)
    want = model.state_dict()
    assert made.keys() == want.keys()
    assert all(torch.equal(made[name], want[name]) for name in want)


@pytest.mark.parametrize(
    "config", [{}, {"shift": 3.0}, {"shift": 6.0}, {"num_train_timesteps": 300}]
)
def test_the_scheduler(config):
    """Its sigmas, and every setting that would give others is refused by its name."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    theirs.set_timesteps(7)
    said = {"_class_name": type(theirs).__name__, **theirs.config}
    diffusion, sampling = from_diffusers(said)
    schedule = schedule_of(diffusion)
    timesteps, _ = plan(schedule, diffusion["prediction"], sampling, {"num_steps": 7})
    np.testing.assert_allclose(schedule.sigma_t(timesteps), theirs.sigmas, rtol=1e-4, atol=1e-6)
    others = {"invert_sigmas": True, "use_dynamic_shifting": True, "shift_terminal": 0.1}
    others |= dict.fromkeys((*CURVES, "stochastic_sampling"), True)
    for name, value in others.items():
        assert f"{name}={value}" in from_diffusers({**said, name: value})[1]["sampler"]


# ------------------------------------------------------------------------------ whole pipelines

F, SIZE = 2, (8, 12)  # the first stage's factor; of the latents: not square
T5_WIDTH = 80


def make_texts(folder, t5=True):
    """Both of CLIP's encoders, T5's (or none), and their tokenizers."""
    parts = {}
    for number, width in (("", 32), ("_2", 24)):
        made = tiny.make_clip(folder / f"clip{number}", num_hidden_layers=3)
        config = made["text_encoder"].config.to_dict()
        config |= {"hidden_size": width, "projection_dim": width}
        config["hidden_act"] = "gelu" if number else "quick_gelu"
        torch.manual_seed(11)
        encoder = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
        parts[f"text_encoder{number}"] = randomised(encoder, 6, 0.1)
        parts[f"tokenizer{number}"] = made["tokenizer"]
    parts["tokenizer_2"].pad_token = "!"
    parts |= {"text_encoder_3": None, "tokenizer_3": None}
    if t5:
        tokenizer = transformers.T5Tokenizer(
            vocab=VOCABULARY, _spm_precompiled_charsmap=CHARSMAP, extra_ids=2
        )
        parts |= {"text_encoder_3": make_t5(T5_WIDTH), "tokenizer_3": tokenizer}
    return parts


def make_t5(width):
    torch.manual_seed(12)
    config = transformers.T5Config(
        vocab_size=len(VOCABULARY) + 3, d_model=width, d_kv=6, d_ff=20, num_layers=2, num_heads=3,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return randomised(transformers.T5EncoderModel(config), 7, 0.1)


def test_the_third_text_encoder(tmp_path):
    """With padding, and distances in every row of the table."""
    model = make_t5(16)
    model.save_pretrained(tmp_path / "theirs")
    part = convert.read(tmp_path / "theirs").conditioners["t5_text"]
    tokens = np.zeros((2, 256), np.int32)
    tokens[0, :30], tokens[1, :5] = np.arange(3, 33), (9, 8, 7, 6, 1)
    with torch.no_grad():
        want = model(torch.from_numpy(tokens)).last_hidden_state.numpy()
    got = T5Text(**part.fields).apply(
        {"params": convert.as_params(part)}, {"tokens": jnp.asarray(tokens)}, jnp.zeros(2, bool)
    )
    close(np.asarray(got.context), want)


def make(folder, kind=diffusers.StableDiffusion3Pipeline, t5=True, **fields):
    """A pipeline of diffusers, and the model loaded from its folder."""
    own = {"joint_attention_dim": T5_WIDTH, "pooled_projection_dim": 56, **fields}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8,
        sample_size=16, scaling_factor=0.8, shift_factor=0.3, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    pipeline = kind(
        transformer=transformer(**own),
        vae=randomised(vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **make_texts(folder / "words", t5),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "theirs")
    return pipeline, ldm.load(folder / "theirs")


@pytest.mark.parametrize("t5", [True, False], ids=["t5", "without"])
def test_text_to_image(t5, tmp_path):
    pipeline, model = make(tmp_path, t5=t5, **KINDS["3.5-medium"])
    z = draw(0, 2, *SIZE, 4)
    size = {"height": SIZE[0] * F, "width": SIZE[1] * F}
    for ours, theirs in (
        ({"negative_prompts": ["grey"]}, {"guidance_scale": 7.0, "negative_prompt": ["grey"] * 2}),
        ({"guidance_scale": 3.0}, {"guidance_scale": 3.0}),
        ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
    ):
        want = pipeline(
            PROMPTS, latents=to_torch(z), num_inference_steps=5, output_type="np", **size, **theirs
        ).images
        got = model.sample(
            RNG, PROMPTS, mode="single", z_T=z, num_steps=5, image_size=tuple(size.values()), **ours
        )
        tiny.check(got, want)
    assert model.defaults["num_steps"] == 28
    model.save(tmp_path / "ours", "diffusers")
    folders = ["vae", "transformer", "text_encoder", "text_encoder_2"]
    for name in folders + ["text_encoder_3"] * t5:
        files = [next((tmp_path / f / name).glob("*.safetensors")) for f in ("theirs", "ours")]
        assert_same_files(*files)
    absent = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "ours", **absent)
    again.set_progress_bar_config(disable=True)
    same = again(
        PROMPTS, latents=to_torch(z), num_inference_steps=5, output_type="np", **size, **theirs
    ).images
    np.testing.assert_allclose(same, want, atol=1e-5)


def test_a_picture_is_changed(tmp_path, monkeypatch):
    pipeline, model = make(tmp_path, diffusers.StableDiffusion3Img2ImgPipeline)
    images = np.clip(draw(1, 2, SIZE[0] * F, SIZE[1] * F, 3) / 2, -1, 1)
    noise = tiny.start_noise(2, *SIZE, 4)
    monkeypatch.setattr(
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img.randn_tensor",
        lambda *_, **__: to_torch(noise),
    )
    want = pipeline(
        PROMPTS, image=picture(images), strength=0.6, num_inference_steps=5, output_type="np",
        height=SIZE[0] * F, width=SIZE[1] * F,
    ).images  # fmt: skip
    got = model.sample(RNG, PROMPTS, mode="single", image=images, strength=0.6, num_steps=5)
    tiny.check(got, want)
