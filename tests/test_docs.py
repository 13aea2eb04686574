"""What the pages and the configs' docstrings name exists: files, modules, targets, fields."""

import ast
import importlib.util
import re
import tomllib

import pytest
from conftest import ROOT

from configs import default

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
NAMED = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
NAMED |= {
    path.relative_to(ROOT).as_posix(): ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    for path in CONFIGS
}
# The pages shorten paths: coverage.md says that its paths start in these folders, and tasks.md
# names configs alone.
STARTS = {"docs/coverage.md": ("latent_diffusion", "tests", ""), "docs/tasks.md": ("configs", "")}

# Files and folders of workdirs, of users and of other formats; `unet/` begins a parameter's path.
OUTSIDE = {"config.json", "metrics.json", "results.json", "model_index.json", "vocab.json"}
OUTSIDE |= {
    "added_tokens.json",
    "tokenizer.json",
    "tokenizer/",
    "checkpoints/",
    "images/",
    "tensorboard/",
}
OUTSIDE |= {
    "adapter_config.json",
    "best.json",
    "best/",
    "evaluations/",
    "train/",
    "test/",
    "val/",
    "unet/",
}


def code_of(text: str) -> str:
    """The code blocks and code spans, one a line, with continued lines joined."""
    blocks = re.findall(r"```[^\n]*\n(.*?)```|^ {4}(\S[^\n]*)$|`([^`\n]+)`", text, re.S | re.M)
    code = "\n".join(next(filter(None, groups), "") for groups in blocks)
    return re.sub(r"\\\n\s*", " ", code)


@pytest.mark.parametrize("page", NAMED)
def test_every_file_and_folder_that_is_named_exists(page):
    text = NAMED[page]
    code = text if page.startswith("configs") else code_of(text)
    files = set(re.findall(r"(?<![\w./-])[a-z_][\w/]*[a-z0-9_]\.(?:py|json)(?=[`\s:,;()]|$)", code))
    folders = set(re.findall(r"(?<=`)[a-z_]+(?:/[a-z_]+)*/(?=`)", text))
    starts = STARTS.get(page, ("",))
    named = {name for name in (files | folders) - OUTSIDE if not name.startswith("runs/")}
    assert not {n for n in named if not any((ROOT / start / n).exists() for start in starts)}


@pytest.mark.parametrize("page", [path.relative_to(ROOT).as_posix() for path in PAGES])
def test_every_link_leads_somewhere(page):
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", NAMED[page]) if "://" not in x]
    assert not [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]


@pytest.mark.parametrize("page", NAMED)
def test_every_module_target_and_field_that_is_named_exists(page):
    text = NAMED[page]
    for module in re.findall(r"python -m ([a-z_.]+[a-z_])", text):
        if module not in ("pip", "benchmarks.", "venv"):
            found = importlib.util.find_spec(module)
            assert found, module
            if found.submodule_search_locations:
                assert importlib.util.find_spec(f"{module}.__main__"), module
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^(?:\w+=\S+ )?make ([a-z]+)", code_of(text), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    free = ("conditioners", "pretrained", "parallel.mesh")  # their keys are names or axes
    for field in re.findall(r"--config\.([a-z_.0-9]*[a-z_0-9])(?==)", text):
        config = default.get_config()
        if not field.startswith(free):
            assert field.split(".")[0] in config
            for key in field.split("."):
                config = config[key]


def test_coverage_names_what_its_files_hold():
    """`file.py` `name`: the file has the name."""
    rows = re.findall(r"`([\w/]+\.py)` ((?:`[A-Za-z_.]+`(?:, )?)+)", NAMED["docs/coverage.md"])
    assert len(rows) > 30
    for file, names in rows:
        path = next(p for p in (ROOT / s / file for s in STARTS["docs/coverage.md"]) if p.exists())
        for name in re.findall(r"`([\w.]+)`", names):
            last = name.rpartition(".")[2]
            assert last in ("py", "md") or re.search(rf"\b{last}\b", path.read_text("utf-8")), name


def test_the_readme_names_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    table = "".join(line for line in NAMED["README.md"].splitlines(True) if line.startswith("| `"))
    assert not [name for name in extras if f"`{name}`" not in table]
    asked = [n for page in NAMED.values() for n in re.findall(r'"\.\[([\w,-]+)\]"', page)]
    assert {name for names in asked for name in names.split(",")} <= set(extras)
