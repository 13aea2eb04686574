"""The best state by an evaluated number stays, and its folder is a workdir."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from configs import openmoji_autoencoder
from latent_diffusion.evaluate.__main__ import evaluate
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.training import loop
from latent_diffusion.training.best import Best


def test_the_best_state_is_kept_across_restarts(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    def offer(step, value, mode="max", metric="eval_psnr"):
        with Best(tmp_path, metric, mode) as best:
            state = SimpleNamespace(ema_params={"x": jnp.full(2, value)}, opt_state=jnp.ones(3))
            return best.offer(step, state, {metric: value})

    assert [offer(*pair) for pair in ((1, 20.0), (2, float("nan")), (3, 25.0), (4, 24.0))] == [
        *(True, False, True, False)
    ]
    record = json.loads((tmp_path / "best" / "best.json").read_text())
    assert record == {"metric": "eval_psnr", "value": 25.0, "step": 3}
    assert (tmp_path / "best" / "config.json").read_text() == "{}"
    with Checkpointer(tmp_path / "best" / "checkpoints", read_only=True) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore().state["ema_params"]["x"], [25, 25])
        assert checkpoints.all_steps() == [3]
    assert offer(5, 30.0, "min", "eval_fd")  # the first value of another number
    with Best(tmp_path, "eval_fd", "min") as best, pytest.raises(ValueError, match=r"eval_psnr"):
        best.offer(5, {}, {"eval_psnr": 1.0})
    with pytest.raises(ValueError, match=r"checkpoint\.best_mode 'low'; known: max, min"):
        Best(tmp_path, "eval_fd", "low")
    with Best(tmp_path / "other", "", "min") as best:
        assert not best.offer(1, {}, {})
    assert not (tmp_path / "other").exists()


def test_training_measures_a_distance_and_keeps_the_best_by_it(tmp_path):
    config = openmoji_autoencoder.get_config("smoke")
    config.num_steps = 2
    config.parallel.mode = "single"
    config.log.num_images = 8
    config.log.distance = "alexnet"
    config.log.distance_images = 24
    config.checkpoint.best = "eval_fd_alexnet"
    loop.train(config, tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    record = json.loads((tmp_path / "best" / "best.json").read_text())
    assert record["value"] == pytest.approx(last["eval_fd_alexnet"]) and record["value"] > 0
    record = evaluate(workdir=str(tmp_path), metrics=["psnr", "ssim", "rfd"], features="alexnet")
    assert list(record["metrics"]) == ["psnr", "ssim", "rfd_alexnet"]
    assert record["step"] == 2 and record["num_images"] == 120
    logged = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(logged[0]) == record
    with pytest.raises(ValueError, match="holds a first stage; its metrics: psnr, ssim"):
        evaluate(workdir=str(tmp_path), metrics=["fd"], features="alexnet")
