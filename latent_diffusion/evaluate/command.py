"""Scores a workdir or a set of pictures, for `python -m latent_diffusion.evaluate`."""

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.convert.clip import Clip, load_clip
from latent_diffusion.convert.experiment import read_config
from latent_diffusion.data.captions import read_lines
from latent_diffusion.evaluate import SAMPLING, generate, reconstruction, scores
from latent_diffusion.evaluate.collect import PROGRESS, cache_folder, collect_features
from latent_diffusion.evaluate.features import FeatureNet, make_features, with_clip
from latent_diffusion.evaluate.frechet import Gaussian, load_statistics, save_statistics
from latent_diffusion.evaluate.images import ImageSet, open_images
from latent_diffusion.evaluate.measured import Measured
from latent_diffusion.files.arrays import open_npz
from latent_diffusion.generation.loading import load
from latent_diffusion.generation.model import Model
from latent_diffusion.nets.losses.perceptual import load_lpips_params
from latent_diffusion.runtime import processes
from latent_diffusion.runtime.checkpoint import Checkpointer, fingerprints
from latent_diffusion.runtime.metrics import Progress

DEFAULT_SAMPLES = 50_000

Options = Mapping[str, Any]  # the values of the command's flags, by name


def evaluate(options: Options) -> dict[str, Any]:
    """Score a workdir or a set of pictures: the record that the command prints and logs.

    On several processes all get the record, and only process 0 writes. Raises ValueError, in one
    line, for input that can't be scored.
    """
    if (options["workdir"] is None) == (options["samples"] is None):
        raise ValueError("give either --workdir or --samples")
    for name, least in (("num_images", 0), ("image_size", 0), ("batch_size", 1), ("seed", 0)):
        if options[name] < least:
            raise ValueError(f"{name}={options[name]} must be at least {least}")
    if options["workdir"] is None:
        _refuse(options, ("split", "save_images", *SAMPLING), "--samples, which exist already")
    processes.check_same(options, "set of options")
    start = time.perf_counter()
    if options["workdir"] is None:
        with tempfile.TemporaryDirectory(prefix="latent_diffusion_") as folder:
            record = _score_samples(options, Path(folder), None)
    else:
        record = _score_workdir(options, Path(options["workdir"]))
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **record}
    record["seconds"] = round(time.perf_counter() - start, 1)
    if options["workdir"] is not None and jax.process_index() == 0:
        with (Path(options["workdir"]) / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return record


def _refuse(options: Options, names: Iterable[str], what: str) -> None:
    """Raise ValueError for an option that would have no effect."""
    for name in names:
        if options[name] is not None:
            raise ValueError(f"--{name}={options[name]} has no effect on {what}: leave it out")


def _checkpoint(directory: Path) -> dict[str, Any]:
    """The `step` and a hash of the `weights` of the latest checkpoint in a workdir."""
    with Checkpointer(directory / "checkpoints", read_only=True) as checkpoints:
        step = max(checkpoints.all_steps(), default=0)
        sums = json.dumps((checkpoints.metadata() or {}).get("fingerprints"), sort_keys=True)
    return {"step": step, "weights": hashlib.sha256(sums.encode()).hexdigest()}


def _load(options: Options) -> Model:
    """The model of a workdir. Raises ValueError if it isn't that of the options' checkpoint."""
    model, now = load(options["workdir"]), _checkpoint(Path(options["workdir"]))
    if now != {name: options[name] for name in now}:
        raise ValueError(
            f"{options['workdir']} got a checkpoint of step {now['step']} while its model was read,"
            " since a run goes on there: try again"
        )
    return model


def _score_workdir(options: Options, directory: Path) -> dict[str, Any]:
    config = read_config(directory)
    if not config.data.get("name"):
        raise ValueError(
            f"{directory} is a converted model without data: write its samples by sample.py, and "
            "score them by --samples and --reference"
        )
    usual = ["psnr", "ssim", "lpips"] if config.task == "autoencoding" else None
    metrics = options["metrics"] or usual or scores.DEFAULT
    of_stage = [name for name in metrics if name in reconstruction.METRICS]
    if of_stage and len(of_stage) < len(metrics):
        raise ValueError(f"metrics={','.join(metrics)} mixes reconstructions and samples")
    if config.task == "autoencoding" and not of_stage:
        raise ValueError(
            f"{directory} holds a first stage; its metrics: {', '.join(reconstruction.METRICS)}"
        )
    score = _score_first_stage if of_stage else _score_samples
    if options["image_size"] and options["reference"] is None:
        _refuse(options, ("image_size",), "a workdir's own pictures")
    checkpoint = _checkpoint(directory)
    processes.check_same(checkpoint, "checkpoint")  # a save may have come between
    options = {**options, "metrics": metrics, **checkpoint}
    cache = directory / "evaluations" / f"step_{options['step']}"
    return {"step": options["step"], **score(options, cache, config)}


def _score_first_stage(options: Options, cache: Path, config: ConfigDict) -> dict[str, Any]:
    """Score reconstructions of the test split by posterior modes."""
    metrics, net_name = options["metrics"], options["features"]
    others = ("reference", "save_reference", "save_images", *SAMPLING)
    _refuse(options, others, "reconstructions")
    if "rfid" in metrics and net_name != "inception":
        raise ValueError(f"rfid means Inception features, not {net_name!r}; rfd is the same")
    net: Any = _features(options) if {"rfid", "rfd"} & set(metrics) else None
    lpips = options["lpips"]
    path = options["features_path"] if net is None else None  # of one network or the other
    images = generate.of_data(config, options["split"] or "test")
    count = _count(options, images)
    first_stage = _load(options).first_stage
    assert first_stage is not None  # every workdir has a first stage
    collect = functools.partial(
        reconstruction.collect_reconstructions,
        first_stage,
        metrics=metrics,
        lpips=(lpips, load_lpips_params(lpips, path or None)) if "lpips" in metrics else None,
        net=net,
    )
    arrays = _collected(options, cache, "reconstructions", images, count, collect)
    results = reconstruction.score_reconstructions(arrays, lpips, net_name)
    return _record(options, results, images.name, images.name, count)


def _score_samples(options: Options, cache: Path, config: ConfigDict | None) -> dict[str, Any]:
    """Score samples of a model (with its config), or pictures, against a reference."""
    metrics = options["metrics"] or scores.DEFAULT
    options = {**options, "metrics": metrics}
    scores.check_metrics(metrics, options["features"])
    clip = _clip(options) if "clip" in metrics else None
    net: Any = _features(options) if set(metrics) - set(scores.WITHOUT_FEATURES) else None
    defaults: Options = {}
    if config is None:
        images = open_images(options["samples"], options["image_size"])
    else:
        images, defaults = _samples_of_model(options, config)
    count = _count(options, images)
    scores.check_counts(metrics, count)
    reference, reference_name = _reference(options, cache, config, net)
    if options["save_reference"] and jax.process_index() == 0:
        save_statistics(options["save_reference"], reference.gaussian())
    captions = None if clip is None else _captions(options, images, count)
    both: Any = net if clip is None else with_clip(net, clip)
    nets = {"features": both.name, "clip_path": None if clip is None else options["clip_path"]}
    nets |= {"defaults": defaults}
    collect = functools.partial(collect_features, net=both)
    arrays = _collected({**options, **nets}, cache, "samples", images, count, collect)
    if clip is not None and captions is not None:
        arrays["captions"] = clip.embed_texts(captions)
    results = scores.score(metrics, arrays, reference, options["features"], options["seed"])
    return _record(options, results, images.name, reference_name, count)


def _features(options: Options) -> Any:
    return make_features(options["features"], options["features_path"], options["filter"])


def _clip(options: Options) -> Clip:
    if not options["clip_path"]:
        raise ValueError("the metric clip needs --clip_path: a CLIPModel's folder, with tokenizer")
    return load_clip(options["clip_path"])


def _captions(options: Options, images: ImageSet, count: int) -> list[str]:
    """The captions of the pictures: a model's prompts, or the prompts.txt beside the pictures."""
    if images.captions is not None:
        return images.captions(count)
    if options["samples"] is None:
        raise ValueError("clip compares pictures with their prompts, but this model takes none")
    path = Path(options["samples"])
    path = (path if path.is_dir() else path.parent) / "prompts.txt"
    lines = read_lines(path) if path.is_file() else []
    if len(lines) != images.count:
        raise ValueError(
            f"clip needs a caption for each of {images.count} pictures; {path} has {len(lines)}"
        )
    return lines[:count]


def _samples_of_model(options: Options, config: ConfigDict) -> tuple[ImageSet, Options]:
    """Samples of the model of a workdir, and the options of its config that draw them."""
    model, seed = _load(options), options["seed"]
    count = options["num_images"] or DEFAULT_SAMPLES
    source = data.make_source(config.data, "test")
    transform = data.make_transform(config.data, train=False)
    conditions = generate.conditions_of(model, source, transform, count, seed)
    images = generate.samples(
        model,
        conditions,
        count,
        seed,
        options["batch_size"],
        Path(options["save_images"]) if options["save_images"] else None,
        **{name: options[name] for name in SAMPLING if options[name] is not None},
    )
    version = generate.version_of_conditions(conditions, source, count)
    if config.get("init_from") and model.denoiser is not None:  # a LoRA's checkpoint lacks its base
        version += json.dumps(fingerprints(model.denoiser.params), sort_keys=True)
    images = replace(images, version=hashlib.sha256(version.encode()).hexdigest())
    return images, dict(model.defaults)


def _reference(
    options: Options, cache: Path, config: ConfigDict | None, net: Any
) -> tuple[scores.Reference, str]:
    """The reference's features or statistics, and its name."""
    spec, metrics = options["reference"], options["metrics"]
    if set(metrics) <= set(scores.WITHOUT_REFERENCE) and not (spec or options["save_reference"]):
        _refuse(options, ("split",), f"metrics={','.join(metrics)}, which need no reference")
        return scores.Reference(), "none"
    if spec is not None:
        _refuse(options, ("split",), "--reference, which is another one")
    elif config is None:
        raise ValueError(f"metrics={','.join(metrics)} need --reference")
    if net is None:
        flag = "save_reference" if spec is None else "reference"
        raise ValueError(f"metrics={','.join(metrics)} need no --{flag}: leave it out")
    if spec is not None and spec.endswith(".npz") and Path(spec).is_file():
        with open_npz(spec) as file:
            holds_statistics = "mu" in file and "arr_0" not in file
        if holds_statistics:
            return scores.Reference(statistics=_statistics(spec, net)), spec
    if spec is None:
        real = generate.of_data(config, options["split"] or "train")
    else:
        real = open_images(spec, options["image_size"])
    compared = [metric for metric in metrics if metric not in scores.WITHOUT_REFERENCE]
    scores.check_counts(compared, real.count)
    collect = functools.partial(collect_features, net=net)
    arrays = _collected(options, cache, "reference", real, real.count, collect)
    return scores.Reference(features=arrays["features"]), real.name


def _statistics(path: str, net: FeatureNet) -> Gaussian:
    """The statistics in a file; ValueError if they are of other features than the net's."""
    statistics = load_statistics(path)
    levels = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    width = jax.eval_shape(net.apply, net.params, levels)["features"].shape[1]
    if statistics.mean.size != width:
        raise ValueError(
            f"{path} has statistics of {statistics.mean.size} features, but {net.name} has {width}"
        )
    return statistics


def _count(options: Options, images: ImageSet) -> int:
    if options["num_images"] > images.count:
        raise ValueError(
            f"num_images={options['num_images']}, but {images.name} has only {images.count}"
        )
    return options["num_images"] or images.count


def _collected(
    options: Options,
    cache: Path,
    kind: str,
    images: ImageSet,
    count: int,
    collect: Callable[..., dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """The arrays of the first `count` images, with a progress bar; see `collect.collect`.

    They are in a folder of `cache` whose name depends on every option that affects the results.
    """
    relevant: tuple[str, ...] = ("samples", "features", "features_path", "filter", "image_size")
    if kind != "reference" and options["workdir"] is not None:
        relevant += ("weights",)
    if kind == "samples":
        relevant += ("clip_path", "seed", "save_images", "defaults", *SAMPLING)
    if kind == "reconstructions":
        relevant += ("metrics", "lpips")
    work: dict[str, Any] = {name: options[name] for name in relevant}
    work |= {"kind": kind, "of": images.name, "version": images.version, "count": count}
    for name in ("features_path", "clip_path", "save_images"):
        if work.get(name):
            work[name] = os.path.abspath(work[name])
    folder = cache_folder(cache, work)
    kept = work.get("save_images")
    if kept and jax.process_index() == 0 and not (Path(kept) / "00000.png").exists():
        (folder / PROGRESS).unlink(missing_ok=True)  # the pictures aren't there any more
    with Progress(count, unit="image") as progress:

        def report(done: int) -> None:
            progress.update(done)
            progress.report(done, {})

        batch_size = options["batch_size"]
        return collect(images.read, count, directory=folder, batch_size=batch_size, report=report)


def _record(
    options: Options, results: Mapping[str, Measured], images: str, reference: str, count: int
) -> dict[str, Any]:
    for name, result in results.items():
        if not np.isfinite([result.value, result.error]).all():
            raise ValueError(
                f"{name} of {images} against {reference} is {result.value} ± {result.error}: "
                "their numbers are too large"
            )
    noted = ("seed", "filter", *SAMPLING)
    return {
        "images": images,
        "reference": reference,
        **{name: options[name] for name in noted if options[name] is not None},
        "num_images": count,
        "metrics": {name: result.value for name, result in results.items()},
        "errors": {name: result.error for name, result in results.items()},
    }
