"""Score samples, folders and first stages.

    python -m latent_diffusion.evaluate --workdir=DIR --metrics=fid,is,pr --num_images=50000
    python -m latent_diffusion.evaluate --workdir=DIR --metrics=psnr,ssim,lpips,rfd
    python -m latent_diffusion.evaluate --samples=DIR|npz --reference=DIR|npz|tfds:NAME@SPLIT

A workdir's samples are scored as they are made, against its own training data unless --reference
says otherwise; nothing but features is kept, in its evaluations/, where an interrupted evaluation
goes on. Results are printed and appended to its evaluations.jsonl. On several hosts:
--distributed, see docs/devices.md.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

from latent_diffusion.process.options import OPTIONS
from latent_diffusion.runtime import flags as shared_flags

WORKDIR = flags.DEFINE_string("workdir", None, "A workdir of either stage.")
SAMPLES = flags.DEFINE_string("samples", None, "Instead: a folder, or an .npz with arr_0.")
REFERENCE = flags.DEFINE_string(
    "reference", None, "A folder, an .npz (arr_0, or mu and sigma), or tfds:NAME@SPLIT."
)
METRICS = flags.DEFINE_list(
    "metrics", None, "fid kid is fd kd pr dc clip | psnr ssim lpips rfid rfd."
)
NUM_IMAGES = flags.DEFINE_integer("num_images", 0, "0 = as many as there are, or 50000 samples.")
FEATURES = flags.DEFINE_string("features", "inception", "inception | alexnet | vgg16.")
FEATURES_PATH = flags.DEFINE_string("features_path", None, "Their weights.")
FILTER = flags.DEFINE_string(
    "filter", "bicubic", "Resizing: bicubic (clean-fid) | bilinear (pytorch-fid) | tensorflow."
)
CLIP_PATH = flags.DEFINE_string("clip_path", None, "Of the metric clip: a CLIPModel's folder.")
LPIPS_NET = flags.DEFINE_string("lpips", "alex", "Net of the metric lpips: alex | vgg.")
SPLIT = flags.DEFINE_string("split", None, "Of a workdir's data; first stages: test, else train.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 0, "Cut and resize --samples, --reference to it.")
SEED = flags.DEFINE_integer("seed", 0, "Of samples, subsets and the order of conditions.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at once, over all devices.")
SAVE_IMAGES = flags.DEFINE_string("save_images", None, "Also write the samples to this folder.")
SAVE_REFERENCE = flags.DEFINE_string(
    "save_reference", None, "Write the reference's mu and sigma to this .npz."
)
SAMPLING = ("sampler", "num_steps", "guidance_scale")  # the options of samples that are scored
read_options = shared_flags.define({name: OPTIONS[name] for name in SAMPLING}, "the model's")
connect = shared_flags.cluster()

DEFAULT_SAMPLES = 50_000


def evaluate(**options: Any) -> dict[str, Any]:
    """Score what the flags of the same names describe: the record that is logged.

    On several processes all get the record, and process 0 alone writes. Raises ValueError (one
    line) for input that can't be scored.
    """
    import jax

    from latent_diffusion.evaluate import reconstruction
    from latent_diffusion.runtime import processes

    o = {flag.name: flag.default for flag in _FLAGS} | dict.fromkeys(SAMPLING) | options
    if (o["workdir"] is None) == (o["samples"] is None):
        raise ValueError("give either --workdir or --samples")
    if o["num_images"] < 0:
        raise ValueError(f"num_images={o['num_images']} must be at least 1 (or 0, for all)")
    processes.check_same(o, "set of options")
    start = time.perf_counter()
    with _cache(o["workdir"]) as cache:
        if o["workdir"] is None:
            record = _score_samples(o, cache, None)
        else:
            record = _score_workdir(o, cache, reconstruction)
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **record}
    record["seconds"] = round(time.perf_counter() - start, 1)
    if o["workdir"] is not None and jax.process_index() == 0:
        with (Path(o["workdir"]) / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return record


@contextlib.contextmanager
def _cache(workdir: str | None) -> Iterator[Path]:
    """Where features lie: in the workdir to stay, or in a temporary folder."""
    if workdir is not None:
        yield Path(workdir) / "evaluations"
        return
    with tempfile.TemporaryDirectory(prefix="latent_diffusion_") as folder:
        yield Path(folder)


def _score_workdir(o: dict[str, Any], cache: Path, reconstruction: Any) -> dict[str, Any]:
    from latent_diffusion.runtime import workdir
    from latent_diffusion.runtime.checkpoint import Checkpointer

    directory = Path(o["workdir"])
    config = workdir.load_config(directory)
    with Checkpointer(directory / "checkpoints", read_only=True) as checkpoints:
        step = max(checkpoints.all_steps(), default=0)
    usual = ["psnr", "ssim", "lpips"] if config.task == "autoencoding" else ["fd", "pr"]
    o = {**o, "metrics": o["metrics"] or usual}
    wanted = [name for name in o["metrics"] if name in reconstruction.METRICS]
    if wanted and len(wanted) < len(o["metrics"]):
        raise ValueError(f"metrics={','.join(o['metrics'])} mixes reconstructions and samples")
    if config.task == "autoencoding" and not wanted:
        raise ValueError(
            f"{directory} holds a first stage; its metrics: {', '.join(reconstruction.METRICS)}"
        )
    scored = _score_first_stage if wanted else _score_samples
    return {"step": step, **scored(o, cache / f"step_{step}", config)}


def _score_first_stage(o: dict[str, Any], cache: Path, config: Any) -> dict[str, Any]:
    """Reconstructions of the test split by posterior modes."""
    from latent_diffusion.evaluate import generate, reconstruction
    from latent_diffusion.evaluate.features import make_features
    from latent_diffusion.generation.loading import load
    from latent_diffusion.nets.losses.perceptual import load_lpips_params

    metrics, net_name = o["metrics"], o["features"]
    if "rfid" in metrics and net_name != "inception":
        raise ValueError(f"rfid means Inception features, not {net_name!r}; rfd is the same")
    net = None
    if {"rfid", "rfd"} & set(metrics):
        net = make_features(net_name, o["features_path"], o["filter"])
    lpips = (o["lpips"], load_lpips_params(o["lpips"])) if "lpips" in metrics else None
    images = generate.of_data(config, o["split"] or "test")
    count = _count(o, images.count, images.name)
    folder = _folder(cache, o, "reconstructions", images.name, count)
    stage = load(o["workdir"]).first_stage
    assert stage is not None  # every workdir has one
    with _progress(count) as report:
        arrays = reconstruction.collect_reconstructions(
            stage,
            images.read,
            count,
            metrics,
            folder,
            lpips=lpips,
            net=net,
            batch_size=o["batch_size"],
            report=report,
        )
    results = reconstruction.score_reconstructions(arrays, o["lpips"], net_name)
    return _record(o, results, images.name, images.name)


def _score_samples(o: dict[str, Any], cache: Path, config: Any) -> dict[str, Any]:
    """Samples of a model (with its config), or a set of pictures, against a reference."""
    import jax

    from latent_diffusion.evaluate import scores
    from latent_diffusion.evaluate.collect import collect_features
    from latent_diffusion.evaluate.features import make_features, with_clip
    from latent_diffusion.evaluate.frechet import save_statistics

    metrics = o["metrics"] or ["fd", "pr"]
    o = {**o, "metrics": metrics}
    scores.check_metrics(metrics, o["features"])
    clip = _clip(o) if "clip" in metrics else None
    net: Any = None
    if set(metrics) - set(scores.WITHOUT_FEATURES):
        net = make_features(o["features"], o["features_path"], o["filter"])
    reference, name = _reference(o, cache, config, net)
    images = _sample_set(o, config)
    count = _count(o, images.count, images.name)
    captions = None if clip is None else _captions(o, images, count)
    both = net if clip is None else with_clip(net, clip)
    nets = {"features": both.name, "clip_path": None if clip is None else o["clip_path"]}
    folder = _folder(cache, {**o, **nets}, "samples", images.name, count)
    with _progress(count) as report:
        arrays = collect_features(images.read, count, both, folder, o["batch_size"], report)
    if clip is not None and captions is not None:
        arrays["captions"] = clip.embed_texts(captions)
    if o["save_reference"] and jax.process_index() == 0:
        save_statistics(o["save_reference"], reference.gaussian())
    return _record(o, scores.score(metrics, arrays, reference, o["features"]), images.name, name)


def _clip(o: dict[str, Any]) -> Any:
    from latent_diffusion.convert.clip import load_clip

    if not o["clip_path"]:
        raise ValueError("the metric clip needs --clip_path: a CLIPModel's folder, with tokenizer")
    return load_clip(o["clip_path"])


def _captions(o: dict[str, Any], images: Any, count: int) -> list[str]:
    """What the pictures should show: a model's prompts, or the prompts.txt beside pictures."""
    if images.captions is not None:
        return images.captions(count)
    path = Path(o["samples"] or "")
    path = (path if path.is_dir() else path.parent) / "prompts.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if len(lines) < count:
        raise ValueError(
            f"clip needs a caption for each of {count} pictures; {path} has {len(lines)}"
        )
    return lines[:count]


def _sample_set(o: dict[str, Any], config: Any) -> Any:
    from latent_diffusion import data
    from latent_diffusion.evaluate import generate, images
    from latent_diffusion.generation.loading import load

    if config is None:
        return images.open_images(o["samples"], o["image_size"])
    model = load(o["workdir"])
    count = o["num_images"] or DEFAULT_SAMPLES
    source = data.make_source(config.data, "test")
    transform = data.make_transform(config.data, train=False)
    chosen = {name: o[name] for name in SAMPLING if o[name] is not None}
    return generate.samples(
        model,
        generate.conditions_of(model, source, transform, count, o["seed"]),
        count,
        o["seed"],
        o["batch_size"],
        Path(o["save_images"]) if o["save_images"] else None,
        **chosen,
    )


def _reference(o: dict[str, Any], cache: Path, config: Any, net: Any) -> tuple[Any, str]:
    """The reference's features or statistics, and its name."""
    import numpy as np

    from latent_diffusion.evaluate import generate, images
    from latent_diffusion.evaluate.collect import collect_features
    from latent_diffusion.evaluate.frechet import load_statistics
    from latent_diffusion.evaluate.scores import WITHOUT_REFERENCE, Reference

    spec = o["reference"]
    if spec is None and set(o["metrics"]) <= set(WITHOUT_REFERENCE):
        return Reference(), "none"
    if spec is None and config is None:
        raise ValueError(f"metrics={','.join(o['metrics'])} need --reference")
    if spec is not None and spec.endswith(".npz") and Path(spec).is_file():
        with np.load(spec, allow_pickle=False) as file:
            if "mu" in file.files and "arr_0" not in file.files:
                return Reference(statistics=load_statistics(spec)), spec
    if spec is None:
        real = generate.of_data(config, o["split"] or "train")
    else:
        real = images.open_images(spec, o["image_size"])
    with _progress(real.count) as report:
        folder = _folder(cache, o, "reference", real.name, real.count)
        arrays = collect_features(real.read, real.count, net, folder, o["batch_size"], report)
    return Reference(features=arrays["features"]), real.name


def _count(o: dict[str, Any], there: int, name: str) -> int:
    if o["num_images"] > there:
        raise ValueError(f"num_images={o['num_images']}, but {name} has only {there}")
    return o["num_images"] or there


def _folder(cache: Path, o: dict[str, Any], kind: str, name: str, count: int) -> Path:
    """Where the arrays of this very work lie; `o` holds everything else it depends on."""
    from latent_diffusion.evaluate.collect import cache_folder

    relevant: tuple[str, ...] = ("samples", "features", "features_path", "filter", "image_size")
    if kind == "samples":
        relevant += ("clip_path", "seed", "save_images", *SAMPLING)
    if kind == "reconstructions":
        relevant += ("metrics", "lpips")
    work = {key: o[key] for key in relevant}
    return cache_folder(cache, {"kind": kind, "of": name, "count": count, **work})


def _record(o: dict[str, Any], results: Any, images: str, reference: str) -> dict[str, Any]:
    asked = ("seed", "filter", *SAMPLING)
    return {
        "images": images,
        "reference": reference,
        **{name: o[name] for name in asked if o[name] is not None},
        "num_images": max(result.count for result in results.values()),
        "metrics": {name: result.value for name, result in results.items()},
        "errors": {name: result.error for name, result in results.items()},
    }


@contextlib.contextmanager
def _progress(count: int) -> Iterator[Any]:
    from latent_diffusion.runtime.metrics import Progress

    with Progress(count, unit="image") as progress:

        def report(done: int) -> None:
            progress.update(done)
            progress.report(done, {})

        yield report


_FLAGS = (
    *(WORKDIR, SAMPLES, REFERENCE, METRICS, NUM_IMAGES, FEATURES, FEATURES_PATH, FILTER),
    *(CLIP_PATH, LPIPS_NET, SPLIT, IMAGE_SIZE, SEED, BATCH_SIZE, SAVE_IMAGES, SAVE_REFERENCE),
)


def main(argv: list[str]) -> None:
    """Evaluate and print."""
    import jax

    from latent_diffusion.runtime import processes
    from latent_diffusion.runtime.checkpoint import CheckpointError
    from latent_diffusion.runtime.startup import quiet_and_cached

    quiet_and_cached()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    try:
        connect()
        record = evaluate(**{flag.name: flag.value for flag in _FLAGS}, **read_options())
    except (ValueError, OSError, ModuleNotFoundError, CheckpointError) as error:
        processes.exit_with(f"error: {error}")
    if jax.process_index() != 0:
        return
    print(f"{record['num_images']} images of {record['images']}, against {record['reference']}")
    for name, value in record["metrics"].items():
        print(f"{name:24s} {value:12.5g} ± {record['errors'][name]:.2g}")


if __name__ == "__main__":
    app.run(main)
