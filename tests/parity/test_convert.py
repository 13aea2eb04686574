"""Folders that diffusers wrote, loaded here; folders written here, loaded by diffusers.

Random weights. Forward passes agree to 1e-4 of the output's scale, saved tensors bitwise.
"""

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

lcm = diffusers.LatentConsistencyModelPipeline
diffusers.utils.logging.set_verbosity_error()
WIDTHS = (32, 64)
KL = dict(
    block_out_channels=WIDTHS,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=16,
)
VQ = dict(
    block_out_channels=WIDTHS,
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    latent_channels=3,
    num_vq_embeddings=16,
    norm_num_groups=8,
    sample_size=16,
    scaling_factor=1.0,
)
UNET = dict(
    block_out_channels=WIDTHS,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=24,
    attention_head_dim=4,
    norm_num_groups=8,
    sample_size=8,
)
PLAIN = dict(
    block_out_channels=WIDTHS,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=16,
    norm_num_groups=8,
    sample_size=8,
    in_channels=3,
    out_channels=3,
)
UPSCALER = dict(in_channels=7, num_class_embeds=9, use_linear_projection=True)
COMPONENTS = {
    "kl": lambda: diffusers.AutoencoderKL(**KL),
    "kl-bare": lambda: diffusers.AutoencoderKL(
        **KL, use_quant_conv=False, use_post_quant_conv=False
    ),
    "vq": lambda: diffusers.VQModel(**VQ),
    "tiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
    ),
    "unet": lambda: diffusers.UNet2DConditionModel(**UNET),
    "unet-linear": lambda: diffusers.UNet2DConditionModel(
        **{**UNET, "use_linear_projection": True, "attention_head_dim": (2, 4)}
    ),
    "unet-crossed": lambda: diffusers.UNet2DConditionModel(
        **{**UNET, "only_cross_attention": (True, False)}
    ),
    "unet-lcm": lambda: diffusers.UNet2DConditionModel(**UNET, time_cond_proj_dim=12),
    "unet-inpainting": lambda: diffusers.UNet2DConditionModel(**{**UNET, "in_channels": 9}),
    "unet-classes": lambda: diffusers.UNet2DConditionModel(**UNET, num_class_embeds=5),
    "unet-upscaler": lambda: diffusers.UNet2DConditionModel(
        **UNET, **UPSCALER, only_cross_attention=(True, False)
    ),
    "unet-unclip": lambda: diffusers.UNet2DConditionModel(
        **UNET, class_embed_type="projection", projection_class_embeddings_input_dim=6
    ),
    "plain": lambda: diffusers.UNet2DModel(**PLAIN),
    "plain-classes": lambda: diffusers.UNet2DModel(**PLAIN, num_class_embeds=5),
    "plain-updown": lambda: diffusers.UNet2DModel(
        **{
            **PLAIN,
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 8,
        }
    ),
}


def randomised(module, seed=0):
    """Weights that differ from what they start from, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return module.eval()


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous()


def to_numpy(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def close(got, want, tolerance=1e-4):
    got, want = np.asarray(got), np.asarray(want)
    error = np.abs(got - want).max() / np.abs(want).std()
    print(f"max error {error:.1e} of the scale")
    assert error <= tolerance


def tensors_of(folder):
    (file,) = folder.glob("*.safetensors")
    return safetensors.numpy.load_file(file)


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def check_unet(model, theirs):
    """All that the network can be told: text, further channels, classes, levels, vectors."""
    config, told, kwargs = theirs.config, {}, {}
    x, numbers = draw(0, 2, 8, 8, config.in_channels), jnp.array([1, 4])
    z_t, concat = x[..., : config.out_channels], x[..., config.out_channels :]
    if concat.size:
        told["concat"] = concat
    if config.get("cross_attention_dim"):
        told["context"] = draw(1, 2, 5, 24)
        kwargs["encoder_hidden_states"] = torch.from_numpy(np.array(told["context"]))
    if config.get("num_class_embeds"):
        batch = {"class_label": numbers, "noise_level": numbers, "low_res": concat}
        told["vector"] = model.denoiser.condition(batch, jnp.zeros(2, bool)).vector
        kwargs["class_labels"] = torch.from_numpy(np.array(numbers)).long()
    if config.get("time_cond_proj_dim"):
        w = torch.tensor([0.5, 7.0])
        told["guidance"] = jnp.asarray(w.numpy())
        kwargs["timestep_cond"] = lcm.get_guidance_scale_embedding(None, w, 12)
    if config.get("class_embed_type"):
        told["vector"] = draw(2, 2, config.projection_class_embeddings_input_dim)
        kwargs["class_labels"] = torch.from_numpy(np.array(told["vector"]))
    want = theirs(to_torch(x), torch.tensor([3, 777]), **kwargs).sample
    close(model.denoise(z_t, jnp.array([3, 777]), ldm.Conditioning(**told)), to_numpy(want))


@pytest.mark.parametrize("name", COMPONENTS)
def test_components(name, tmp_path):
    torch.manual_seed(1)
    theirs = randomised(COMPONENTS[name]())
    theirs.save_pretrained(tmp_path / "theirs")
    model = ldm.load(tmp_path / "theirs")
    with torch.no_grad():
        if name in ("kl", "kl-bare", "vq", "tiny"):
            image = jnp.clip(draw(0, 2, 16, 16, 3), -1, 1)
            scale = theirs.config.scaling_factor
            if name not in ("vq", "tiny"):
                z = theirs.encode(to_torch(image)).latent_dist.mode()
            else:
                z = theirs.encode(to_torch(image)).latents
            close(model.encode(image), to_numpy(z) * scale)
            latents = draw(1, 2, 8, 8, z.shape[1])
            close(model.decode(latents), to_numpy(theirs.decode(to_torch(latents) / scale).sample))
        else:
            check_unet(model, theirs)
    model.save(tmp_path / "ours", format="diffusers")
    assert_same_tensors(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs"))
    again = type(theirs).from_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == config
    assert_same_tensors(
        {k: v.numpy() for k, v in again.state_dict().items()},
        {k: v.numpy() for k, v in theirs.state_dict().items()},
    )
