"""DiT and MMDiT cut over the axis "tensor": the same steps as on one device."""

import jax
import numpy as np
import pytest
from tiny import make_batch, make_config

from latent_diffusion.core.rng import init_key
from latent_diffusion.runtime import parallel
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec

RULES = (
    (r"(attn_proj|mlp_fc2)/kernel", "tensor(-2)"),
    (r"(attn_qkv|mlp_fc1|adaLN_modulation/1)/kernel", "tensor(-1)"),
    (".*", "fsdp(min_mb=0.002)"),
)
FIELDS = {"width": 16, "depth": 1, "num_heads": 2, "base_size": 4}


@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_a_mesh_and_pmap_take_the_steps_of_one_device(name):
    more = {"mmdit.max_positions": 4} if name == "mmdit" else {}
    fields = {f"{name}.{field}": value for field, value in FIELDS.items()}
    config = make_config("denoising", backbone=name, **fields, **more)
    config.autoencoder.regularization, config.data.image_size = "identity", 8
    config.optimizer.update({"eps": 1e-2, "learning_rate": 1e-3})
    config.conditioners.text.depth = 0
    task, batch, rng = TASKS["denoising"](config), make_batch(config), jax.random.key(7)
    batch["image"] = batch["image"][:, :8, :8]
    first, constants = jax.jit(lambda key: task.init(key, batch_spec(config)))(init_key(0))

    def run(mode, mesh=None, rules=()):
        step = parallel.compile_step(task.train_step, mode, mesh=mesh, rules=rules)
        state = parallel.place(jax.tree.map(np.asarray, first), mode, mesh, rules)
        kernels = {
            leaf.sharding
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.params[name])
            if "attn_qkv" in str(path) and leaf.ndim == 2
        }
        for _ in range(2):
            state, _ = step(state, constants, batch, rng)
        return jax.tree.map(np.asarray, state.params), kernels

    want, _ = run("single")
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    cut, kernels = run("mesh", mesh, RULES)
    assert kernels and all("tensor" in sharding.spec for sharding in kernels)
    for got in (cut, run("pmap")[0]):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=0, atol=2e-6), want, got)
    last = want[name]["final_layer_linear"]["bias"]
    assert np.abs(last - np.asarray(first.params[name]["final_layer_linear"]["bias"])).max() > 1e-4
