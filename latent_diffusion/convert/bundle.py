"""A model between two formats: its architecture in our terms, its parameters not yet read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from latent_diffusion.convert.shapes import array, parameter_shapes
from latent_diffusion.convert.tables import Table, matching, read_tensors
from latent_diffusion.core.types import Params
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.models.denoiser import schedule_of
from latent_diffusion.nets.autoencoder import WITH_CODEBOOK, Identity
from latent_diffusion.nets.conditioners import CONDITIONERS
from latent_diffusion.process.schedules import BETAS, NoiseSchedule, make_schedule

Size = int | tuple[int, int]  # the side of a square, or (height, width)
_NETWORKS = ("unet", "dit", "mmdit")  # of a denoiser


@dataclass(frozen=True)
class Part:
    """One module: its fields, and its parameters by path ("encoder/conv_in/kernel").

    unused: tensors of the file that no computation here needs, by their names in the file. A file
    of the same kind gets them again.
    """

    fields: Mapping[str, Any]
    params: Mapping[str, Tensor]
    unused: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """All parts and settings of a model; a part that is None is absent.

    unet, dit, mmdit: the denoiser's network; at most one of them is present. scale_factor, shift:
    latents are (z - shift)·scale_factor; each is a scalar or has a value for each channel.
    conditioners: parts by the name of the conditioner. diffusion: `schedule`, `num_timesteps`,
    `beta_start`, `beta_end`, `zero_terminal_snr` and `prediction`, as in a config. sampling: the
    default options of `sample`. image_size: the side of a training image in pixels, or its height
    and width. notes: facts that a format needs to write the same file again, such as
    `linear_projections`. lora: low-rank factors and their α by part and path, for the formats of
    LoRA files; they are already merged into the parameters.
    """

    autoencoder: Part | None = None
    scale_factor: Any = 1.0
    shift: Any = 0.0
    unet: Part | None = None
    dit: Part | None = None
    prior: Part | None = None
    conditioners: Mapping[str, Part] = field(default_factory=dict)
    diffusion: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    image_size: Size = 256
    notes: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    mmdit: Part | None = None

    def parts(self) -> Iterator[tuple[str, Part]]:
        """The names and parts that are present."""
        if self.autoencoder is not None:
            yield "autoencoder", self.autoencoder
        if self.denoiser is not None:
            yield self.denoiser
        if self.prior is not None:
            yield "prior", self.prior
        yield from self.conditioners.items()

    @property
    def denoiser(self) -> tuple[str, Part] | None:
        """The name and the part of the denoiser's network."""
        networks = {name: getattr(self, name) for name in _NETWORKS}
        return next(((name, part) for name, part in networks.items() if part is not None), None)

    def with_part(self, name: str, part: Part) -> "Bundle":
        """The same model with another part of this name."""
        if name in ("autoencoder", *_NETWORKS, "prior"):
            present: dict[str, Any] = {name: part}
            return replace(self, **present)
        return replace(self, conditioners={**self.conditioners, name: part})

    def with_params(self, name: str, params: Mapping[str, Tensor]) -> "Bundle":
        """The same model with some other parameters, by path, in the part of this name."""
        part = dict(self.parts())[name]
        return self.with_part(name, replace(part, params={**part.params, **params}))

    @property
    def linear_projections(self) -> bool:
        """Whether files have linear maps, not 1×1 convolutions, around the U-Net's transformers."""
        return bool(self.notes.get("linear_projections"))

    @property
    def time_width(self) -> int | None:
        """The width of each size's sinusoid in the vector (Stable Diffusion XL); None elsewhere."""
        sizes = self.conditioners.get("sizes")
        if sizes is not None:
            return sizes.fields.get("width", 256)
        return self.notes.get("time_width")

    @property
    def downsampling(self) -> int:
        """The factor f of the autoencoder; 8, the most common one, without an autoencoder."""
        if self.autoencoder is None:
            return 8
        fields = self.autoencoder.fields
        if fields.get("regularization") == "identity":  # a run's config has other fields beside
            return 1
        return 2 ** (len(fields.get("channel_mult") or fields.get("encoder_blocks") or (1,)) - 1)

    @property
    def latent_size(self) -> Size:
        """The side of the latent of a trained image, or its height and width."""
        size, f = self.image_size, self.downsampling
        return size // f if isinstance(size, int) else (size[0] // f, size[1] // f)

    def in_pixels(self, size: Size) -> Size:
        """The side of the image, or its height and width, of which a latent has this size."""
        f = self.downsampling
        return size * f if isinstance(size, int) else (size[0] * f, size[1] * f)

    def astype(self, dtype: Any) -> "Bundle":
        """The same model with its floating-point parameters and factors in another dtype."""

        def factors(where: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
            cast = {n: in_memory(x).astype(dtype, f"{where}/{n}") for n, x in arrays.items()}
            return {**{n: x.read() for n, x in cast.items()}, "alpha": arrays["alpha"]}

        lora = {
            name: {path: factors(f"{name}/{path}", arrays) for path, arrays in kernels.items()}
            for name, kernels in self.lora.items()
        }
        bundle = replace(self, lora=lora)
        for name, part in self.parts():
            params, unused = (
                {path: t.astype(dtype, f"{name}/{path}") for path, t in tensors.items()}
                for tensors in (part.params, part.unused)
            )
            bundle = bundle.with_part(name, Part(part.fields, params, unused))
        return bundle


def check_depth(where: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for more layers than the tensors can be, before shapes are computed.

    A residual block and a layer of a transformer have at least eight tensors.
    """
    levels, blocks = len(fields.get("channel_mult", ())), fields.get("num_res_blocks", 0)
    layers = levels * blocks + fields.get("depth", 0)
    attends = [2**level in fields.get("attention_resolutions", ()) for level in range(levels)]
    depth = fields.get("transformer_depth", 0)
    depths = (depth,) * max(levels, 1) if isinstance(depth, int) else depth
    layers += blocks * sum(d for d, yes in zip(depths, attends, strict=False) if yes)
    layers += fields.get("middle_depth") or depths[-1]
    if 8 * layers > len(tensors):
        raise ValueError(
            f"{where}: {len(tensors)} tensors can't be the {layers} layers of its config"
        )


def flat(tree: Params) -> dict[str, Any]:
    """The leaves of a tree by their paths, with "/" between the names."""
    return flatten_dict(tree, sep="/")


def conditioner_shapes(name: str, fields: Mapping[str, Any]) -> Params:
    """The tree of parameter shapes of the conditioner `name` with these fields."""
    module = CONDITIONERS[name](**fields)
    side = 2 ** getattr(module, "num_stages", 1)

    def integers(*shape: int) -> Any:
        return array(*shape, dtype="int32")

    one_example = {
        "tokens": integers(1, getattr(module, "max_length", 2)),
        "class_label": integers(1),
        "segmentation": integers(1, side, side),
        "image": array(1, 2, 2, 3),
        "noise_level": integers(1),
        **dict.fromkeys(("original_size", "crop_top_left", "target_size"), integers(1, 2)),
        "aesthetic_score": array(1),
        "embedding_noise": array(1, getattr(module, "projection_dim", None) or 1),
    }
    return parameter_shapes(module, FrozenDict(one_example), array(1, dtype="bool"))


def as_part(
    fields: Mapping[str, Any], tree: Params, unused: Mapping[str, np.ndarray] | None = None
) -> Part:
    """A part whose parameters are in memory."""
    params = {path: in_memory(leaf) for path, leaf in flat(tree).items()}
    return Part(fields, params, {name: in_memory(x) for name, x in (unused or {}).items()})


def read_part(
    where: Path,
    fields: Mapping[str, Any],
    table: Table,
    tree: Params,
    tensors: Mapping[str, Tensor],
    unused: Sequence[str] = (),
    ignored: Sequence[str] = (),
) -> Part:
    """Read a part of the file `where`. tree: the shapes of its parameters.

    unused, ignored: regular expressions for names of tensors that may be left over. Those of
    `unused` become the part's `unused`, those of `ignored` are dropped. Raises ValueError where the
    tensors don't fit.
    """
    shapes = {path: leaf.shape for path, leaf in flat(tree).items()}
    params = read_tensors(table, shapes, tensors, str(where), (*unused, *ignored))
    return Part(fields, params, matching(unused, tensors))


def as_params(
    part: Part,
    dtype: Any = np.float32,
    leaf: Callable[[str, np.ndarray], Any] = lambda path, array: jax.device_put(np.array(array)),
) -> Params:
    """Read the parameters into arrays on the device, in nested dictionaries.

    leaf: makes the leaf of the tree from a parameter's path and its array of `dtype`.
    """
    arrays = {path: leaf(path, t.astype(dtype).read()) for path, t in part.params.items()}
    return unflatten_dict(arrays, sep="/")


def input_widths(network: Part) -> tuple[int, int | None, int | None]:
    """The widths of a network's inputs: channels, context, vector; None for an absent input.

    A DiT has the same parameters with a vector as without; its width here is None.
    """

    def width(*paths: str) -> int | None:
        kernels = (network.params.get(f"{path}/kernel") for path in paths)
        return next((kernel.shape[-2] for kernel in kernels if kernel is not None), None)

    context = width(
        "middle_block_1/transformer_blocks_0/attn2/to_k",
        "blocks_0/cross_attn/to_k",
        "context_embedder",
    )
    channels = width("input_blocks_0_0")
    if (patch := width("x_embedder_proj")) is not None:
        channels = patch // network.fields["patch_size"] ** 2
    assert channels is not None
    return channels, context, width("label_emb_0", "y_embedder_mlp_0")


def recognise_schedule(schedule: NoiseSchedule) -> dict[str, Any]:
    """The `diffusion` fields that make this schedule; ValueError where no named curve does."""
    betas = np.asarray(schedule.betas, np.float64)
    num, alphas = len(betas), np.asarray(schedule.alphas)
    ends = [(float(f"{betas[0]:.4g}"), float(f"{betas[-1]:.4g}"))]
    zero_snr = bool(alphas[-1] == 0)
    if zero_snr:  # rescaling hides the last beta, so those of released models are tried
        ends = [(ends[0][0], end) for end in (0.012, 0.02, 0.0195, 0.0205, 0.0155, 0.015)]
    for name in BETAS:
        for start, end in ends:
            made = make_schedule(name, num, start, end, zero_terminal_snr=zero_snr)
            if np.allclose(made.alphas, alphas, rtol=1e-5, atol=1e-7):
                return {
                    "schedule": name,
                    "num_timesteps": num,
                    "beta_start": start,
                    "beta_end": end,
                    "zero_terminal_snr": zero_snr,
                }
    raise ValueError("the noise schedule has none of the named curves, and files hold only names")


def same_noise(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the `diffusion` fields of two models are one noise schedule and one prediction."""
    return one["prediction"] == other["prediction"] and _makes(one, schedule_of(other))


def _makes(diffusion: Mapping[str, Any], schedule: NoiseSchedule) -> bool:
    """Whether the `diffusion` fields of a file make this schedule."""
    made = schedule_of(diffusion)
    return made.num_timesteps == schedule.num_timesteps and np.allclose(
        made.alphas, schedule.alphas, rtol=1e-5, atol=1e-7
    )


def with_folded_scale(bundle: Bundle, shifts: bool = False) -> Bundle:
    """The same model with a scalar latent scale and no shift, for formats with nothing else.

    shifts: whether the format has a scalar shift for KL and tiny autoencoders. The scale s and
    shift m of each channel move into the 1×1 convolutions beside the latent: quant_conv returns
    (z − m)·s and log-variances + 2 log s, post_quant_conv takes z/s + m. Raises ValueError for an
    autoencoder with a codebook or without these convolutions.
    """
    scale = np.asarray(bundle.scale_factor, np.float32)
    shift = np.asarray(bundle.shift, np.float32)
    if bundle.autoencoder is None or (scale.ndim == 0 and not shift.any()):
        return bundle
    fields = bundle.autoencoder.fields
    kind = fields["regularization"]
    if shifts and scale.ndim == shift.ndim == 0 and kind in ("kl", "tiny"):
        return bundle
    if kind in ("tiny", "identity"):
        what = "a tiny autoencoder" if kind == "tiny" else "pixels"
        raise ValueError(f"this format has one scale for all channels of {what}; save it as orbax")
    if kind in WITH_CODEBOOK:
        raise ValueError("this format has one scale for all channels, and codes can't be rescaled")
    width = fields["embed_dim"]
    scale, shift = np.broadcast_to(scale, width), np.broadcast_to(shift, width)
    twice = kind == "kl"
    gain = np.concatenate([scale, np.ones(width, np.float32)]) if twice else scale
    offset = np.concatenate([-shift * scale, 2 * np.log(scale)]) if twice else -shift * scale
    old = {k: bundle.autoencoder.params[k] for k in bundle.autoencoder.params if "quant_conv" in k}
    array = {path: np.asarray(tensor.read(), np.float32) for path, tensor in old.items()}
    after = array["post_quant_conv/kernel"]
    array["post_quant_conv/bias"] = array["post_quant_conv/bias"] + shift @ after[0, 0]
    array["post_quant_conv/kernel"] = after / scale[:, None]
    array["quant_conv/kernel"] = array["quant_conv/kernel"] * gain
    array["quant_conv/bias"] = array["quant_conv/bias"] * gain + offset
    folded = {
        path: in_memory(value.astype(np.float32)).astype(old[path].dtype, f"autoencoder/{path}")
        for path, value in array.items()
    }
    part = replace(bundle.autoencoder, params={**bundle.autoencoder.params, **folded})
    notes = {name: note for name, note in bundle.notes.items() if name != "autoencoder"}
    return replace(bundle, autoencoder=part, scale_factor=1.0, shift=0.0, notes=notes)


def bundle_of(model: Any) -> Bundle:
    """The bundle of a loaded `Model`, whose `origin` has the facts that its arrays don't show."""
    bundle = Bundle(
        tokenizer=model.tokenizer,
        sampling=model.defaults,
        image_size=model.image_size,
        notes={k: v for k, v in model.origin.items() if k not in ("diffusion", "unused")},
    )
    unused = model.origin.get("unused", {})
    if (first_stage := model.first_stage) is not None:
        bundle = replace(
            bundle,
            autoencoder=as_part(
                _fields(first_stage.module), first_stage.params, unused.get("autoencoder")
            ),
            scale_factor=first_stage.scale_factor,
            shift=first_stage.shift,
        )
    if model.prior is not None:
        return _with_prior(bundle, model.prior, unused)
    if (denoiser := model.denoiser) is None:
        return bundle
    bundle = with_denoiser(bundle, denoiser, unused)
    diffusion = model.origin.get("diffusion")
    if diffusion is None or not _makes(diffusion, denoiser.schedule):
        diffusion = recognise_schedule(denoiser.schedule)
    return replace(bundle, diffusion={**diffusion, "prediction": denoiser.prediction})


def with_denoiser(bundle: Bundle, denoiser: Any, unused: Mapping[str, Any]) -> Bundle:
    """The bundle with the networks of a `Denoiser`. unused: `Part.unused` of each part, by name."""
    name = denoiser.name
    network = as_part(_fields(denoiser.network), denoiser.params[name], unused.get(name))
    return replace(
        bundle,
        conditioners=_conditioners(denoiser, unused),
    ).with_part(name, network)


def _with_prior(bundle: Bundle, prior: Any, unused: Mapping[str, Any]) -> Bundle:
    part = as_part(_fields(prior.transformer), prior.params["transformer"])
    return replace(bundle, prior=part, conditioners=_conditioners(prior, unused))


def _conditioners(owner: Any, unused: Mapping[str, Any]) -> dict[str, Part]:
    """The conditioners of a denoiser or a prior."""
    trees = owner.params.get("conditioner", {})
    return {
        name: as_part(fields, trees.get(name, {}), unused.get(name))
        for name, fields in owner.conditioner.config.items()
    }


def _fields(module: Any) -> dict[str, Any]:
    if isinstance(module, Identity):
        return {"regularization": "identity", "image_channels": module.image_channels}
    names = (n for n in module.__dataclass_fields__ if n not in ("parent", "name", "axis_name"))
    return {name: getattr(module, name) for name in names}
