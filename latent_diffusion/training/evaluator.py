"""Evaluation within a run: means of losses, a distance of sets, and pictures to look at."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.evaluate.features import levels_of, make_features
from latent_diffusion.evaluate.frechet import gaussian, measure_frechet
from latent_diffusion.evaluate.scores import frechet_name
from latent_diffusion.runtime import metrics, parallel


class Evaluator:
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

    def measure(self, state: Any, constants: Any, rng: jax.Array) -> dict[str, float]:
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

    def draw(self, state: Any, constants: Any, rng: jax.Array) -> dict[str, np.ndarray]:
        """One grid: the images of every kind that the task shows, a row each."""
        num = self._config.log.num_images
        batch = next(self._batches(num + -num % self._parts))  # a whole number for every device
        batch.pop("weight")
        images = self._show(state, constants, batch, rng)
        rows = np.concatenate([kind[:num] for kind in images.values()])
        return {"_".join(images): metrics.image_grid(rows, num)}

    def _batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        return data.epoch(self._source, self._transform, batch_size, *self._shard)
