"""Pages of the site that the code itself writes: a hook of MkDocs (mkdocs.yml), for `make docs`.

index.md is the README; reference/ has every field of the configs, every flag, the public API and
every sampler.
"""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "train.py",
    "sample.py",
    "-m latent_diffusion.evaluate",
    "-m latent_diffusion.convert",
    "-m latent_diffusion.serve",
    "-m latent_diffusion.encode",
    "-m latent_diffusion.compile_check",
    "-m latent_diffusion.training.plan",
    "-m latent_diffusion.training.averages",
    "-m latent_diffusion.training.embed",
)


def on_files(files, config):
    """Add the pages to the files of the site."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def pages() -> dict[str, str]:
    """Path of a page -> its text."""
    return {
        "index.md": (ROOT / "README.md").read_text("utf-8").replace("](docs/", "]("),
        "reference/fields.md": fields((ROOT / "configs" / "default.py").read_text("utf-8")),
        "reference/commands.md": commands(),
        "reference/python.md": python(),
        "reference/samplers.md": samplers(),
    }


def fields(source: str) -> str:
    """The fields of `default.py`: a table for every function, made of its lines and comments."""
    lines = ["# Fields of the configs", "", "`--config.FIELD=VALUE` sets a field."]
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or "arguments" in function.name:
            continue
        if function.args.args or not (rows := _rows(source.splitlines(), function)):
            continue
        prefix = "" if function.name == "get_config" else f"{function.name}."
        lines += ["", f"## {function.name if prefix else 'The run'}", ""]
        lines += ["| field | default | meaning |", "|---|---|---|"]
        lines += [f"| `{prefix}{name}` | `{value}` | {text} |" for name, value, text in rows]
    return "\n".join(lines) + "\n"


def _rows(lines: list[str], function: ast.FunctionDef) -> list[tuple[str, str, str]]:
    """(field, default, comment above and behind it) of each line `c.field = default`."""
    rows, above = [], []
    for line in lines[function.lineno : function.end_lineno]:
        comment = line.strip()
        assigned = re.fullmatch(r"    c\.([\w.]+) = (.+?)(?:  # (.*))?", line)
        if comment.startswith("#"):
            above.append(comment[2:])
        elif assigned:
            name, value, behind = assigned.groups()
            made = re.fullmatch(r"ConfigDict\(\)|(\w+)\(\)", value)
            if not made or above or behind:
                value = "a part" if made else re.sub(r"placeholder\(\w+\)", "None", value)
                text = " ".join([*above, behind or ""]).strip().replace("|", "\\|")
                rows.append((name, value.replace("|", "\\|"), text))
            above = []
        else:
            above = []
    return rows


def commands() -> str:
    """What --help of each command prints."""
    lines = ["# Commands", "", "Installed, most have short names: `ldm-train`, `ldm-convert` …"]
    for written in COMMANDS:
        command = [sys.executable, *written.split(), "--help"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        shown = re.sub(r"\n\S*\.py:\n", "\n", shown.partition("\nTry --helpfull")[0].strip())
        lines += ["", f"## python {written}", "", "```text", shown, "```"]
    return "\n".join(lines) + "\n"


def python() -> str:
    """The public names of the package, by their docstrings."""
    import latent_diffusion

    lines = ["# Python"]
    for name in latent_diffusion.__all__:
        if name not in ("SAMPLERS", "Conditioning"):
            lines += ["", f"::: latent_diffusion.{latent_diffusion._MODULES[name]}.{name}"]
    return "\n".join([*lines, "", "::: latent_diffusion.core.types.Conditioning"]) + "\n"


def samplers() -> str:
    """Every sampler by its function's docstring."""
    from latent_diffusion import SAMPLERS

    lines = ["# Every sampler", "", "How they are used and compared: [samplers](../samplers.md)."]
    for name, sampler in SAMPLERS.items():
        lines += ["", f"## {name}", "", inspect.getdoc(sampler.table) or ""]
    return "\n".join(lines) + "\n"
