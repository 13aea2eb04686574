"""Evaluation within a run: means of losses, a distance of sets, and pictures for the log."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.evaluate.features import levels_of, make_features
from latent_diffusion.evaluate.frechet import MIN_IMAGES, gaussian, measure_frechet
from latent_diffusion.evaluate.scores import frechet_name
from latent_diffusion.runtime import metrics, parallel


class Evaluator:
    """Evaluates and draws with a task's `eval_step` and `show`, on the same test examples."""

    def __init__(
        self,
        config: ConfigDict,
        task: Any,
        constants: Any,
        source: Any,
        tokenizer: Any,
        mode: str,
        layout: Mapping[str, Any],
    ):
        self._config, self._constants, self._source = config, constants, source
        self._transform = data.make_transform(config.data, train=False, tokenizer=tokenizer)
        self._shard = parallel.process_shard(mode, layout["mesh"])
        self._parts = parallel.num_parts(mode, layout["mesh"])
        self._eval_step = parallel.compile_eval(_with_weight(task.eval_step), mode, **layout)
        self._show = parallel.compile_eval(task.show, mode, **layout)
        self._net = None
        if config.log.distance:
            if config.task == "classifying":
                raise ValueError(
                    f"log.distance={config.log.distance!r} is of samples or reconstructions; a "
                    "classifier makes none"
                )
            if min(config.log.distance_images, len(source)) < MIN_IMAGES:
                raise ValueError(
                    f"log.distance_images={config.log.distance_images} of {len(source)} test "
                    f"images: a distance needs at least {MIN_IMAGES}"
                )
            self._net = make_features(config.log.distance, config.log.distance_path or None)
            features = _with_weight(_featured(task.show, self._net.apply))
            self._features = parallel.compile_eval(features, mode, **layout)
            self._with_net = (constants, self._net.params)

    def measure(
        self, state: Any, rng: jax.Array, stopped: Callable[[], Any] = lambda: False
    ) -> dict[str, float] | None:
        """Means of the per-example values over `log.eval_batches` batches, and the distance.

        The distance is the Fréchet distance between test images and reconstructions or samples by
        the averaged parameters. Padding doesn't count. `stopped()` is called before every batch;
        if it is true, the result is None.
        """
        config = self._config
        values = self._outputs(
            self._eval_step, state, self._constants, rng, config.log.eval_batches, stopped
        )
        if values is None:
            return None
        means = {f"eval_{name}": float(np.mean(value)) for name, value in values.items()}
        if "eval_bits_per_code" in means:
            means["eval_perplexity"] = 2.0 ** means["eval_bits_per_code"]
        if self._net is None:
            return means
        count = -(-config.log.distance_images // config.batch_size)
        features = self._outputs(self._features, state, self._with_net, rng, count, stopped)
        if features is None:
            return None
        name = frechet_name(self._net.name)
        distance = measure_frechet(features["made"], gaussian(features["real"]), name)
        return means | {f"eval_{name}": distance.value}

    def draw(self, state: Any, rng: jax.Array) -> dict[str, np.ndarray]:
        """A grid with a row for each kind of images that the task shows."""
        num = self._config.log.num_images
        batch = next(self._batches(num + -num % self._parts, 1))  # a multiple of the devices
        batch.pop("weight")
        images = self._show(state, self._constants, batch, rng)
        rows = np.concatenate([kind[:num] for kind in images.values()])
        return {"_".join(images): metrics.image_grid(rows, num)}

    def _outputs(
        self,
        step: Callable[..., dict[str, np.ndarray]],
        state: Any,
        constants: Any,
        rng: jax.Array,
        count: int,
        stopped: Callable[[], Any],
    ) -> dict[str, np.ndarray] | None:
        """The outputs [N ...] of a step for `count` batches of test examples, without padding.

        The examples are evenly spaced, since files often lie in folders of classes.

        Returns None if `stopped()` is true before a batch.
        """
        parts: dict[str, list[np.ndarray]] = {}
        for i, batch in enumerate(self._batches(self._config.batch_size, count)):
            if stopped():
                return None
            out = step(state, constants, batch, jax.random.fold_in(rng, i))
            real = out.pop("weight") > 0
            for name, value in out.items():
                parts.setdefault(name, []).append(value[real])
        return {name: np.concatenate(values) for name, values in parts.items()}

    def _batches(self, batch_size: int, count: int) -> Iterator[dict[str, np.ndarray]]:
        return data.epoch(self._source, self._transform, batch_size, *self._shard, count)


def _with_weight(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, with the weights of the examples among its outputs.

    A process only has the weights of its rows, but needs the weights of the global batch.
    """

    def weighted(state: Any, constants: Any, batch: Any, rng: Any, **options: Any) -> Any:
        batch = dict(batch)
        weight = batch.pop("weight")
        return {**step(state, constants, batch, rng, **options), "weight": weight}

    return weighted


def _featured(show: Callable[..., Any], apply: Callable[..., Any]) -> Callable[..., Any]:
    """A step that returns the features of test images and of the pictures that `show` returns."""

    def features(state: Any, constants: Any, batch: Any, rng: Any, **options: Any) -> Any:
        constants, params = constants
        shown = show(state, constants, batch, rng, **options)
        made = shown["samples" if "samples" in shown else "reconstructions"]
        pair = {"real": shown["inputs"], "made": made}
        return {k: apply(params, levels_of(x))["features"] for k, x in pair.items()}

    return features
