"""A signal in any moment of a step: the step is saved, nothing is looked at any more, then is."""

import contextlib
import json
import os
import signal

import jax
import pytest
import several

from latent_diffusion.runtime import parallel
from latent_diffusion.runtime.parallel import initialisation
from latent_diffusion.training import loop
from latent_diffusion.training.evaluator import Evaluator
from latent_diffusion.training.stop import Interrupted, Stop

FIELDS = {
    "num_steps": 2,
    "log.eval_every_steps": 1,
    "log.eval_batches": 3,
    "parallel.mode": "single",
}


def run(workdir, every):
    return loop.train(several.make_config(**FIELDS, **{"log.images_every_steps": every}), workdir)


@contextlib.contextmanager
def compiled_once():
    """Runs of one network, which have the same programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialisation, "compile_init", once(initialisation.compile_init))
        for name in ("compile_step", "compile_eval"):
            patch.setattr(parallel, name, once(getattr(parallel, name)))
        yield


@pytest.fixture(scope="module", autouse=True)
def same_programs():
    with compiled_once():
        yield


def once(compile):
    programs = {}

    def compiled(step, *arguments, **layout):
        name = getattr(step, "__qualname__", "init")
        if name not in programs:
            programs[name] = compile(step, *arguments, **layout)
        return programs[name]

    return compiled


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(workdir, 1)
    return logged(workdir)


def logged(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    own = ("images_per_second", "peak_memory_gib")  # of the machine, not of the run
    return [{k: v for k, v in json.loads(line).items() if k not in own} for line in lines]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_next_acts_at_once(signum):
    acted = []
    before = signal.signal(signum, lambda *_: acted.append(signum))
    try:
        with Stop() as stop:
            assert stop.poll() is None
            os.kill(os.getpid(), signum)
            assert stop.signum is None and stop.poll() == signum == stop.signum
            os.kill(os.getpid(), signum)
            assert acted == [signum]
    finally:
        signal.signal(signum, before)
    assert Interrupted(signum, 3).exit_code == 128 + signum


def test_an_interrupt_of_one_process_of_several_is_a_termination_of_all(monkeypatch):
    """JAX's runtime, which tells the others, listens to SIGTERM alone."""
    noticed, interrupted = [], signal.getsignal(signal.SIGINT)
    before = signal.signal(signal.SIGTERM, lambda *_: noticed.append("by the runtime"))
    try:
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with Stop():
            os.kill(os.getpid(), signal.SIGINT)
            assert noticed == ["by the runtime"]
            assert signal.getsignal(signal.SIGINT) is interrupted
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_signal_loses_no_step_and_draws_nothing(
    moment, every, undisturbed, tmp_path, monkeypatch
):
    events = []
    measure, batches = Evaluator.measure, Evaluator._batches

    def stopping(self, state, rng, stopped):
        events.append("measure")
        values = measure(self, state, rng, stopped)
        if moment == "after":
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    def stopping_batches(self, *sizes):
        for i, batch in enumerate(batches(self, *sizes)):
            if i == 1 and moment == "during":
                os.kill(os.getpid(), signal.SIGTERM)
            events.append("batch")
            yield batch

    def settled(self):
        if moment == "before":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "measure", stopping)
        patch.setattr(Evaluator, "_batches", stopping_batches)
        patch.setattr(Evaluator, "draw", lambda *_: events.append("draw"))
        patch.setattr(loop.Best, "settle", settled)
        with pytest.raises(loop.Interrupted, match="SIGTERM after step 1, saved"):
            run(tmp_path, every)
    batch = {"before": [], "during": ["measure", "batch", "batch"]}
    if moment in batch:
        assert events == batch[moment]
    assert "draw" not in events
    assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["1"]
    assert ("eval_loss" in logged(tmp_path)[0]) == (moment == "after")
    run(tmp_path, every)
    assert logged(tmp_path) == undisturbed
    pictures = sorted(path.name[-6:] for path in (tmp_path / "images").glob("*"))
    assert pictures == (["01.png", "02.png"] if every else ["02.png"])
