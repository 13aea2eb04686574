"""What benchmarks/compression.py has found so far."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_diffusion.runtime.workdir import write_whole


class Results:
    """results.json: what has been found, by kind and name, written as it comes."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, dict[str, Any]] = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        )

    def get(self, kind: str, name: object, make: Callable[[], Any]) -> Any:
        """What is there, made first where nothing is."""
        kept = self.found.setdefault(kind, {})
        if str(name) not in kept:
            kept[str(name)] = make()
            write_whole(self.path, json.dumps(self.found, indent=1) + "\n")
        return kept[str(name)]

    def check(self, **settings: float) -> None:
        """Raise ValueError where an earlier run had other settings; one folder, one comparison."""
        for name, value in settings.items():
            before = self.get("settings", name, lambda value=value: value)
            if before != value:
                raise ValueError(
                    f"{self.path} was begun with --{name}={before}; --{name}={value} needs another "
                    "--workdir"
                )
