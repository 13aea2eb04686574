"""Similar pictures by exact search: the conditions of retrieval-augmented models and of variations.

A database is a table of embeddings. Searching it is one matrix product, blocked over the queries:
20 million embeddings of 512 numbers are 40 GB, and below that exactness costs little.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from latent_diffusion.data.sources import Example
from latent_diffusion.data.windows import cut, window
from latent_diffusion.embedders import embed, make_embedder

ROWS = 1024  # queries at once


@dataclass(frozen=True)
class Database:
    """Embeddings [N D] to search in, and what each stands for."""

    embeddings: Float[np.ndarray, "N D"]
    names: tuple[str, ...] = ()

    def search(
        self,
        queries: Float[np.ndarray, "M D"],
        k: int,
        exclude: Int[np.ndarray, " M"] | None = None,
    ) -> tuple[Int[np.ndarray, "M k"], Float[np.ndarray, "M k"]]:
        """Places of the k most similar embeddings, best first, and their cosine similarities.

        exclude: one place for each query that isn't an answer: itself. Raises ValueError where
        there aren't k.
        """
        available = len(self.embeddings) - (exclude is not None)
        if not 0 < k <= available:
            raise ValueError(f"k={k} neighbours of {available} embeddings")
        table, places, scores = _unit(self.embeddings), [], []
        for start in range(0, len(queries), ROWS):
            similarity = _unit(queries[start : start + ROWS]) @ table.T
            rows = np.arange(len(similarity))[:, None]
            if exclude is not None:
                similarity[rows[:, 0], exclude[start : start + ROWS]] = -np.inf
            best = np.argpartition(-similarity, k - 1)[:, :k]
            best = best[rows, np.argsort(-similarity[rows, best], kind="stable")]
            places.append(best)
            scores.append(similarity[rows, best])
        return np.concatenate(places), np.concatenate(scores)

    def neighbours(
        self,
        queries: Float[np.ndarray, "M D"],
        k: int,
        exclude: Int[np.ndarray, " M"] | None = None,
    ) -> Float[np.ndarray, "M k D"]:
        """The embeddings of the k most similar entries: what a model is conditioned on."""
        return self.embeddings[self.search(queries, k, exclude)[0]]

    def save(self, path: str | Path) -> None:
        """Write the database as .npz."""
        np.savez(path, embedding=self.embeddings, name=np.array(self.names))


def load_database(path: str | Path) -> Database:
    """Read what `Database.save` wrote; ValueError in one line where it isn't one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Database(file["embedding"], tuple(map(str, file["name"])))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no database of embeddings: {error}") from error


def _unit(x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


class Embedded:
    """A source whose examples have `image_embedding` [D], or `neighbours` [k D], or both."""

    def __init__(self, source: Any, columns: dict[str, np.ndarray]):
        self.source, self.columns = source, columns

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __getitem__(self, index: int) -> Example:
        own = {key: column[index] for key, column in self.columns.items()}
        return {**self.source[index], **own}


_MADE: dict[tuple[Any, ...], Database] = {}  # this process's, by data set and net


def embeddings_of(source: Any, data_config: Any, split: str) -> Database:
    """Every picture of a split as evaluation sees it, embedded by the net of `data_config`.

    Computed once in a process: training and its evaluation share the training set's.
    """
    size, net = data_config.image_size, data_config.embedding
    where, path = data_config.dir, data_config.embedding_path
    key = (data_config.name, where, split, len(source), size, net, path)
    if key not in _MADE:
        crop, shorter_side = data_config.crop, data_config.shorter_side
        crop = "center" if crop == "random" else crop
        images, names = [], []
        for i in range(len(source)):
            example, rng = source[i], np.random.default_rng(0)
            image = example["image"]
            place = window(image.shape[:2], size, crop, shorter_side, rng)
            images.append(cut(image, place, size))
            names.append(str(example.get("name", i)))
        embeddings = embed(make_embedder(net, path or None), np.stack(images))
        _MADE[key] = Database(embeddings, tuple(names))
    return _MADE[key]


def with_embeddings(source: Any, split: str, database: Any, data_config: Any) -> Embedded:
    """Add embeddings by the net `data_config.embedding`, and neighbours where it wants any.

    split: "train" or "test". database: the training source, where neighbours come from; a picture
    isn't its own neighbour.
    """
    own = embeddings_of(source, data_config, split).embeddings
    columns = {"image_embedding": own}
    if data_config.num_neighbours:
        itself = np.arange(len(own)) if split == "train" else None
        found = embeddings_of(database, data_config, "train")
        columns["neighbours"] = found.neighbours(own, data_config.num_neighbours, itself)
    return Embedded(source, columns)
