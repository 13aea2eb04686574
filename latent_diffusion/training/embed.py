"""CLIP's embeddings of a data set's pictures, for the training of retrieval-augmented models.

    python -m latent_diffusion.training.embed --config=configs/rdm.py --clip=CLIP --out=FOLDER

writes train.npz and test.npz: FOLDER is then the `data.embedding_path` of
`data.embedding="precomputed"`. CLIP is a CLIPModel's folder of transformers.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from latent_diffusion import data
from latent_diffusion.convert.clip import load_clip
from latent_diffusion.data.embedders import Embedder
from latent_diffusion.data.retrieval import database_of
from latent_diffusion.runtime import flags as shared_flags
from latent_diffusion.runtime.startup import quiet_and_cached


def embed_data(data_config: Any, clip_path: str | Path, out: Path) -> None:
    """Embed both splits. Raises ValueError, in one line, if CLIP or the data isn't usable."""
    clip = load_clip(clip_path)
    embedder = Embedder(clip.image.projection_dim, clip.params, clip.of_images)
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        without_embedding = ConfigDict({**data_config, "embedding": ""})
        pictures = data.make_source(without_embedding, split)
        database = database_of(pictures, data_config, embedder)
        database.save(out / f"{split}.npz")
        print(f"{out / split}.npz: {len(database.names)} embeddings of {embedder.width} numbers")


def main(argv: list[str]) -> None:
    """Embed the data of a config."""
    quiet_and_cached()
    try:
        embed_data(CONFIG.value.data, CLIP.value, Path(OUT.value))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "Names the data.", lock_config=True)
    flags.mark_flag_as_required("config")
    CLIP = flags.DEFINE_string("clip", None, "A CLIPModel's folder.", required=True)
    OUT = flags.DEFINE_string("out", None, "Folder of the embeddings.", required=True)
    shared_flags.run(main)
