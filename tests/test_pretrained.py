"""Frozen conditioners: read from everybody's files, kept beside the run, never changed."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from tiny import make_config

import latent_diffusion as ldm
from latent_diffusion import convert
from latent_diffusion.convert import bert, clip_text
from latent_diffusion.convert.bundle import as_part
from latent_diffusion.convert.pretrained import read_pretrained
from latent_diffusion.convert.tables import prefixed, write_tensors
from latent_diffusion.data import ArraySource
from latent_diffusion.data.tokenizers import WordTokenizer
from latent_diffusion.files.tensors import write_safetensors
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.tasks.denoising import make_denoising
from latent_diffusion.training import frozen
from latent_diffusion.training.batch_spec import batch_spec
from latent_diffusion.training.best import Best
from latent_diffusion.training.tokenizer import check_reads, make_tokenizer

BERT = dict(vocab_size=64, max_positions=8, width=16, depth=1, num_heads=2)
CLIP = dict(vocab_size=9, max_length=4, width=64, depth=2, num_heads=1)


def draw(family, fields):
    """Random parameters; nothing is compiled."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), family.shapes(fields)
    )


def write(folder, table, params, config=None, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / name, write_tensors(table, as_part({}, params).params))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    params = draw(bert, BERT)
    folder = tmp_path_factory.mktemp("bert")
    write(folder, bert.transformers_table(BERT), params, bert.config_from_fields(BERT))
    return folder, params


def same(a, b):
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], strict=True, err_msg=path)


def test_a_run_keeps_its_own_copy(bert_folder, tmp_path):
    """In starting, resuming without the original, loading, and as the source of another run."""
    folder, params = bert_folder
    source, run = shutil.copytree(folder, tmp_path / "source"), tmp_path / "run"
    config = make_config("denoising")
    config.autoencoder.update({"regularization": "identity", "embed_dim": 3})
    config.conditioners = ConfigDict({"text": config.conditioners.text, "bert": {"empty": ()}})
    config.pretrained.bert = str(source)
    resolved = frozen.resolve(config)
    assert resolved.conditioners.bert.width == 16 and resolved.conditioners.bert.empty == ()
    task = make_denoising(resolved)
    state, constants = jax.eval_shape(task.init, jax.random.key(0), batch_spec(resolved))
    assert set(state.params["conditioner"]) == set(state.ema_params["conditioner"]) == {"text"}
    pixels = FirstStage({}, jnp.ones(()), jnp.zeros(()), task.autoencoder)
    constants = constants.replace(first_stage=pixels)
    pictures = ArraySource({"image": np.zeros((8, 16, 16, 3), np.uint8)})
    resolved.first_stage.update({"normalization": "none", "num_batches": 1})
    constants = frozen.load_constants(resolved, constants, pictures, None, None)
    same(constants.conditioner["bert"], params)
    frozen.save(resolved, constants, run)

    shutil.rmtree(source)
    again = frozen.load_constants(resolved, constants, None, run, None)
    same(again.conditioner["bert"], params)

    workdir.save_config(resolved, run)
    ema_params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), state.ema_params)
    with Checkpointer(run / "checkpoints") as checkpoints:
        checkpoints.save(0, {"ema_params": ema_params})
    WordTokenizer([], 2, 4).save(run / workdir.TOKENIZER)
    trained = ema_params["conditioner"]["text"]
    loaded = ldm.load(run).denoiser.params["conditioner"]
    same(loaded, {"bert": params, "text": trained})
    with Best(run, "eval_loss", "min") as best:
        best.offer(1, SimpleNamespace(ema_params=ema_params), {"eval_loss": 1.0})
    same(ldm.load(run / "best").denoiser.params["conditioner"], {"bert": params, "text": trained})
    same(convert.as_params(read_pretrained("bert", run, {})), params)
    part = read_pretrained("text", run, {})  # whatever the conditioner, trained or not
    same(convert.as_params(part), trained)
    with pytest.raises(ValueError, match="has no conditioner of this name; it has "):
        read_pretrained("clip_text", run, {})


def test_the_words_of_a_frozen_encoder_are_those_of_its_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    WordTokenizer(["red", "heart"], 9, 3).save(run / workdir.TOKENIZER)
    captions = ArraySource({"caption": ["blue heart"]})
    config = make_config("denoising")
    _, fresh = make_tokenizer(config, captions, None, None)
    assert fresh(["heart"]).tolist() == [[3, 0, 0, 0]]
    config.pretrained.text = str(run)
    config.conditioners.text.update({"vocab_size": 9, "max_length": 3})  # as `frozen.resolve` does
    resolved, tokenizer = make_tokenizer(config, captions, None, None)
    assert tokenizer(["blue red heart"]).tolist() == [[1, 2, 3]]
    assert resolved.tokenizer.max_length == 3 and resolved.asked.tokenizer.max_length == 4
    other = tmp_path / "other"
    other.mkdir()
    WordTokenizer(["blue"], 9, 3).save(other / workdir.TOKENIZER)
    config.conditioners.word_map = {"vocab_size": 9, "height": 2, "width": 2, "channels": 1}
    config.pretrained.word_map = str(other)
    with pytest.raises(ValueError, match=r"run/tokenizer.json and .*differ, but one tokenizer"):
        make_tokenizer(config, captions, None, None)


def test_clips_text_encoder_is_found_in_every_place(tmp_path):
    params = draw(clip_text, CLIP)
    transformers, open_clip = clip_text.transformers_table(CLIP), clip_text.open_clip_table(CLIP)
    config = {**clip_text.config_from_fields(CLIP), "architectures": ["CLIPTextModel"]}
    original = prefixed(transformers, "cond_stage_model.transformer.text_model.")
    write(tmp_path / "a", prefixed(transformers, "text_model."), params, config)
    write(tmp_path / "b" / "text_encoder", transformers, params, config)
    write(tmp_path / "c", original, params)
    write(tmp_path / "d", prefixed(open_clip, "cond_stage_model.model."), params)
    file = "model.safetensors"
    places = [tmp_path / "a", tmp_path / "b", tmp_path / "c" / file, tmp_path / "d" / file]
    for path in places:
        part = read_pretrained("clip_text", path, {"skip_last": 0})
        same({k: t.read() for k, t in part.params.items()}, flatten_dict(params, sep="/"))
        assert part.fields.get("activation", "quick_gelu") == (
            "gelu" if "d" in path.parts else "quick_gelu"
        )
        assert part.fields["empty"] == (7, 8)
    part = read_pretrained("clip_text", places[-1], {})
    assert not any(path.startswith("layers_1") for path in part.params)


def test_what_is_no_encoder_is_refused(bert_folder, tmp_path):
    folder, _ = bert_folder
    config = make_config("denoising")
    config.conditioners.bert = ConfigDict()
    for pretrained, message in (
        ({"bert": ""}, "pretrained.bert is empty: say where its weights lie"),
        ({"bert": "/nowhere"}, "pretrained.bert=/nowhere does not exist"),
        ({"clip_text": "x"}, "pretrained.clip_text is none of the conditioners: bert, text"),
        ({"text": str(folder)}, r"LDMBertModel\.hidden_act='gelu': this setting is unknown"),
        ({"bert": str(folder / "model.safetensors")}, "a bare file; give a folder"),
        ({"bert": str(tmp_path)}, "has no config.json with weights beside it"),
    ):
        config.pretrained = ConfigDict(pretrained)
        with pytest.raises(ValueError, match=message):
            frozen.resolve(config)
    with pytest.raises(ValueError, match="other weights exist for bert, clip_image"):
        read_pretrained("class_label", folder, {})
    with pytest.raises(ValueError, match=r"does not fit: .* of another shape: .*fc1/bias"):
        read_pretrained("bert", folder, {"mlp_width": 32})


def test_an_encoder_and_its_tokenizer_must_agree():
    tokenizer = WordTokenizer(["cat", "dog", "egg"], 5, 4)
    for fields, message in (
        ({"vocab_size": 4}, "text.vocab_size=4, but the tokenizer has 5 tokens"),
        ({"vocab_size": 5, "pad_id": 3}, "text.pad_id=3, but the tokenizer's is 0: set it"),
        (
            {"vocab_size": 5, "empty": [1]},
            r"text.empty=\(1,\), but the tokenizer's is \(\): set it",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check_reads(make_conditioner({"class_label": {}, "text": fields}), tokenizer)
    fits = {"text": {"vocab_size": 5}, "word_map": {"vocab_size": 5}}
    check_reads(make_conditioner(fits), tokenizer)
