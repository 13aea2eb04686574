"""The start of a run, with its frozen parts, state, data and compiled steps."""

import functools
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.core.rng import init_key, seed_key
from latent_diffusion.core.trees import leaves_by_path
from latent_diffusion.core.types import lookup
from latent_diffusion.data.shards import ShardSource
from latent_diffusion.models.first_stage import make_autoencoder
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.runtime import metrics, parallel, processes, workdir
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.tasks import DENOISERS, TASKS
from latent_diffusion.training import (
    class_pictures,
    frozen,
    init_from,
    moments,
    preview,
    settings,
    stages,
    teacher,
    texts,
)
from latent_diffusion.training.batch_spec import batch_spec, check_classes, with_checked_examples
from latent_diffusion.training.batches import train_batches
from latent_diffusion.training.evaluator import Evaluator
from latent_diffusion.training.tokenizer import make_tokenizer

log = logging.getLogger(__name__)

# Numbers of which less than one would lose everything, or have no meaning
_AT_LEAST_ONE = (("checkpoint", "keep"), ("log", "num_images"), ("first_stage", "num_batches"))


@dataclass(frozen=True)
class Start:
    """A run before its next step, `train_step(state, constants, next(batches), rng)`.

    step: the number of finished steps. batches: already on their devices. The metrics include
    `finite` (see `metrics.flagged`).
    """

    step: int
    state: Any
    constants: Any
    rng: jax.Array
    batches: Iterator[Any]
    train_step: Callable[..., Any]
    evaluator: Evaluator
    mode: str


def resolve(config: ConfigDict, directory: Path) -> ConfigDict:
    """The checked config with all fields that files decide; nothing is written.

    directory: the run's workdir; if it has a run, that run's config counts. Raises ValueError, in
    one line, if a file isn't usable, the workdir has another run, or processes differ.
    """
    lookup(TASKS, config.task, "task")
    if config.checkpoint.averages_every_steps and not config.optimizer.averages:
        raise ValueError(
            "checkpoint.averages_every_steps needs widths in optimizer.averages, e.g. (0.05, 0.1)"
        )
    for section, field in _AT_LEAST_ONE:
        if (value := config[section][field]) is not None and value < 1:
            raise ValueError(f"{section}.{field}={value} must be at least 1")
    _check_expressions(config)
    if config.data.layout.centres and "layout_map" in config.conditioners:
        raise ValueError("layout_map fills boxes: it needs data.layout.centres=False")
    if config.data.bucket_step and config.task in ("prior", "classifying"):
        raise ValueError(
            f"data.bucket_step={config.data.bucket_step}: the task {config.task} has pictures of "
            "one size"
        )
    run = workdir.load_run(directory)
    if run is None:
        config = with_files(config)
        check_new(config)
    else:
        config = settings.continued(config, run, directory)
    processes.check_same({**config.to_dict(), "workdir": str(directory)}, "config")
    class_pictures.check(config)
    mode, mesh = parallel.devices(config.parallel)
    parallel.check_batch_size(config.batch_size, mode, mesh, config.grad_accumulation)
    return config


def _check_expressions(config: ConfigDict) -> None:
    """Raise ValueError for a pattern that is no regular expression."""
    patterns = {
        "optimizer.frozen": config.optimizer.frozen,
        "optimizer.no_decay": config.optimizer.no_decay,
        "lora.targets": config.lora.targets,
        "init_from_only": (config.init_from_only,),
        "parallel.rules": [rule[0] for rule in config.parallel.rules],
    }
    for field, expressions in patterns.items():
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                message = f"{field}={expression!r} is no regular expression: {error}"
                raise ValueError(message) from error


def with_files(config: ConfigDict) -> ConfigDict:
    """The config of a new run, with all fields that files decide."""
    config = init_from.resolve(teacher.resolve(preview.resolve(config)))
    return frozen.resolve(stages.resolve(config))


def check_new(config: ConfigDict) -> None:
    """Raise ValueError for what a new run can't be, but an earlier one may have been.

    These are fields that its data set or its network ignores, pictures whose sides the autoencoder
    can't divide, maps of one size for pictures of several, guidance without a condition, and
    layouts that the model would take for others.
    """
    data.check_fields(config.data)
    for field in ("init_from_only", "init_from_changes"):
        if config[field] and not config.init_from:
            raise ValueError(f"{field}={config[field]!r} needs a model: name it by init_from")
    if config.task == "classifying" and config.backbone != "unet":
        raise ValueError(
            f"backbone={config.backbone!r}, but a classifier is half a U-Net: backbone='unet'"
        )
    f = make_autoencoder(config.autoencoder).downsampling
    for field in ("image_size", "bucket_step"):
        if config.data[field] % f:
            raise ValueError(
                f"data.{field}={config.data[field]} must be divisible by f={f}, by which the "
                "autoencoder divides each side"
            )
    scale = config.sampling.guidance_scale  # None stands for the default, 1
    guided = config.task in DENOISERS and scale is not None and np.any(np.asarray(scale) != 1)
    if guided and not config.conditioners and config[config.backbone].get("guidance_dim") is None:
        raise ValueError(
            f"sampling.guidance_scale={scale} needs a condition, and there are no conditioners: "
            "set it to 1"
        )
    of_one_size = [name for name in ("word_map", "layout_map") if name in config.conditioners]
    if config.data.bucket_step and of_one_size:
        raise ValueError(
            f"data.bucket_step={config.data.bucket_step} gives latents of several sizes, and "
            f"conditioners.{of_one_size[0]} has maps of one: set data.bucket_step=0, or leave it "
            "out"
        )
    conditioner, size = make_conditioner(config.conditioners), config.data.layout.vocab_size
    for name, part in zip(conditioner.config, conditioner.parts(), strict=True):
        if "layout" in part.keys and size not in (0, part.vocab_size):
            raise ValueError(
                f"conditioners.{name}.vocab_size={part.vocab_size}, but data.layout.vocab_size="
                f"{size}: the same token would stand for another place"
            )


def start(config: ConfigDict, directory: Path, checkpoints: Checkpointer) -> Start:
    """Begin the run of a resolved config in its workdir, or resume from its latest checkpoint.

    Nothing is written before everything is read and checked.
    """
    mode, mesh = parallel.devices(config.parallel)
    layout = {"mesh": mesh, "rules": config.parallel.rules}
    train_source = data.make_source(config.data, "train")
    test_source = data.make_source(config.data, "test")
    check_classes(config, train_source)
    if isinstance(train_source, ShardSource):
        moments.check_shards(config, train_source)
    run = directory if checkpoints.all_steps() else None  # has copies of the frozen parts
    bundle = init_from.read(config) if run is None or init_from.adapts(config) else None
    config, tokenizer = make_tokenizer(config, train_source, run, bundle)
    task = lookup(TASKS, config.task, "task")(config)
    if config.data.bucket_step:
        train_source = data.Bucketed(train_source, config.data, config.batch_size, config.seed)
    transform = _transform(config, tokenizer)
    transform(train_source[0])  # raises an error for what all lack before anything is encoded

    init_rng = init_key(config.seed)
    init = functools.partial(task.init, batch_spec=batch_spec(config))
    if run is None:
        state, constants = parallel.initialise(init, init_rng, mode, **layout)
        _check_patterns(config, state, constants)
    else:
        state, constants = jax.eval_shape(init, init_rng)
    constants = frozen.load_constants(config, constants, train_source, run, bundle)
    constants = preview.load(config, constants, run)
    constants = teacher.load(config, constants, run, bundle)
    constants = init_from.base_from(config, constants, bundle)
    base = init_from.check_base(config, constants, run)
    step = 0
    if run is None:
        state = init_from.start_from(config, state, bundle)
    else:
        restored = checkpoints.restore(parallel.abstract(state, mode, **layout))
        assert restored is not None
        state, step = restored.state, restored.step
    state = parallel.place(state, mode, **layout)
    constants = parallel.place(constants, mode, mesh)
    evaluator = Evaluator(config, task, constants, test_source, tokenizer, mode, layout)
    train_source, transform = _encoded_once(
        config, directory, train_source, tokenizer, state, constants, transform
    )
    sources = [train_source]
    if config.dreambooth.class_prompt:
        show = parallel.compile_eval(task.show, mode, **layout)
        draw = functools.partial(show, state, constants)
        resumed = run is not None
        sources.append(class_pictures.make_source(config, directory, resumed, tokenizer, draw))
    _write(config, directory, run, constants, tokenizer, base)

    options = (transform, step, len(sources), config.data.workers)
    batches, *class_batches = (train_batches(config, s, *options) for s in sources)
    if class_batches:
        batches = class_pictures.with_class(config, batches, *class_batches)
    return Start(
        step=step,
        state=state,
        constants=constants,
        rng=seed_key(config.seed),
        batches=(parallel.place_batch(batch, mode, mesh) for batch in batches),
        train_step=parallel.compile_step(metrics.flagged(task.train_step), mode, **layout),
        evaluator=evaluator,
        mode=mode,
    )


def _check_patterns(config: ConfigDict, state: Any, constants: Any) -> None:
    """Raise ValueError for a pattern of `optimizer.frozen` or `lora.targets` that matches nothing.

    What `optimizer.frozen` matches may be frozen anyway; pretrained conditioners aren't adapted. Of
    `optimizer.no_decay`, a warning names such patterns: lists for several networks have some.
    """
    trained = (state.params, getattr(state, "disc_params", None))
    base = getattr(constants, "base", None)
    pretrained = leaves_by_path({"conditioner": getattr(constants, "conditioner", None)})
    paths = [path for tree in (*trained, base) for path in leaves_by_path(tree)] + [*pretrained]
    for pattern in config.optimizer.no_decay:
        if not any(re.search(pattern, path) for path in paths):
            log.warning("optimizer.no_decay=%r matches no parameter", pattern)
    kernels = [path for path in leaves_by_path(base) if path.endswith("kernel")]
    targets = config.lora.targets if config.lora.rank else ()
    checked = [("optimizer.frozen", pattern, paths) for pattern in config.optimizer.frozen]
    for field, pattern, among in checked + [("lora.targets", t, kernels) for t in targets]:
        if any(re.search(pattern, path) for path in among):
            continue
        if named := {path.split("/")[1] for path in pretrained if re.search(pattern, path)}:
            raise ValueError(
                f"{field}={pattern!r} matches only the encoder of pretrained.{min(named)}, which "
                "isn't adapted: take it from init_from, as configs/sd_v1.py:lora does"
            )
        parts = ", ".join(sorted({"/".join(path.split("/")[:2]) for path in among}))
        raise ValueError(f"{field}={pattern!r} matches no parameter; they begin with {parts}")


def _transform(config: ConfigDict, tokenizer: Any) -> Any:
    """The transform of the training examples, which refuses those that the model can't read."""
    transform = data.make_transform(config.data, train=True, tokenizer=tokenizer, as_bytes=True)
    return with_checked_examples(config, transform)


def _encoded_once(
    config: ConfigDict,
    directory: Path,
    source: Any,
    tokenizer: Any,
    state: Any,
    constants: Any,
    transform: Any,
) -> tuple[Any, Any]:
    """The training examples and their transform, with latents and texts that are encoded once."""
    inner = getattr(source, "source", source)  # within buckets
    shards = inner if isinstance(inner, ShardSource) else None
    with_texts = shards if shards is not None and shards.made.get("texts") else None
    cached = config.first_stage.cache or (config.cache_texts and with_texts is None)
    if config.data.workers and config.task != "autoencoding" and cached:
        raise ValueError(
            f"data.workers={config.data.workers} can't share what a run caches: set "
            "first_stage.cache=False and cache_texts=False, or encode shards, or set data.workers=0"
        )
    if config.cache_texts:
        encoders = texts.frozen_encoders(config, state, constants)
        if with_texts is not None:
            transform = texts.from_shards(config, encoders, with_texts, tokenizer, transform)
        else:
            transform = texts.with_encoded(
                config, directory, encoders, source, tokenizer, transform
            )
    if shards is not None:
        moments.check_first_stage(config, shards, constants.first_stage)
    elif config.task != "autoencoding" and config.first_stage.cache:
        source = moments.with_moments(config, directory, constants.first_stage, source)
    if config.data.balance:
        source = data.Balanced(source, config.data.balance)
    return source, transform


def _write(
    config: ConfigDict,
    directory: Path,
    run: Path | None,
    constants: Any,
    tokenizer: Any,
    base: dict[str, str],
) -> None:
    """Write the files of the workdir, all of them or none; only process 0 writes."""
    resumed = run is not None
    unchanged = resumed and settings.flat(config) == settings.flat(workdir.load_config(directory))
    if unchanged or jax.process_index() != 0:
        return
    with workdir.together(directory) as folder:
        workdir.save_config(config, folder)
        if not resumed:
            frozen.save(config, constants, folder)
            if tokenizer is not None:
                tokenizer.save(folder / workdir.TOKENIZER)
            if base:
                workdir.write_whole(folder / workdir.BASE, json.dumps(base, indent=2) + "\n")
            for path in workdir.copies(directory):  # of a run that was killed before a checkpoint
                path.unlink()
