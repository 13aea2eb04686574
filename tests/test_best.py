"""The best state by an evaluated number stays, and its folder is a workdir."""

import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
import pytest
import several

from configs import default, openmoji_autoencoder
from latent_diffusion.evaluate.__main__ import evaluate
from latent_diffusion.evaluate.generate import of_data
from latent_diffusion.generation.loading import load
from latent_diffusion.nets.losses.similarity import psnr
from latent_diffusion.runtime import metrics
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.runtime.metrics import to_uint8
from latent_diffusion.training import loop
from latent_diffusion.training.best import Best
from latent_diffusion.training.evaluator import _featured
from latent_diffusion.training.start import Start
from latent_diffusion.training.stop import Stop


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
        state = checkpoints.restore().state
        np.testing.assert_array_equal(state.pop("ema_params")["x"], [25, 25])
        assert not state  # no optimiser's
        assert checkpoints.all_steps() == [3]
    assert offer(5, 30.0, "min", "eval_fd")  # the first value of another number
    with Best(tmp_path, "eval_fd", "min") as best, pytest.raises(ValueError, match=r"eval_psnr"):
        best.offer(5, {}, {"eval_psnr": 1.0})
    with pytest.raises(ValueError, match=r"checkpoint\.best_mode 'low'; known: max, min"):
        Best(tmp_path, "eval_fd", "low")
    with Best(tmp_path / "other", "", "min") as best:
        assert not best.offer(1, {}, {})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("metric", "steps"),
    [("eval_psnr", [1, 3]), ("eval_accuracy_500", [1, 3]), ("eval_lpips", [1, 2])],
)
def test_the_metric_says_which_value_is_the_best(metric, steps, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with Best(tmp_path, metric, default.get_config().checkpoint.best_mode) as best:
        state = SimpleNamespace(ema_params={"x": jnp.ones(1)})
        values = {1: 20.0, 2: 19.0, 3: 25.0}
        assert [step for step in values if best.offer(step, state, {metric: values[step]})] == steps


def kept(directory):
    return json.loads((directory / "best" / "best.json").read_text())


def offer(directory, metric, step, value, mode="min"):
    """Whether a state is the best; its record is written when this returns."""
    with Best(directory, metric, mode) as best:
        state = SimpleNamespace(ema_params={"x": jnp.full(2, value)})
        return best.offer(step, state, {metric: value})


def test_a_kill_between_the_best_checkpoint_and_its_record_loses_neither(tmp_path, monkeypatch):
    for name in ("first_stage", "teacher"):
        (tmp_path / f"{name}.safetensors").write_text("")
    offer(tmp_path, "eval_loss", 1, 3.0)
    with monkeypatch.context() as patch:
        patch.setattr(Best, "settle", lambda self: None)  # the process is no more
        offer(tmp_path, "eval_loss", 2, 2.0)
    assert (tmp_path / "best" / "checkpoints" / "2").is_dir()
    assert not (tmp_path / "best" / "best.json").exists()
    assert not offer(tmp_path, "eval_loss", 3, 2.5)
    assert kept(tmp_path) == {"metric": "eval_loss", "value": 2.0, "step": 2}
    assert (tmp_path / "best" / "first_stage.safetensors").exists()
    assert not (tmp_path / "best" / "teacher.safetensors").exists()  # only training reads it


def test_a_record_whose_checkpoint_is_gone_refuses_no_other(tmp_path):
    offer(tmp_path, "eval_loss", 1, 1.0)
    shutil.rmtree(tmp_path / "best" / "checkpoints" / "1")
    assert offer(tmp_path, "eval_loss", 2, 2.0)
    assert kept(tmp_path) == {"metric": "eval_loss", "value": 2.0, "step": 2}
    assert (tmp_path / "best" / "checkpoints" / "2").is_dir()


def test_of_a_run_without_averages_the_best_parameters_stay(tmp_path):
    with Best(tmp_path, "eval_loss", "min") as best:
        state = SimpleNamespace(ema_params=None, params={"x": jnp.full(2, 3.0)})
        assert best.offer(1, state, {"eval_loss": 1.0})
    with Checkpointer(tmp_path / "best" / "checkpoints", read_only=True) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore().state["params"]["x"], [3, 3])


def test_another_metric_begins_afresh_even_at_the_step_that_is_kept(tmp_path):
    offer(tmp_path, "eval_loss", 3, 1.0)
    for step, value, best in ((3, 20.0, True), (4, 19.0, False), (5, 21.0, True)):
        assert offer(tmp_path, "eval_psnr", step, value, "max") == best
    assert kept(tmp_path) == {"metric": "eval_psnr", "value": 21.0, "step": 5}
    assert offer(tmp_path, "eval_loss", 6, 70.0)


@pytest.mark.parametrize(("metric", "measured"), [("", 0), ("eval_loss", 0), ("eval_new", 1)])
def test_a_step_is_evaluated_again_for_a_metric_that_it_lacks(metric, measured, tmp_path):
    config = default.get_config()
    config.num_steps = 2
    values = {"eval_loss": 1.0, "eval_new": 2.0}
    calls = []
    evaluator = SimpleNamespace(measure=lambda *_: calls.append(1) or values, draw=lambda *_: {})
    run = Mock(spec=Start, evaluator=evaluator, rng=None, mode="single")
    stop = Mock(spec=Stop, signum=None, poll=lambda: None)
    state = SimpleNamespace(ema_params={"x": jnp.ones(2)})
    with Best(tmp_path, metric, "min") as best, metrics.Writer(tmp_path, step=2) as writer:
        config.checkpoint.best = metric
        writer.scalars(2, {"loss": 1.0, "eval_loss": 1.0})  # by an earlier start
        loop._look_at(config, run, state, 2, best, stop, writer)
    assert len(calls) == measured
    if metric:
        assert kept(tmp_path) == {"metric": metric, "value": values[metric], "step": 2}


def test_training_measures_a_distance_and_keeps_the_best_by_it(tmp_path):
    config = openmoji_autoencoder.get_config("smoke")
    config.update_from_flattened_dict(
        {**several.FIRST_STAGE_FIELDS, **several.LOOKED_AT, **several.BEST, "num_steps": 2}
    )
    config.parallel.mode = "single"
    loop.train(config, tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    record = kept(tmp_path)
    assert record["value"] == pytest.approx(last["eval_fd_alexnet"]) and record["value"] > 0
    record = evaluate(workdir=str(tmp_path), metrics=["psnr", "ssim", "rfd"], features="alexnet")
    assert list(record["metrics"]) == ["psnr", "ssim", "rfd_alexnet"]
    assert record["step"] == 2 and record["num_images"] == 120
    pictures, first_stage = of_data(config, "test").read(0, 120), load(tmp_path).first_stage
    x = jnp.asarray(pictures / np.float32(127.5) - 1)
    bytes_rec = to_uint8(first_stage.decode(first_stage.encode({"image": x})))
    expected = jnp.mean(psnr(x, jnp.asarray(bytes_rec / np.float32(127.5) - 1)))
    assert record["metrics"]["psnr"] == pytest.approx(float(expected), rel=1e-3)
    logged = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(logged[0]) == record
    with pytest.raises(ValueError, match="holds a first stage; its metrics: psnr, ssim"):
        evaluate(workdir=str(tmp_path), metrics=["fd"], features="alexnet")


def test_the_distance_is_that_of_the_samples_and_not_of_their_hints():
    def show(*_):
        names = ("inputs", "samples", "hints")
        return {name: jnp.full((1, 2, 2, 3), x) for name, x in zip(names, (-1, 0, 1), strict=True)}

    step = _featured(show, lambda params, levels: {"features": levels.mean((1, 2, 3))})
    features = step({}, ({}, {}), {}, None)
    np.testing.assert_allclose([features["real"], features["made"]], [[0], [128]])


def test_a_run_that_goes_on_before_its_best_step_forgets_it(tmp_path, monkeypatch):
    """Its number and its parameters are those of a run that is no more; so are later snapshots."""
    offer(tmp_path, "eval_loss", 2, 3.0)
    offer(tmp_path, "eval_loss", 6, 1.0)
    widths = {"0.05": {"x": jnp.zeros(2)}}
    with Checkpointer(tmp_path / "averages", keep=None) as snapshots:
        for step in (2, 4, 6):
            snapshots.save(step, widths)
    config = default.get_config()
    config.checkpoint.update({"best": "eval_loss", "averages_every_steps": 2})
    config.optimizer.averages = (0.05,)
    at = [6]
    monkeypatch.setattr(loop, "resolve", lambda config, directory: config)
    monkeypatch.setattr(loop, "start", lambda *given: SimpleNamespace(step=at[0]))
    monkeypatch.setattr(loop, "_steps", lambda *given: None)
    loop.train(config, tmp_path)  # from the end: nothing is lost
    assert kept(tmp_path)["step"] == 6 and not offer(tmp_path, "eval_loss", 6, 2.0)
    at[0] = 4
    loop.train(config, tmp_path)
    assert not (tmp_path / "best" / "best.json").exists()
    with Checkpointer(tmp_path / "averages", read_only=True) as snapshots:
        assert snapshots.all_steps() == [2, 4]
    assert offer(tmp_path, "eval_loss", 6, 2.0)
    with Checkpointer(tmp_path / "best" / "checkpoints", read_only=True) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore().state["ema_params"]["x"], [2, 2])


def test_a_copy_with_files_for_links_goes_on(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    offer(run, "eval_loss", 1, 3.0)
    shutil.copytree(run, tmp_path / "copy")  # which follows links
    (tmp_path / "copy" / "config.json").write_text('{"seed": 1}')
    assert offer(tmp_path / "copy", "eval_loss", 2, 2.0)
    assert (tmp_path / "copy" / "best" / "config.json").read_text() == '{"seed": 1}'
