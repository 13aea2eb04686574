"""IP-Adapters: sizes, files, pictures and embeddings, all adapters together in one program."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from key_lists import read_key_list
from safetensors.numpy import load_file, save_file
from test_control import HINTS, plain, random_control, sampled
from test_model import IMAGE, RNG, model

from latent_diffusion import convert
from latent_diffusion.convert import clip_image
from latent_diffusion.convert.adapters import ImagePrompt, read_adapter, write_image_prompt
from latent_diffusion.convert.adapters import image_prompt as files
from latent_diffusion.convert.adapters.adapter import LowRank
from latent_diffusion.convert.bundle import as_part
from latent_diffusion.convert.tables import write_tensors
from latent_diffusion.convert.unet import shapes as unet_shapes
from latent_diffusion.core.types import Conditioning
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.generation.image_prompts import bound, entries, inputs, numbers_of
from latent_diffusion.nets.attention import CrossAttention, SpatialTransformer
from latent_diffusion.nets.conditioners.clip_image import ClipImage, mean_picture
from latent_diffusion.nets.dit import DiT
from latent_diffusion.nets.image_prompt import ImageProjection, Resampler
from latent_diffusion.nets.unet import UNet

XL = dict(
    channel_mult=(1, 2, 4), attention_resolutions=(2, 4), transformer_depth=(1, 2, 10),
    num_head_channels=64, vector_projection=True,
)  # fmt: skip
# key list: (the U-Net, widths of its context and vector, attentions, parameters)
RELEASED = {
    "ip-adapter-sd15": ({}, 768, None, 16, 22_319_616),
    "ip-adapter-plus-sd15": ({}, 768, None, 16, 49_087_488),
    "ip-adapter-sdxl": (XL, 2048, 2816, 70, 351_285_248),
    "ip-adapter-plus-sdxl": (XL, 2048, 2816, 70, 423_748_864),
}
VIT = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2}
UP = ("output_blocks_0_1", "output_blocks_1_1")
PICTURES = np.random.default_rng(8).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)


def parameters(fields, width, attentions):
    """Shapes of an IP-Adapter by path. attentions: widths of the U-Net's."""
    plus = "inner" in fields
    net = Resampler(**fields) if plus else ImageProjection(**fields)
    given = jax.ShapeDtypeStruct((1, 5, width) if plus else (1, width), "float32")
    tree = {"image_proj": jax.eval_shape(net.init, RNG, given)["params"]}
    kernel = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    for i, inner in enumerate(attentions):
        own = {"kernel": kernel((fields["width"], inner))}
        tree[str(i)] = {"to_k_ip": own, "to_v_ip": own}
    return flatten_dict(tree, sep="/")


@pytest.mark.parametrize("name", RELEASED)
def test_every_tensor_of_the_released_files_has_a_place(name):
    unet, context, vector, attentions, count = RELEASED[name]
    keys = read_key_list(name)
    assert sum(map(math.prod, keys.values())) == count
    tensors = {key: Tensor(shape, np.dtype("f4"), lambda: None) for key, shape in keys.items()}
    part = files.open_part(Path("ip"), tensors)
    written = write_tensors(files.table(attentions), part.params)
    assert {key: tensor.shape for key, tensor in written.items()} == keys
    adapter = ImagePrompt(path="ip", params=part.params, fields=FrozenDict(part.fields))
    theirs = unet_shapes(unet, 4, context, vector)
    places = adapter.attentions(UNet(**unet), theirs)
    paths = {f"{place.block}/{place.inner}/attn2/to_k/kernel" for place in places}
    assert paths == {path for path in flatten_dict(theirs, sep="/") if "attn2/to_k/" in path}
    assert len(places) == attentions


def random_adapter(plus=False, seed=3, encoder=True, width=6, inner=8):
    """An IP-Adapter for the model of test_model, whose attentions have 8 channels."""
    fields = {"num_tokens": 2, "width": width}
    fields |= {"inner": 8, "num_heads": 1, "depth": 1} if plus else {}
    rng = np.random.default_rng(seed)
    drawn = {
        path: (0.5 * rng.normal(size=x.shape)).astype(np.float32)
        for path, x in parameters(fields, 16 if plus else 10, [inner] * 4).items()
    }
    adapter = ImagePrompt(path="ip", params=drawn, fields=FrozenDict(fields))
    if not encoder:
        return adapter
    vit = ClipImage(**VIT, projection_dim=10)
    shapes = jax.eval_shape(vit.init, RNG, {"image": jnp.zeros((1, 8, 8, 3))}, jnp.zeros(1, bool))
    tree = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), shapes["params"])
    own = FrozenDict({**VIT, "projection_dim": 10})
    return adapter.replace(encoder=tree, encoder_fields=own)


def test_the_tokens_of_an_encoder_are_those_before_its_last_layer():
    encoder = random_adapter(True)
    variables, drop = {"params": encoder.encoder}, jnp.zeros(2, bool)
    _, stored = ClipImage(**VIT, projection_dim=10).apply(
        variables, {"image": jnp.asarray(PICTURES)}, drop, capture_intermediates=True
    )
    layers = stored["intermediates"]
    np.testing.assert_array_equal(layers["penultimate"][0], layers["layers_0"]["__call__"][0])


def style(seed):
    """A LoRA of one attention of the model of test_model."""
    rng = np.random.default_rng(seed)
    factors = {"lora_down": rng.normal(size=(2, 8)), "lora_up": rng.normal(size=(8, 2))}
    factors = {name: x.astype(np.float32) for name, x in factors.items()}
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    return LowRank(path="lora", modules={name: {"weight": {**factors, "scale": np.float32(1)}}})


def test_all_kinds_are_inputs_of_one_program(caplog):
    ip, plus, net = random_adapter(), random_adapter(True), random_control()
    first, second = style(0), style(1)

    def all_of(a, b, c, d, e, pictures=PICTURES, **options):
        prompts = [(ip, pictures, a), (plus, [PICTURES[:1], PICTURES[1]], b)]
        loras = [(first, d), (second, e)]
        return sampled([(net, HINTS, c)], image_prompts=prompts, adapters=loras, **options)

    with caplog.at_level("WARNING"), jax.log_compiles():
        found = [all_of(1.0, 0.5, 1.0, 0.5, 0.5)]
        steps = [r for r in caplog.messages if r.startswith("Compiling") and "step" in r]
        assert len(steps) == 1
        caplog.clear()
        for i in range(6):  # each of the five is off once, and in the last of these none
            found.append(all_of(*(0.5 * (i != j) for j in range(5))))
        found.append(all_of({"": 0.0, "mid_block": 1.0}, 0.5, 1.0, 0.5, 0.5))
        found.append(all_of(1.0, 0.5, 1.0, 0.5, 0.5, PICTURES[::-1]))
        # The unconditional alone, which sees no picture.
        null = [
            all_of(1.0, 0.0, 0.0, 0.0, 0.0, x, guidance_scale=0.0) for x in (PICTURES, -PICTURES)
        ]
        none = all_of(0.0, {"": 0}, 0.0, 0.0, 0.0)
    assert not [r for r in caplog.messages if r.startswith("Compiling")]
    np.testing.assert_allclose(none, plain(), atol=1e-4)
    np.testing.assert_allclose(*null, atol=1e-4)
    for i, one in enumerate(found):
        for two in found[:i]:
            assert np.abs(one - two).max() > 1e-3


def test_a_refiner_goes_on_without_the_adapters_of_the_first_model():
    ip, net, lora = random_adapter(), random_control(), style(0)

    def both(a, b, c, **options):
        options |= {"controls": [(net, HINTS, b)], "adapters": [(lora, c)]}
        return sampled(image_prompts=[(ip, PICTURES, a)], **options)

    whole = both(1.0, 1.0, 1.0, refiner=(model(), 0.5))
    between = both(1.0, 1.0, 1.0, end=0.5)
    np.testing.assert_array_equal(whole, sampled(start=0.5, z_T=between))
    for weights in ((0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0)):
        assert np.abs(both(*weights, refiner=(model(), 0.5)) - whole).max() > 1e-3


def told(adapter, pictures, tokens=False):
    """What the image encoder says of pictures."""
    never, variables = jnp.zeros(len(pictures), bool), {"params": adapter.encoder}
    batch = {"image": jnp.asarray(pictures)}
    out, seen = adapter.module.apply(variables, batch, never, mutable=["intermediates"])
    return seen["intermediates"]["penultimate"][0] if tokens else out.context[:, 0]


def entry(adapter, pictures, total=2):
    return entries([(adapter, pictures, 1.0)], total)["image_prompt_0"]


@pytest.mark.parametrize("plus", [False, True])
def test_pictures_are_embedded_one_for_all_or_one_for_each_or_several(plus):
    adapter = random_adapter(plus)
    want = told(adapter, PICTURES, plus)
    each = entry(adapter, PICTURES)
    assert want.shape == ((2, 5, 16) if plus else (2, 10))
    np.testing.assert_allclose(each[:, 0], want, atol=1e-4)
    np.testing.assert_array_equal(entry(adapter, want)[:, 0], want)
    np.testing.assert_allclose(entry(adapter, PICTURES[0])[1], each[0], atol=1e-4)
    both = entry(adapter, [PICTURES[0], PICTURES[1:]])
    np.testing.assert_allclose(both, np.stack([each[:, 0]] * 2), atol=1e-4)
    listed = entry(adapter, [want[0], want[1]])  # two embeddings, both for all images
    np.testing.assert_array_equal(listed, np.stack([want] * 2))
    # Pictures of another size are cut in the middle, here to bytes of themselves.
    wide = np.pad(PICTURES, ((0, 0), (0, 0), (4, 4), (0, 0)))
    middle = np.round((PICTURES + 1) * 127.5) / np.float32(127.5) - 1
    np.testing.assert_allclose(entry(adapter, wide)[:, 0], told(adapter, middle, plus), atol=1e-4)


@pytest.mark.parametrize("plus", [False, True])
def test_keys_and_values_are_of_the_tokens_and_those_of_the_null_of_no_picture(plus):
    adapter = random_adapter(plus)
    prompts = [(adapter, [PICTURES[0], PICTURES[1]], {"mid_block": 0.5})]
    found = bound(model(), prompts)
    given = (entries(prompts, 2), numbers_of(found, prompts))
    batch, numbers = jax.tree.map(jnp.asarray, given)
    own, null = inputs([one for _, one in found], batch, numbers)
    grey = np.asarray(mean_picture(8))
    no_picture = told(adapter, grey, True) if plus else jnp.zeros((1, 10))
    projection = {"params": adapter.tree()["image_proj"]}
    for got, several in ((own, batch["image_prompt_0"][0]), (null, [*no_picture] * 2)):
        tokens = adapter.projection.apply(projection, jnp.stack(several)).reshape(-1, 6)
        for i, block in enumerate(("input_blocks_1_1", *UP, "middle_block_1")):
            ((key, value),) = got["image_context"][block]["transformer_blocks_0"]
            assert key.shape == (2, 4, 8)
            kernels = adapter.tree()[str(i)]
            np.testing.assert_allclose(key[1], tokens @ kernels["to_k_ip"]["kernel"], atol=1e-4)
            want = (0.5 if i == 3 else 1.0) * tokens @ kernels["to_v_ip"]["kernel"]
            np.testing.assert_allclose(value[1], want, atol=1e-4)


def test_pictures_are_attended_to_beside_the_context_by_a_softmax_of_their_own():
    rng = np.random.default_rng(0)
    x, context, k, v = (jnp.asarray(rng.normal(size=(2, n, 8))) for n in (5, 3, 4, 4))
    module = CrossAttention(2, 4)
    params = module.init(RNG, x, context)["params"]
    q = (x @ params["to_q"]["kernel"]).reshape(2, 5, 2, 4)
    scores = np.einsum("blnd,bsnd->bnls", q, k.reshape(2, 4, 2, 4)) / 2
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    more = np.einsum("bnls,bsnd->blnd", weights, v.reshape(2, 4, 2, 4)).reshape(2, 5, 8)
    got = module.apply({"params": params}, x, context, [(k, v)])
    want = module.apply({"params": params}, x, context) + more @ params["to_out"]["kernel"]
    np.testing.assert_allclose(got, want, atol=1e-5)
    # The same tokens twice are seen as once.
    twice = [(jnp.concatenate([k, k], 1), jnp.concatenate([v, v], 1))]
    np.testing.assert_allclose(module.apply({"params": params}, x, context, twice), got, atol=1e-5)


def test_a_control_net_sees_no_image_prompt():
    """The prompt's keys and values belong to the attentions of the U-Net."""
    rng, made, net = np.random.default_rng(0), model().denoiser, random_control()
    unet, own = made.network, made.params["unet"]
    z_t, hint, context = (
        jnp.asarray(rng.normal(size=shape)) for shape in ((2, 8, 8, 3), (2, 8, 8, 8), (2, 3, 6))
    )
    key, value = jnp.asarray(rng.normal(size=(2, 2, 4, 8)))
    without = Conditioning(context=context)
    images = {"middle_block_1": {"transformer_blocks_0": ((key, value),)}}
    told = Conditioning(context=context, image_context=images)
    params, t = {"params": net.tree(own)}, jnp.zeros(2)
    one, other = (
        net.net(unet, own, 1).apply(params, z_t, t, given, hint) for given in (without, told)
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    seen = [unet.apply({"params": own}, z_t, t, given) for given in (without, told)]
    assert np.abs(seen[0] - seen[1]).max() > 1e-3


def test_blocks_that_run_as_a_loop_see_pictures_of_their_own():
    rng = np.random.default_rng(0)
    x, context = (jnp.asarray(rng.normal(size=shape)) for shape in ((1, 2, 2, 8), (1, 3, 6)))
    beside = jnp.asarray(rng.normal(size=(2, 2, 1, 4, 8)))
    images = {f"transformer_blocks_{i}": [tuple(beside[i])] for i in range(2)}
    net = SpatialTransformer(2, 4, 2, num_groups=4)
    shapes = jax.eval_shape(net.init, RNG, x, context)["params"]
    params = {"params": jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)}
    want = net.apply(params, x, context, images)
    looped = net.clone(scan=True).apply(params, x, context, images)
    np.testing.assert_allclose(looped, want, atol=1e-5)
    assert np.abs(net.apply(params, x, context) - want).max() > 1e-2


@pytest.mark.parametrize("plus", [False, True])
def test_files_are_read_and_written_bitwise(plus, tmp_path):
    adapter = random_adapter(plus, encoder=False)
    if plus:  # whose heads have 64 channels
        fields = {"num_tokens": 2, "width": 6, "inner": 8, "num_heads": 1, "depth": 2}
        own = parameters(fields, 16, [8] * 4)
        params = {k: np.random.default_rng(0).normal(size=x.shape) for k, x in own.items()}
        params = {k: x.astype(np.float32) for k, x in params.items()}
        adapter = ImagePrompt(path="ip", params=params, fields=FrozenDict(fields))
    write_image_prompt(adapter, tmp_path / "ip.safetensors")
    read = read_adapter(tmp_path / "ip.safetensors")
    assert {**read.fields} == {**adapter.fields} and read.params.keys() == adapter.params.keys()
    for name, array in adapter.params.items():
        np.testing.assert_array_equal(read.params[name], array)
    tensors = load_file(tmp_path / "ip.safetensors")
    assert {n for n in tensors if n.startswith("ip_adapter.")} == {
        f"ip_adapter.{i}.to_{kind}_ip.weight" for i in (1, 3, 5, 7) for kind in "kv"
    }
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        write_image_prompt(adapter, tmp_path / "ip.bin")


def test_the_image_encoder_beside_a_file_has_the_width_that_it_takes(tmp_path):
    path, rng = tmp_path / "ip.safetensors", np.random.default_rng(0)
    write_image_prompt(random_adapter(encoder=False), path)
    for width in (10, 9):
        fields = {**VIT, "projection_dim": width}
        drawn = {
            k: rng.normal(size=x.shape).astype(np.float32)
            for k, x in flatten_dict(clip_image.shapes(fields), sep="/").items()
        }
        encoder = as_part(fields, unflatten_dict(drawn, sep="/"))
        whole = convert.Bundle(conditioners={"clip_image": encoder})
        convert.write(whole, tmp_path / "image_encoder", "diffusers")
        if width == 10:
            read = flatten_dict(read_adapter(path).encoder, sep="/")
            assert read.keys() == drawn.keys()
            for name, array in drawn.items():
                np.testing.assert_array_equal(read[name], array)
            (tmp_path / "image_encoder").rename(tmp_path / "named")
    named = flatten_dict(read_adapter(path, image_encoder=tmp_path / "named").encoder, sep="/")
    assert all(np.array_equal(named[name], read[name]) for name in read)
    with pytest.raises(ValueError, match=r"takes 10 numbers, of which the image enc.* makes 9"):
        read_adapter(path)


IP = random_adapter()
BAD = {
    "no entry": ([IP], r"image_prompts are \(adapter, pictures, weight\), not"),
    "no adapter": ([("ip", PICTURES, 1.0)], "image_prompts come from load_adapter, not ip"),
    "a control": ([(random_control(), HINTS, 1.0)], "^net: give this adapter as controls="),
    "a block": (
        [(IP, PICTURES, {"up": 1.0})],
        "^ip: no module 'up'; there are down_blocks.0",
    ),
    "a range": ([(IP, 300 * PICTURES, 1.0)], r"^ip: pictures: values in .*, expected \[-1, 1\]"),
    "a width": ([(IP, np.zeros((2, 9)), 1.0)], r"^ip: embeddings has shape \(2, 9\), .*\[N 10\]"),
    "no picture": ([(IP, [], 1.0)], "^ip: no picture"),
    "a number": ([(IP, PICTURES[[0, 1, 1]], 1.0)], "^ip: 3 of pictures for 2 images"),
    "no encoder": (
        [(random_adapter(encoder=False), PICTURES, 1.0)],
        "^ip: no folder image_encoder lies beside it, .* or give embeddings$",
    ),
    "another U-Net": (
        [(IP.replace(params={**IP.params, "1/to_k_ip/kernel": np.zeros((6, 12))}), PICTURES, 1)],
        r"^ip: 3.to_k_ip.weight is \(12, 6\), up_blocks.0.attentions.0.transformer_blocks.0.attn2."
        r"to_k of the U-Net \(8, 6\); it is another one's",
    ),
    "a larger U-Net": (
        [(IP.replace(params={**IP.params, "4/to_k_ip/kernel": np.zeros((6, 8))}), PICTURES, 1)],
        "^ip: it has more attentions than the U-Net, which has 4",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_image_prompts_are_refused_in_a_line(name):
    image_prompts, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        sampled(image_prompts=image_prompts)


def test_other_models_and_other_kinds_refuse(tmp_path):
    with pytest.raises(ValueError, match=r"^ip: an IP-Adapter is for a U-Net, which"):
        IP.attentions(DiT(), {})
    with pytest.raises(ValueError, match=r"^ip: give this adapter as image_prompts="):
        sampled(adapters=[(IP, 1.0)])
    with pytest.raises(ValueError, match=r"load it with image_encoder=PATH$"):
        sampled(image_prompts=[(random_adapter(True, encoder=False), np.zeros((5, 16)), 1.0)])
    write_image_prompt(IP, tmp_path / "ip.safetensors")
    tensors = load_file(tmp_path / "ip.safetensors")
    for end, kind in (("proj.2.weight", "FaceID"), ("proj.3.weight", "full")):
        save_file({**tensors, f"image_proj.{end}": IMAGE}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=f"x.safetensors: .* kind {kind} aren't read"):
            read_adapter(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="it is no textual inversion, and word='a' names one"):
        read_adapter(tmp_path / "ip.safetensors", word="a")
