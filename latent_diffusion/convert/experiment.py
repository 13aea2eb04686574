"""Read the config.json of a workdir; a field that this version doesn't use is refused by name."""

from pathlib import Path

from ml_collections import ConfigDict

from latent_diffusion.core.types import lookup
from latent_diffusion.files.reading import reading
from latent_diffusion.models.denoiser import SCHEDULE_FIELDS
from latent_diffusion.process.options import OPTIONS
from latent_diffusion.runtime import workdir
from latent_diffusion.tasks import TASKS
from latent_diffusion.tasks.denoising import Denoising

_DATA = """
    name dir image_size crop shorter_side bucket_step flip train_split test_split test_fraction
    balance caption_column features low_res low_res_factor mask sizes layout embedding
    embedding_path num_neighbours search workers
"""
# Sections whose fields are checked only here, and their fields (as in configs/default.py).
KNOWN = {
    "data": frozenset(_DATA.split()),
    "tokenizer": frozenset(("name", "path", "vocab_size", "max_length")),
    "sampling": OPTIONS.keys(),
    "diffusion": {*Denoising.__dataclass_fields__, *SCHEDULE_FIELDS, "prediction"},
}


def read_config(directory: Path) -> ConfigDict:
    """The experiment of a workdir, with sampling options renamed to today's names.

    Raises a ValueError of one line where there is no experiment, for an unknown task, and for
    fields that this version lacks, which would be ignored otherwise.
    """
    config = workdir.load_config(directory)
    with reading(directory / workdir.CONFIG):
        lookup(TASKS, config.task, "task")
        options = config.get("sampling", ConfigDict())
        for old, new, kind in (("start", "spread", str), ("end", "last", int)):
            if isinstance(options.get(old), kind):  # floats are shares of the noise, a newer option
                options[new] = options[old]
                del options[old]
        for section, fields in KNOWN.items():
            if unknown := sorted(set(config.get(section, {})) - set(fields)):
                raise ValueError(
                    f"unknown field {section}.{unknown[0]}; "
                    "another version may have written it, or its name is misspelt"
                )
    return config
