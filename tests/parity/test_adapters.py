"""Adapters merged here are what diffusers, PEFT and LyCORIS merge, to 1e-6 of the change."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from safetensors.numpy import save_file
from test_pipelines import ABSENT, SIDE, draw, make_unet, stable, to_torch

import latent_diffusion as ldm
from latent_diffusion import convert

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
RANK = 2
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj", "out_proj", "fc1", "proj_in")
CONVOLUTIONS = (*LINEAR, "conv1", "conv2", "conv_shortcut", "conv", "conv_in", "time_emb_proj")


def modules(pipeline, ends):
    """(prefix, name, module) of everything with a weight whose name ends so."""
    for prefix in ("unet", "text_encoder"):
        for name, module in getattr(pipeline, prefix).named_modules():
            if hasattr(module, "weight") and any(
                name == end or name.endswith(f".{end}") for end in ends
            ):
                yield prefix, name, module


def whole(prefix, name):
    """The name in files, where CLIP's begin with text_model."""
    return name if prefix == "unet" or name.startswith("text_model") else f"text_model.{name}"


def normal(rng, *shape):
    return (0.3 * rng.normal(size=shape)).astype(np.float32)


def parameters(folder, pipeline):
    """The pipeline's networks as our parameters: it is saved, and read by what parity holds."""
    pipeline.save_pretrained(folder)
    bundle = convert.read(folder)
    return {f"{name}/{path}": np.array(t.read()) for name, part in bundle.parts()
            for path, t in part.params.items()}  # fmt: skip


def compare(before, want, bundle, path, changed, weight=1.0):
    merged = convert.with_lora(bundle, path, weight)
    got = {f"{n}/{p}": t for n, part in merged.parts() for p, t in part.params.items()}
    worst, count, of = 0.0, 0, ""
    for name, array in want.items():
        change = np.abs(array - before[name]).max()
        difference = np.abs(got[name].read() - array).max()
        if change:
            worst, of = max((worst, of), (difference / change, name))
            count += 1
        else:
            assert difference == 0, name
    print(f"{count} parameters changed; largest difference {worst:.1e} of the change, {of}")
    assert count >= changed and worst <= 1e-6


def lora_of(pipeline, kind, rng, ends=CONVOLUTIONS):
    """(tensors, metadata) of a file in the words of a kind."""
    kohya = "kohya" in kind
    tensors, metadata = {}, {}
    adapted = [
        (prefix, name, module)
        for prefix, name, module in modules(pipeline, ends)
        if (kind != "bias" or module.bias is not None)
        and (kind != "dora" or prefix == "unet")  # transformers' encoder leaves magnitudes out
    ]
    for prefix, name, module in adapted:
        out, *rest = module.weight.shape
        down = normal(rng, RANK, *rest)
        up = normal(rng, out, RANK, *[1] * (len(rest) - 1))
        if kohya:
            flat = whole(prefix, name).replace(".", "_")
            key = f"lora_{'unet' if prefix == 'unet' else 'te'}_{flat}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = np.asarray(1.5, np.float32)
            continue
        key = f"{prefix}.{whole(prefix, name)}"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        if kind == "dora":
            norms = np.abs(normal(rng, out)) + 0.5
            shape = (out,) if len(rest) == 1 else (1, out, 1, 1)
            tensors[f"{key}.lora_magnitude_vector"] = norms.reshape(shape)
        if kind == "bias":
            tensors[f"{key}.lora_B.bias"] = normal(rng, out)
    if kind in ("header", "rslora", "dora", "bias"):
        for prefix in sorted({prefix for prefix, _, _ in adapted}):
            names = [n for p, n, _ in adapted if p == prefix]
            settings = {"r": RANK, "lora_alpha": 5, "target_modules": names}
            settings |= {"alpha_pattern": {names[0]: 3}, "use_rslora": kind == "rslora"}
            settings |= {"use_dora": kind == "dora", "lora_bias": kind == "bias"}
            metadata |= {f"{prefix}.{k}": v for k, v in settings.items()}
    return tensors, {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "header", "rslora", "dora", "bias"])
def test_lora_as_diffusers_fuses_it(kind, tmp_path):
    pipeline, _ = stable(diffusers.StableDiffusionPipeline, tmp_path, make_unet(), **ABSENT)
    before, bundle = parameters(tmp_path / "a", pipeline), convert.read(tmp_path / "a")
    tensors, metadata = lora_of(pipeline, kind, np.random.default_rng(1))
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    want = parameters(tmp_path / "b", pipeline)
    compare(before, want, bundle, tmp_path / "x.safetensors", changed=30)


def test_several_unmerged_and_by_block_as_diffusers_samples_them(tmp_path):
    """In attention alone: diffusers leaves blocks without it at the weight 1."""
    pipeline, model = stable(diffusers.StableDiffusionPipeline, tmp_path, make_unet(), **ABSENT)
    adapters, z_T = [], draw(0, 2, SIDE, SIDE, 4)
    for i, weight in enumerate((0.7, {"unet.up_blocks": 2.0, "text_encoder": -0.5, "": 0.4})):
        tensors, _ = lora_of(pipeline, "diffusers", np.random.default_rng(i), LINEAR)
        save_file(tensors, tmp_path / f"{i}.safetensors")
        pipeline.load_lora_weights(tmp_path, weight_name=f"{i}.safetensors", adapter_name=f"a{i}")
        adapters.append((ldm.load_adapter(tmp_path / f"{i}.safetensors"), weight))
    blocks = {"unet": {"down": 0.4, "mid": 0.4, "up": 2.0}, "text_encoder": -0.5}
    pipeline.set_adapters(["a0", "a1"], [0.7, blocks])
    prompts = ["a red cat", "two dogs, far away"]
    theirs = pipeline(prompts, latents=to_torch(z_T), num_inference_steps=4, output_type="np")

    def sampled(adapters):
        options = {"num_steps": 4, "z_T": z_T, "mode": "single", "adapters": adapters}
        return (model.sample(jax.random.key(0), prompts, **options) + 1) / 2

    difference = np.abs(sampled(adapters) - theirs.images).max()
    print(f"largest difference {255 * difference:.3f} levels")
    assert difference <= 2 / 255 and np.abs(sampled([]) - theirs.images).max() > 5 / 255


LYCORIS = {
    "locon": {},
    "locon tucker": {"use_tucker": True},
    "locon dora": {"weight_decompose": True, "wd_on_out": True},
    "loha": {},
    "loha tucker": {"use_tucker": True},
    "loha dora": {"weight_decompose": True, "wd_on_out": False},
    "lokr": {"factor": 4},
    "lokr both": {"factor": 4, "decompose_both": True, "lora_dim": 1},
    "lokr tucker": {"factor": 4, "use_tucker": True},
    "lokr full": {"factor": 4, "full_matrix": True},
    "glora": {},
    "full": {},
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_kinds_as_lycoris_merges_them(kind, tmp_path):
    """Its modules are made, filled with noise, saved, and merged into a copy of the network."""
    lycoris = pytest.importorskip("lycoris.modules")
    algorithm = kind.split()[0]
    classes = {"locon": "LoConModule", "loha": "LohaModule", "lokr": "LokrModule",
               "glora": "GLoRAModule", "full": "FullModule"}  # fmt: skip
    module_class = getattr(lycoris, classes[algorithm])
    pipeline, _ = stable(diffusers.StableDiffusionPipeline, tmp_path, make_unet(), **ABSENT)
    before, bundle = parameters(tmp_path / "a", pipeline), convert.read(tmp_path / "a")
    generator, tensors = torch.Generator().manual_seed(0), {}
    with torch.no_grad():
        for prefix, name, layer in list(modules(pipeline, CONVOLUTIONS)):
            flat = whole(prefix, name).replace(".", "_")
            key = f"lora_{'unet' if prefix == 'unet' else 'te'}_{flat}"
            if algorithm == "full":
                diff = torch.randn(layer.weight.shape, generator=generator)
                tensors[f"{key}.diff"] = diff.numpy()
                layer.weight += diff
                continue
            settings = {"lora_dim": RANK, "alpha": 1.5, **LYCORIS[kind]}
            own = module_class(key, layer, 1.0, **settings)
            for p_name, p in own.named_parameters():
                if "org" in p_name or "dora" in p_name:
                    continue
                p.copy_(torch.randn(p.shape, generator=generator))
            if hasattr(own, "dora_scale"):
                own.dora_scale.mul_(1.3)
            saved = own.custom_state_dict()
            for factor, tensor in saved.items():
                tensors[f"{key}.{factor}"] = np.array(tensor.detach().float().numpy())
            if algorithm in ("loha", "lokr"):  # get_merged_weight multiplies by α/r twice
                merged = layer.weight + own.get_weight(layer.weight.shape)
                merged = own.apply_weight_decompose(merged) if own.wd else merged
            else:
                merged = own.get_merged_weight(1.0, shape=layer.weight.shape)[0]
            layer.weight.copy_(merged)
    save_file(tensors, tmp_path / "x.safetensors")
    want = parameters(tmp_path / "b", pipeline)
    compare(before, want, bundle, tmp_path / "x.safetensors", changed=40)


@pytest.mark.parametrize("layout", ["diffusers", "a1111"])
def test_a_word_of_two_vectors_as_diffusers_samples_it(layout, tmp_path):
    pipeline, model = stable(diffusers.StableDiffusionPipeline, tmp_path, make_unet(), **ABSENT)
    width = pipeline.text_encoder.config.hidden_size
    vectors = normal(np.random.default_rng(3), 2, width)
    if layout == "diffusers":
        torch.save({"<it>": torch.from_numpy(vectors)}, tmp_path / "<it>.bin")
    else:
        tree = {"string_to_param": {"*": torch.from_numpy(vectors)}, "name": "<it>"}
        torch.save({"string_to_token": {"*": 265}, **tree}, tmp_path / "<it>.bin")
    pipeline.load_textual_inversion(str(tmp_path / "<it>.bin"))
    z_T, texts = draw(0, 2, SIDE, SIDE, 4), (["a <it> cat", "two dogs"], ["dogs", "a <it>, far"])
    call = {"latents": to_torch(z_T), "num_inference_steps": 4, "output_type": "np"}
    theirs = pipeline(texts[0], negative_prompt=texts[1], **call).images
    options = {"negative_prompts": texts[1], "num_steps": 4, "z_T": z_T, "mode": "single"}
    word = ldm.load_adapter(tmp_path / "<it>.bin")
    ours = (model.sample(jax.random.key(0), texts[0], adapters=[(word, 1.0)], **options) + 1) / 2
    plain = (model.sample(jax.random.key(0), texts[0], **options) + 1) / 2
    difference = np.abs(ours - theirs).max()
    print(f"largest difference {difference:.1e}")
    assert difference <= 1e-4 and np.abs(plain - theirs).max() > 1e-2


TRANSFORMERS = {
    "mmdit": (
        "SD3Transformer2DModel",
        dict(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8,
            caption_projection_dim=8, pooled_projection_dim=6, pos_embed_max_size=4,
            qk_norm="rms_norm", dual_attention_layers=(0,),
        ),
        ["to_q", "to_v", "add_k_proj", "to_out.0", "to_add_out", "net.2", "norm_out.linear",
         "pos_embed.proj"],
    ),
    "dit": (
        "DiTTransformer2DModel",
        dict(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
            num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=5,
        ),
        ["to_q", "to_v", "to_out.0", "net.0.proj", "norm1.linear", "proj_out_1", "pos_embed.proj"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformers_lora_as_peft_merges_it(name, tmp_path):
    """The folder of PEFT beside diffusers' transformers."""
    kind, fields, targets = TRANSFORMERS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**fields)
    if name == "dit":  # whose blocks have copies of one embedding
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        model.transformer_blocks[1].norm1.emb.load_state_dict(first)
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    bundle, merged = (convert.read(tmp_path / which) for which in ("base", "merged"))
    before, want = (
        {f"{name}/{path}": np.array(t.read()) for path, t in getattr(b, name).params.items()}
        for b in (bundle, merged)
    )
    compare(before, want, bundle, tmp_path / "adapter", 9)
