"""Similar pictures by exact search: the conditions of retrieval-augmented models and of variations.

A database is a table of embeddings. Searching it is one matrix product, blocked over the queries:
20 million embeddings of 512 numbers are 40 GB, and below that exactness costs little.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from latent_diffusion.data.embedders import Embedder, embed, make_embedder
from latent_diffusion.data.sources import Example
from latent_diffusion.data.windows import cut, window
from latent_diffusion.types import lookup

ROWS = 1024  # queries at once
PRECOMPUTED = "precomputed"


@dataclass(frozen=True)
class Database:
    """Embeddings [N D] to search in, and what each stands for.

    search_by: a name in SEARCHES, all of which give the same answers.
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
        """Places of the k most similar embeddings, best first, and their cosine similarities.

        exclude: one place for each query that isn't an answer: itself. Raises ValueError where
        there aren't k.
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
    """The brute-force search of the `faiss` extra: all cores, and no table of similarities."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError('data.search="faiss" needs pip install -e ".[faiss]"') from error
    wanted = k + (exclude is not None)
    scores, places = faiss.knn(queries, table, wanted, faiss.METRIC_INNER_PRODUCT)
    if exclude is None:
        return places, scores
    others = places != exclude[:, None]
    others[others.all(1), -1] = False  # where the query itself isn't among the nearest
    return places[others].reshape(-1, k), scores[others].reshape(-1, k)


SEARCHES = {"numpy": _by_numpy, "faiss": _by_faiss}


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

    Computed once in a process: training and its evaluation share the training set's. The net
    "precomputed" is what `python -m latent_diffusion.training.embed` left in `data.embedding_path`.
    """
    if data_config.embedding == PRECOMPUTED:
        return _precomputed(source, data_config, split)
    size, net = data_config.image_size, data_config.embedding
    where, path = data_config.dir, data_config.embedding_path
    key = (data_config.name, where, split, len(source), size, net, path)
    if key not in _MADE:
        embedder = make_embedder(net, path or None)
        _MADE[key] = database_of(source, data_config, embedder)
    return _MADE[key]


def database_of(source: Any, data_config: Any, embedder: Embedder) -> Database:
    """Every picture of a source, cut as evaluation does, embedded one batch after the other."""
    size, crop = data_config.image_size, data_config.crop
    crop = "center" if crop == "random" else crop
    names: list[str] = []

    def pictures() -> Iterator[np.ndarray]:
        for i in range(len(source)):
            example, rng = source[i], np.random.default_rng(0)
            names.append(str(example.get("name", i)))
            image = example["image"]
            yield cut(
                image, window(image.shape[:2], size, crop, data_config.shorter_side, rng), size
            )

    embeddings = embed(embedder, pictures())
    return Database(embeddings, tuple(names), data_config.search)


def _precomputed(source: Any, data_config: Any, split: str) -> Database:
    path = Path(data_config.embedding_path) / f"{split}.npz"
    if not path.is_file():
        raise ValueError(
            f"data.embedding_path: no {path}; python -m latent_diffusion.training.embed makes it"
        )
    found = replace(load_database(path), search_by=data_config.search)
    if len(found.embeddings) != len(source):
        raise ValueError(
            f"{path} has {len(found.embeddings)} embeddings, the data {len(source)} pictures; make "
            "it again for this data"
        )
    return found


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
