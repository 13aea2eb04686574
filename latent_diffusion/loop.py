"""The training loop: the one place where tasks, data, devices, checkpoints and logs meet."""

import itertools
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import (
    data,
    frozen,
    init_from,
    metrics,
    moments,
    parallel,
    processes,
    startup,
    workdir,
)
from latent_diffusion.best import Best
from latent_diffusion.checkpoint import (
    Checkpointer,
    CheckpointError,
    WorkdirInUse,
    acquire_lock,
)
from latent_diffusion.conditioners import make_conditioner
from latent_diffusion.evaluation.features import levels_of, make_features
from latent_diffusion.evaluation.frechet import gaussian, measure_frechet
from latent_diffusion.evaluation.scores import frechet_name
from latent_diffusion.first_stage import make_autoencoder
from latent_diffusion.tasks import TASKS
from latent_diffusion.types import lookup

# What a user can cause and mend: the commands print these as one line.
USER_ERRORS = (
    ValueError,
    ModuleNotFoundError,
    OSError,
    CheckpointError,
    WorkdirInUse,
    metrics.NonFiniteError,
)

_BATCH_SPECS = {  # batch keys that conditioners read -> (shape without B, dtype)
    "image": lambda config: ((*_square(config), config.autoencoder.image_channels), np.float32),
    "tokens": lambda config: ((config.tokenizer.max_length,), np.int32),
    "class_label": lambda config: ((), np.int32),
    "layout": lambda config: ((config.conditioners.layout.max_length,), np.int32),
    "segmentation": lambda config: (_square(config), np.int32),
    "mask": lambda config: ((*_square(config), 1), np.float32),
    "low_res": lambda config: (
        (*_square(config, make_autoencoder(config.autoencoder).downsampling), 3),
        np.float32,
    ),
    "depth": lambda config: ((*_square(config), 1), np.float32),
    "neighbours": lambda config: (
        (config.conditioners.neighbours.num_neighbours, config.conditioners.neighbours.width),
        np.float32,
    ),
    "image_embedding": lambda config: ((config.conditioners.image_embedding.width,), np.float32),
}


def _square(config: ConfigDict, f: int = 1) -> tuple[int, int]:
    return (config.data.image_size // f, config.data.image_size // f)


class Interrupted(Exception):
    """A signal stopped the run, after its state was saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}, saved")
        self.exit_code = 128 + signum


class _Stop:
    """Notes the first SIGINT or SIGTERM, so that the loop can save; a second one acts at once.

    On several processes SIGTERM is left to JAX's runtime, which lets all stop after the same step.
    """

    def __enter__(self) -> "_Stop":
        self._signum: int | None = None
        alone = jax.process_count() == 1
        handlers = (
            {signal.SIGINT: self._note, signal.SIGTERM: self._note}
            if alone
            else {signal.SIGINT: self._pass_on}
        )
        self._before = {signum: signal.signal(signum, f) for signum, f in handlers.items()}
        return self

    def after(self, step: int) -> int | None:
        """The signal that ends the run after this step, if any."""
        return signal.SIGTERM if processes.preempted(step) else self._signum

    def _note(self, signum: int, frame: Any) -> None:
        self._signum = signum
        self._restore()

    def _pass_on(self, signum: int, frame: Any) -> None:
        self._restore()
        os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()


def batch_spec(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of one global batch, before anything is read."""
    shapes = {"image": _BATCH_SPECS["image"](config)}
    if config.task == "denoising":
        keys = make_conditioner(config.conditioners).keys
    elif config.task == "classifying":
        keys = ("class_label",)
    else:
        keys = tuple(filter(None, [config.autoencoding.disc_condition]))
    for key in keys:
        shapes[key] = lookup(_BATCH_SPECS, key, "batch key")(config)
    return {
        key: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
        for key, (shape, dtype) in shapes.items()
    }


def dry_run(config: ConfigDict) -> str:
    """What a run would be, without allocating it: config, parameters, sharding, memory, FLOPs."""
    task = lookup(TASKS, config.task, "task")(config)
    mode, mesh = parallel.devices(config.parallel)
    batch, rng = batch_spec(config), jax.random.key(0)
    state, constants = jax.eval_shape(task.init, rng, batch)
    shardings = parallel.state_shardings(state, mode, mesh, config.parallel.rules)
    lines = [str(config), parallel.describe(shardings.params, state.params)]
    for name, tree in task.components(state, constants).items():
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
        lines.append(f"{name:24s}{count / 1e6:10.2f} M")
    kept = parallel.num_bytes(state, shardings), parallel.num_bytes(constants)
    lines.append(
        f"mode {mode} on {jax.device_count()} devices, mesh {dict(mesh.shape) if mesh else '-'}"
    )
    lines.append(f"bytes a device: state {kept[0]:,}, constants {kept[1]:,}, and activations")
    flops = parallel.count_flops(task.train_step, state, constants, batch, rng)
    lines.append(
        f"{flops / 1e12:.4g} TFLOP a step, {flops / config.batch_size / 1e9:.4g} GFLOP an image"
    )
    return "\n".join(lines)


def train(config: ConfigDict, directory: str | Path) -> Any:
    """Train to `config.num_steps` in a workdir, from its latest checkpoint if it has one.

    Returns the final state. Raises Interrupted after a signal, NonFiniteError on NaN, and the
    errors of `USER_ERRORS` for bad input.
    """
    directory = Path(directory).absolute()
    make_task = lookup(TASKS, config.task, "task")
    config = init_from.resolve(workdir.resolve(config), directory)
    config = frozen.resolve(config, directory)
    task = make_task(config)
    processes.check_same({**config.to_dict(), "workdir": str(directory)}, "config")
    mode, mesh = parallel.devices(config.parallel)
    parallel.check_batch_size(config.batch_size, mode, mesh, config.grad_accumulation)
    layout = {"mesh": mesh, "rules": config.parallel.rules}
    rng = jax.random.key(config.seed)

    with (
        acquire_lock(directory),
        Checkpointer(directory / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
        Best(directory, config.checkpoint.best, config.checkpoint.best_mode) as best,
    ):
        train_source = data.make_source(config.data, "train")
        test_source = data.make_source(config.data, "test")
        workdir.save_config(config, directory)
        tokenizer = workdir.make_tokenizer(config, directory, train_source)

        # Fresh state or its shapes alone, the frozen parts, then what the latest checkpoint holds.
        # XLA takes minutes to compile hundreds of small threefry draws, and seconds for these.
        init_rng = jax.random.key(config.seed, impl="unsafe_rbg")
        init = jax.jit(lambda rng: task.init(rng, batch_spec(config)))
        resumes = bool(checkpoints.all_steps())
        state, constants = jax.eval_shape(init, init_rng) if resumes else init(init_rng)
        constants = frozen.load_constants(config, directory, constants, train_source)
        constants = init_from.base_from(config, constants)
        start = 0
        if resumes:
            restored = checkpoints.restore(parallel.abstract(state, mode, **layout))
            assert restored is not None
            state, start = restored.state, restored.step
        else:
            state = init_from.start_from(config, state)
        state = parallel.place(state, mode, **layout)
        if config.task != "autoencoding" and config.first_stage.cache:
            train_source = moments.with_moments(
                config, directory, constants.first_stage, train_source
            )

        index, count = parallel.process_shard(mode, mesh)
        batches = data.iterate(
            train_source,
            data.make_transform(config.data, train=True, tokenizer=tokenizer),
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start,
            process_index=index,
            process_count=count,
        )
        train_step = parallel.compile_step(task.train_step, mode, **layout)
        report = _Reporter(config, task, test_source, tokenizer, mode, layout)
        speed = metrics.Throughput()
        with (
            _Stop() as stop,
            metrics.Writer(directory, step=start) as writer,
            metrics.Progress(config.num_steps, start) as progress,
        ):
            if start:
                progress.write(f"resuming from step {start} of {checkpoints.directory}")
            for step in range(start + 1, config.num_steps + 1):
                state, values = train_step(state, constants, next(batches), rng)
                # Waiting for the values here costs little: the next batch is prefetched.
                metrics.check_finite(step, values, state.params)
                speed.add(config.batch_size)
                progress.update(step)
                if step == start + 1:
                    progress.write(f"first step after {startup.seconds_since_start():.1f} s")
                signum = stop.after(step)
                last = step == config.num_steps or signum is not None
                if step % config.log.every_steps == 0 or last:
                    rate = speed.read()
                    measured = {"peak_memory_gib": metrics.peak_memory()}
                    measured |= {} if rate is None else {"images_per_second": rate}
                    writer.scalars(step, {**values, **measured})
                    progress.report(step, {"loss": float(values["loss"]), "images/s": rate})
                if metrics.image_log_steps(step, config.log.images_every_steps) or last:
                    for name, grid in report.pictures(state, constants, rng).items():
                        writer.image(step, name, grid)
                    speed.skip()
                every = config.log.eval_every_steps
                if step == config.num_steps or (every and step % every == 0):
                    measured = report.evaluation(state, constants, rng)
                    writer.scalars(step, measured)
                    best.offer(step, parallel.to_global(state, mode), measured)
                    speed.skip()
                if step % config.checkpoint.every_steps == 0 or last:
                    whole = parallel.to_global(state, mode)
                    checkpoints.save(step, whole, {"seed": config.seed})
                if signum is not None:
                    checkpoints.wait()
                    progress.write(str(Interrupted(signum, step)))
                    raise Interrupted(signum, step)
    return state


class _Reporter:
    """Evaluates and draws with a task's `eval_step` and `show`, on the same test examples."""

    def __init__(
        self,
        config: ConfigDict,
        task: Any,
        source: Any,
        tokenizer: Any,
        mode: str,
        layout: Mapping[str, Any],
    ):
        self._config, self._source = config, source
        self._transform = data.make_transform(config.data, train=False, tokenizer=tokenizer)
        self._shard = parallel.process_shard(mode, layout["mesh"])
        self._parts = parallel.num_parts(mode, layout["mesh"])
        self._eval_step = parallel.compile_eval(task.eval_step, mode, **layout)
        self._show = parallel.compile_eval(task.show, mode, **layout)
        self._net = None
        if config.log.distance:
            self._net = make_features(config.log.distance, config.log.distance_path or None)
            apply = self._net.apply

            def features(state, params, batch, rng, *, axis_name=None):
                return {k: apply(params, levels_of(x))["features"] for k, x in batch.items()}

            self._features = parallel.compile_eval(features, mode, mesh=layout["mesh"])

    def evaluation(self, state: Any, constants: Any, rng: jax.Array) -> dict[str, float]:
        """Means of the per-example values over `log.eval_batches` batches, exact on the padded."""
        values: dict[str, list[np.ndarray]] = {}
        weights = []
        batches = self._batches(self._config.batch_size)
        for i, batch in enumerate(itertools.islice(batches, self._config.log.eval_batches)):
            weights.append(batch.pop("weight"))
            out = self._eval_step(state, constants, batch, jax.random.fold_in(rng, i))
            for name, value in out.items():
                values.setdefault(name, []).append(value)
        weight = np.concatenate(weights)
        means = {
            f"eval_{name}": float(np.average(np.concatenate(value), weights=weight))
            for name, value in values.items()
        }
        return means | self._distance(state, constants, rng)

    def _distance(self, state: Any, constants: Any, rng: jax.Array) -> dict[str, float]:
        """Fréchet distance between test images and what the averaged parameters make of them."""
        if self._net is None:
            return {}
        size, wanted = self._config.batch_size, self._config.log.distance_images
        real, made = [], []
        for i, batch in enumerate(itertools.islice(self._batches(size), -(-wanted // size))):
            kept = batch.pop("weight") > 0
            shown = self._show(state, constants, batch, jax.random.fold_in(rng, i))
            *_, last = shown.values()  # reconstructions or samples
            pair = {"real": shown["inputs"], "made": last}
            found = self._features({}, self._net.params, pair, rng)
            real.append(found["real"][kept])
            made.append(found["made"][kept])
        name = frechet_name(self._net.name)
        reference = gaussian(np.concatenate(real))
        measured = measure_frechet(np.concatenate(made), reference, name)
        return {f"eval_{name}": measured.value}

    def pictures(self, state: Any, constants: Any, rng: jax.Array) -> dict[str, np.ndarray]:
        """One grid: the images of every kind that the task shows, a row each."""
        num = self._config.log.num_images
        batch = next(self._batches(num + -num % self._parts))  # a whole number for every device
        batch.pop("weight")
        images = self._show(state, constants, batch, rng)
        rows = np.concatenate([kind[:num] for kind in images.values()])
        return {"_".join(images): metrics.image_grid(rows, num)}

    def _batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        return data.epoch(self._source, self._transform, batch_size, *self._shard)
