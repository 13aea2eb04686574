"""Captions that frozen encoders read once: the same losses, the right rows, once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several
from ml_collections import ConfigDict
from test_pretrained import BERT, bert_folder  # noqa: F401 (a fixture)
from test_sdxl import ENCODER, SECOND
from test_shards import on_shards, pixels
from tiny import BATCH, SIZE, make_batch, make_config

from latent_diffusion import data
from latent_diffusion.nets.conditioners import encoded_apart
from latent_diffusion.runtime import parallel
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.tasks.denoising import make_denoising
from latent_diffusion.training import encoding, loop, start, texts
from latent_diffusion.training.batch_spec import batch_spec

RNG = jax.random.key(0)
CAPTIONS = ["red", ["blue", "green"], "red", [], "two words"]


def config_of(pretrained=("clip_text", "clip_text_2"), **fields):
    """Two frozen text encoders: what the first drops is the empty prompt, the second zeros."""
    config = make_config("denoising")
    config.autoencoder.update({"regularization": "identity", "embed_dim": 3})
    encoders = {"clip_text": {**ENCODER, "zero_null": False}, "clip_text_2": SECOND}
    config.conditioners = ConfigDict(encoders)
    config.tokenizer.max_length = 5
    config.pretrained = ConfigDict(dict.fromkeys(pretrained, "somewhere"))
    config.unet.vector_projection = True
    config.diffusion.drop_rate = 0.5
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def made():
    """(task, state, constants, batch) of such a run."""
    config = config_of()
    task = make_denoising(config)
    state, constants = jax.jit(task.init)(RNG, batch_spec(config))
    draw = np.random.default_rng(0).standard_normal  # fresh networks answer zero
    state = state.replace(
        params=jax.tree.map(lambda x: np.float32(0.2 * draw(x.shape)), state.params)
    )
    batch = make_batch(config)
    batch["tokens"] = np.array([[7, 3, 8, 8, 8], [7, 5, 6, 8, 8]], np.int32)[np.arange(BATCH) % 2]
    return task, state, constants, batch


@pytest.mark.parametrize("mode", ["single", "pmap", "mesh"])
def test_losses_with_encoded_texts_are_those_with_their_encoders(made, mode):
    """Dropped conditions among them, and on several devices."""
    task, state, constants, batch = made
    conditioner = task.denoiser.conditioner
    encoded = jax.jit(lambda *given: encoded_apart(conditioner, *given))
    entries = jax.tree.map(np.asarray, encoded(constants.conditioner, {"tokens": batch["tokens"]}))
    assert set(entries) == {"clip_text.context", "clip_text_2.context", "clip_text_2.vector"}
    mesh = parallel.make_mesh({"data": 4, "fsdp": 2}) if mode == "mesh" else None
    rules = ((".*unet.*kernel", "fsdp(min_mb=0)"), (".*", "replicate"))

    def loss(batch, constants=constants):
        step = parallel.compile_step(
            task.train_step, mode, mesh=mesh, rules=rules, donate_state=False
        )
        return float(step(state, constants, batch, RNG)[1]["loss"])

    got = loss({**batch, **entries})
    if mode == "single":
        task_of = dataclasses.replace(task, drop_rate=0.0)  # the null counts
        plain = jax.jit(task_of.train_step)(state, constants, batch, RNG)[1]["loss"]
        assert abs(float(plain) - got) > 1e-4
        changed = {**entries, "clip_text.context": 2 * entries["clip_text.context"]}
        assert abs(loss({**batch, **changed}) - got) > 1e-4  # the entries count
    want = jax.jit(task.train_step)(state, constants, batch, RNG)[1]["loss"]
    np.testing.assert_allclose(got, want, rtol=1e-5)


class Letters:
    """A tokenizer for encoders with nine words: the first letters, between begin and end."""

    def __call__(self, prompts):
        rows = [[7, *(ord(c) % 7 for c in text[:3]), 8, 8, 8, 8][:5] for text in prompts]
        return np.array(rows, np.int32).reshape(-1, 5)


def test_every_text_is_encoded_once_and_anew_only_for_others(made, tmp_path, monkeypatch):
    config, (task, _, constants, _) = config_of(), made
    images = np.zeros((len(CAPTIONS), SIZE, SIZE, 3), np.uint8)
    source = data.ArraySource({"image": images, "caption": CAPTIONS})
    transform = data.make_transform(config.data, train=True, tokenizer=Letters())
    encoders = constants.conditioner

    def with_encoded(encoders=encoders, source=source):
        given = (config, tmp_path, encoders, source, Letters(), transform)
        return texts.with_encoded(*given)

    both = with_encoded()
    seen = [both(source[i], np.random.default_rng(seed)) for seed in range(4) for i in range(5)]
    assert len({example["tokens"].tobytes() for example in seen}) == 5  # both captions of one
    for example in seen:
        want = encoded_apart(
            task.denoiser.conditioner, encoders, {"tokens": jnp.asarray(example["tokens"])[None]}
        )
        for name, value in want.items():
            np.testing.assert_allclose(example[name], value[0], atol=1e-5)
    (file,) = tmp_path.glob("texts-*.npy")
    assert len(np.load(file)) == 5  # equal texts have one row

    encode = texts.encoded
    monkeypatch.setattr(texts, "encoded", None)
    again = with_encoded()(source[0], np.random.default_rng(0))
    np.testing.assert_array_equal(again["clip_text.context"], seen[0]["clip_text.context"])
    monkeypatch.setattr(texts, "encoded", encode)
    others = jax.tree.map(lambda x: 2 * x, encoders)
    for given in ({"encoders": others}, {"source": data.ArraySource({"caption": ["red"]})}):
        with_encoded(**given)
        (other,) = tmp_path.glob("texts-*.npy")
        assert other != file
        file = other


def test_the_file_of_texts_is_that_of_captions_tokenizer_encoders_and_their_fields():
    captions, encoders = ["a", "b"], {"clip_text": {"kernel": np.ones(3)}}

    def identity(captions=captions, encoders=encoders, tokenizer=None, **fields):
        config = config_of(**fields)
        return texts._identity(config, encoders, captions, tokenizer or Letters())

    found = [
        identity(),
        identity(captions=["a", "c"]),
        identity(encoders={"clip_text": {"kernel": np.zeros(3)}}),
        identity(encoders={"clip_text_2": {"kernel": np.ones(3)}}),
        identity(tokenizer=lambda prompts: Letters()(prompts) + 1),
        identity(**{"conditioners.clip_text.skip_last": 0}),
    ]
    assert len({*found}) == len(found) and identity() == found[0]


def test_only_frozen_encoders_of_texts_are_asked():
    def found(*given, **fields):
        config = config_of(*given, **fields)
        with config.unlocked():
            config.conditioners.sizes = {}
        task = make_denoising(config)
        state, constants = jax.eval_shape(task.init, RNG, batch_spec(config))
        return sorted(texts.frozen_encoders(config, state, constants))

    both = ["clip_text", "clip_text_2"]
    assert found() == both
    assert found(["clip_text_2"]) == ["clip_text_2"]
    unet, encoder = r"unet/.*to_q/kernel", r"clip_text/.*qkv/kernel"
    for targets, names in (((unet,), both), ((unet, encoder), ["clip_text_2"])):
        assert found([], **{"lora.rank": 2, "lora.targets": targets}) == names
    with pytest.raises(ValueError, match="none of the conditioners is a frozen text encoder"):
        found([])
    for fields, message in (
        ({"task": "prior"}, "cache_texts=True is for latent denoising .*; task='prior'"),
        ({"textual_inversion.word": "new"}, r"textual_inversion\.word='new'"),
    ):
        with pytest.raises(ValueError, match=message):
            texts.frozen_encoders(config_of(**fields), None, None)


def with_bert(config, folder):
    """A run whose captions are read by a frozen encoder alone, half of them dropped."""
    config.conditioners = ConfigDict({"bert": {"empty": ()}})
    config.pretrained.bert = str(folder)
    config.tokenizer.vocab_size = BERT["vocab_size"]
    config.diffusion.drop_rate = 0.5
    return config


def test_a_run_reads_its_captions_once(bert_folder, tmp_path):  # noqa: F811
    config = several.make_config(**{"parallel.mode": "pmap", "cache_texts": True})
    config = with_bert(config, bert_folder[0])
    config = loop.resolve(config, tmp_path)
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        batch = next(start.start(config, tmp_path, checkpoints).batches)
    assert batch["bert.context"].shape == (*batch["tokens"].shape, BERT["width"])
    assert np.std(batch["bert.context"]) > 0.1 and len(list(tmp_path.glob("texts-*.npy"))) == 1


@pytest.fixture(scope="module")
def in_shards(bert_folder, tmp_path_factory):  # noqa: F811
    """A run whose texts are cached, and shards of its pictures and texts."""
    config = with_bert(pixels(**{"cache_texts": True}), bert_folder[0])
    out = tmp_path_factory.mktemp("latents")
    encoding.encode(config, out, shard_size=300, splits=["train"])
    encoding.encode(config, out, splits=["test"])
    return config, out


def losses(config, workdir):
    """The losses of a run's first steps."""
    with Checkpointer(workdir / "checkpoints") as checkpoints:
        run = start.start(loop.resolve(config, workdir), workdir, checkpoints)
    state, values = run.state, []
    for _ in range(3):
        state, metrics = run.train_step(state, run.constants, next(run.batches), run.rng)
        values.append(float(metrics["loss"]))
    return values


def assert_equal_losses(config, out, tmp_path, monkeypatch):
    """Without encoding, shards with texts give the losses of pictures with captions."""
    plain = config.copy_and_resolve_references()
    plain.cache_texts = False
    want = losses(plain, tmp_path / "captions")
    monkeypatch.setattr(texts, "encoded", None)
    got = losses(on_shards(config, out), tmp_path / "shards")
    assert len({*want}) == 3
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_losses_on_shards_with_texts_are_those_on_pictures_with_captions(
    in_shards, tmp_path, monkeypatch
):
    assert_equal_losses(*in_shards, tmp_path, monkeypatch)


def test_an_adaptation_reads_the_texts_of_its_base_from_shards(tmp_path, monkeypatch):
    """The base has trained its text encoder, which the adaptation leaves as it is."""
    encoder = {"vocab_size": 2048, "max_length": 4, "width": 8, "depth": 1, "num_heads": 2}
    fields = {"unet.attention_resolutions": (1,), "unet.transformer_depth": 1}
    base = pixels(**fields, **{"optimizer.learning_rate": 0.1})
    base.num_steps, base.log.images_every_steps = 1, 0
    base.conditioners = ConfigDict({"text": {**encoder, "head_dim": 4}})
    loop.train(base, tmp_path / "base")
    config = pixels(**fields, **{"cache_texts": True, "lora.rank": 2})
    config.conditioners = base.conditioners
    config.init_from = str(tmp_path / "base")
    encoding.encode(config, tmp_path / "latents", shard_size=300, splits=["train"])
    encoding.encode(config, tmp_path / "latents", splits=["test"])
    assert_equal_losses(config, tmp_path / "latents", tmp_path, monkeypatch)


def test_texts_of_other_encoders_or_tokenizers_are_refused(in_shards):
    config, out = in_shards
    source = data.make_source(on_shards(config, out).data, "train")
    made, transform = dict(source.made["texts"]), data.make_transform(config.data, train=True)
    assert list(made) == ["bert", "tokenizer"]

    def ask(tokenizer, **encoders):
        return texts.from_shards(config, encoders, source, tokenizer, transform)

    with pytest.raises(ValueError, match="has texts of bert, but not of this run's bert: encode"):
        ask(None, bert={"kernel": np.ones(3)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_hashes", lambda *_: [["bert", made["bert"]]])
        with pytest.raises(ValueError, match="has texts of another tokenizer than this run's"):
            ask(lambda prompts: np.full((len(prompts), 8), 63), bert=None)
    with pytest.raises(ValueError, match=r"was begun with texts=.*, not \[\]: choose another"):
        encoding.encode(pixels(), out, shard_size=300, splits=["train"])
