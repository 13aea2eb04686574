"""Control nets against diffusers: residuals, and pictures of its pipelines, to 1e-4."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from test_pipelines import (
    ABSENT,
    PROMPTS,
    SIDE,
    STABLE,
    DiagonalGaussianDistribution,
    F,
    draw,
    in_order,
    make_unet,
    picture,
    randomised,
    sample,
    stable,
    to_torch,
)  # fmt: skip

import latent_diffusion as ldm
from latent_diffusion.convert.adapters import write_control
from latent_diffusion.core.types import Conditioning
from latent_diffusion.nets.control import HINT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
HINTS = [np.random.default_rng(i).uniform(size=(2, SIDE * F, SIDE * F, 3)).astype("f4")
         for i in range(2)]  # fmt: skip


def make_net(unet, folder, seed, pooled=False, **own):
    net = diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(16, 32), **own
    )
    net.register_to_config(global_pool_conditions=pooled)
    net = randomised(net, seed, 0.1)
    net.save_pretrained(folder)
    return net, ldm.load_adapter(folder)


def close(name, got, want, bound=1e-4):
    difference = np.abs(np.asarray(got) - want).max()
    print(f"{name}: largest difference {difference:.1e} of {np.abs(want).max():.2f}")
    assert difference <= bound


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_residuals(order, tmp_path):
    unet = make_unet()
    net, adapter = make_net(unet, tmp_path, 1, controlnet_conditioning_channel_order=order)
    z_t, text, t = draw(0, 2, SIDE, SIDE, 4), draw(1, 2, 5, 32), np.array([7, 400])
    with torch.no_grad():
        beside, middle = net(
            to_torch(z_t), torch.from_numpy(t), torch.from_numpy(text), to_torch(HINTS[0]),
            return_dict=False,
        )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    model = ldm.load(tmp_path / "unet")
    params = model.denoiser.params["unet"]
    module, tree = adapter.net(model.denoiser.network, params, F), adapter.tree(params)
    hint = HINTS[0][..., ::-1] if adapter.bgr else HINTS[0]
    hint = module.hint_net.apply({"params": tree[HINT]}, jnp.asarray(hint))
    ours = module.apply({"params": tree}, z_t, jnp.asarray(t), Conditioning(context=text), hint)
    for i, (got, want) in enumerate(zip(ours, [*beside, middle], strict=True)):
        close(adapter.blocks[i], np.moveaxis(np.asarray(got), 3, 1), want.numpy(), 1e-5)
    # Back to diffusers, with its own settings, and with ours, as a net trained here is written.
    for config in (adapter.config, {}):
        write_control(adapter.replace(config=config), tmp_path / "again", "diffusers")
        again = diffusers.ControlNetModel.from_pretrained(tmp_path / "again")
        for name in ("attention_head_dim", "global_pool_conditions", "cross_attention_dim"):
            assert again.config[name] == net.config[name]
        for name, tensor in net.state_dict().items():
            np.testing.assert_array_equal(again.state_dict()[name].numpy(), tensor.numpy())


def test_a_file_of_the_originals_is_the_net_that_diffusers_makes_of_it(tmp_path):
    """By its own converter, which knows hints that shrink by eight."""
    unet = make_unet(block_out_channels=(32, 64), norm_num_groups=32, cross_attention_dim=768)
    net = randomised(diffusers.ControlNetModel.from_unet(unet), 1, 0.1)
    net.save_pretrained(tmp_path / "net")
    ours, file = ldm.load_adapter(tmp_path / "net"), tmp_path / "net.safetensors"
    write_control(ours, file, "compvis")
    made = diffusers.ControlNetModel.from_single_file(
        str(file), config=str(tmp_path / "net"), local_files_only=True
    ).state_dict()
    assert made.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(made[name].numpy(), tensor.numpy())
    again = ldm.load_adapter(file)
    assert again.params.keys() == ours.params.keys() and again.blocks == ours.blocks


CALLS = {
    "one": ([0.8], {}, {}),
    "pooled": ([0.8], {}, {}),
    "two": ([0.8, 0.5], {}, {}),
    "guess": ([0.8], {"guess_mode": True}, {"guess": True}),
    "two in windows": (
        [1.0, 0.5],
        {"control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.5, 1.0]},
        [{"start": 0.0, "end": 0.5}, {"start": 0.3, "end": 1.0}],
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_pictures_of_the_pipeline(call, tmp_path):
    weights, theirs, ours = CALLS[call]
    unet = make_unet()
    made = [make_net(unet, tmp_path / str(i), i + 1, call == "pooled") for i in range(len(weights))]
    nets = [net for net, _ in made]
    single = len(nets) == 1
    pipeline, model = stable(
        diffusers.StableDiffusionControlNetPipeline, tmp_path, unet,
        controlnet=nets[0] if single else nets, **ABSENT,
    )  # fmt: skip
    z_T = draw(0, 2, SIDE, SIDE, 4)
    hints = [to_torch(hint) for hint in HINTS[: len(nets)]]
    want = pipeline(
        PROMPTS, hints[0] if single else hints, latents=to_torch(z_T), num_inference_steps=10,
        controlnet_conditioning_scale=weights[0] if single else weights, output_type="np", **theirs,
    ).images  # fmt: skip
    settings = [ours] * len(nets) if isinstance(ours, dict) else ours
    controls = [(adapter, HINTS[i], weights[i], settings[i]) for i, (_, adapter) in enumerate(made)]
    got = (sample(model, z_T=z_T, num_steps=10, controls=controls) + 1) / 2
    close(call, got, want)
    plain = (sample(model, z_T=z_T, num_steps=10) + 1) / 2
    assert np.abs(plain - want).max() > 1e-2


def test_pictures_of_a_model_as_stable_diffusion_2(tmp_path):
    """v, linear projections, heads by level, a negative prompt, hints in the other order."""
    unet = make_unet(use_linear_projection=True, attention_head_dim=(1, 2))
    own = {"controlnet_conditioning_channel_order": "bgr"}
    net, adapter = make_net(unet, tmp_path / "net", 1, **own)
    scheduler = diffusers.DDIMScheduler(**STABLE, clip_sample=False, prediction_type="v_prediction")
    pipeline, model = stable(
        diffusers.StableDiffusionControlNetPipeline, tmp_path, unet, controlnet=net,
        scheduler=scheduler, **ABSENT,
    )  # fmt: skip
    z_T, options = draw(0, 2, SIDE, SIDE, 4), {"guidance_scale": 5.0}
    want = pipeline(
        PROMPTS, to_torch(HINTS[0]), latents=to_torch(z_T), num_inference_steps=10,
        controlnet_conditioning_scale=0.7, negative_prompt=["grey"] * 2, output_type="np",
        **options,
    ).images  # fmt: skip
    options |= {"z_T": z_T, "num_steps": 10, "negative_prompts": ["grey"]}
    got, plain = (
        (sample(model, controls=[(adapter, HINTS[0], weight)], **options) + 1) / 2
        for weight in (0.7, 0.0)
    )
    close("v", got, want)
    assert np.abs(plain - want).max() > 1e-2


def test_inpainting_by_a_net_that_sees_the_latent_alone(tmp_path, monkeypatch):
    """The U-Net also sees mask and masked picture; the net was made from one that doesn't."""
    net, adapter = make_net(make_unet(), tmp_path / "net", 1)
    pipeline, model = stable(
        diffusers.StableDiffusionControlNetInpaintPipeline, tmp_path, make_unet(in_channels=9),
        controlnet=net, **ABSENT,
    )  # fmt: skip
    image, mask = np.tanh(draw(1, 2, SIDE * F, SIDE * F, 3)), np.zeros((2, SIDE * F, SIDE * F, 1))
    mask[0, 3:12, 5:] = mask[1, :, 9:] = 1.0
    mask = mask.astype(np.float32)
    z_T = draw(0, 2, SIDE, SIDE, 4)
    in_order(monkeypatch, pipeline, z_T)
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    want = pipeline(
        PROMPTS, image=picture(image), mask_image=to_torch(mask), control_image=to_torch(HINTS[0]),
        num_inference_steps=10, controlnet_conditioning_scale=0.8, strength=1.0,
        height=SIDE * F, width=SIDE * F, output_type="np",
    ).images  # fmt: skip
    options = {"image": image, "mask": mask, "z_T": z_T, "num_steps": 10}
    got, plain = (
        (sample(model, controls=[(adapter, HINTS[0], weight)], **options) + 1) / 2
        for weight in (0.8, 0.0)
    )
    hole = np.broadcast_to(mask > 0.5, got.shape)  # outside, ours keeps the picture's own pixels
    close("inpainting", got[hole], want[hole])
    assert np.abs(plain - want)[hole].max() > 1e-2
