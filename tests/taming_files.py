"""Files of taming-transformers: the released priors with their yaml, and small ones alike."""

import json

import yaml
from key_lists import read_key_list, shapes
from sparse import write_sparse

from latent_diffusion import convert
from latent_diffusion.convert.compvis_writing import as_compvis

VQ = "taming.models.vqgan.VQModel"
UTIL = "taming.modules.util"
LOSS = {"target": "taming.modules.losses.DummyLoss"}


def ddconfig(**changes):
    settings = {"double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3}
    settings |= {"out_ch": 3, "ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2}
    return {**settings, "attn_resolutions": [16], "dropout": 0.0, **changes}


def vq(codes=1024, settings=None, **more):
    """The yaml of a first stage."""
    settings = settings or ddconfig()
    params = {"embed_dim": settings["z_channels"], "n_embed": codes, "ddconfig": settings}
    return {"target": VQ, "params": {**params, "lossconfig": LOSS, **more}}


def of_maps(channels, **more):
    return vq(settings=ddconfig(in_channels=channels, out_ch=channels), **more)


BOXES = {"target": "taming.models.dummy_cond_stage.DummyCondStage"}
BOXES["params"] = {"conditional_key": "objects_bbox"}
COORDINATES = {"target": "taming.modules.misc.coord.CoordStage"}
COORDINATES["params"] = {"n_embed": 1024, "down_factor": 16}
LABELS = {"target": f"{UTIL}.Labelator", "params": {"n_classes": 1000}}
SEGMENTS = of_maps(182, colorize_nlabels=182, image_key="segmentation")
DROPOUT = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.1)
# list of keys, codes, key and yaml of the condition, dropout; what we make of the condition
RELEASED = {
    "faceshq": ("faceshq", 1024, "coord", COORDINATES, {}, "coordinates", {"num_places": 1024}),
    "sflckr": (
        *("faceshq", 1024, "segmentation", SEGMENTS, {}),
        *("code_map", {"key": "segmentation"}),
    ),
    "drin": ("faceshq", 1024, "depth", of_maps(1), {}, "code_map", {"key": "depth"}),
    "coco": (
        *("coco", 8192, "objects_bbox", BOXES, DROPOUT),
        *("layout_tokens", {"vocab_size": 8192, "max_length": 92}),
    ),
    "openimages": (
        *("openimages", 8192, "objects_bbox", BOXES, DROPOUT),
        *("layout_tokens", {"vocab_size": 8192, "max_length": 92}),
    ),
    "cin": ("cin", 16384, "class_label", LABELS, {}, "class_token", {"num_classes": 1000}),
}
COUNTS = {"faceshq": 304_932_864, "coco": 975_876_352}
COUNTS |= {"openimages": 1_045_638_144, "cin": 1_410_640_896}


def gpt(keys, **more):
    """The yaml of the transformer with these tensors."""
    rows, width = keys["tok_emb.weight"]
    depth = len({name.split(".")[1] for name in keys if name.startswith("blocks.")})
    sizes = {"vocab_size": rows, "block_size": keys["pos_emb"][1], "n_layer": depth}
    params = {**sizes, "n_head": 16, "n_embd": width, **more}
    return {"target": "taming.modules.transformer.mingpt.GPT", "params": params}


def net2net(transformer, first_stage, condition, key, **more):
    """The yaml of the whole."""
    params = {"transformer_config": transformer, "first_stage_config": first_stage}
    params |= {"cond_stage_config": condition, "cond_stage_key": key, **more}
    return {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}


def write(folder, keys, model):
    """A file without weights and its yaml; returns the file's path."""
    path = write_sparse(folder / "model.safetensors", keys, "F32", 4)
    model = json.loads(json.dumps(model))  # a part that occurs twice would become a reference
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": model}))
    return path


def with_channels(keys, channels, codes=1024):
    """A first stage of maps: with other ends and another codebook."""
    keys = dict(keys)
    for name in ("encoder.conv_in.weight", "decoder.conv_out.weight"):
        shape = list(keys[name])
        shape[1 if "conv_in" in name else 0] = channels
        keys[name] = tuple(shape)
    keys["decoder.conv_out.bias"] = (channels,)
    keys["quantize.embedding.weight"] = (codes, keys["quantize.embedding.weight"][1])
    return keys


def check_prior(name, folder):
    """A released prior has its number of parameters, its condition, and its tensors again."""
    listed, codes, key, condition, more, ours, fields = RELEASED[name]
    transformer = read_key_list(f"prior-{listed}")
    stage = read_key_list("first-stage-taming-f16")
    parts = {"transformer.": transformer, "first_stage_model.": with_channels(stage, 3, codes)}
    if ours == "code_map":
        channels = condition["params"]["ddconfig"]["in_channels"]
        parts["cond_stage_model."] = with_channels(stage, channels)
        if name == "sflckr":
            parts["cond_stage_model."]["colorize"] = (3, channels, 1, 1)
    keys = {prefix + n: shape for prefix, part in parts.items() for n, shape in part.items()}
    model = net2net(gpt(transformer, **more), vq(codes), condition, key)
    bundle = convert.read(write(folder, keys, model))
    assert sum(tensor.size for tensor in bundle.prior.params.values()) == COUNTS[listed]
    assert list(bundle.conditioners) == [ours] and bundle.image_size == 256
    assert fields.items() <= dict(bundle.conditioners[ours].fields).items()
    written, config = as_compvis(bundle)
    assert shapes(written) == keys
    again = convert.read(write(folder / "again", keys, config))
    assert again.prior.fields == bundle.prior.fields
    assert again.autoencoder.fields == bundle.autoencoder.fields
    assert {n: dict(p.fields) for n, p in again.conditioners.items()} == {
        n: dict(p.fields) for n, p in bundle.conditioners.items()
    }
