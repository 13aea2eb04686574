"""The yaml beside a file of the original, which describes its modules."""

import re
from pathlib import Path
from typing import Any

import yaml

from latent_diffusion.files.reading import read_bytes, reading

MAX_YAML = 256 << 10  # bytes; the released models' files have a few thousand


class _Loader(yaml.SafeLoader):
    """Builds plain data; refuses references, by which a short text can describe huge data.

    Numbers such as 1e-4, which are strings in YAML 1.1, are numbers here, as in OmegaConf.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse a reference; compose any other node as usual."""
        if self.check_event(yaml.AliasEvent):
            raise ValueError("references (*name) are not supported")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The entry `model` of a file. Raises ValueError, with the path, where it can't be read."""
    with reading(path):
        text = read_bytes(path, MAX_YAML).decode("utf-8")
        model: dict[str, Any] = yaml.load(text, _Loader)["model"]
        return model
