"""IP-Adapters against diffusers: pictures of its pipelines, to 1e-4, and its names."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import public_keys
from key_lists import read_key_list
from PIL import Image
from safetensors import safe_open
from test_control import HINTS, close, make_net
from test_pipelines import (
    PROMPTS,
    SIDE,
    draw,
    make_unet,
    randomised,
    sample,
    stable,
    to_torch,
)  # fmt: skip

import latent_diffusion as ldm
from latent_diffusion.convert.adapters import write_image_prompt
from latent_diffusion.generation.image_prompts import _cut

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
VIT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
           image_size=16, patch_size=8, projection_dim=24)  # fmt: skip
BYTES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
OURS = BYTES.astype(np.float32) / 127.5 - 1


def make_adapter(unet, folder, plus, seed=0):
    """A file of the original's, and its encoder beside it."""
    draws = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return 0.3 * torch.randn(shape, generator=draws)

    if plus:
        own = {"latents": tensor(1, 3, 16), "proj_in.weight": tensor(16, 32)}
        own |= {"proj_in.bias": tensor(16), "proj_out.weight": tensor(32, 16)}
        own |= {"proj_out.bias": tensor(32)}
        norms = {"norm_out": 32}
        for i in range(4):  # the depth that diffusers knows
            start = f"layers.{i}"
            own |= {f"{start}.0.to_q.weight": tensor(64, 16)}
            own |= {f"{start}.0.to_kv.weight": tensor(128, 16)}
            own |= {f"{start}.0.to_out.weight": tensor(16, 64)}
            own |= {f"{start}.1.1.weight": tensor(64, 16), f"{start}.1.3.weight": tensor(16, 64)}
            norms |= {f"{start}.0.norm1": 16, f"{start}.0.norm2": 16, f"{start}.1.0": 16}
    else:
        own = {"proj.weight": tensor(4 * 32, 24), "proj.bias": tensor(4 * 32)}
        norms = {"norm": 32}
    for name, width in norms.items():
        own |= {f"{name}.weight": 1 + tensor(width), f"{name}.bias": tensor(width)}
    attentions = {}
    for i, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            inner = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            attentions |= {f"{i}.to_{kind}_ip.weight": tensor(inner, 32) for kind in "kv"}
    folder.mkdir(exist_ok=True)
    torch.save({"image_proj": own, "ip_adapter": attentions}, folder / "ip.bin")
    torch.manual_seed(6)  # the pipeline has one encoder for all adapters
    encoder = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VIT))
    encoder = randomised(encoder, 7, 0.1)
    encoder.save_pretrained(folder / "image_encoder")
    return encoder, ldm.load_adapter(folder / "ip.bin")


CASES = {
    "plain": ([False], 0.8, 0.8),
    "plus": ([True], 0.8, 0.8),
    "both": ([False, True], [0.8, 0.4], [0.8, 0.4]),
    "one block": ([False], {"up": {"block_1": [0.0, 1.0]}},
                  {"": 0.0, "up_blocks.1.attentions.1": 1.0}),
    "with a control net and negatives": ([True], 0.6, 0.6),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_pictures_of_the_pipeline(name, tmp_path):
    kinds, theirs, ours = CASES[name]
    unet = make_unet()
    made = [make_adapter(unet, tmp_path / str(i), plus, i) for i, plus in enumerate(kinds)]
    processor = transformers.CLIPImageProcessor(size=16, crop_size=16)
    own = {"safety_checker": None, "feature_extractor": processor, "image_encoder": made[0][0]}
    kind, call, controls, negative = diffusers.StableDiffusionPipeline, {}, [], None
    if name == "with a control net and negatives":
        kind = diffusers.StableDiffusionControlNetPipeline
        own["controlnet"], net = make_net(unet, tmp_path / "net", 1)
        call = {"image": to_torch(HINTS[0]), "negative_prompt": ["grey"] * 2}
        controls, negative = [(net, HINTS[0], 1.0)], ["grey"]
    pipeline, model = stable(kind, tmp_path, unet, **own)
    folders = [str(tmp_path / str(i)) for i in range(len(kinds))]
    pipeline.load_ip_adapter(folders, subfolder="", weight_name=["ip.bin"] * len(kinds))
    pipeline.set_ip_adapter_scale(theirs)
    z_T = draw(0, 2, SIDE, SIDE, 4)
    # Two pictures are seen together, by all images.
    pictures = [[Image.fromarray(x) for x in BYTES]] * len(kinds)
    want = pipeline(
        PROMPTS, ip_adapter_image=pictures, latents=to_torch(z_T), num_inference_steps=10,
        output_type="np", **call,
    ).images  # fmt: skip
    weights = ours if isinstance(ours, list) else [ours]
    prompts = [(ip, list(OURS), w) for (_, ip), w in zip(made, weights, strict=True)]
    options = {"z_T": z_T, "num_steps": 10, "controls": controls, "negative_prompts": negative}
    got = (sample(model, image_prompts=prompts, **options) + 1) / 2
    close(name, got, want)
    assert np.abs((sample(model, **options) + 1) / 2 - want).max() > 1e-2


def test_a_file_that_we_write_is_read_by_diffusers(tmp_path):
    unet = make_unet()
    _, adapter = make_adapter(unet, tmp_path, True)
    write_image_prompt(adapter, tmp_path / "again.safetensors")
    old, new = torch.load(tmp_path / "ip.bin"), {}
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            part, _, rest = name.partition(".")
            new.setdefault(part, {})[rest] = file.get_tensor(name)
    for part in ("image_proj", "ip_adapter"):
        assert old[part].keys() == new[part].keys()
        for name, tensor in old[part].items():
            np.testing.assert_array_equal(new[part][name].numpy(), tensor.numpy())
    unet._load_ip_adapter_weights([new])
    assert unet.config.encoder_hid_dim_type == "ip_image_proj"


def test_a_wide_picture_is_cut_as_their_processor_does():
    wide = np.random.default_rng(1).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    processor = transformers.CLIPImageProcessor(size=16, crop_size=16, do_normalize=False)
    want = np.asarray(processor(Image.fromarray(wide)).pixel_values[0]).transpose(1, 2, 0)
    got = (_cut(wide, 16) + 1) / 2
    assert np.abs(got - want).max() < 1.5 / 255


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("kind", ["ip-adapter", "ip-adapter-plus"])
def test_the_key_lists_are_what_diffusers_reads(kind, xl):
    keys = read_key_list(f"{kind}-{'sdxl' if xl else 'sd15'}")
    own = public_keys.DIFFUSERS["diffusers-sdxl-unet" if xl else "diffusers-sd-v1-unet"]
    with torch.device("meta"):
        unet = own()
    image_proj = {
        name.removeprefix("image_proj."): torch.zeros(shape)
        for name, shape in keys.items()
        if name.startswith("image_proj.")
    }
    module = unet._convert_ip_adapter_image_proj_to_diffusers(image_proj, low_cpu_mem_usage=False)
    width = unet.config.cross_attention_dim
    attentions = {}
    for i, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            inner = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            attentions |= {f"ip_adapter.{i}.to_{x}_ip.weight": (inner, width) for x in "kv"}
    assert attentions == {k: v for k, v in keys.items() if k.startswith("ip_adapter.")}
    count = sum(p.numel() for p in module.parameters()) + sum(map(np.prod, attentions.values()))
    assert count == sum(map(np.prod, keys.values()))
