"""The prior over a first stage's codes: transformer and conditioner as one pytree that samples."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from latent_diffusion.core.types import (
    Array,
    Batch,
    Bool,
    Conditioning,
    Config,
    Float,
    Int,
    Keys,
    Params,
    module_fields,
)
from latent_diffusion.nets.autoencoder import WITH_CODEBOOK
from latent_diffusion.nets.conditioners import Conditioner, make_conditioner
from latent_diffusion.nets.prior import CodeTransformer, front_of
from latent_diffusion.process import decoding
from latent_diffusion.process.options import PriorOptions

Preset = tuple[Array, Array]  # codes [B L] and which of them are preset [B L]


class Prior(flax.struct.PyTreeNode):
    """Modules and parameters {"transformer", "conditioner"} of a trained (or training) prior."""

    params: Params
    transformer: CodeTransformer = flax.struct.field(pytree_node=False)
    conditioner: Conditioner = flax.struct.field(pytree_node=False)

    def condition(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        """The conditioning of a batch; unconditional where `drop` is true."""
        params = self.params.get("conditioner", {})
        out: Any = self.conditioner.apply({"params": params}, batch, drop)
        return out

    def logits(
        self,
        codes: Int[Array, "B L"],
        conditioning: Conditioning,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
        at: Array | None = None,
    ) -> Float[Array, "B n K"]:
        """Logits whose position i predicts code i; with `at`, those of that position only."""
        out: Any = self.transformer.apply(
            {"params": self.params["transformer"]}, codes, conditioning, train, at, rngs=rngs
        )
        return out

    def sample(
        self,
        keys: Keys,
        conditioning: Conditioning,
        null: Conditioning,
        size: tuple[int, int],
        window: int,
        options: PriorOptions,
        known: tuple[Int[Array, "B h w"], Bool[Array, "B h w"]] | None = None,
    ) -> Int[Array, "B h w"]:
        """Codes by a whole loop of drawing; traceable, so that it compiles as one program.

        keys: one per image, the only source of its randomness. null: the unconditional
        conditioning. size: (h, w) of the codes. window: side of the grid in training; a causal
        prior draws a larger grid through windows. known: codes, and a mask of those that stay.
        Raises ValueError for a size that the prior can't draw.
        """
        check_size(self.transformer, size, window)
        shape = (keys.shape[0], size[0] * size[1])
        codes, fixed = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
        if known is not None:
            codes, fixed = (x.reshape(shape) for x in known)
        if options.guidance_scale is not None:
            conditioning = jax.tree.map(lambda *x: jnp.concatenate(x), conditioning, null)
        if not self.transformer.causal:
            made = self._in_steps(keys, conditioning, options, (codes, fixed))
        elif size == (window, window):
            made = self._in_order(keys, conditioning, options, (codes, fixed))
        else:
            made = self._in_windows(keys, conditioning, options, (codes, fixed), size, window)
        return made.reshape(-1, *size)

    def _in_order(
        self, keys: Keys, conditioning: Conditioning, options: PriorOptions, preset: Preset
    ) -> Int[Array, "B L"]:
        """Draw code by code, with a cache of the keys and values of earlier codes."""
        codes, length = preset[0], preset[0].shape[1]
        front = front_of(conditioning, _rows(codes, options))
        self.transformer.check_length(front.shape[1], length)
        params, apply = {"params": self.params["transformer"]}, self.transformer.apply
        extend = functools.partial(apply, method="extend")
        cache = self.transformer.empty_cache(front.shape[0], front.shape[1] + length - 1)
        # The keys and values of a text are the same at every position.
        first, stored = extend(
            params, front, 0, cache, conditioning.context, mutable=["of_context"]
        )

        def step(carry: tuple[Array, Any], i: Array) -> tuple[tuple[Array, Any], Array]:
            logits, cache = carry
            code = _one_code(keys, i, logits[:, None], options, preset)
            logits, cache = extend(
                {**params, **stored},
                _twice(code[:, None], options),
                front.shape[1] + i,
                cache,
                conditioning.context,
            )
            return (logits, cache), code

        (logits, _), made = jax.lax.scan(step, first, jnp.arange(length - 1))
        last = _one_code(keys, jnp.asarray(length - 1), logits[:, None], options, preset)
        return jnp.concatenate([made.T, last[:, None]], 1)

    def _in_windows(
        self,
        keys: Keys,
        conditioning: Conditioning,
        options: PriorOptions,
        preset: Preset,
        size: tuple[int, int],
        window: int,
    ) -> Int[Array, "B L"]:
        """Draw code by code from the window around each; maps of tokens are cut to it, too."""
        maps = conditioning.token_maps
        if maps is not None and maps.shape[-2:] != size:
            raise ValueError(
                f"maps of {maps.shape[-2]}×{maps.shape[-1]} tokens can't be cut as a picture of "
                f"{size[0]}×{size[1]} codes: larger pictures need maps with the codes' f"
            )

        def step(i: Array, codes: Array) -> Array:
            places = (i // size[1], i % size[1])
            row, column = (
                decoding.local_place(place, n, window)
                for place, n in zip(places, size, strict=True)
            )
            corner = (places[0] - row, places[1] - column)

            def cut(x: Array) -> Array:
                rows = jax.lax.dynamic_slice_in_dim(x, corner[0], window, -2)
                return jax.lax.dynamic_slice_in_dim(rows, corner[1], window, -1)

            part = cut(codes.reshape(-1, *size)).reshape(codes.shape[0], -1)
            part_maps = None if maps is None else cut(maps)
            condition = dataclasses.replace(conditioning, token_maps=part_maps)
            logits = self.logits(_twice(part, options), condition, at=row * window + column)
            return codes.at[:, i].set(_one_code(keys, i, logits, options, preset))

        return jax.lax.fori_loop(0, size[0] * size[1], step, preset[0])

    def _in_steps(
        self, keys: Keys, conditioning: Conditioning, options: PriorOptions, preset: Preset
    ) -> Int[Array, "B L"]:
        """Draw all codes in each step, then mask the least certain of them again."""
        codes, fixed = preset
        mask, steps = self.transformer.mask_token, options.num_steps
        missing = jnp.sum(~fixed, 1)

        def step(i: Array, tokens: Array) -> Array:
            unknown = tokens == mask
            logits = _guided(self.logits(_twice(tokens, options), conditioning), options)
            noise = _gumbel(keys, 2 * i, logits.shape[1:])
            made = jnp.where(unknown, _drawn(logits, noise, options), tokens)
            log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), made[..., None], -1)[..., 0]
            progress = (i + 1) / steps
            count = jnp.floor(missing * decoding.masked_share(progress)).astype(jnp.int32)
            again = decoding.remasked(
                log_probs,
                _gumbel(keys, 2 * i + 1, made.shape[1:]),
                unknown,
                count,
                options.choice_temperature * (1 - progress),
            )
            return jnp.where(again & (i < steps - 1), mask, made)

        return jax.lax.fori_loop(0, steps, step, jnp.where(fixed, codes, mask))


def make_prior(transformer: Config, conditioners: Config, autoencoder: nn.Module) -> Prior:
    """A prior without parameters, over the codes of `autoencoder`.

    transformer, conditioners: the fields of a config. Raises ValueError if parts don't fit.
    """
    if getattr(autoencoder, "regularization", "none") not in WITH_CODEBOOK:
        raise ValueError(
            "a prior needs a first stage with a codebook (autoencoder.regularization vq or gumbel)"
        )
    fields = module_fields({"num_codes": autoencoder.num_codes, **transformer})
    made = Prior({}, CodeTransformer(**fields), make_conditioner(conditioners))
    network, num_codes = made.transformer, autoencoder.num_codes
    rows = network.vocab_size - (not network.causal)  # the last is the token of a masked code
    if num_codes > rows or num_codes != network.num_codes:
        raise ValueError(
            f"the first stage has {num_codes} codes, the prior's logits {network.num_codes} and "
            f"its table {rows} (transformer.vocab_size={network.vocab_size}): too few or too many"
        )
    for name, part in zip(made.conditioner.config, made.conditioner.parts(), strict=True):
        if getattr(part, "end", 0) > rows:
            raise ValueError(
                f"conditioners.{name} has tokens up to {part.end - 1}, the prior's table {rows} "
                f"(transformer.vocab_size={network.vocab_size})"
            )
    return made


def check_null(conditioner: Conditioner, asked: str) -> None:
    """Raise ValueError if a prior has no null condition. asked: the setting that needs it."""
    if not conditioner.keys:
        raise ValueError(f"{asked} needs a condition: this prior has none")
    for name, part in zip(conditioner.config, conditioner.parts(), strict=True):
        if part.keys and getattr(part, "null", 0) is None:
            raise ValueError(
                f"{asked} needs a null condition, and {name} has none (its field "
                f"{'has_null' if hasattr(part, 'has_null') else 'null'})"
            )


def check_size(transformer: CodeTransformer, size: tuple[int, int], window: int) -> None:
    """Raise ValueError for a grid of codes that the prior can't draw in windows of training."""
    if min(size) < window:
        raise ValueError(
            f"a picture of {size[0]}×{size[1]} codes is smaller than the prior's window of "
            f"{window}×{window}"
        )
    if not transformer.causal and size != (window, window):
        raise ValueError(
            f"a masked prior draws {window}×{window} codes, no {size[0]}×{size[1]}: only a causal "
            "one has windows"
        )


def _rows(codes: Array, options: PriorOptions) -> int:
    return codes.shape[0] * (1 if options.guidance_scale is None else 2)


def _twice(x: Array, options: PriorOptions) -> Array:
    """x for the conditional prediction, and again for the unconditional if there is guidance."""
    return x if options.guidance_scale is None else jnp.concatenate([x, x])


def _guided(logits: Array, options: PriorOptions) -> Array:
    if options.guidance_scale is None:
        return logits
    conditional, unconditional = jnp.split(logits, 2)
    return decoding.guided(conditional, unconditional, options.guidance_scale)


def _gumbel(keys: Keys, step: Array, shape: tuple[int, ...]) -> Array:
    of_step = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(lambda key: jax.random.gumbel(key, shape))(of_step)


def _drawn(logits: Array, gumbel: Array, options: PriorOptions) -> Array:
    temperature = 1.0 if options.temperature is None else options.temperature
    allowed = decoding.filtered(logits, temperature, options.top_k, options.top_p)
    return decoding.drawn(allowed, gumbel, temperature)


def _one_code(keys: Keys, i: Array, logits: Array, options: PriorOptions, preset: Preset) -> Array:
    """Code i [B], drawn from its logits [B 1 K], or the preset code."""
    logits = _guided(logits, options)[:, 0]
    made = _drawn(logits, _gumbel(keys, i, logits.shape[1:]), options)
    codes, fixed = (jnp.take(x, i, axis=1) for x in preset)
    return jnp.where(fixed, codes, made)
