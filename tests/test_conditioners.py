"""The contract over the table of conditioners, and what each promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.conditioners import CONDITIONERS, combine, make_conditioner
from latent_diffusion.types import Conditioning

SMALL = {
    "class_label": {"num_classes": 5, "width": 6},
    "clip_text": {"vocab_size": 11, "max_length": 4, "width": 6, "depth": 2, "num_heads": 2}
    | {"bos_id": 9, "eos_id": 10, "pad_id": 1},
    "text": {"vocab_size": 11, "max_length": 4, "width": 6, "depth": 1}
    | {"num_heads": 2, "head_dim": 3},
}
BATCH = {
    "class_label": jnp.array([0, 4, 2]),
    "tokens": jnp.array([[2, 3, 0, 0], [4, 0, 0, 0], [5, 6, 7, 8]]),
}
NEVER, ALWAYS = jnp.zeros(3, bool), jnp.ones(3, bool)


def _apply(config, drop, batch=BATCH):
    conditioner = make_conditioner(config)
    params = jax.jit(conditioner.init)(jax.random.key(0), batch, NEVER)
    return jax.tree.leaves(conditioner.apply(params, batch, drop))[0]


@pytest.mark.parametrize("name", CONDITIONERS)
def test_drop_is_per_example_and_hides_the_condition(name):
    config = {name: SMALL[name]}
    never, always = _apply(config, NEVER), _apply(config, ALWAYS)
    mixed = _apply(config, jnp.array([True, False, False]))
    np.testing.assert_allclose(always, np.broadcast_to(always[:1], always.shape), atol=1e-6)
    assert np.abs(never - always).max() > 1e-3
    np.testing.assert_allclose(mixed, jnp.concatenate([always[:1], never[1:]]), atol=1e-6)


def test_no_conditioner_is_unconditional():
    conditioner = make_conditioner({})
    assert jax.tree.leaves(conditioner.apply({}, {}, NEVER)) == []
    assert conditioner.keys == ()


def test_the_empty_prompt_is_the_null_condition():
    config = {"text": SMALL["text"]}
    empty = BATCH | {"tokens": jnp.zeros((3, 4), jnp.int32)}
    np.testing.assert_allclose(_apply(config, NEVER, empty), _apply(config, ALWAYS), atol=1e-6)


def test_clips_empty_prompt_is_the_null_condition_and_the_future_is_not_seen():
    config = {"clip_text": SMALL["clip_text"]}
    empty = BATCH | {"tokens": jnp.array([[9, 10, 1, 1]] * 3)}
    null = _apply(config, ALWAYS)
    np.testing.assert_allclose(_apply(config, NEVER, empty), null, atol=1e-6)
    longer = BATCH | {"tokens": empty["tokens"].at[:, 3].set(7)}
    got = _apply(config, NEVER, longer)
    np.testing.assert_allclose(got[:, :3], null[:, :3], atol=1e-6)
    assert np.abs(got[:, 3] - null[:, 3]).max() > 1e-3
    with pytest.raises(ValueError, match="clip_text: 4 tokens a prompt, expected max_length=77"):
        _apply({"clip_text": SMALL["clip_text"] | {"max_length": 77}}, NEVER)


def test_a_skipped_layer_has_no_parameters():
    conditioner = make_conditioner({"clip_text": SMALL["clip_text"] | {"skip_last": 1}})
    params = jax.eval_shape(conditioner.init, jax.random.key(0), BATCH, NEVER)["params"]
    assert "layers_0" in params["clip_text"] and "layers_1" not in params["clip_text"]


def test_class_labels_outside_the_range_are_the_null_class():
    config = {"class_label": SMALL["class_label"] | {"route": "vector"}}
    odd = BATCH | {"class_label": jnp.array([-1, 5, 99])}
    np.testing.assert_array_equal(_apply(config, NEVER, odd), _apply(config, ALWAYS))
    assert _apply(config, NEVER).shape == (3, 6)


def test_several_conditioners_join_along_their_axes():
    config = {name: SMALL[name] for name in ("class_label", "text")}
    assert _apply(config, NEVER).shape == (3, 1 + 4, 6)
    both = combine(
        [
            Conditioning(concat=jnp.zeros((1, 2, 2, 3)), vector=jnp.zeros((1, 4))),
            Conditioning(concat=jnp.ones((1, 2, 2, 1)), context=jnp.ones((1, 2, 5))),
        ]
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(both)]
    assert shapes == [(1, 2, 2, 4), (1, 2, 5), (1, 4)]


def test_a_wrong_condition_is_named():
    with pytest.raises(ValueError, match="unknown conditioner 'clip'; known: class_label, cli"):
        make_conditioner({"clip": {}})
    with pytest.raises(ValueError, match="unknown field 'num_class'; known: num_classes"):
        make_conditioner({"class_label": {"num_class": 3}})
    with pytest.raises(ValueError, match=r"needs tokens; the batch has class_label"):
        _apply({"text": SMALL["text"]}, NEVER, {"class_label": BATCH["class_label"]})
    with pytest.raises(ValueError, match="4 tokens a prompt, expected max_length=7"):
        _apply({"text": SMALL["text"] | {"max_length": 7}}, NEVER)
    with pytest.raises(ValueError, match="route='concat'; known: context, vector"):
        _apply({"class_label": SMALL["class_label"] | {"route": "concat"}}, NEVER)
