"""Lower bounds for a large run, from counts and published rates, for `training.plan`."""

import hashlib
import io
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from latent_diffusion import data
from latent_diffusion.core.types import lookup
from latent_diffusion.data.pictures import read_image
from latent_diffusion.models.first_stage import make_autoencoder
from latent_diffusion.runtime import parallel
from latent_diffusion.runtime.parallel.chips import num_chips, parse_topology
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec

# Hosts in Google's cloud: their chips, and their cores (two vCPUs each).
HOSTS = {
    "v4": (4, 120),
    "v5e": (4, 56),
    "v5p": (4, 104),
    "v6e": (4, 90),
    "a100": (8, 48),
    "h100": (8, 104),
    "h200": (8, 112),
}
MEASURED = 6  # the number of pictures whose decoding is measured


class Facts(NamedTuple):
    """Costs of a train step, in bytes unless noted.

    flops: operations for an image, without recomputation; state: parameters, averages and moments;
    gradients: of a device; latent: moments of a picture and its mirror image in bfloat16;
    images_per_core: images per second and core of the machine that counted.
    """

    flops: float
    state: int
    gradients: int
    constants: int
    latent: int
    images_per_core: float


class Plan(NamedTuple):
    """A run. seconds: of a step at least, by part. pictures, latents, checkpoint: bytes."""

    seconds: dict[str, float]
    chips: int
    hosts: int
    cores: float  # of all hosts, needed to feed the chips at full speed
    memory: float  # bytes per chip, at least
    days: float
    epochs: float
    pictures: float
    latents: float
    checkpoint: float
    written: float  # bytes of checkpoints per second

    @property
    def binds(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])


def count(config: Any) -> Facts:
    """The facts of an experiment, from shapes and a measurement on this machine."""
    config = config.copy_and_resolve_references().unlock()
    config.batch_size = config.grad_accumulation = 1
    for part in (config.get(config.backbone, {}), config.transformer, config.autoencoder):
        if "attention" in part:
            part.attention = "xla"
        if "remat" in part:
            part.remat = "none" if isinstance(part.remat, str) else False
    task: Any = lookup(TASKS, config.task, "task")(config)
    batch, rng = batch_spec(config), jax.eval_shape(lambda: jax.random.key(0))
    state, constants = jax.eval_shape(task.init, rng, batch)
    trained = (state.params, getattr(state, "disc_params", ()))
    return Facts(
        flops=parallel.count_flops(task.train_step, state, constants, batch, rng),
        state=parallel.num_bytes(state),
        gradients=parallel.num_bytes(trained),
        constants=parallel.num_bytes(constants),
        latent=_latent_bytes(config),
        images_per_core=round(measure(config), 1),
    )


def _latent_bytes(config: Any) -> int:
    stage = config.autoencoder
    if stage.regularization == "identity":
        return 0
    module = make_autoencoder(stage)
    side = config.data.image_size // module.downsampling
    if config.task == "prior":  # whose shards hold codes of 32 bits
        return 2 * 4 * side**2
    numbers = 2 if stage.regularization == "kl" else 1
    return 2 * 2 * numbers * side**2 * module.latent_channels


def measure(config: Any) -> float:
    """Pictures per second that a core decodes, crops and resizes for an experiment."""
    side = max(config.data.image_size, config.data.shorter_side or 0) * 5 // 4
    levels = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG")
    without_boxes = ConfigDict({**dict(config.data), "layout": {}})  # which no JPEG has
    transform = data.make_transform(without_boxes, train=True)
    start = time.process_time()
    for seed in range(MEASURED):
        file.seek(0)
        transform({"image": read_image(file)}, np.random.default_rng(seed))
    return MEASURED / (time.process_time() - start)


def plan(
    facts: Facts,
    topology: str,
    *,
    batch_size: int,
    num_steps: int,
    images: int,
    parts: int | None = None,
    shares: int = 1,
    checkpoint_steps: int = 0,
    picture: float = 107e3,
    storage_rate: float = 1e9,
) -> Plan:
    """The lower bounds of a run.

    parts, shares: the numbers of parts of the batch, by default one for each chip, and of shards of
    the state (see `cuts`). picture: bytes per picture.
    Raises ValueError for an unknown chip and for a batch that the chips can't share. An all-reduce
    over n chips sends 2 (n − 1)/n of the gradients over each chip's links; FSDP sends as many bytes
    of gradients and parameters together.
    """
    name, chip, _ = parse_topology(topology)
    chips = num_chips(topology)
    in_host, cores = HOSTS[name]
    hosts = -(-chips // in_host)
    parts = parts or chips
    if batch_size % parts:
        raise ValueError(f"batch_size {batch_size} isn't a multiple of its {parts} parts")
    traffic = 2 * facts.state / shares + facts.constants
    seconds = {
        "compute": batch_size * facts.flops / (chips * chip.tflops * 1e12),
        "memory": traffic / (chip.memory_rate * 1e9),
        "network": 2 * facts.gradients * (chips - 1) / chips / (chip.network_rate * 1e9),
        "input": batch_size / (hosts * cores * facts.images_per_core),
        "storage": batch_size * picture / (hosts * storage_rate),
    }
    on_chips = max(seconds[part] for part in ("compute", "memory", "network"))
    step = max(seconds.values())
    written = facts.state / (checkpoint_steps * step) if checkpoint_steps else 0.0
    return Plan(
        seconds=seconds,
        chips=chips,
        hosts=hosts,
        cores=batch_size / on_chips / facts.images_per_core,
        memory=(facts.state + facts.gradients) / shares + facts.constants,
        days=num_steps * step / 86400,
        epochs=num_steps * batch_size / images,
        pictures=images * picture,
        latents=images * facts.latent,
        checkpoint=facts.state,
        written=written,
    )


def cuts(settings: Any, topology: str) -> tuple[int, int]:
    """The numbers of parts of the batch and of shards of the state over a topology's chips.

    settings: `config.parallel`. Raises ValueError for a mesh that doesn't have as many chips.
    """
    chips = num_chips(topology)
    if settings.mode != "mesh":
        return chips, 1
    sizes = parallel.mesh_sizes(dict(settings.mesh), chips)
    return sizes["data"] * sizes["fsdp"], sizes["fsdp"] * sizes["tensor"]


def report(run: Plan, topology: str, batch_size: int) -> str:
    """A paragraph on a plan."""
    name, chip, _ = parse_topology(topology)
    step = max(run.seconds.values())
    parts = ", ".join(f"{part} {1e3 * s:,.2f}" for part, s in run.seconds.items())
    room = chip.memory * 2**30
    fits = "" if run.memory < room else " DOES NOT FIT: cut the state (docs/devices.md)"
    memory = f"{run.memory / 2**30:.1f} of {chip.memory:g} GiB a chip, and activations{fits}"
    row = "  {:<12s}{}".format
    lines = [
        f"{topology}: {run.chips} chips, {run.hosts} hosts; global batch {batch_size}",
        row("a step", f"at least {1e3 * step:,.2f} ms (ms by part: {parts})"),
        row("bound by", run.binds),
        row("at most", f"{1 / step:,.2f} steps/s, {batch_size / step:,.0f} images/s"),
        row("memory", memory),
        row(
            "input", f"{run.cores:,.0f} of {run.hosts * HOSTS[name][1]:,} cores keep the chips busy"
        ),
        row("the run", f"{run.days:,.1f} days at least, {run.epochs:,.1f} epochs"),
        row("storage", f"pictures {_size(run.pictures)}, or latents {_size(run.latents)}"),
        row("checkpoint", f"{_size(run.checkpoint)} each, {_size(3600 * run.written)} an hour"),
    ]
    return "\n".join(lines)


def _size(num_bytes: int | float) -> str:
    return f"{num_bytes / 1e12:,.1f} TB" if num_bytes >= 1e12 else f"{num_bytes / 1e9:,.1f} GB"


def key(name: str, config: Any) -> str:
    """The key of an experiment's facts: its name, and a hash of the fields that they depend on."""
    fields = config.to_dict()
    for other in ("batch_size", "num_steps", "grad_accumulation", "log", "checkpoint", "parallel"):
        fields.pop(other, None)
    text = json.dumps(fields, sort_keys=True, default=str)
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def known_facts(config: Any, name: str, path: str | None) -> Facts:
    """The facts under a name in a JSON file; if they are missing, count and add them."""
    file = Path(path) if path else None
    facts = json.loads(file.read_text()) if file and file.exists() else {}
    if name not in facts:
        facts[name] = count(config)._asdict()
        if file:
            lines = (f"{json.dumps(key)}: {json.dumps(facts[key])}" for key in sorted(facts))
            file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return Facts(**facts[name])
