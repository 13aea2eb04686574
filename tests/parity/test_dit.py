"""DiT against diffusers' class with random weights, and its files in and out."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import latent_diffusion as ldm
from latent_diffusion.core.rng import example_keys, normal_per_example, sampling_keys
from latent_diffusion.models import sampling
from latent_diffusion.process.plan import plan
from latent_diffusion.process.schedules import make_schedule

diffusers.utils.logging.set_verbosity_error()
TINY = dict(
    num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
    sample_size=8, patch_size=2, num_embeds_ada_norm=5, norm_eps=1e-3,
)  # fmt: skip
LABELS = [4, 0]


def make(**fields):
    """A transformer whose every parameter is random; copies of the embeddings stay alike."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**{**TINY, **fields})
    for name, p in model.named_parameters():
        scale = 0.3 if "norm1.linear" in name or "proj_out" in name else 0.05
        torch.nn.init.normal_(p, std=scale)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model.eval()


def inputs(size=(8, 8)):
    z = jax.random.normal(jax.random.key(0), (2, *size, 4))
    return z, jnp.array([3, 777])


def ours(model, z, t):
    condition = model.denoiser.condition({"class_label": jnp.array(LABELS)}, jnp.zeros(2, bool))
    return np.asarray(model.denoise(z, t, condition))


def theirs_of(z):
    return torch.from_numpy(np.array(z)).permute(0, 3, 1, 2)


def theirs(model, z, t):
    x = theirs_of(z)
    with torch.no_grad():
        out = model(x, torch.from_numpy(np.array(t)), class_labels=torch.tensor(LABELS)).sample
    return out[:, :4].permute(0, 2, 3, 1).numpy()


def close(got, want, tolerance=1e-4):
    error = np.abs(got - want).max() / np.abs(want).std()
    print(f"max error {error:.1e} of the scale")
    assert error <= tolerance


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("fields", [{}, {"out_channels": 4}, {"patch_size": 4}, {"norm_eps": 1e-6}])
def test_the_network_and_its_folder(fields, tmp_path):
    model = make(**fields)
    model.save_pretrained(tmp_path / "theirs")
    loaded = ldm.load(tmp_path / "theirs")
    z, t = inputs()
    close(ours(loaded, z, t), theirs(model, z, t))
    loaded.save(tmp_path / "ours", "diffusers")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(theirs(again, z, t), theirs(model, z, t))


def test_a_released_size_goes_through_its_flat_file(tmp_path):
    """DiT's file, which has no settings: 384 wide with 6 heads, read and written bitwise."""
    model = make(num_attention_heads=6, attention_head_dim=64, norm_eps=1e-6, num_layers=1)
    model.save_pretrained(tmp_path / "theirs")
    loaded = ldm.load(tmp_path / "theirs")
    loaded.save(tmp_path / "dit.safetensors", "compvis")
    read = ldm.load(tmp_path / "dit.safetensors")
    z, t = inputs()
    network = read.denoiser.network
    assert (network.frequency_shift, loaded.denoiser.network.frequency_shift) == (0, 1)
    shifted = read.denoiser.replace(network=network.clone(frequency_shift=1))
    np.testing.assert_array_equal(ours(read.replace(denoiser=shifted), z, t), ours(loaded, z, t))
    read.save(tmp_path / "again.safetensors", "compvis")
    files = [
        safetensors.numpy.load_file(tmp_path / f"{name}.safetensors") for name in ("dit", "again")
    ]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        np.testing.assert_array_equal(*(file[name] for file in files))
    positions = diffusers.models.embeddings.get_2d_sincos_pos_embed(
        384, 4, base_size=4, output_type="np"
    )
    np.testing.assert_allclose(files[0]["pos_embed"][0], positions, atol=1e-6)


def test_copies_of_the_embedding_must_be_alike(tmp_path):
    model = make()
    torch.nn.init.ones_(model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"copies of norm1\.emb.timestep_embedder\.linear_1 differ"
    ):
        ldm.load(tmp_path)


@pytest.mark.parametrize("channels", [3, None])
def test_ancestral_sampling_with_the_learned_variance(channels, tmp_path, monkeypatch):
    """Their network and scheduler in the loop of DiT's code, whose guidance is on 3 channels."""
    model = make()
    for p in model.proj_out_2.parameters():
        p.data *= 0.1  # a variance between its bounds
    model.save_pretrained(tmp_path)
    loaded, scale, steps = ldm.load(tmp_path), 4.0, 5
    keys, guided = sampling_keys(example_keys(jax.random.key(0), 2)), channels or 4
    scheduler = diffusers.DDPMScheduler(
        variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(steps)
    z = theirs_of(normal_per_example(keys.start, (8, 8, 4)))
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            labels = torch.tensor([*LABELS, 5, 5])  # the last is the null class
            out = model(torch.cat([z, z]), t.expand(4), class_labels=labels).sample
        out, without = out.chunk(2)
        out[:, :guided] = without[:, :guided] + scale * (out - without)[:, :guided]
        of_step = jax.vmap(jax.random.fold_in, (0, None))(keys.steps, i)
        noise = theirs_of(normal_per_example(of_step, (8, 8, 4)))
        module = diffusers.schedulers.scheduling_ddpm
        monkeypatch.setattr(module, "randn_tensor", lambda *args, noise=noise, **kwargs: noise)
        z = scheduler.step(out, t, z).prev_sample
    options = {"sampler": "ddpm", "num_steps": steps, "spacing": "uniform"}
    options |= {"guidance_scale": scale, "guidance_channels": channels, "learned_variance": True}
    denoiser = loaded.denoiser.replace(
        schedule=make_schedule("sqrt_linear", beta_start=1e-4, beta_end=0.02)
    )
    timesteps, planned = plan(denoiser.schedule, "eps", {}, options)
    null, condition = (
        denoiser.condition({"class_label": jnp.array(LABELS)}, jnp.full(2, drop))
        for drop in (True, False)
    )
    got = sampling.sample(denoiser, keys, condition, null, timesteps, (8, 8, 4), planned)
    close(np.asarray(got), z.permute(0, 2, 3, 1).numpy(), 1e-3)


def test_the_pipeline_draws_the_same_pictures(tmp_path):
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8,
        sample_size=16, scaling_factor=0.5,
    ).eval()  # fmt: skip
    # The pipeline's null class is number 1000, the last row of the released models.
    pipeline = diffusers.DiTPipeline(make(num_embeds_ada_norm=1000), vae, diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "theirs")
    named = tmp_path / "theirs" / "model_index.json"  # as the released folders have it
    named.write_text(
        json.dumps({**json.loads(named.read_text()), "id2label": {"0": "tench, fish"}})
    )
    pipeline.set_progress_bar_config(disable=True)
    model = ldm.load(tmp_path / "theirs")
    assert model.image_size == 16
    noise = {}
    original = diffusers.pipelines.dit.pipeline_dit.randn_tensor

    def remember(*args, **kwargs):
        noise["z"] = original(*args, **kwargs)
        return noise["z"]

    diffusers.pipelines.dit.pipeline_dit.randn_tensor = remember
    try:
        want = pipeline(
            class_labels=LABELS, guidance_scale=3.0, num_inference_steps=5, output_type="np"
        ).images
    finally:
        diffusers.pipelines.dit.pipeline_dit.randn_tensor = original
    got = model.sample(
        jax.random.key(0), class_labels=LABELS, guidance_scale=3.0, num_steps=5,
        z_T=jnp.asarray(noise["z"].permute(0, 2, 3, 1).numpy()),
    )  # fmt: skip
    error = np.abs(np.asarray(got) / 2 + 0.5 - want).max() * 255
    print(f"{error:.2f} of 255")
    assert error <= 2
    model.save(tmp_path / "ours", "diffusers")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline" and index["id2label"] == {"0": "tench, fish"}
    diffusers.DiTPipeline.from_pretrained(tmp_path / "ours")
