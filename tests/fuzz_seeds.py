"""Good models and adapters of every format that is read: small, and of the package's own writers.

`fuzz.py` damages copies of them.
"""

import functools
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import test_adapters
import test_convert_files as files
import test_convert_round_trips as models
import test_dit
import test_image_prompts
import test_lora
import test_prior_files
import test_sd3
import test_t2i_adapter
import test_tiny_autoencoder
import test_tokenizers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from t5_vocabulary import VOCABULARY

from latent_diffusion import convert
from latent_diffusion.convert import adapters, autoencoder, unet
from latent_diffusion.convert.adapters import control
from latent_diffusion.convert.bundle import as_part, conditioner_shapes
from latent_diffusion.convert.sd3 import SCALE, SHIFT
from latent_diffusion.convert.tokenizers import write_tokenizer
from latent_diffusion.data.tokenizers import ClipT5Tokenizer, ClipTokenizer, T5Tokenizer
from latent_diffusion.nets.unet import UNet

CLIP_WORDS = ClipTokenizer(test_tokenizers.CLIP, test_tokenizers.MERGES, max_length=5)
CONTROLLED = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 8}
CONTROLLED |= {"attention_resolutions": (1, 2), "out_channels": 4}


class Seed(NamedTuple):
    """A good file or folder.

    read: what a user does with it. places: files that crafted inputs replace whole. settings: files
    of which they replace every value. brief: with one value each.
    """

    path: Path
    places: tuple[str, ...]
    settings: tuple[str, ...] = ()
    read: Callable[[Path], object] = convert.read
    brief: bool = True

    @property
    def root(self) -> Path:
        """The folder that is copied."""
        return self.path if self.path.is_dir() else self.path.parent


# -------------------------------------------------------------------------------- how it is read


def read_and_fit(path):
    """Read an adapter and give it to the model that it is for."""
    adapter = adapters.read_adapter(path)
    if isinstance(adapter, adapters.ControlWeights):
        adapter.net(UNet(**CONTROLLED), unet_params(), 2)
    elif isinstance(adapter, adapters.T2IWeights):
        adapter.places(UNet(model_channels=8, channel_mult=(1, 2), num_res_blocks=1), 8)
    elif isinstance(adapter, adapters.ImagePrompt):
        model = test_image_prompts.model()
        adapter.attentions(model.denoiser.network, model.denoiser.params["unet"])
    else:
        adapter.changes(test_lora.make_bundle())


@functools.cache
def unet_params():
    return unet.shapes(CONTROLLED, 4, 768, None)


# ----------------------------------------------------------------------------- the earlier formats


def stable_diffusion(folder):
    """Stable Diffusion in all its containers, parts of it, and a workdir."""
    bundle = models.make_bundle("clip")
    single, pipeline = folder / "compvis" / "model.safetensors", folder / "pipeline"
    convert.write(bundle, single, "compvis")
    convert.write(bundle, pipeline, "diffusers")
    write_tokenizer(CLIP_WORDS, pipeline / "tokenizer")
    # The same tensors in torch's zip file, as training writes it.
    ckpt = folder / "ckpt" / "model.ckpt"
    ckpt.parent.mkdir()
    shutil.copy(single.with_suffix(".yaml"), ckpt.with_suffix(".yaml"))
    write_torch_zip(ckpt, load_file(single))
    # A component in shards.
    shards = folder / "shards"
    shutil.copytree(pipeline / "vae", shards)
    (weights,) = shards.glob("*.safetensors")
    arrays = load_file(weights)
    weights.unlink()
    index = {}
    for i in range(2):
        part = {n: a for n, a in arrays.items() if sum(n.encode()) % 2 == i}
        save_file(part, shards / f"part{i}.safetensors")
        index |= {n: f"part{i}.safetensors" for n in part}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (shards / name).write_text(json.dumps({"weight_map": index}))
    for part in ("unet", "text_encoder"):
        shutil.copytree(pipeline / part, folder / part)
    convert.write(convert.Bundle(autoencoder=bundle.autoencoder), folder / "workdir", "orbax")
    old = functools.partial(Seed, brief=False)
    tokenizer = "tokenizer/tokenizer_config.json"
    return {
        "compvis": old(single, ("model.safetensors", "model.yaml"), ("model.yaml",)),
        "ckpt": old(ckpt, ("model.ckpt",)),
        "shards": old(shards, (name, "part0.safetensors"), ("config.json",)),
        "unet": old(folder / "unet", ("config.json",), ("config.json",)),
        "text_encoder": old(
            folder / "text_encoder", ("config.json", "model.safetensors"), ("config.json",)
        ),
        "pipeline": old(
            pipeline,
            ("model_index.json", "scheduler/scheduler_config.json", "vae/config.json",
             "tokenizer/vocab.json", "tokenizer/merges.txt", tokenizer),
            ("model_index.json", "scheduler/scheduler_config.json", tokenizer),
        ),
        "workdir": old(
            folder / "workdir", ("config.json", "first_stage.safetensors"), ("config.json",)
        ),
    }  # fmt: skip


def write_torch_zip(path, tensors, name="state_dict", **beside):
    """Write float32 tensors as torch.save does; name: None for a flat file."""
    tree, storages = OrderedDict(), {}
    for i, (key, array) in enumerate(tensors.items()):
        steps, strides = 1, []
        for side in reversed(array.shape):
            strides.insert(0, steps)
            steps *= side
        kind = "FloatStorage" if array.dtype.kind == "f" else "LongStorage"
        tree[key] = files.tensor(kind, str(i), array.size, array.shape, tuple(strides))
        storages[str(i)] = array
    whole = tree if name is None else {name: tree, "global_step": 3, **beside}
    files.torch_zip(path, whole, storages)


# ------------------------------------------------------------------------------- the newer formats


def stable_diffusion_3(folder):
    encoders = {k: dict(fields) for k, fields in test_sd3.ENCODERS.items()}
    for name in ("clip_text", "clip_text_2"):
        encoders[name] |= {"vocab_size": CLIP_WORDS.vocab_size, "max_length": 5}
        encoders[name] |= {"empty": CLIP_WORDS.empty, "pad_id": CLIP_WORDS.pad_id}
    words = T5Tokenizer(VOCABULARY, max_length=4)
    encoders["clip_text_2"]["activation"] = "gelu"
    encoders["t5_text"] |= {"vocab_size": words.vocab_size}
    made = test_sd3.bundle()
    for name, fields in encoders.items():
        made = made.with_part(name, models.part(fields, conditioner_shapes(name, fields)))
    stage = models.part(models.AUTOENCODER, autoencoder.shapes(models.AUTOENCODER))
    network = replace(made.mmdit, fields={**made.mmdit.fields, "patch_size": 2})
    made = replace(made, autoencoder=stage, scale_factor=SCALE, shift=SHIFT, mmdit=network)
    made = replace(made, tokenizer=ClipT5Tokenizer(CLIP_WORDS, words))
    convert.write(made, folder / "sd3", "diffusers")
    convert.write(test_sd3.bundle(), folder / "sd3_file" / "one.safetensors", "compvis")
    third = "text_encoder_3/config.json"
    configs = ("transformer/config.json", third, "scheduler/scheduler_config.json")
    return {
        "sd3": Seed(
            folder / "sd3",
            ("model_index.json", third, "tokenizer_3/tokenizer.json"),
            ("model_index.json", *configs, "tokenizer_3/tokenizer_config.json"),
        ),
        "sd3_file": Seed(folder / "sd3_file" / "one.safetensors", ("one.safetensors",)),
    }


def stable_diffusion_xl(folder):
    bundle = models.make_bundle("xl")
    convert.write(bundle, folder / "sdxl", "diffusers")
    convert.write(bundle, folder / "sgm" / "model.safetensors", "compvis")
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(CLIP_WORDS, folder / "sdxl" / name)
    second = "text_encoder_2/config.json"
    return {
        "sdxl": Seed(
            folder / "sdxl",
            ("model_index.json", second),
            ("model_index.json", "unet/config.json", second, "tokenizer_2/tokenizer_config.json"),
        ),
        "sgm": Seed(folder / "sgm" / "model.safetensors", ("model.yaml",), ("model.yaml",)),
    }


def transformers(folder):
    """Of DiT and SiT as the flat .pt of their authors, as .safetensors, and as a pipeline."""
    wide = {"width": 384, "num_heads": 6, "depth": 1}
    found = {}
    for name in ("DiT", "SiT"):
        path = folder / f"{name.lower()}_file" / f"{name}-S-2.safetensors"
        test_dit.model_with(sit=name == "SiT", **wide).save(path, "compvis")
        found[path.parent.name] = Seed(path, (path.name,))
        flat = folder / name.lower() / f"{name}-S-2.pt"
        flat.parent.mkdir()
        write_torch_zip(flat, load_file(path), name=None)
        found[flat.parent.name] = Seed(flat, (flat.name,))
    stage = models.part(models.AUTOENCODER, autoencoder.shapes(models.AUTOENCODER))
    bundle = convert.bundle_of(test_dit.model_with(frequency_shift=1))
    whole = replace(bundle, autoencoder=stage, scale_factor=0.25)
    convert.write(whole, folder / "dit_pipeline", "diffusers")
    configs = ("model_index.json", "transformer/config.json")
    return {**found, "dit_pipeline": Seed(folder / "dit_pipeline", configs, configs)}


def codes(folder):
    """taming's priors and its other quantiser."""
    found = {}
    for name in ("code_map", "class_token"):
        path = folder / name / "prior.safetensors"
        path.parent.mkdir()
        conditions = {name: test_prior_files.CONDITIONS[name]}
        test_prior_files.made(conditions).save(path, format="compvis")
        found[name] = Seed(path, ("prior.yaml", path.name), ("prior.yaml",))
    fields = {**models.AUTOENCODER, "regularization": "gumbel", "num_codes": 8}
    stage = models.part(fields, autoencoder.shapes(fields))
    path = folder / "gumbel" / "vq.safetensors"
    convert.write(convert.Bundle(autoencoder=stage), path, "compvis")
    return {**found, "gumbel": Seed(path, ("vq.yaml", path.name), ("vq.yaml",))}


def tiny_autoencoders(folder):
    params, path = test_tiny_autoencoder.made(), folder / "taesd" / "taesd_decoder.safetensors"
    stage = as_part(test_tiny_autoencoder.FIELDS, params)
    convert.write(convert.Bundle(autoencoder=stage), folder / "tiny", "diffusers")
    path.parent.mkdir()
    for half, tensors in test_tiny_autoencoder.as_original(params).items():
        save_file(tensors, path.with_name(f"taesd_{half}.safetensors"))
    return {
        "taesd": Seed(path, (path.name, "taesd_encoder.safetensors")),
        "tiny": Seed(folder / "tiny", ("config.json",), ("config.json",)),
    }


# --------------------------------------------------------------------------------------- adapters


def steering(folder):
    """Control nets and T2I-Adapters in both formats, and an IP-Adapter with its encoder."""
    fields = {**CONTROLLED, "hint_channels": (16, 32)}
    tree = flatten_dict(control.shapes(fields, 4, 768, None), sep="/")
    params = {k: models.random(x.shape) for k, x in tree.items()}
    fields = control.frozen({**fields, "global_pooling": False})
    net = adapters.ControlWeights(path="net", params=params, fields=fields)
    sizes = {"channels": (8, 16), "num_res_blocks": 2, "downscale": 8}
    t2i = test_t2i_adapter.random_adapter("full", 64, **sizes)
    found = {}
    for name, adapter, write in (
        ("control", net, adapters.write_control), ("t2i", t2i, adapters.write_t2i),
    ):  # fmt: skip
        path = folder / f"{name}_file" / "net.safetensors"
        write(adapter, path, "compvis")
        write(adapter, folder / name, "diffusers")
        config = ("config.json",)
        found[name] = Seed(folder / name, config, config, read_and_fit)
        found[f"{name}_file"] = Seed(path, (path.name,), read=read_and_fit)
    path, prompt = folder / "ip" / "ip.safetensors", test_image_prompts.random_adapter()
    adapters.write_image_prompt(prompt, path)
    encoder = as_part(dict(prompt.encoder_fields), prompt.encoder)
    whole = convert.Bundle(conditioners={"clip_image": encoder})
    convert.write(whole, path.parent / "image_encoder", "diffusers")
    return found | {"ip": Seed(path, (path.name,), ("image_encoder/config.json",), read_and_fit)}


def words(folder):
    """A word in three layouts."""
    vectors = {"": models.random((2, 16))}
    found = {}
    for layout in ("diffusers", "a1111"):
        path = folder / f"word_{layout}" / "noun.safetensors"
        adapters.write_words(adapters.Words(path="", word="<it>", vectors=vectors), path, layout)
        found[path.parent.name] = Seed(path, (path.name,), read=read_and_fit)
    path = folder / "word_pt" / "noun.pt"
    path.parent.mkdir()
    write_torch_zip(path, {"*": vectors[""]}, "string_to_param", name_of="noun")
    found["word_pt"] = Seed(path, (path.name,), read=read_and_fit)
    path = folder / "word_xl" / "noun.safetensors"
    pair = {"clip_l": models.random((2, 16)), "clip_g": models.random((2, 10))}
    adapters.write_words(adapters.Words(path="", word="noun", vectors=pair), path, "diffusers")
    return found | {"word_xl": Seed(path, (path.name,), read=adapters.read_adapter)}


BLOCK = f"unet.{test_adapters.BLOCK}.to_q"
KOHYA = "lora_unet_" + test_adapters.flat(test_adapters.BLOCK) + "_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def kinds_of_lora():
    """{name: (tensors, the header's settings)}."""
    draw = models.random
    down, up = draw((2, 8)), draw((8, 2))
    kohya = {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up}
    alpha = {f"{KOHYA}.alpha": np.array(1, np.float32)}
    theirs = {f"{BLOCK}.lora_A.weight": down, f"{BLOCK}.lora_B.weight": up}
    settings = {"unet.r": 2, "unet.lora_alpha": 4, "unet.use_dora": False}
    settings |= {"unet.rank_pattern": {}, "unet.alpha_pattern": {}, "unet.use_rslora": True}
    convolution = {f"{CONV}.lora_down.weight": draw((2, 8, 1, 1))}
    convolution |= {f"{CONV}.lora_mid.weight": draw((2, 2, 3, 3))}
    convolution |= {
        f"{CONV}.lora_up.weight": draw((8, 2, 1, 1)),
        f"{CONV}.alpha": np.array(2, np.float32),
    }
    hada = {f"{KOHYA}.hada_w{i}_{x}": a for i in (1, 2) for x, a in (("a", up), ("b", down))}
    kron = {f"{KOHYA}.lokr_w1": draw((2, 2)), f"{KOHYA}.lokr_w2": draw((4, 4))}
    return {
        "kohya": ({**kohya, **alpha}, None),
        "peft": (theirs, settings),
        "locon": (convolution, None),
        "dora": ({**kohya, **alpha, f"{KOHYA}.dora_scale": draw((8, 1)) + 2}, None),
        "loha": ({**hada, **alpha}, None),
        "lokr": ({**kron, **alpha}, None),
    }


def loras(folder):
    found = {}
    for name, (tensors, settings) in kinds_of_lora().items():
        path = folder / f"lora_{name}" / "x.safetensors"
        path.parent.mkdir()
        header = settings and {"lora_adapter_metadata": json.dumps(settings)}
        save_file(tensors, path, header)
        found[path.parent.name] = Seed(path, (path.name,), read=read_and_fit)
    return found


# ---------------------------------------------------------------------------------------- together

EARLIER = ("compvis", "ckpt", "shards", "unet", "text_encoder", "pipeline", "workdir")
GROUPS = (
    stable_diffusion, stable_diffusion_3, stable_diffusion_xl, transformers, codes,
    tiny_autoencoders, steering, words, loras,
)  # fmt: skip


def write_seeds(folder):
    """Write all of them: {name: Seed}, each in a folder of its own."""
    found = {}
    for group in GROUPS:
        found |= group(folder)
    return found
