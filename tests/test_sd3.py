"""Stable Diffusion 3: three text encoders, its noise, its files, and training."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from t5_vocabulary import VOCABULARY

import latent_diffusion as ldm
from configs import sd3
from latent_diffusion import convert
from latent_diffusion.convert import diffusers
from latent_diffusion.convert import sd3 as files
from latent_diffusion.convert.bundle import Bundle, as_part, conditioner_shapes
from latent_diffusion.convert.mmdit import shapes
from latent_diffusion.convert.pretrained import read_pretrained
from latent_diffusion.convert.scheduler import ASSUMED, from_diffusers, to_diffusers
from latent_diffusion.core.rng import example_keys
from latent_diffusion.data.tokenizers import T5Tokenizer
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.conditioners.t5_text import buckets
from latent_diffusion.process import objectives
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.process.spacings import spacing
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec

CLIP = {
    "vocab_size": 9, "max_length": 3, "width": 64, "depth": 2, "num_heads": 1, "skip_last": 1,
    "final_norm": False, "projection_dim": 64, "empty": (7, 8), "pad_id": 8,
}  # fmt: skip
T5 = {
    "vocab_size": 11, "max_length": 4, "width": 132, "depth": 1, "num_heads": 2, "head_dim": 4,
    "mlp_width": 8, "buckets": 8,
}  # fmt: skip
ENCODERS = {"clip_text": CLIP, "clip_text_2": {**CLIP, "repad": True, "pad_id": 0}, "t5_text": T5}
TOKENS = jnp.array([[7, 2, 8, 5, 6, 1, 0], [7, 3, 8, 9, 1, 0, 0]])  # CLIP's row, then T5's


def drawn(tree, seed=0):
    """A tree of this shape with random leaves."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), "float32"), tree)


def conditioned(encoders, tokens=TOKENS, drop=(False, False)):
    conditioner = make_conditioner(encoders)
    params = {n: drawn(conditioner_shapes(n, fields)) for n, fields in encoders.items()}
    params = {name: tree for name, tree in params.items() if tree}
    return conditioner.apply({"params": params}, {"tokens": tokens}, jnp.array(drop))


def test_texts_follow_each_other_and_vectors_join():
    """CLIP's two contexts along their width, zeros up to T5's, and T5's context behind them."""
    both = conditioned({k: ENCODERS[k] for k in ("clip_text", "clip_text_2")}, TOKENS[:, :3])
    out = conditioned(ENCODERS)
    assert out.context.shape == (2, 3 + 4, 132) and out.vector.shape == (2, 128)
    np.testing.assert_allclose(out.context[:, :3, :128], both.context, atol=1e-6)
    np.testing.assert_allclose(out.vector, both.vector, atol=1e-6)
    assert not out.context[:, :3, 128:].any() and out.context[:, 3:].any((0, 2)).all()
    without = conditioned({**ENCODERS, "t5_text": {**T5, "absent": True}}, TOKENS[:, :3])
    np.testing.assert_allclose(without.context[:, :3], out.context[:, :3], atol=1e-6)
    assert without.context.shape == out.context.shape and not without.context[:, 3:].any()


def test_what_is_dropped_is_the_empty_prompt_of_every_encoder():
    empty = jnp.array([[7, 8, 8, 1, 0, 0, 0]] * 2)
    dropped, want = conditioned(ENCODERS, drop=(True, False)), conditioned(ENCODERS, empty)
    kept = conditioned(ENCODERS)
    for name in ("context", "vector"):
        np.testing.assert_allclose(getattr(dropped, name)[0], getattr(want, name)[0], atol=1e-6)
        np.testing.assert_array_equal(getattr(dropped, name)[1], getattr(kept, name)[1])


def test_a_context_of_clip_is_no_wider_than_t5s():
    with pytest.raises(ValueError, match="the context of CLIP is 128 wide, T5's only 100"):
        conditioned({**ENCODERS, "t5_text": {**T5, "width": 100}})


def test_t5_computes_in_float16_though_its_sums_of_layers_are_beyond_its_range():
    fields = {**T5, "depth": 2}
    tree = drawn(conditioner_shapes("t5_text", fields))
    for i in range(2):
        kernels = tree[f"layers_{i}"]
        kernels["wi_0"]["kernel"] *= 30
        kernels["wi_1"]["kernel"] *= 30
        kernels["wo"]["kernel"] *= 1000

    def context(dtype):
        params = {"t5_text": jax.tree.map(lambda x: x.astype(dtype), tree)}
        conditioner = make_conditioner({"t5_text": {**fields, "dtype": dtype}})
        out = conditioner.apply({"params": params}, {"tokens": TOKENS}, jnp.zeros(2, bool))
        return np.asarray(out.context, np.float32)

    np.testing.assert_allclose(context("float16"), context("float32"), atol=0.02)


def test_distances_share_rows_where_they_are_large():
    """32 rows: 0 to 7 for single steps back, up to 15 from a distance of 128; 16 more ahead."""
    rows = buckets(300, 32, 128)
    assert rows[299, 299 - np.array([0, 1, 7, 8, 127, 128, 299])].tolist() == [
        0,
        1,
        7,
        8,
        15,
        15,
        15,
    ]
    assert rows[0, [1, 7, 8, 16, 299]].tolist() == [17, 23, 24, 26, 31]


# ------------------------------------------------------------------------------------- the noise


def test_a_flow_is_straight_between_its_timesteps_too():
    schedule = make_schedule("rectified_flow", 1000)
    t = jnp.array([0.25, 1.5, 500.75, 997.5])  # behind 998, alpha falls to 0
    np.testing.assert_allclose(schedule.sigma_t(t), (t + 1) / 1000, rtol=1e-6)
    np.testing.assert_allclose(schedule.alpha_t(t), 1 - (t + 1) / 1000, rtol=1e-4)
    np.testing.assert_allclose(schedule.timestep_at(schedule.log_snr_t(t)), t, rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shifted_steps_are_those_of_the_released_models(shift):
    """Even shares from 1 to the shifted least one, each then shifted (diffusers' scheduler)."""
    schedule = make_schedule("rectified_flow", 1000)
    t = spacing("shifted", schedule, 5, shift=shift)
    least = shift * 0.001 / (1 + (shift - 1) * 0.001)
    even = np.linspace(1, least, 5)
    want = shift * even / (1 + (shift - 1) * even)
    np.testing.assert_allclose(schedule.sigma_t(t), [*want, 0], rtol=1e-5)


def test_drawn_timesteps_follow_their_densities():
    schedule = make_schedule("rectified_flow", 1000)
    keys = example_keys(jax.random.key(0), 4000)
    share = {
        name: np.asarray(objectives.TIMESTEP_SAMPLING[name](keys, schedule) + 0.5) / 1000
        for name in ("uniform", "logit_normal", "mode")
    }
    assert np.std(share["logit_normal"]) < np.std(share["mode"]) < np.std(share["uniform"])
    u = (np.arange(10_000) + 0.5) / 10_000
    mapped = 1 - u - 1.29 * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    np.testing.assert_allclose(
        np.quantile(share["mode"], [0.1, 0.5, 0.9]), np.quantile(mapped, [0.1, 0.5, 0.9]), atol=0.03
    )
    t = objectives.shift_timesteps(jnp.array([0, 499, 999]), schedule, 3.0)
    assert t.tolist() == [2, 749, 999]  # 3·½ / (1 + 2·½) = ¾


def test_the_scheduler_is_read_and_written_and_what_it_adds_is_refused(caplog):
    diffusion, sampling = from_diffusers(files.SCHEDULER)
    assert (diffusion["schedule"], diffusion["prediction"]) == ("rectified_flow", "flow")
    assert (sampling["spacing"], sampling["shift"]) == ("shifted", 3.0)
    assert to_diffusers(diffusion, sampling) == files.SCHEDULER
    _, sampling = from_diffusers({**files.SCHEDULER, "use_dynamic_shifting": True})
    assert "use_dynamic_shifting=True has no equal here" in sampling["sampler"]


# ------------------------------------------------------------------------------------ single files


def bundle(t5=True, projection=True):
    """A tiny model with the scale of the released ones, as a single file would give it."""
    fields = {
        "out_channels": 4, "width": 64, "depth": 2, "num_heads": 1, "max_positions": 4,
        "qk_norm": True, "dual_attention": (0,),
    }  # fmt: skip
    diffusion, sampling = from_diffusers(files.SCHEDULER)
    encoders = {k: v for k, v in ENCODERS.items() if t5 or k != "t5_text"}
    encoders |= {"clip_text_2": {**ENCODERS["clip_text_2"], "activation": "gelu"}}
    parts = {n: as_part(f, drawn(conditioner_shapes(n, f))) for n, f in encoders.items()}
    return Bundle(
        mmdit=as_part(fields, drawn(shapes(fields, 4, 132, 128))),
        conditioners=parts,
        diffusion=diffusion,
        sampling=sampling,
        notes={} if projection else {"no_projection": True},
    )


@pytest.mark.parametrize(("t5", "projection"), [(True, True), (False, False)])
def test_a_single_file_holds_every_array_bitwise(t5, projection, tmp_path):
    made = bundle(t5, projection)
    convert.write(made, tmp_path / "one.safetensors", "compvis")
    model = ldm.load(tmp_path / "one.safetensors")
    model.save(tmp_path / "two.safetensors", "compvis")
    one, two = (safetensors.numpy.load_file(tmp_path / f"{n}.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    clip = "text_encoders.clip_l.transformer."
    assert f"{clip}text_model.encoder.layers.1.mlp.fc1.weight" in one
    assert (f"{clip}text_projection.weight" in one) == projection
    assert any(name.startswith("text_encoders.t5xxl.") for name in one) == t5
    t5_fields = model.conditioner.config["t5_text"]
    assert bool(t5_fields.get("absent")) != t5 and t5_fields["width"] == 132
    eye = model.denoiser.params["conditioner"]["clip_text"]["text_projection"]["kernel"]
    assert np.array_equal(eye, np.eye(64)) != projection
    assert (model.defaults["num_steps"], model.defaults["guidance_scale"]) == (28, 7.0)


def test_a_single_file_takes_a_run_whose_noise_is_that_of_the_released_models():
    """A run's `diffusion` has its objective beside, and betas that a flow doesn't use."""
    made = bundle()
    run = {**made.diffusion, "loss": "l2", "beta_start": 0.1, "timestep_sampling": "logit_normal"}
    tensors = files.as_single(replace(made, diffusion=run))
    assert tensors.keys() == files.as_single(made).keys()
    for other in ({"prediction": "v"}, {"schedule": "cosine"}, {"num_timesteps": 500}):
        with pytest.raises(ValueError, match="a flow with shift=3; save it as diffusers"):
            files.as_single(replace(made, diffusion={**run, **other}))


def test_a_single_file_of_other_pictures_than_the_released_models_says_so(tmp_path, caplog):
    convert.write(replace(bundle(), image_size=1024), tmp_path / "one.safetensors", "compvis")
    assert not caplog.records
    convert.write(replace(bundle(), image_size=512), tmp_path / "one.safetensors", "compvis")
    assert "doesn't say the size of trained pictures: 512 is read as 1024" in caplog.text
    assert convert.read(tmp_path / "one.safetensors").image_size == 1024


def test_each_text_encoder_is_read_from_its_own_folder_of_a_pipeline(tmp_path):
    made = bundle()
    network = replace(made.mmdit, fields={**made.mmdit.fields, "patch_size": 2})
    second = made.conditioners["clip_text_2"].fields  # with other numbers than the first
    part = as_part(second, drawn(conditioner_shapes("clip_text_2", second), seed=1))
    made = replace(made, mmdit=network).with_part("clip_text_2", part)
    convert.write(made, tmp_path, "diffusers")
    whole = convert.read(tmp_path)
    for name, part in made.conditioners.items():
        fields = {"skip_last": 1, "final_norm": False, "projection_dim": 64}
        alone = read_pretrained(name, tmp_path, fields if name.startswith("clip") else {})
        for read in (alone, whole.conditioners[name]):
            assert read.params.keys() == part.params.keys()
            for path, tensor in part.params.items():
                np.testing.assert_array_equal(read.params[path].read(), tensor.read())


def test_a_file_without_an_encoder_of_clip_is_refused(tmp_path):
    made = bundle()
    made = made.__class__(
        **{**made.__dict__, "conditioners": {"t5_text": made.conditioners["t5_text"]}}
    )
    convert.write(made, tmp_path / "one.safetensors", "compvis")
    with pytest.raises(ValueError, match="it lacks the text encoder clip_text, clip_text_2"):
        ldm.load(tmp_path / "one.safetensors")


# --------------------------------------------------------------------------- tokens and training


def test_the_likeliest_pieces_and_the_end():
    scores = {"▁a": -1.0, "b": -1.0, "c": -1.0, "bc": -1.5, "▁abc": -2.6, "▁": -3.0}
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5Tokenizer([*special, *scores.items()], max_length=6)
    names = [piece for piece, _ in tokenizer.vocabulary]

    def pieces(text):
        return [names[i] for i in tokenizer([text])[0]]

    assert pieces("abc") == ["▁a", "bc", "</s>", "<pad>", "<pad>", "<pad>"]  # −2.5, not −2.6, −3
    assert pieces("xyb") == ["▁", "<unk>", "b", "</s>", "<pad>", "<pad>"]  # unknown ones join
    assert pieces("a</s>b c c c c") == ["▁a", "</s>", "▁", "b", "▁", "</s>"]  # is cut
    assert tokenizer.unknown_words("a xy") == ["xy"]
    assert len(VOCABULARY) == T5Tokenizer(VOCABULARY).vocab_size


RELEASED = {  # width, depth, heads, norms of queries and keys, blocks that attend twice, positions
    "": (1536, 24, 24, False, 0, 192),
    "medium": (1536, 24, 24, True, 13, 384),
    "large": (2432, 38, 38, True, 0, 192),
}


def narrowed(config):
    """The same experiment with tiny networks and pictures."""
    config.batch_size, config.data.image_size = 2, 32
    config.autoencoder.update({"channels": 32, "num_res_blocks": 1})
    config.mmdit.update({"width": 16, "depth": 2, "num_heads": 2, "max_positions": 8})
    for name, fields in config.conditioners.items():
        fields.update({"depth": 2, "width": 32 if name == "t5_text" else 8, "num_heads": 2})
        fields.update({"projection_dim": 8} if name != "t5_text" else {"mlp_width": 8})
    return config


@pytest.mark.parametrize("variant", ["", "medium", "large", "lora", "smoke"])
def test_the_experiment_takes_a_step(variant):
    config = sd3.get_config(variant)
    if variant in RELEASED:
        own = config.mmdit
        fields = (own.width, own.depth, own.num_heads, own.qk_norm, len(own.dual_attention))
        assert (*fields, own.max_positions) == RELEASED[variant]
    config = config if variant == "smoke" else narrowed(config)
    task, spec = TASKS[config.task](config), batch_spec(config)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    state, constants = jax.eval_shape(task.init, rng, spec)
    after, _ = jax.eval_shape(task.train_step, state, constants, spec, rng)
    assert jax.tree.map(jnp.shape, after.params) == jax.tree.map(jnp.shape, state.params)
    if variant == "lora":
        adapted = flatten_dict(state.params["lora"]["mmdit"]).keys()
        assert {path[-2] for path in adapted} == {"kernel"} and len(adapted) == 2 * 7
        assert set(state.params) == {"lora"}


def test_a_transformer_without_a_known_scheduler_is_a_flow():
    """Its class alone says so, not the settings of Stable Diffusion 1."""
    model = bundle()
    model = replace(model, diffusion=ASSUMED, sampling={}, notes={"pipeline": files.BASE})
    flow, usual = from_diffusers(files.SCHEDULER)
    assert diffusers._assumed(model).diffusion == flow
    config = {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 2.0}
    read = diffusers._with_scheduler(model, config, None)
    assert read.diffusion == flow and read.sampling["shift"] == 2.0
    assert read.sampling["sampler"] == "FlowMatchHeunDiscreteScheduler"
    assert (
        read.sampling["spacing"] == usual["spacing"] and read.sampling["num_steps"] == files.STEPS
    )
