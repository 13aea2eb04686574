"""The results of benchmarks/compression.py, on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_diffusion.runtime.workdir import write_whole


class Results:
    """results.json: records by kind and name; every new one is written at once."""

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict[str, Any]] = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        )

    def get(self, kind: str, name: object, make: Callable[[], Any]) -> Any:
        """The record of this kind and name; `make` makes it if there is none."""
        records = self.records.setdefault(kind, {})
        if str(name) not in records:
            records[str(name)] = make()
            write_whole(self.path, json.dumps(self.records, indent=1) + "\n")
        return records[str(name)]

    def check(self, **settings: float) -> None:
        """Raise ValueError if an earlier run in this folder had other settings."""
        for name, value in settings.items():
            before = self.get("settings", name, lambda value=value: value)
            if before != value:
                raise ValueError(
                    f"{self.path} was begun with --{name}={before}; --{name}={value} needs another "
                    "--workdir"
                )
