"""Files of LoRA for the transformers: kohya's and diffusers' names of MMDiT, diffusers' of DiT."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_dit import model_with

from latent_diffusion import convert
from latent_diffusion.convert import as_params, as_part, bundle_of
from latent_diffusion.convert.bundle import Bundle
from latent_diffusion.convert.mmdit import shapes
from latent_diffusion.convert.scheduler import ASSUMED

FIELDS = {"out_channels": 4, "width": 8, "depth": 2, "num_heads": 2, "dual_attention": (0,)}
BLOCK = "transformer.transformer_blocks.0"


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mmdit():
    tree = shapes({**FIELDS, "max_positions": 4}, 4, 6, 5)
    params = jax.tree.map(lambda x: normal(x.size, *x.shape), tree)
    return Bundle(
        mmdit=as_part({**FIELDS, "max_positions": 4}, params), conditioners={}, diffusion=ASSUMED
    )


def dit():
    return bundle_of(model_with())


def kohya(module, down, up, alpha=3.0):
    """The tensors of one module."""
    name = f"lora_unet_{module.replace('.', '_')}"
    ends = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.float32(alpha)}
    return {f"{name}.{end}": np.asarray(x) for end, x in ends.items()}


def peft(module, down, up):
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def changes(bundle, tensors, tmp_path, name="mmdit"):
    """What a file adds to each of our kernels that it changes."""
    save_file({k: np.ascontiguousarray(x) for k, x in tensors.items()}, tmp_path / "x.safetensors")
    merged = dict(convert.with_lora(bundle, tmp_path / "x.safetensors").parts())[name].params
    base = dict(bundle.parts())[name].params
    added = {
        path: np.asarray(t.read()) - np.asarray(base[path].read()) for path, t in merged.items()
    }
    return {path: change for path, change in added.items() if change.any()}


@pytest.mark.parametrize("attention", ["x_block.attn", "context_block.attn", "x_block.attn2"])
def test_kohyas_map_of_queries_keys_and_values_is_that_of_diffusers_three(attention, tmp_path):
    down, up = normal(0, 2, 8), normal(1, 24, 2)
    found = changes(mmdit(), kohya(f"joint_blocks.0.{attention}.qkv", down, up), tmp_path)
    kernel = f"joint_blocks_0/{attention.replace('.', '_')}_qkv/kernel"
    np.testing.assert_allclose(found[kernel], 3 / 2 * (up @ down).T, atol=1e-5)
    first, to, ends = {
        "x_block.attn": ("attn", "to_{}", "qkv"),
        "context_block.attn": ("attn", "add_{}_proj", "qkv"),
        "x_block.attn2": ("attn2", "to_{}", "qkv"),
    }[attention]
    apart = {}
    for i, end in enumerate(ends):
        apart |= peft(f"{BLOCK}.{first}.{to.format(end)}", down, 1.5 * up[8 * i : 8 * i + 8])
    again = changes(mmdit(), apart, tmp_path)
    assert again.keys() == found.keys() == {kernel}
    np.testing.assert_allclose(again[kernel], found[kernel], atol=1e-5)


def test_the_last_modulation_has_the_originals_order_in_kohyas_files(tmp_path):
    down, up = normal(0, 2, 8), normal(1, 16, 2)
    found = changes(mmdit(), kohya("final_layer.adaLN_modulation.1", down, up), tmp_path)
    np.testing.assert_allclose(
        found["final_layer_adaLN_modulation/1/kernel"], 1.5 * (up @ down).T, atol=1e-5
    )
    swapped = peft("transformer.norm_out.linear", down, 1.5 * np.roll(up, 8, axis=0))
    again = changes(mmdit(), swapped, tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again, found)


def test_queries_together_and_alone_are_two_changes(tmp_path):
    down, up = normal(0, 2, 8), normal(1, 24, 2)
    both = kohya("joint_blocks.0.x_block.attn.qkv", down, up)
    both |= peft(f"{BLOCK}.attn.to_k", down, up[:8])
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\S* has two changes"):
        changes(mmdit(), both, tmp_path)


@pytest.mark.parametrize("spelling", ["transformer.{}", "{}", "base_model.model.{}"])
def test_diffusers_names_of_dit(spelling, tmp_path):
    down, up = normal(0, 2, 16), normal(1, 16, 2)
    module = spelling.format("transformer_blocks.1.attn1.to_v")
    found = changes(dit(), peft(module, down, up), tmp_path, "dit")
    (kernel,) = found
    assert kernel == "blocks_1/attn_qkv/kernel"
    np.testing.assert_allclose(found[kernel][:, 32:], (up @ down).T, atol=1e-5)
    assert not found[kernel][:, :32].any()


def test_the_copies_of_dits_embedding_are_refused(tmp_path):
    module = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2"
    with pytest.raises(ValueError, match=r"1 modules aren't in this model: transformer_blocks\.1"):
        changes(dit(), peft(module, normal(0, 2, 16), normal(1, 16, 2)), tmp_path, "dit")


def factors(bundle, name, paths):
    """An adaptation of these kernels, as a workdir has it."""
    part = dict(bundle.parts())[name]
    sizes = {path: part.params[path].shape for path in paths}
    return {
        name: {
            path: {"down": normal(i, m, 2), "up": normal(-i - 1 + 9, 2, n), "alpha": np.float32(3)}
            for i, (path, (m, n)) in enumerate(sizes.items())
        }
    }


@pytest.mark.parametrize(
    ("make", "name", "format", "qkv"),
    [
        (mmdit, "mmdit", "kohya", "lora_unet_joint_blocks_1_x_block_attn_qkv.lora_up.weight"),
        (mmdit, "mmdit", "lora", "transformer.transformer_blocks.1.attn.to_q.lora_B.weight"),
        (dit, "dit", "lora", "transformer.transformer_blocks.1.attn1.to_q.lora_B.weight"),
    ],
)
def test_a_file_that_is_written_adds_what_was_trained(make, name, format, qkv, tmp_path):
    bundle = make()
    block = {"mmdit": "joint_blocks_1/x_block", "dit": "blocks_1/"}[name]
    middle = "_" if name == "mmdit" else ""
    kernels = [f"{block}{middle}{end}/kernel" for end in ("attn_qkv", "mlp_fc1")]
    kernels += ["final_layer_adaLN_modulation/1/kernel", "x_embedder_proj/kernel"]
    lora = factors(bundle, name, kernels)
    convert.write(replace(bundle, lora=lora), tmp_path / "w.safetensors", format)
    tensors = load_file(tmp_path / "w.safetensors")
    assert qkv in tensors
    merged = convert.with_lora(bundle, tmp_path / "w.safetensors")
    got, base = (as_params(dict(b.parts())[name]) for b in (merged, bundle))
    flat, old = (jax.tree_util.tree_leaves_with_path(x) for x in (got, base))
    moved = {
        "/".join(key.key for key in path): x - y
        for (path, x), (_, y) in zip(flat, old, strict=True)
    }
    assert {path for path, change in moved.items() if change.any()} == set(kernels)
    for path in kernels:
        own = lora[name][path]
        np.testing.assert_allclose(moved[path], 1.5 * own["down"] @ own["up"], atol=1e-4)


@pytest.mark.parametrize("format", ["lora", "kohya"])
def test_a_file_of_factors_is_written_in_the_dtype_that_is_asked_for(format, tmp_path):
    bundle = mmdit()
    lora = factors(bundle, "mmdit", ["joint_blocks_1/x_block_attn_qkv/kernel"])
    adapted, path = replace(bundle, lora=lora), tmp_path / "w.safetensors"
    convert.write(adapted, path, format, "bfloat16")
    written = {name: x.dtype for name, x in load_file(path).items()}
    alphas = {name for name in written if name.endswith(".alpha")}
    assert {written[name] for name in alphas} <= {np.dtype("float32")}
    assert {str(written[name]) for name in written.keys() - alphas} == {"bfloat16"}
    lora["mmdit"]["joint_blocks_1/x_block_attn_qkv/kernel"]["up"][0, 0] = 1e6
    with pytest.raises(ValueError, match="attn_qkv/kernel/up has 1e"):
        convert.write(adapted, path, format, "float16")


@pytest.mark.parametrize(
    ("format", "kernel"),
    [("lora", "t_embedder_mlp_0/kernel"), ("kohya", "blocks_1/attn_qkv/kernel")],
)
def test_a_kernel_without_a_name_is_refused(format, kernel, tmp_path):
    bundle = dit()
    lora = factors(bundle, "dit", [kernel])
    with pytest.raises(ValueError, match=f"no name for 1 adapted kernels: dit/{kernel}"):
        convert.write(replace(bundle, lora=lora), tmp_path / "x.safetensors", format)
