"""A model between formats: architecture in our words, parameters still unread."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from latent_diffusion.convert.tables import Table, matching, read_tensors
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.nets.autoencoder import Identity
from latent_diffusion.process.schedules import BETAS, NoiseSchedule, make_schedule
from latent_diffusion.types import Params

DIFFUSION = {"num_timesteps": 1000, "zero_terminal_snr": False, "prediction": "eps"}


@dataclass(frozen=True)
class Part:
    """One module: its fields, and its parameters by path ("encoder/conv_in/kernel").

    unused: tensors of its file that no computation here needs, by their names there; who writes
    the same kind of file writes them again.
    """

    fields: Mapping[str, Any]
    params: Mapping[str, Tensor]
    unused: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """Everything that makes up a model; a part that is None isn't there.

    conditioners: by the name of the conditioner. diffusion: `schedule`, `num_timesteps`,
    `beta_start`, `beta_end`, `zero_terminal_snr`, `prediction`, as in a config. sampling: what
    `sample` falls back to. image_size: of a trained image, in pixels. notes: what a format must
    remember to write the same file again, e.g. `linear_projections`. lora: factors that are in the
    parameters already, by part and path, for formats that hold nothing else.
    """

    autoencoder: Part | None = None
    scale_factor: Any = 1.0
    shift: Any = 0.0
    unet: Part | None = None
    conditioners: Mapping[str, Part] = field(default_factory=dict)
    diffusion: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    image_size: int = 256
    notes: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[str, Part]]:
        """The parts there are, by name."""
        if self.autoencoder is not None:
            yield "autoencoder", self.autoencoder
        if self.unet is not None:
            yield "unet", self.unet
        yield from self.conditioners.items()

    @property
    def linear_projections(self) -> bool:
        """Whether others keep the transformers' outer projections as linear maps."""
        return bool(self.notes.get("linear_projections"))

    @property
    def downsampling(self) -> int:
        """f of the autoencoder; 8, the most common, where there is none."""
        if self.autoencoder is None:
            return 8
        return 2 ** (len(self.autoencoder.fields.get("channel_mult", (1,))) - 1)

    def astype(self, dtype: Any) -> "Bundle":
        """The same model with floating-point parameters of another dtype."""

        def cast(part: Part) -> Part:
            params = {k: t.astype(dtype) for k, t in part.params.items()}
            unused = {k: t.astype(dtype) for k, t in part.unused.items()}
            return Part(part.fields, params, unused)

        return replace(
            self,
            autoencoder=self.autoencoder and cast(self.autoencoder),
            unet=self.unet and cast(self.unet),
            conditioners={name: cast(part) for name, part in self.conditioners.items()},
        )


def flat(tree: Params) -> dict[str, Any]:
    """Leaves by path."""
    return flatten_dict(tree, sep="/")


def as_part(
    fields: Mapping[str, Any], tree: Params, unused: Mapping[str, np.ndarray] | None = None
) -> Part:
    """A part whose parameters are in memory already."""
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
    """A part of a file. tree: its parameters' shapes.

    unused, ignored: regular expressions over names that may be left over; the first are kept for
    who writes the file again.
    """
    shapes = {path: leaf.shape for path, leaf in flat(tree).items()}
    params = read_tensors(table, shapes, tensors, str(where), (*unused, *ignored))
    return Part(fields, params, matching(unused, tensors))


def as_params(part: Part) -> Params:
    """The parameters as float32 device arrays, in nested dictionaries."""
    arrays = {k: jnp.array(t.astype(np.float32).read()) for k, t in part.params.items()}
    return unflatten_dict(arrays, sep="/")


def input_widths(unet: Part) -> tuple[int, int | None, int | None]:
    """Channels, context width and vector width that a U-Net takes, read off its parameters."""
    context = unet.params.get("middle_block_1/transformer_blocks_0/attn2/to_k/kernel")
    vector = unet.params.get("label_emb_0/kernel")
    return (
        unet.params["input_blocks_0_0/kernel"].shape[2],
        None if context is None else context.shape[0],
        None if vector is None else vector.shape[0],
    )


def recognise_schedule(schedule: NoiseSchedule) -> dict[str, Any]:
    """The `diffusion` fields that make this schedule; ValueError where no named curve does."""
    betas = np.asarray(schedule.betas, np.float64)
    num, alphas = len(betas), np.asarray(schedule.alphas)
    ends = [(float(f"{betas[0]:.4g}"), float(f"{betas[-1]:.4g}"))]
    zero_snr = bool(alphas[-1] == 0)
    if zero_snr:  # the last beta is lost; try those in use
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
    raise ValueError("the noise schedule is none of the named ones, which is all a format can say")


def with_folded_scale(bundle: Bundle) -> Bundle:
    """The same model with a scalar latent scale and no shift, for formats that know no other.

    Per-channel scale s and shift m move into the 1×1 convolutions next to the latent: quant_conv
    gives (z − m)·s (and log-variances + 2 log s), post_quant_conv takes z/s + m.
    """
    scale = np.asarray(bundle.scale_factor, np.float32)
    shift = np.asarray(bundle.shift, np.float32)
    if bundle.autoencoder is None or (scale.ndim == 0 and not shift.any()):
        return bundle
    fields = bundle.autoencoder.fields
    if fields["regularization"] == "vq":
        raise ValueError("this format knows no per-channel scale, and codes can't take one on")
    width = fields["embed_dim"]
    scale, shift = np.broadcast_to(scale, width), np.broadcast_to(shift, width)
    twice = fields["regularization"] == "kl"
    gain = np.concatenate([scale, np.ones(width, np.float32)]) if twice else scale
    offset = np.concatenate([-shift * scale, 2 * np.log(scale)]) if twice else -shift * scale
    old = {k: bundle.autoencoder.params[k] for k in bundle.autoencoder.params if "quant_conv" in k}
    array = {path: np.asarray(tensor.read(), np.float32) for path, tensor in old.items()}
    after = array["post_quant_conv/kernel"]
    array["post_quant_conv/bias"] = array["post_quant_conv/bias"] + shift @ after[0, 0]
    array["post_quant_conv/kernel"] = after / scale[:, None]
    array["quant_conv/kernel"] = array["quant_conv/kernel"] * gain
    array["quant_conv/bias"] = array["quant_conv/bias"] * gain + offset
    folded = {path: in_memory(value.astype(np.float32)) for path, value in array.items()}
    part = replace(bundle.autoencoder, params={**bundle.autoencoder.params, **folded})
    notes = {name: note for name, note in bundle.notes.items() if name != "autoencoder"}
    return replace(bundle, autoencoder=part, scale_factor=1.0, shift=0.0, notes=notes)


def bundle_of(model: Any) -> Bundle:
    """The bundle of a loaded `Model`. Its origin says what its arrays don't."""
    bundle = Bundle(
        tokenizer=model.tokenizer,
        sampling=model.defaults,
        image_size=model.image_size,
        notes={k: v for k, v in model.origin.items() if k not in ("diffusion", "unused")},
    )
    unused = model.origin.get("unused", {})
    if model.first_stage is not None:
        bundle = replace(
            bundle,
            autoencoder=as_part(
                _fields(model.first_stage.module),
                model.first_stage.params,
                unused.get("autoencoder"),
            ),
            scale_factor=model.first_stage.scale_factor,
            shift=model.first_stage.shift,
        )
    if model.denoiser is None:
        return bundle
    denoiser = model.denoiser
    diffusion = model.origin.get("diffusion") or {
        **recognise_schedule(denoiser.schedule),
        "prediction": denoiser.prediction,
    }
    conditioner = denoiser.params.get("conditioner", {})
    return replace(
        bundle,
        unet=as_part(_fields(denoiser.unet), denoiser.params["unet"], unused.get("unet")),
        conditioners={
            name: as_part(fields, conditioner.get(name, {}), unused.get(name))
            for name, fields in denoiser.conditioner.config.items()
        },
        diffusion=diffusion,
    )


def _fields(module: Any) -> dict[str, Any]:
    if isinstance(module, Identity):
        return {"regularization": "identity", "image_channels": module.image_channels}
    own = (name for name in module.__dataclass_fields__ if name not in ("parent", "name"))
    return {name: getattr(module, name) for name in own if name != "axis_name"}
