"""The loop and the device: who waits for whom, and what that may not cost."""

from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several

from latent_diffusion.runtime import metrics, parallel
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.training import loop
from latent_diffusion.training.averages import Snapshots
from latent_diffusion.training.best import Best
from latent_diffusion.training.evaluator import Evaluator
from latent_diffusion.training.start import Start
from latent_diffusion.training.stop import Stop

RNG = jax.random.key(0)


class Number:
    """A metric on a device: it notes when the host reads it."""

    def __init__(self, value, name, events):
        self.value, self.name, self.events = value, name, events

    def copy_to_host_async(self):
        self.events.append(("send", self.name))

    def __bool__(self):
        self.events.append(("read", self.name))
        return bool(self.value)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.value)


class Speed(metrics.Throughput):
    """It notes after how many steps a pause is left out."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def skip(self, seconds):
        super().skip(seconds)
        self.events.append(("skip", sum(kind == "take" for kind, _ in self.events)))


def take_steps(tmp_path, batches, losses, given=None, begins=0, **fields):
    """The events of a run whose step s has losses[s - 1]; given: another state and step.

    begins: the step at which it goes on.
    """
    events, taken = [], []

    def train_step(state, constants, batch, rng):
        taken.append(batch)
        step = len(taken)
        events.append(("take", step))
        loss = losses[step - 1]
        return state, {"loss": loss, "finite": Number(np.isfinite(loss), step, events)}

    state, train_step = given or (SimpleNamespace(params={"w": jnp.ones(2)}), train_step)
    config = several.make_config(
        **{"num_steps": len(losses), "log.images_every_steps": 0, "log.eval_every_steps": 0}
    )
    config.update_from_flattened_dict(fields)
    run = Start(
        state=state,
        constants=None,
        rng=RNG,
        step=begins,
        mode="single",
        train_step=train_step,
        batches=iter(batches),
        evaluator=Mock(spec=Evaluator, measure=lambda *_: {}, draw=lambda *_: {}),
    )
    checkpoints = Mock(spec=Checkpointer, save=lambda step, *_: events.append(("save", step)))
    with (
        Stop() as stop,
        metrics.Writer(tmp_path) as writer,
        metrics.Progress(config.num_steps) as progress,
    ):
        try:
            best = Mock(spec=Best)
            snapshots = Mock(spec=Snapshots, save=lambda s, *_: events.append(("average", s)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(metrics, "Throughput", lambda: Speed(events))
                loop._steps(config, run, checkpoints, best, snapshots, stop, writer, progress)
        except (metrics.NonFiniteError, OSError) as error:
            events.append(str(error))
    return events


def test_the_host_looks_at_a_step_when_the_next_one_has_been_dispatched(tmp_path):
    fields = {"log.every_steps": 2, "checkpoint.every_steps": 3}
    events = take_steps(tmp_path, range(9), [1.0] * 5, **fields)
    kinds = [f"{kind} {step}" for kind, step in events if kind in ("take", "read", "save")]
    before = ["take 1", "take 2", "read 1", "take 3", "read 2"]
    at_the_save = ["read 3", "save 3"]
    assert kinds == [*before, *at_the_save, "take 4", "take 5", "read 4", "read 5", "save 5"]
    assert events.index(("send", 1)) < events.index(("take", 2))


def test_nothing_goes_to_a_device_unasked_while_steps_are_taken(tmp_path):
    """All that a step reads is placed before, by name, and no number of the host joins it."""

    def step(state, constants, batch, rng, *, axis_name=None):
        return state + batch["x"].mean(), {"loss": state}

    compiled = parallel.compile_step(metrics.flagged(step), "single", donate_state=False)
    key = parallel.place(jax.random.key(0), "single")
    place = lambda i: parallel.place_batch({"x": np.full(4, i, np.float32)}, "single", None)  # noqa: E731

    def train_step(state, constants, batch, rng):
        params, values = compiled(state.params, constants, batch, key)
        return SimpleNamespace(params=params), values

    first = SimpleNamespace(params=parallel.place(np.float32(0), "single"))
    first, _ = train_step(first, None, place(0), None)  # compiled without the guard
    jax.config.update("jax_transfer_guard_host_to_device", "disallow")
    try:
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            first.params + np.ones(3)
        events = take_steps(tmp_path, map(place, range(9)), [1.0] * 5, (first, train_step))
    finally:
        jax.config.update("jax_transfer_guard_host_to_device", "allow")
    assert [event for event in events if event[0] == "save"][-1] == ("save", 5)


def test_nan_is_named_by_its_step_and_nothing_is_saved_after_it(tmp_path):
    losses = [1.0, np.nan, np.nan, np.nan]
    events = take_steps(tmp_path / "late", range(9), losses, **{"checkpoint.every_steps": 1})
    assert events[-1].startswith("step 2: loss = nan") and ("save", 1) in events
    assert ("save", 2) not in events
    events = take_steps(tmp_path / "last", range(9), losses[:2], **{"checkpoint.every_steps": 0})
    assert events[-1].startswith("step 2: loss = nan") and ("save", 2) not in events
    events = take_steps(tmp_path, range(9), losses, **{"checkpoint.every_steps": 0})
    assert events[-1].startswith("step 2: loss = nan") and ("take", 3) in events


def test_averages_of_a_step_are_saved_once_its_numbers_are_finite_and_made_up_for(tmp_path):
    """A run may have been killed between the checkpoint of a step and the snapshot."""

    def saved(losses, **given):
        where = tmp_path / str(len(losses)) / str(given)
        events = take_steps(where, range(9), losses, **{"checkpoint.every_steps": 0}, **given)
        return [step for kind, step in filter(lambda e: e[0] == "average", events)]

    every = {"checkpoint.averages_every_steps": 2}
    assert saved([1.0] * 5, **every) == [2, 4, 5]
    assert saved([1.0, np.nan, 1.0, 1.0], **every) == []
    assert saved([1.0] * 3, begins=3, **every) == [3]  # of the last step
    assert saved([1.0] * 3, begins=2, **every) == [2, 3]
    assert saved([1.0] * 3, begins=1, **every) == [2, 3]


def test_the_speed_is_without_the_pauses(tmp_path):
    """Those of saves and of evaluations; their steps themselves count."""

    def pauses(name, **fields):
        events = take_steps(tmp_path / name, range(9), [1.0] * 7, **fields)
        return [step for kind, step in filter(lambda e: e[0] == "skip", events)]

    assert pauses("save", **{"checkpoint.every_steps": 3}) == [3, 6, 7]
    assert pauses("look", **{"log.eval_every_steps": 2}) == [2, 4, 6, 7]


def test_a_batch_that_can_not_be_read_costs_no_finished_step(tmp_path):
    def batches():
        yield from (1, 2)
        raise OSError("no such picture")

    events = take_steps(tmp_path, batches(), [1.0] * 4, **{"checkpoint.every_steps": 2})
    assert ("save", 2) in events and events[-1] == "no such picture"


def test_the_flag_is_false_where_a_metric_is_not_finite():
    def step(state, axis_name=None):
        return state, {"loss": state, "norms": jnp.asarray([1.0, 2.0]), "count": jnp.int32(3)}

    flagged = metrics.flagged(step)
    assert [bool(flagged(jnp.asarray(x))[1]["finite"]) for x in (1.0, jnp.nan, jnp.inf)] == [
        True,
        False,
        False,
    ]
    _, values = flagged(jnp.asarray(jnp.nan))
    with pytest.raises(metrics.NonFiniteError, match=r"^step 3: loss = nan$"):
        metrics.check_finite(3, values)
