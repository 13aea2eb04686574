"""Pipelines that diffusers made, loaded here: the same prompts and noise give the same pictures.

Random weights, tiny, but for one step of Stable Diffusion 1 in its real shape. Where diffusers
draws noise of its own it is handed ours, and its posteriors are taken at their mode, as ours are.
"""

import json
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import public_keys
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from ml_collections import ConfigDict
from safetensors.numpy import save_file

import latent_diffusion as ldm
from configs import default
from latent_diffusion import convert
from latent_diffusion.convert import autoencoder as autoencoder_
from latent_diffusion.convert import text
from latent_diffusion.convert import unet as unet_
from latent_diffusion.core.rng import (
    keys_of_examples,
    normal_per_example,
    sampling_keys,
    split_per_example,
)
from latent_diffusion.data.tokenizers import WordTokenizer
from latent_diffusion.generation.loading import as_model
from latent_diffusion.training import loop

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
# diffusers' own, of numpy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # of diffusers, for a steps_offset other than that of Stable Diffusion's own scheduler
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]
RNG = jax.random.key(3)
PROMPTS = ["a red cat", "two dogs, far away"]
SIDE, F = 8, 2  # of the latents; the first stage's factor
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STABLE = {**BETAS, "steps_offset": 1, "set_alpha_to_one": False}
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(**STABLE, clip_sample=False),
    "pndm": lambda: diffusers.PNDMScheduler(**STABLE, skip_prk_steps=True),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**BETAS, steps_offset=1),
    "whole timesteps": lambda: diffusers.DPMSolverMultistepScheduler(
        **BETAS, use_karras_sigmas=True
    ),
    "start of k-diffusion": lambda: diffusers.EulerDiscreteScheduler(**BETAS, use_beta_sigmas=True),
    "edm": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
}


def randomised(module, seed=0, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return module.eval()


def make_vae(scaling_factor=0.5, **own):
    torch.manual_seed(1)
    fields = dict(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE * F,
        scaling_factor=scaling_factor,
    )
    return randomised(diffusers.AutoencoderKL(**{**fields, **own}))


def make_vq():
    torch.manual_seed(2)
    return randomised(
        diffusers.VQModel(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=3,
            num_vq_embeddings=16,
            norm_num_groups=8,
            sample_size=SIDE * F,
            scaling_factor=1.0,
        )
    )


def make_unet(**own):
    torch.manual_seed(3)
    fields = dict(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        sample_size=SIDE,
    )
    return randomised(diffusers.UNet2DConditionModel(**{**fields, **own}))


def make_plain_unet(in_channels):
    torch.manual_seed(4)
    return randomised(
        diffusers.UNet2DModel(
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=16,
            norm_num_groups=8,
            sample_size=SIDE,
            in_channels=in_channels,
            out_channels=3,
        )
    )


def make_clip(folder, length=24, **fields):
    """A text encoder and its tokenizer: single letters, and a few merges."""
    from latent_diffusion.data.tokenizers.clip import BYTE_CHARACTERS as letters

    singles = list(letters.values())
    merges = ["c a", "ca t</w>", "d o", "do g", "r e", "re d</w>"]
    vocabulary = [*singles, *(c + "</w>" for c in singles), *(m.replace(" ", "") for m in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(5)
    tiny = dict(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=length, projection_dim=32,
        bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
    )  # fmt: skip
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**tiny, **fields}))
    return {
        "text_encoder": randomised(encoder, 5, 0.1),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder),
    }


ABSENT = {"safety_checker": None, "feature_extractor": None}


def stable(kind, tmp_path, unet, **own):
    """A pipeline of diffusers', and the model loaded from the folder where it saved itself."""
    parts = {"unet": unet, **make_clip(tmp_path / "vocabulary"), **own}
    parts.setdefault("vae", make_vae())
    parts.setdefault("scheduler", SCHEDULERS["ddim"]())
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "pipeline")
    return pipeline, ldm.load(tmp_path / "pipeline")


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous()


def picture(x):
    """In [0, 1], as diffusers wants pictures."""
    return to_torch(x) / 2 + 0.5


def draw(seed, *shape):
    return np.array(jax.random.normal(jax.random.key(seed), shape))


def image_keys(number):
    return keys_of_examples(RNG, jnp.arange(number))


def condition_keys(number):
    """The keys of the only condition that adds noise."""
    (keys,) = split_per_example(sampling_keys(image_keys(number)).conditions, 1)
    return keys


def start_noise(number, *shape):
    """What `Model.sample` starts from where it isn't given z_T."""
    start = sampling_keys(image_keys(number)).start
    return np.array(normal_per_example(start, shape))


def in_order(monkeypatch, pipeline, *noises):
    """diffusers' draws of noise become these, one after the other."""
    left = [to_torch(noise) for noise in noises]
    module = sys.modules[type(pipeline).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: left.pop(0).reshape(shape))
    return left


@pytest.fixture(autouse=True)
def modes(monkeypatch):
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )


def check(got, want, where=None):
    """Pictures [0, 1] of theirs against ours [-1, 1]: within 2 of 255 levels, and not flat."""
    got, want = (np.clip(np.asarray(got), -1, 1) + 1) / 2, np.asarray(want)
    difference = np.abs(got - want) if where is None else np.abs(got - want)[where]
    print(f"largest difference {255 * difference.max():.4f} levels; std {want.std():.3f}")
    assert difference.max() <= 2 / 255
    assert want.std() > 0.02 and np.abs(want[0] - want[-1]).max() > 1 / 255


def sample(model, prompts=PROMPTS, **options):
    return model.sample(RNG, prompts, mode="single", **{"num_steps": 20, **options})


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_text_to_image(scheduler, tmp_path):
    pipeline, model = stable(
        diffusers.StableDiffusionPipeline,
        tmp_path,
        make_unet(),
        scheduler=SCHEDULERS[scheduler](),
        **ABSENT,
    )
    z_T = draw(0, 2, SIDE, SIDE, 4)
    theirs = pipeline(PROMPTS, latents=to_torch(z_T), num_inference_steps=20, output_type="np")
    check(sample(model, z_T=z_T), theirs.images)


def test_v_prediction_and_a_negative_prompt(tmp_path):
    scheduler = diffusers.DDIMScheduler(**STABLE, clip_sample=False, prediction_type="v_prediction")
    unet = make_unet(use_linear_projection=True, attention_head_dim=(1, 2))
    pipeline, model = stable(
        diffusers.StableDiffusionPipeline, tmp_path, unet, scheduler=scheduler, **ABSENT
    )
    z_T, options = draw(0, 2, SIDE, SIDE, 4), {"guidance_scale": 5.0}
    theirs = pipeline(
        PROMPTS, negative_prompt=["grey"] * 2, latents=to_torch(z_T), num_inference_steps=20,
        output_type="np", **options,
    )  # fmt: skip
    check(sample(model, z_T=z_T, negative_prompts=["grey"], **options), theirs.images)


def test_image_to_image(tmp_path, monkeypatch):
    pipeline, model = stable(
        diffusers.StableDiffusionImg2ImgPipeline, tmp_path, make_unet(), **ABSENT
    )
    image = np.tanh(draw(1, 2, SIDE * F, SIDE * F, 3))
    in_order(monkeypatch, pipeline, start_noise(2, SIDE, SIDE, 4))
    theirs = pipeline(
        PROMPTS, image=picture(image), strength=0.6, num_inference_steps=20, output_type="np"
    )
    check(sample(model, image=image, strength=0.6), theirs.images)


def test_inpainting(tmp_path, monkeypatch):
    pipeline, model = stable(
        diffusers.StableDiffusionInpaintPipeline, tmp_path, make_unet(in_channels=9), **ABSENT
    )
    image, mask = np.tanh(draw(1, 2, SIDE * F, SIDE * F, 3)), np.zeros((2, SIDE * F, SIDE * F, 1))
    mask[0, 3:12, 5:] = mask[1, :, 9:] = 1.0
    mask = mask.astype(np.float32)
    in_order(monkeypatch, pipeline, draw(0, 2, SIDE, SIDE, 4))
    theirs = pipeline(
        PROMPTS, image=picture(image), mask_image=to_torch(mask), num_inference_steps=20,
        height=SIDE * F, width=SIDE * F, output_type="np", strength=1.0,
    )  # fmt: skip
    got = sample(model, image=image, mask=mask, z_T=draw(0, 2, SIDE, SIDE, 4))
    check(got, theirs.images, np.broadcast_to(mask > 0.5, got.shape))
    outside = np.broadcast_to(mask < 0.5, got.shape)
    np.testing.assert_allclose(got[outside], image[outside], atol=1e-6)


def test_depth_to_image(tmp_path, monkeypatch):
    pipeline, model = stable(
        diffusers.StableDiffusionDepth2ImgPipeline, tmp_path, make_unet(in_channels=5),
        depth_estimator=None, feature_extractor=None,
    )  # fmt: skip
    image = np.tanh(draw(1, 2, SIDE * F, SIDE * F, 3))
    depth = 3 + draw(2, 2, SIDE * F, SIDE * F, 1)
    in_order(monkeypatch, pipeline, start_noise(2, SIDE, SIDE, 4))
    theirs = pipeline(
        PROMPTS, image=picture(image), depth_map=to_torch(depth)[:, 0], strength=0.75,
        num_inference_steps=20, output_type="np",
    )  # fmt: skip
    check(sample(model, image=image, depth=depth, strength=0.75), theirs.images)


def test_upscaling(tmp_path, monkeypatch):
    unet = make_unet(in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False))
    pipeline, model = stable(
        diffusers.StableDiffusionUpscalePipeline, tmp_path, unet, max_noise_level=350,
        vae=make_vae(0.08333),
        low_res_scheduler=diffusers.DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=1e-4, beta_end=0.02
        ),
    )  # fmt: skip
    low_res, z_T = np.tanh(draw(1, 2, SIDE, SIDE, 3)), draw(0, 2, SIDE, SIDE, 4)
    _, noise = split_per_example(condition_keys(2), 2)
    in_order(monkeypatch, pipeline, normal_per_example(noise, (SIDE, SIDE, 3)))
    theirs = pipeline(
        PROMPTS, image=picture(low_res), noise_level=30, latents=to_torch(z_T),
        num_inference_steps=20, output_type="np",
    )  # fmt: skip
    check(sample(model, low_res=low_res, noise_level=30, z_T=z_T), theirs.images)


def test_variations_of_a_picture(tmp_path, monkeypatch):
    side, width = 12, 10  # of what CLIP sees; of its embedding
    torch.manual_seed(10)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=side, patch_size=4, projection_dim=width,
    )  # fmt: skip
    normalizer = StableUnCLIPImageNormalizer(width)
    with torch.no_grad():
        normalizer.mean += 0.3 * torch.randn(1, width)
        normalizer.std += 0.3 * torch.rand(1, width)
    unet = make_unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * width)
    pipeline, model = stable(
        diffusers.StableUnCLIPImg2ImgPipeline, tmp_path, unet,
        image_encoder=randomised(transformers.CLIPVisionModelWithProjection(vision), 10, 0.3),
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        image_normalizer=normalizer,
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )  # fmt: skip
    image, z_T = np.tanh(draw(1, 2, side, side, 3)), draw(0, 2, SIDE, SIDE, 4)
    _, noise = split_per_example(condition_keys(2), 2)
    noise = torch.from_numpy(np.array(normal_per_example(noise, (width,))))
    monkeypatch.setattr(
        sys.modules[type(pipeline).__module__], "randn_tensor", lambda shape, **_: noise
    )
    processor = pipeline.feature_extractor
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std)
    )
    theirs = pipeline(
        (picture(image) - mean) / std, PROMPTS, noise_level=200, latents=to_torch(z_T),
        num_inference_steps=20, output_type="np", height=SIDE * F, width=SIDE * F,
    )  # fmt: skip
    ours = sample(model, image=image, noise_level=200, z_T=z_T)
    check(ours, theirs.images)
    assert np.abs(ours - sample(model, image=image, z_T=z_T)).max() > 1 / 255  # level 0
    # diffusers reads what we write of it.
    model.save(tmp_path / "ours", format="diffusers")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    for name in ("image_encoder", "image_normalizer", "unet"):
        want = getattr(pipeline, name).state_dict()
        for key, value in getattr(again, name).state_dict().items():
            assert torch.equal(value, want[key]), key
    assert again.feature_extractor.crop_size == processor.crop_size


def bert_pipeline(folder, scheduler, vae):
    words = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "two",
             "dog", "##s", ",", "far", "away"]  # fmt: skip
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(6)
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(words), d_model=32, encoder_layers=2, encoder_attention_heads=8,
            encoder_ffn_dim=128, head_dim=64,
        )
    )  # fmt: skip
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    pipeline = diffusers.LDMTextToImagePipeline(
        vqvae=vae, bert=randomised(bert, 6, 0.1), tokenizer=tokenizer, unet=make_unet(),
        scheduler=scheduler,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_papers_text_to_image(tmp_path):
    pipeline = bert_pipeline(tmp_path / "vocabulary", SCHEDULERS["ddim"](), make_vae())
    pipeline.save_pretrained(tmp_path / "pipeline")
    model, z_T = ldm.load(tmp_path / "pipeline"), draw(0, 2, SIDE, SIDE, 4)
    theirs = pipeline(
        PROMPTS, latents=to_torch(z_T), num_inference_steps=20, guidance_scale=7.5,
        output_type="np", height=8 * SIDE, width=8 * SIDE,
    )  # fmt: skip
    check(sample(model, z_T=z_T, guidance_scale=7.5), theirs.images)


def test_unconditional_with_a_codebook(tmp_path, monkeypatch):
    pipeline = diffusers.LDMPipeline(
        vqvae=make_vq(), unet=make_plain_unet(3), scheduler=SCHEDULERS["ddim"]()
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    z_T = draw(0, 2, SIDE, SIDE, 3)
    in_order(monkeypatch, pipeline, z_T)
    theirs = pipeline(batch_size=2, num_inference_steps=20, output_type="np")
    check(sample(ldm.load(tmp_path), None, num_images=2, z_T=z_T), theirs.images)


def test_the_papers_super_resolution(tmp_path, monkeypatch):
    pipeline = diffusers.LDMSuperResolutionPipeline(
        vqvae=make_vq(), unet=make_plain_unet(6), scheduler=SCHEDULERS["ddim"]()
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    low_res, z_T = np.tanh(draw(1, 2, SIDE, SIDE, 3)), draw(0, 2, SIDE, SIDE, 3)
    in_order(monkeypatch, pipeline, z_T)
    theirs = pipeline(image=to_torch(low_res), num_inference_steps=20, output_type="np")
    check(sample(ldm.load(tmp_path), None, low_res=low_res, z_T=z_T), theirs.images)


def lora_file(path, unet, encoder, kind):
    """Random factors for the attention of both, in kohya's names or diffusers'."""
    rng, tensors, rank = np.random.default_rng(7), {}, 3
    for prefix, model in (("unet", unet), ("te", encoder)):
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            if not name.endswith(
                ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj", "out_proj")
            ):
                continue
            down = rng.normal(size=(rank, module.in_features)).astype(np.float32)
            up = rng.normal(size=(module.out_features, rank)).astype(np.float32)
            whole = (
                name if prefix == "unet" or name.startswith("text_model") else f"text_model.{name}"
            )
            if kind == "kohya":
                key = f"lora_{prefix}_{whole.replace('.', '_')}"
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": 0.1 * up}
                tensors[f"{key}.alpha"] = np.float32(2.0)
            else:
                key = f"{'unet' if prefix == 'unet' else 'text_encoder'}.{whole}"
                tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": 0.1 * up}
    save_file({name: np.asarray(array) for name, array in tensors.items()}, path)


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_adaptations(kind, tmp_path):
    pytest.importorskip("peft")
    pipeline, model = stable(diffusers.StableDiffusionPipeline, tmp_path, make_unet(), **ABSENT)
    file = tmp_path / "lora.safetensors"
    lora_file(file, pipeline.unet, pipeline.text_encoder, kind)
    adapted = ldm.load(tmp_path / "pipeline", lora={file: 1.0})
    plain, z_T = sample(model, z_T=draw(0, 2, SIDE, SIDE, 4)), draw(0, 2, SIDE, SIDE, 4)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    theirs = pipeline(PROMPTS, latents=to_torch(z_T), num_inference_steps=20, output_type="np")
    ours = sample(adapted, z_T=z_T)
    check(ours, theirs.images)
    assert np.abs(ours - plain).max() > 0.05


def adapting(folder, model, kind):
    """A short training of factors beside the attention of both networks of a pipeline's folder."""
    config, bundle = default.get_config(), convert.bundle_of(model)
    config.update_from_flattened_dict({
        "init_from": str(folder), "tokenizer.name": "clip", "tokenizer.max_length": 24,
        "tokenizer.path": str(folder / "tokenizer"), "data.image_size": SIDE * F,
        "batch_size": 8, "num_steps": 3, "log.every_steps": 1, "log.images_every_steps": 0,
        "log.eval_batches": 1, "log.num_images": 1, "sampling.num_steps": 2,
        "optimizer.learning_rate": 0.05, "lora.rank": 2, "lora.alpha": 3.0, "lora.kind": kind,
        "lora.targets": (
            r"unet/.*(attn\d/to_.*|in_layers_2|skip_connection|op|proj_in|emb_layers_1)/",
            # transformers' encoder leaves the magnitudes of a DoRA out.
            *([r"clip_text/.*self_attn/(qkv|out_proj)"] if kind == "lora" else []),
        ),
    })  # fmt: skip
    unet = {k: v for k, v in bundle.unet.fields.items() if k in config.unet}
    config.unet.update(unet)
    config.conditioners = ConfigDict({"clip_text": dict(bundle.conditioners["clip_text"].fields)})
    config.diffusion.update(bundle.diffusion)
    return config


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adaptations_that_we_train(kind, tmp_path):
    pytest.importorskip("peft")
    pipeline, model = stable(diffusers.StableDiffusionPipeline, tmp_path, make_unet(), **ABSENT)
    loop.train(adapting(tmp_path / "pipeline", model, kind), tmp_path / "run")
    z_T = draw(0, 2, SIDE, SIDE, 4)
    options = {**model.defaults, "num_steps": 20}
    ours = sample(ldm.load(tmp_path / "run"), z_T=z_T, **options)
    assert np.abs(ours - sample(model, z_T=z_T)).max() > 0.05
    for names in ("lora", "kohya"):
        file = tmp_path / f"{names}.safetensors"
        convert.write(convert.read(tmp_path / "run"), file, names)
        unmerged = [(ldm.load_adapter(file), 1.0)]
        check(sample(model, z_T=z_T, adapters=unmerged), (ours + 1) / 2)
        if (names, kind) == ("kohya", "dora"):
            continue  # diffusers drops `dora_scale`
        pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        theirs = pipeline(PROMPTS, latents=to_torch(z_T), num_inference_steps=20, output_type="np")
        check(ours, theirs.images)
        pipeline.unload_lora_weights()
        merged = ldm.load(tmp_path / "pipeline", lora={file: 1.0})
        check(sample(merged, z_T=z_T), theirs.images)


def make_own():
    """A model as our training leaves it: words, v-prediction, latents normalised per channel."""
    rng = np.random.default_rng(8)

    def part(fields, shapes):
        return convert.as_part(
            fields,
            jax.tree.map(lambda x: (0.15 * rng.normal(size=x.shape)).astype(np.float32), shapes),
        )

    autoencoder = dict(channels=16, channel_mult=(1, 2), num_res_blocks=1, num_groups=8,
                       embed_dim=4, z_channels=4, resolution=16, regularization="kl")  # fmt: skip
    unet = dict(model_channels=16, channel_mult=(1, 2), num_res_blocks=1,
                attention_resolutions=(1,), num_heads=2, num_groups=8, out_channels=4)  # fmt: skip
    words = dict(vocab_size=12, max_length=6, width=32, depth=1, num_heads=2, head_dim=16)
    return as_model(
        convert.Bundle(
            autoencoder=part(autoencoder, autoencoder_.shapes(autoencoder)),
            scale_factor=np.array([0.5, 1.0, 2.0, 1.5], np.float32),
            shift=np.array([0.1, -0.2, 0.0, 0.3], np.float32),
            unet=part(unet, unet_.shapes(unet, 4, 32, None)),
            conditioners={"text": part(words, text.shapes(words))},
            diffusion={"schedule": "cosine", "num_timesteps": 1000, "beta_start": 1e-4,
                       "beta_end": 0.02, "zero_terminal_snr": False, "prediction": "v"},
            tokenizer=WordTokenizer.train(["a red cat", "two dogs far away", "são"], 12, 6),
            image_size=SIDE * F,
        )
    )  # fmt: skip


def test_our_own_text_model_sampled_by_diffusers(tmp_path):
    model, z_T = make_own(), draw(0, 2, SIDE, SIDE, 4)
    model.save(tmp_path, format="diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red São’s cat", "two dogs, far-away unknown"]
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=6, truncation=True)
    np.testing.assert_array_equal(ids["input_ids"], model.tokenizer(prompts))
    theirs = pipeline(
        prompts, latents=to_torch(z_T), num_inference_steps=20, guidance_scale=2.0,
        output_type="np", height=SIDE * F, width=SIDE * F,
    )  # fmt: skip
    check(sample(model, prompts, z_T=z_T, guidance_scale=2.0, spacing="trailing"), theirs.images)


MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(MEMORY < 16e9, reason="needs 12 GB of memory")
def test_one_step_of_stable_diffusion_1_in_its_real_shape(tmp_path):
    torch.manual_seed(9)
    parts = make_clip(tmp_path / "vocabulary", 77, **public_keys.CLIP_L, vocab_size=49408)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**public_keys.SD_VAE).eval(),
        unet=diffusers.UNet2DConditionModel(**{**public_keys.SD_UNET, "sample_size": SIDE}).eval(),
        scheduler=SCHEDULERS["ddim"](),
        **parts,
        **ABSENT,
    )
    pipeline.set_progress_bar_config(disable=True)
    z_T = draw(0, 2, SIDE, SIDE, 4)
    theirs = pipeline(PROMPTS, latents=to_torch(z_T), num_inference_steps=1, output_type="np")
    pipeline.save_pretrained(tmp_path / "pipeline")
    del pipeline, parts
    model = ldm.load(tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline")
    assert sum(x.size for x in jax.tree.leaves(model.denoiser.params["unet"])) == 859_520_964
    check(sample(model, z_T=z_T, num_steps=1), theirs.images)
