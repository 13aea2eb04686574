"""Low-rank adaptation: its formula, its training, and the files in which others keep it."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import make_batch, make_config

from latent_diffusion import convert
from latent_diffusion.convert import clip_text, frozen_parts, unet
from latent_diffusion.convert.adapters import read_adapter, read_weights, write_kohya_lora
from latent_diffusion.convert.adapters.adapter import LowRank
from latent_diffusion.convert.adapters.names import pairs_of
from latent_diffusion.convert.adapters.writing import of_workdir
from latent_diffusion.convert.bundle import conditioner_shapes
from latent_diffusion.convert.scheduler import ASSUMED
from latent_diffusion.core.rng import init_key
from latent_diffusion.optimisation import low_rank
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.tasks import TASKS
from latent_diffusion.tasks.denoising import State
from latent_diffusion.training import init_from
from latent_diffusion.training.batch_spec import batch_spec

CLIP = dict(vocab_size=9, max_length=5, width=16, depth=1, num_heads=2)
UNET = dict(
    model_channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,),
    num_heads=2, num_groups=4, out_channels=3,
)  # fmt: skip


def random_tree(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


@functools.cache
def make_bundle():
    return convert.Bundle(
        unet=convert.as_part(UNET, random_tree(unet.shapes(UNET, 3, 16, None), 0)),
        conditioners={"clip_text": convert.as_part(CLIP, random_tree(clip_text.shapes(CLIP), 1))},
    )


def test_what_is_added_is_the_scaled_product_and_nothing_at_first():
    rng = np.random.default_rng(0)
    params = {name: {"kernel": rng.normal(size=(4, 6)).astype(np.float32)} for name in "ab"}
    config = {"rank": 2, "targets": ("^a/",), "kind": "lora"}
    factors = low_rank.init(jax.random.key(0), params, config)
    assert flatten_dict(factors, sep="/").keys() == {"a/kernel/down", "a/kernel/up"}
    jax.tree.map(np.testing.assert_array_equal, low_rank.merge(params, factors, 8.0), params)
    factors["a"]["kernel"]["up"] = up = rng.normal(size=(2, 6))
    want = params["a"]["kernel"] + 4.0 * np.asarray(factors["a"]["kernel"]["down"]) @ up
    merged = low_rank.merge(params, factors, 8.0)
    np.testing.assert_allclose(merged["a"]["kernel"], want, rtol=1e-5)
    np.testing.assert_array_equal(merged["b"]["kernel"], params["b"]["kernel"])
    for targets in (("c",), ()):
        with pytest.raises(ValueError, match=r"lora\.targets=.* match no kernel"):
            low_rank.init(jax.random.key(0), params, {**config, "targets": targets})
    with pytest.raises(ValueError, match=r"lora\.kind='loha'; known: lora, dora"):
        low_rank.init(jax.random.key(0), params, {**config, "kind": "loha"})


def test_factors_of_a_convolution_are_a_convolution_and_a_map_and_dora_keeps_the_norms():
    rng = np.random.default_rng(0)
    kernel, x = (rng.normal(size=s).astype(np.float32) for s in ((3, 3, 4, 6), (1, 5, 5, 4)))
    wide = {"kernel": np.zeros((2, 2, 64, 4), np.float32)}
    wide = low_rank.init(jax.random.key(0), wide, {"rank": 64, "targets": ("",), "kind": "lora"})
    np.testing.assert_allclose(np.std(wide["kernel"]["down"]), 256**-0.5, rtol=0.05)
    config = {"rank": 2, "targets": ("",), "kind": "dora"}
    factors = low_rank.init(jax.random.key(0), {"kernel": kernel}, config)["kernel"]
    np.testing.assert_allclose(low_rank.adapted(kernel, factors, 1.0), kernel, rtol=1e-6)
    factors["up"] = rng.normal(size=factors["up"].shape).astype(np.float32)
    magnitude = factors.pop("magnitude")

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    summed = low_rank.adapted(kernel, factors, 3.0)
    chain = conv(conv(x, factors["down"]), factors["up"])
    np.testing.assert_allclose(conv(x, summed), conv(x, kernel) + 1.5 * chain, rtol=1e-4, atol=1e-4)
    rescaled = low_rank.adapted(kernel, {**factors, "magnitude": magnitude}, 3.0)
    norm = np.sqrt((np.asarray(rescaled) ** 2).sum((0, 1, 2)))
    np.testing.assert_allclose(norm, np.sqrt((kernel**2).sum((0, 1, 2))), rtol=1e-5)
    direction = summed / np.sqrt((summed**2).sum((0, 1, 2)))
    np.testing.assert_allclose(rescaled / norm, direction, rtol=1e-4)


def test_training_moves_the_factors_and_has_no_memory_for_the_rest():
    config = make_config("denoising", **{"lora.rank": 2, "lora.alpha": 2.0})
    config.unet.transformer_depth = 1
    task = TASKS["denoising"](config)
    state, constants = jax.jit(lambda rng: task.init(rng, batch_spec(config)))(init_key(0))
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    assert trained < 0.2 * sum(x.size for x in jax.tree.leaves(constants.base))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 2 * trained + 4
    assert set(state.params) == {"lora"}
    # The last convolution starts at zero, which would hide all that comes before it.
    out = constants.base["unet"]["out_2"]
    out["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), out["kernel"].shape)
    for name, block in constants.base["unet"].items():
        if name.endswith("_1") and "proj_out" in block:
            shape = block["proj_out"]["kernel"].shape
            block["proj_out"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(2), shape)
    step = jax.jit(task.train_step)
    losses = []
    for _ in range(8):
        state, values = step(state, constants, make_batch(config), jax.random.key(1))
        losses.append(float(values["loss"]))
    assert all(np.isfinite(losses))
    ups = [x for k, x in flatten_dict(state.params, sep="/").items() if k.endswith("/up")]
    assert ups and all(float(jnp.abs(up).max()) > 0 for up in ups)


def test_a_dora_starts_with_the_norms_of_the_kernels_at_init_from():
    shapes = unet.shapes(UNET, 3, 16, None)
    config = make_config("denoising", **{"lora.rank": 1, "lora.kind": "dora"})
    factors = low_rank.init(jax.random.key(0), {"unet": random_tree(shapes, 0)}, config.lora)
    average, target = ({"lora": jax.tree.map(jnp.copy, factors)} for _ in range(2))
    state = State(0, {"lora": factors}, average, None, target=target)
    base = random_tree(shapes, 1)
    bundle = convert.Bundle(unet=convert.as_part(UNET, base))
    state = init_from.start_from(config, state, bundle)
    for params in (state.params, state.ema_params, state.target):  # of a distillation
        merged = low_rank.merge({"unet": base}, params["lora"], 1.0)["unet"]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), merged, base)


def foreign(kind, rank=3, alpha=1.5):
    """A LoRA file of theirs for `make_bundle`: names, as their tools write them."""
    rng, tensors = np.random.default_rng(2), {}
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn{}.{}"
    modules = [
        ("unet", attention.format(2, "to_k"), 16, 8),
        ("unet", attention.format(1, "to_q"), 8, 8),
    ]
    modules += [("unet", attention.format(2, "to_out.0"), 8, 8)]
    text = "text_model.encoder.layers.0.self_attn."
    modules += [("te", f"{text}{name}", 16, 16) for name in ("q_proj", "v_proj", "out_proj")]
    for part, module, rows, columns in modules:
        down = rng.normal(size=(rank, rows)).astype(np.float32)
        up = rng.normal(size=(columns, rank)).astype(np.float32)
        if kind == "kohya":
            name = f"lora_{part}_{module.replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = np.float32(alpha)
        else:
            name = f"{'unet' if part == 'unet' else 'text_encoder'}.{module}"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return {name: np.asarray(array) for name, array in tensors.items()}


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_files_of_others_are_merged_by_the_formula(kind, tmp_path):
    path, tensors = tmp_path / "lora.safetensors", foreign(kind)
    save_file(tensors, path)
    bundle = make_bundle()
    adapted = convert.with_lora(bundle, path, 0.5)
    down, up = (
        next(v for k, v in tensors.items() if "attn2" in k and "to_k" in k and mark in k)
        for mark in (("lora_down", "lora_up") if kind == "kohya" else ("lora_A", "lora_B"))
    )
    scale = 0.5 * (1.5 / 3 if kind == "kohya" else 1.0)
    kernel = "input_blocks_1_1/transformer_blocks_0/attn2/to_k/kernel"
    want = bundle.unet.params[kernel].read() + scale * (up @ down).T
    np.testing.assert_allclose(adapted.unet.params[kernel].read(), want, rtol=1e-5, atol=1e-6)
    changed = {k for k, t in adapted.unet.params.items()
               if not np.array_equal(t.read(), bundle.unet.params[k].read())}  # fmt: skip
    assert len(changed) == 3 and kernel in changed
    # q and v of the text encoder are columns of one kernel; k between them stays.
    qkv = "layers_0/self_attn/qkv/kernel"
    moved = adapted.conditioners["clip_text"].params[qkv].read()
    still = moved == bundle.conditioners["clip_text"].params[qkv].read()
    assert still[:, 16:32].all() and not still[:, :16].any() and not still[:, 32:].any()


def test_old_names_of_diffusers_and_files_of_another_model(tmp_path):
    new = foreign("diffusers")
    old = {
        name.replace("to_out.0.lora_A", "processor.to_out_lora.down")
        .replace("to_out.0.lora_B", "processor.to_out_lora.up")
        .replace("to_k.lora_A", "processor.to_k_lora.down")
        .replace("to_k.lora_B", "processor.to_k_lora.up")
        .replace("_proj.lora_A", "_proj.lora_linear_layer.down")
        .replace("_proj.lora_B", "_proj.lora_linear_layer.up"): array
        for name, array in new.items()
    }
    bundle = make_bundle()
    for name, tensors in (("new", new), ("old", old)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    ours = [convert.with_lora(bundle, tmp_path / f"{name}.safetensors") for name in ("new", "old")]
    for path, tensor in ours[0].unet.params.items():
        np.testing.assert_array_equal(tensor.read(), ours[1].unet.params[path].read())
    save_file(
        {f"unet.mid_block.other.lora_{x}.weight": np.ones((2, 2), np.float32) for x in "AB"},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(
        ValueError, match=r"x\.safetensors: 1 modules aren't in this model: unet\.mid"
    ):
        convert.with_lora(bundle, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="this model has no LoRA"):
        write_kohya_lora(bundle, tmp_path / "y.safetensors")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_workdir_of_an_adaptation_is_the_adapted_model_and_writes_it_alone(kind, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    convert.write(replace(make_bundle(), diffusion=ASSUMED), base, "orbax")
    bundle = convert.read(base)
    params = {"unet": convert.as_params(bundle.unet)}
    params["conditioner"] = {"clip_text": convert.as_params(bundle.conditioners["clip_text"])}
    targets = ("attn2/to_k", "self_attn/qkv", "blocks_1_0/out_layers_3", "input_blocks_1_1/proj_in")
    config = {"rank": 2, "targets": targets, "kind": kind}
    factors = low_rank.init(jax.random.key(0), params, config)
    factors = random_tree(factors, 3)
    # As training leaves it.
    settings = workdir.load_config(base)
    settings.init_from, settings.lora = str(base), {"rank": 2, "alpha": 3.0, "kind": kind}
    settings.data.image_size = 24
    workdir.save_config(settings, run)
    with Checkpointer(run / "checkpoints") as checkpoints:
        checkpoints.save(0, {"ema_params": {"lora": factors}})
    adapted = convert.read(run)
    assert adapted.image_size == 24 != bundle.image_size  # of the pictures that it has learned from
    want = flatten_dict(low_rank.merge(params, factors, 3.0)["unet"], sep="/")
    for path, tensor in adapted.unet.params.items():
        np.testing.assert_allclose(tensor.read(), want[path], rtol=1e-5, atol=1e-5)
    # The same factors beside a base of which a file in eight bits was made.
    small = tmp_path / "small"
    convert.write(replace(make_bundle(), diffusion=ASSUMED), small, "diffusers", "float8_e4m3fn")
    settings.init_from = str(small)
    workdir.save_config(settings, run)
    rounded = convert.as_params(convert.read(small).unet)
    want = flatten_dict(low_rank.merge({**params, "unet": rounded}, factors, 3.0)["unet"], sep="/")
    for path, tensor in convert.read(run).unet.params.items():
        np.testing.assert_allclose(
            tensor.astype("float32").read(), want[path], rtol=1e-5, atol=1e-5
        )
    for names in ("lora", "kohya"):
        file = tmp_path / f"{names}.safetensors"
        convert.write(adapted, file, names)
        again = convert.with_lora(bundle, file)
        changed = 0
        if names == "lora":  # CLIP's modules are text_model.… in older transformers
            with safe_open(file, "np") as opened:
                header = json.loads(opened.metadata()["lora_adapter_metadata"])
            targets = header["text_encoder.target_modules"]
            assert sorted(targets) == [f"encoder.layers.0.self_attn.{n}_proj" for n in "kqv"]
        for (_, part), (_, other), (_, old) in zip(
            adapted.parts(), again.parts(), bundle.parts(), strict=True
        ):
            for path, tensor in part.params.items():
                x = tensor.read()
                np.testing.assert_allclose(x, other.params[path].read(), rtol=1e-4, atol=1e-4)
                changed += not np.array_equal(x, old.params[path].read())
        assert changed == sum(path.endswith("down") for path in flatten_dict(factors, sep="/"))
        ends = {"lora": "lora_magnitude_vector", "kohya": "dora_scale"}[names]
        written = {k: x.shape for k, x in load_file(file).items() if k.endswith(ends)}
        assert len(written) == (0 if kind == "lora" else changed + 2)
        own = {"lora": ((1, 8, 1, 1), (16,)), "kohya": ((8, 1, 1, 1), (16, 1))}[names]  # as theirs
        for name, shape in written.items():
            if "conv2" in name or "q_proj" in name:
                assert shape == own["q_proj" in name]
        if names == "lora":
            assert header["unet.use_dora"] == header["text_encoder.use_dora"] == (kind == "dora")
        # Every number comes back bitwise, in the layout of the others.
        modules = {name.replace(".", "_"): m for name, m in read_adapter(file).modules.items()}
        assert len(modules) == changed + 2  # q, k and v are one kernel here
        prefixes = ("unet_", "text_encoder_") if names == "lora" else ("lora_unet_", "lora_te_")
        block, layer = "down_blocks_0_", "text_model_encoder_layers_0_self_attn_"
        ours = flatten_dict(factors["unet"], sep="/")
        conv = modules[f"{prefixes[0]}{block}resnets_0_conv2"]["weight"]
        own = {k.rpartition("/")[2]: x for k, x in ours.items() if "input_blocks_1_0" in k}
        np.testing.assert_array_equal(conv["lora_down"], own["down"].transpose(3, 2, 0, 1))
        np.testing.assert_array_equal(conv["lora_up"][:, :, 0, 0], own["up"][0, 0].T)
        assert conv["scale"] == 1.5
        joint = factors["conditioner"]["clip_text"]["layers_0"]["self_attn"]["qkv"]["kernel"]
        for i, name in enumerate("qkv"):
            module = modules[f"{prefixes[1]}{layer}{name}_proj"]["weight"]
            np.testing.assert_array_equal(module["lora_down"], joint["down"].T)
            columns = slice(16 * i, 16 * (i + 1))
            np.testing.assert_array_equal(module["lora_up"], joint["up"][:, columns].T)
            if kind == "dora":
                np.testing.assert_array_equal(module["magnitude"], joint["magnitude"][columns])


def test_an_adapted_unet_keeps_the_text_encoder_that_its_run_took_from_elsewhere(tmp_path):
    base, run, bundle = tmp_path / "base", tmp_path / "run", make_bundle()
    convert.write(replace(bundle, conditioners={}, diffusion=ASSUMED), base, "orbax")
    params = {"unet": convert.as_params(bundle.unet)}
    config = {"rank": 2, "targets": ("attn2/to_k",), "kind": "lora"}
    factors = random_tree(low_rank.init(jax.random.key(0), params, config), 3)
    settings = workdir.load_config(base)
    settings.init_from, settings.lora = str(base), {"rank": 2, "alpha": 3.0, "kind": "lora"}
    settings.conditioners = {"clip_text": CLIP, "sizes": {}}
    settings.pretrained = {"clip_text": "elsewhere"}
    workdir.save_config(settings, run)
    encoder = convert.as_params(bundle.conditioners["clip_text"])
    frozen_parts.save_conditioner(run, "clip_text", encoder, CLIP, "elsewhere")
    with Checkpointer(run / "checkpoints") as checkpoints:
        checkpoints.save(0, {"ema_params": {"lora": factors}})
    read = convert.read(run)
    assert [*read.conditioners] == ["clip_text", "sizes"] and read.lora
    again = convert.as_params(read.conditioners["clip_text"])
    jax.tree.map(np.testing.assert_array_equal, again, encoder)


def test_an_adapter_of_a_workdir_changes_kernels_for_which_others_have_no_name():
    text = dict(vocab_size=9, max_length=5, width=16, depth=1, num_heads=2, head_dim=8)
    encoder = convert.as_part(text, random_tree(conditioner_shapes("text", text), 1))
    base = replace(make_bundle(), conditioners={"text": encoder})
    config = {"rank": 2, "targets": ("text/.*to_q", "attn2/to_k"), "kind": "dora"}
    params = {
        "unet": convert.as_params(base.unet),
        "conditioner": {"text": convert.as_params(encoder)},
    }
    factors = random_tree(low_rank.init(jax.random.key(0), params, config), 3)
    paths = {name: {k.rpartition(f"{name}/")[2]: {**x, "alpha": np.float32(3)}
             for k, x in low_rank.flatten_factors(factors).items() if f"{name}/" in k}
             for name in ("unet", "text")}  # fmt: skip
    adapter = LowRank(path="run", modules=of_workdir(replace(base, lora=paths)))
    changes, want = adapter.changes(base), low_rank.merge(params, factors, 3.0)
    before, after = (flatten_dict(tree, sep="/") for tree in (params, want))
    assert changes.keys() == {k for k in before if not np.array_equal(before[k], after[k])}
    assert "conditioner/text/layers_0_attn/to_q/kernel" in changes
    for path, change in changes.items():
        added = before[path] + change.delta(np.asarray(before[path]), np.ones(1))
        np.testing.assert_allclose(added, after[path], rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match="has no name for 1 adapted kernels: text/layers_0_attn/to"
    ):
        write_kohya_lora(replace(base, lora=paths), Path("x.safetensors"))


def test_weights_of_adaptations_as_a_user_writes_them():
    assert read_weights(["a.safetensors", "b:c.safetensors:-0.5"]) == [
        ("a.safetensors", 1.0),
        ("b:c.safetensors", -0.5),
    ]
    with pytest.raises(ValueError, match=r"--lora=a:0\.3: this file is given twice; add"):
        read_weights(["a", "b:0.5", "a:0.3"])
    with pytest.raises(ValueError, match="--lora=a:x: write FILE or FILE:WEIGHT"):
        read_weights(["a:x"])


@pytest.mark.parametrize("time_width", [None, 256])
def test_kohyas_names_are_the_originals_for_stable_diffusion_xl(time_width):
    fields = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 1}
    fields |= {"attention_resolutions": (2,), "out_channels": 4}
    params = flatten_dict(unet.shapes(fields, 4, 16, None), sep="/")
    notes = {} if time_width is None else {"time_width": time_width}
    bundle = convert.Bundle(unet=convert.Part(fields, params), notes=notes)
    names = {name for *_, pair in pairs_of(bundle, kohya=True) for name in pair.theirs}
    block = "down_blocks.1.attentions.0" if time_width is None else "input_blocks.3.1"
    assert f"{block}.transformer_blocks.0.attn1.to_q.weight" in names
