"""The transformer of Stable Diffusion 3, which attends to pictures and texts together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.core.rng import example_keys, sampling_keys
from latent_diffusion.core.types import Conditioning
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.models.sampling import sample
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.dit import positions_2d
from latent_diffusion.nets.mmdit import MMDiT
from latent_diffusion.process.plan import plan
from latent_diffusion.process.schedules import make_schedule

SMALL = {"out_channels": 3, "width": 16, "depth": 2, "num_heads": 2, "max_positions": 5}
T = jnp.array([3.0, 700.0])


def network(size=(4, 6), context=5, **fields):
    """A small transformer with random parameters (not zeros anywhere), and its inputs."""
    mmdit = MMDiT(**{**SMALL, "base_size": 6, **fields})
    key = jax.random.key(0)
    z = jax.random.normal(key, (2, *size, 3))
    conditioning = Conditioning(
        context=jax.random.normal(key, (2, 3, context)) if context else None,
        vector=jax.random.normal(key, (2, 7)),
    )
    params = mmdit.init(key, z, T, conditioning)["params"]
    leaves, tree = jax.tree.flatten({k: v for k, v in params.items() if k != "pos_embed"})
    keys = jax.random.split(key, len(leaves))
    leaves = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    params = {**jax.tree.unflatten(tree, leaves), "pos_embed": params["pos_embed"]}
    return mmdit, params, z, conditioning


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 2_028_328_000),
        (
            {"qk_norm": True, "dual_attention": tuple(range(13)), "max_positions": 384},
            2_243_171_520,
        ),
        ({"width": 2432, "depth": 38, "num_heads": 38, "qk_norm": True}, 8_056_627_520),
    ],
    ids=["3-medium", "3.5-medium", "3.5-large"],
)
def test_the_released_sizes(fields, count):
    """The counts are those of diffusers' SD3Transformer2DModel."""

    def init():
        conditioning = Conditioning(context=jnp.zeros((1, 9, 4096)), vector=jnp.zeros((1, 2048)))
        z = jnp.zeros((1, 128, 128, 16))
        return MMDiT(**fields).init(jax.random.key(0), z, jnp.zeros(1), conditioning)

    shapes = jax.eval_shape(init)["params"]
    shapes.pop("pos_embed")  # which isn't trained
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_every_block_is_the_identity_at_first_and_the_prediction_zero():
    mmdit, _, z, conditioning = network(dual_attention=(0,), qk_norm=True)
    params = mmdit.init(jax.random.key(0), z, T, conditioning)["params"]
    assert not mmdit.apply({"params": params}, z, T, conditioning).any()
    params["final_layer_linear"]["kernel"] = jnp.ones_like(params["final_layer_linear"]["kernel"])
    np.testing.assert_array_equal(
        mmdit.apply({"params": params}, z, T, conditioning),
        mmdit.clone(depth=0).apply({"params": params}, z, T, conditioning),
    )


@pytest.mark.parametrize(("size", "top", "left"), [((4, 6), 1, 1), ((2, 6), 2, 1)])
def test_positions_are_cut_from_the_middle_of_the_table(size, top, left):
    """Without blocks, moving the table by a row moves what a row of patches adds."""
    mmdit, params, z, conditioning = network(size, depth=0)
    table = params["pos_embed"].reshape(5, 5, 16)
    np.testing.assert_allclose(table, positions_2d(5, 5, 16, 3).reshape(5, 5, 16), atol=1e-7)
    out = mmdit.apply({"params": params}, z, T, conditioning)
    seen = np.zeros((5, 5), bool)
    for row, column in np.ndindex(5, 5):
        moved = table.at[row, column].add(jnp.arange(16.0))  # the last norm undoes a constant
        other = {**params, "pos_embed": moved.reshape(1, 25, 16)}
        changed = np.asarray(out != mmdit.apply({"params": other}, z, T, conditioning))
        seen[row, column] = changed.any()
        if changed.any():
            y, x = 2 * (row - top), 2 * (column - left)
            assert changed[:, y : y + 2, x : x + 2].any((0, 3)).all()
            assert changed.any((0, 3)).sum() == 4
    rows, columns = (n // 2 for n in size)
    assert seen[top : top + rows, left : left + columns].all() and seen.sum() == rows * columns


def test_a_picture_beyond_the_table_of_positions_is_made_in_tiles():
    mmdit, params, _, conditioning = network()
    schedule, parts = make_schedule("rectified_flow", 1000), make_conditioner({})
    denoiser = Denoiser({"mmdit": params}, schedule, mmdit, parts, "flow", "mmdit")
    timesteps, options = plan(schedule, "flow", {}, {"num_steps": 2, "guidance_scale": 2.0})
    keys = sampling_keys(example_keys(jax.random.key(0), 2))

    def sampled(tile):
        call = (denoiser, keys, conditioning, conditioning, timesteps, (12, 16, 3), options)
        return jax.eval_shape(lambda: sample(*call, tile=tile)).shape

    assert sampled((8, 4)) == (2, 12, 16, 3)
    for tile in (None, (12, 4)):
        with pytest.raises(ValueError, match="allow 10 at most"):
            sampled(tile)


def test_the_table_of_positions_is_not_trained():
    mmdit, params, z, conditioning = network()
    grads = jax.grad(lambda p: mmdit.apply({"params": p}, z, T, conditioning).sum())(params)
    assert not grads.pop("pos_embed").any()
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))


def test_loops_over_blocks_are_the_blocks_by_the_same_parameters():
    """Two that attend twice, two that don't, and the last, which is another kind."""
    mmdit, params, z, conditioning = network(qk_norm=True, dual_attention=(0, 1), depth=5)
    looped = mmdit.clone(scan=True, remat="full")

    def answer(net):
        def loss(params):
            out = net.apply({"params": params}, z, T, conditioning)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (grads, out), (got, seen) = answer(mmdit), answer(looped)
    np.testing.assert_allclose(seen, out, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), got, grads)
    forward = jax.make_jaxpr(mmdit.clone(scan=True).apply)({"params": params}, z, T, conditioning)
    assert str(forward).count("scan[") == 2


@pytest.mark.parametrize("given", ["context", "vector", "z", "t"])
def test_each_input_changes_the_prediction_of_its_example_alone(given):
    mmdit, params, z, conditioning = network(qk_norm=True, dual_attention=(1,))
    out = mmdit.apply({"params": params}, z, T, conditioning)
    inputs = {"z": z, "t": T, "context": conditioning.context, "vector": conditioning.vector}
    inputs[given] = inputs[given].at[0].add(1.0)
    moved = mmdit.apply(
        {"params": params},
        inputs["z"],
        inputs["t"],
        Conditioning(context=inputs["context"], vector=inputs["vector"]),
    )
    assert (out[0] != moved[0]).all()
    np.testing.assert_array_equal(out[1], moved[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": (4, 5)}, "latent of 4×5 must be divisible by patch_size=2"),
        ({"size": (12, 4)}, "latent of 12×4; max_positions=5 patches of 2 allow 10 at most"),
        ({"num_heads": 3}, "width=16 must be divisible by 4 and by num_heads=3"),
        ({"context": None}, "it attends to a context, and no conditioner gives one"),
        ({"remat": "some"}, r"mmdit\.remat"),
    ],
)
def test_one_line_for_what_does_not_fit(changed, message):
    with pytest.raises(ValueError, match=message):
        network(**changed)
