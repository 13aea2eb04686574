"""Exact search for similar pictures, for conditions of retrieval-augmented models and variations.

A database is a table of embeddings. A search is one matrix product in blocks of queries, which is
cheap enough up to about 20 million embeddings of 512 numbers (40 GB).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from latent_diffusion.core.types import lookup
from latent_diffusion.data.embedders import Embedder, embed, make_embedder
from latent_diffusion.data.sources import Around, Example
from latent_diffusion.data.windows import cut, window
from latent_diffusion.files.arrays import check_finite, open_npz

ROWS = 1024  # number of queries in a block
PRECOMPUTED = "precomputed"
SAMPLE = 16  # pictures whose names are compared with those of precomputed embeddings


@dataclass(frozen=True)
class Database:
    """Embeddings [N D], and the names of their pictures.

    search_by: a method in SEARCHES; all methods have the same results.
    """

    embeddings: Float[np.ndarray, "N D"]
    names: tuple[str, ...] = ()
    search_by: str = "numpy"

    def search(
        self,
        queries: Float[np.ndarray, "M D"],
        k: int,
        exclude: Int[np.ndarray, " M"] | None = None,
    ) -> tuple[Int[np.ndarray, "M k"], Float[np.ndarray, "M k"]]:
        """Return the rows of the k most similar embeddings, best first, and cosine similarities.

        exclude: for each query a row that is left out, namely that of the query. Raises ValueError
        for a database with fewer than k rows.
        """
        available = len(self.embeddings) - (exclude is not None)
        if not 0 < k <= available:
            raise ValueError(f"k={k} neighbours of {available} embeddings")
        find = lookup(SEARCHES, self.search_by, "data.search")
        return find(_unit(self.embeddings), _unit(queries), k, exclude)

    def neighbours(
        self,
        queries: Float[np.ndarray, "M D"],
        k: int,
        exclude: Int[np.ndarray, " M"] | None = None,
    ) -> Float[np.ndarray, "M k D"]:
        """Return the embeddings of the k most similar entries: the condition of a model."""
        return self.embeddings[self.search(queries, k, exclude)[0]]

    def save(self, path: str | Path) -> None:
        """Write the database as .npz."""
        np.savez(path, embedding=self.embeddings, name=np.array(self.names))


def load_database(path: str | Path) -> Database:
    """Read a file that `Database.save` wrote; ValueError of one line for any other file."""
    with open_npz(path) as file:
        if missing := [name for name in ("embedding", "name") if name not in file]:
            raise ValueError(f"it holds no database of embeddings: no {missing[0]}")
        embeddings, names = file["embedding"], file["name"]
        if embeddings.ndim != 2 or embeddings.dtype.kind != "f":
            raise ValueError(
                f"embedding is {embeddings.dtype} {list(embeddings.shape)}, expected floats [N D]"
            )
        check_finite(path, {"embedding": embeddings})
        return Database(embeddings, tuple(map(str, names)))


def _unit(x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _by_numpy(table: Any, queries: Any, k: int, exclude: Any) -> tuple[Any, Any]:
    places, scores = [], []
    for start in range(0, len(queries), ROWS):
        similarity = queries[start : start + ROWS] @ table.T
        rows = np.arange(len(similarity))[:, None]
        if exclude is not None:
            similarity[rows[:, 0], exclude[start : start + ROWS]] = -np.inf
        best = np.argpartition(-similarity, k - 1)[:, :k]
        best = best[rows, np.argsort(-similarity[rows, best], kind="stable")]
        places.append(best)
        scores.append(similarity[rows, best])
    return np.concatenate(places), np.concatenate(scores)


def _by_faiss(table: Any, queries: Any, k: int, exclude: Any) -> tuple[Any, Any]:
    """Brute-force search with the `faiss` extra, on all cores, without a table of similarities."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError('data.search="faiss" needs pip install -e ".[faiss]"') from error
    count = k + (exclude is not None)
    scores, places = faiss.knn(queries, table, count, faiss.METRIC_INNER_PRODUCT)
    if exclude is None:
        return places, scores
    others = places != exclude[:, None]
    others[others.all(1), -1] = False  # for queries that aren't among their nearest rows
    return places[others].reshape(-1, k), scores[others].reshape(-1, k)


SEARCHES = {"numpy": _by_numpy, "faiss": _by_faiss}


class Embedded(Around):
    """A source whose examples have `image_embedding` [D], or `neighbours` [k D], or both."""

    def __init__(self, source: Any, columns: dict[str, np.ndarray]):
        self.source, self.columns = source, columns

    def __getitem__(self, index: int) -> Example:
        return {**self.source[index], **{key: c[index] for key, c in self.columns.items()}}


_MADE: dict[tuple[Any, ...], Database] = {}  # databases of this process, by split and config


def embeddings_of(source: Any, data_config: Any, split: str) -> Database:
    """Embed every picture of a split, cut as in evaluation, by the network of `data_config`.

    A process computes the embeddings once: training and its evaluation share those of the training
    set. The network "precomputed" reads the files that `python -m latent_diffusion.training.embed`
    has written to `data.embedding_path`.
    """
    if data_config.embedding == PRECOMPUTED:
        return _precomputed(source, data_config, split)
    key = (split, len(source), str(data_config))
    if key not in _MADE:
        embedder = make_embedder(data_config.embedding, data_config.embedding_path or None)
        _MADE[key] = database_of(source, data_config, embedder)
    return _MADE[key]


def database_of(source: Any, data_config: Any, embedder: Embedder) -> Database:
    """Embed every picture of a source, cut as in evaluation, batch by batch."""
    size, crop = (data_config.image_size,) * 2, data_config.crop
    crop = "center" if crop == "random" else crop
    names: list[str] = []

    def pictures() -> Iterator[np.ndarray]:
        for i in range(len(source)):
            example, rng = source[i], np.random.default_rng(0)
            names.append(_name(example, i))
            image = example["image"]
            where = window(image.shape[:2], size, crop, data_config.shorter_side, rng)
            yield cut(image, where, size)

    embeddings = embed(embedder, pictures())
    return Database(embeddings, tuple(names), data_config.search)


def _precomputed(source: Any, data_config: Any, split: str) -> Database:
    path = Path(data_config.embedding_path) / f"{split}.npz"
    if not path.is_file():
        raise ValueError(
            f"data.embedding_path: no {path}; python -m latent_diffusion.training.embed makes it"
        )
    database = replace(load_database(path), search_by=data_config.search)
    if (count := len(database.embeddings)) != len(source):
        raise ValueError(
            f"{path} has {count} embeddings, the data {len(source)} pictures; make it again for "
            "this data"
        )
    places = np.linspace(0, count - 1, SAMPLE if len(database.names) == count else 0).astype(int)
    for i in places.tolist():
        have, had = (name.rpartition("/")[2] for name in (_name(source[i], i), database.names[i]))
        if have != had:
            raise ValueError(
                f"{path} has {had} as picture {i}, the data {have}; make it again for this data"
            )
    return database


def _name(example: Example, index: int) -> str:
    return str(example.get("name", index))


def with_embeddings(source: Any, split: str, database: Any, data_config: Any) -> Embedded:
    """Add embeddings by the network `data_config.embedding`, and `num_neighbours` neighbours.

    split: "train" or "test". database: the training source, in which neighbours are searched. A
    training picture isn't a neighbour of itself.
    """
    queries = embeddings_of(source, data_config, split).embeddings
    columns = {"image_embedding": queries}
    if count := data_config.num_neighbours:
        exclude = np.arange(len(queries)) if split == "train" else None
        train = embeddings_of(database, data_config, "train")
        columns["neighbours"] = train.neighbours(queries, count, exclude)
    return Embedded(source, columns)
