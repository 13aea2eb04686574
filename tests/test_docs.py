"""What the pages and the configs' docstrings name exists: files, modules, targets, fields."""

import ast
import importlib.util
import re
import shlex
import sys
import tomllib
from functools import cache

import pytest
import wiring
import yaml
from conftest import ROOT
from flax.traverse_util import flatten_dict

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
STARTS["docs/paper.md"] = ("latent_diffusion", "")

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
    "base.json",
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


@pytest.mark.parametrize(("page", "at_least"), [("coverage", 30), ("paper", 15)])
def test_pages_name_what_their_files_hold(page, at_least):
    """`file.py` `name`: the file has the name."""
    page = f"docs/{page}.md"
    rows = re.findall(r"`([\w/]+\.py)` ((?:`[A-Za-z_0-9.]+`(?:, )?)+)", NAMED[page])
    assert len(rows) > at_least
    for file, names in rows:
        path = next(p for p in (ROOT / s / file for s in STARTS[page]) if p.exists())
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


ROOMS = {"train.py": "training", "sample.py": "generation"}
MODULES = {name: f"latent_diffusion.{room}.__main__" for name, room in ROOMS.items()}
COMMAND = re.compile(
    r"^\s*(?:\w+=\S+ )*python (train\.py|sample\.py|-m latent_diffusion\.\w+) (.*)"
)


def commands_of(text):
    """(module, words behind it) of each command of the package; ellipses end one."""
    for line in code_of(text).splitlines():
        if found := COMMAND.match(line):
            name = found[1].removeprefix("-m ")
            module = MODULES.get(name, name if name in wiring.FLAGS else f"{name}.__main__")
            words = shlex.split(found[2].replace("[", "").replace("]", ""), comments=True)
            yield module, [word for word in words if "…" not in word and "..." not in word]


@cache
def experiment(value):
    """The config of --config=FILE:VARIANT; None for names that stand for any."""
    path, _, variant = value.partition(":")
    if not (ROOT / path).exists():
        assert re.search(r"X|TASK", path), f"{path} doesn't exist"
        return None
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    return module.get_config(*[variant] * (variant.isalnum() and not variant.isupper()))


def check_field(config, field, value):
    """The experiment has the field, and the value is of its type."""
    *path, name = field.split(".")
    for key in path:
        config = config[key]
    assert name in config, field
    old = config[name]
    if isinstance(old, int | float) and not value.isupper():
        assert type(old)(ast.literal_eval(value)) == ast.literal_eval(value), f"{field}={value}"


@pytest.mark.parametrize("page", [path.relative_to(ROOT).as_posix() for path in PAGES])
def test_every_command_could_run(page):
    """Its flags exist, its experiment has the variant and the fields; nothing is run."""
    for module, words in commands_of(NAMED[page]):
        if module not in wiring.FLAGS:
            continue
        config = None
        for word in (word for word in words if word.startswith("--")):
            flag, _, value = word.removeprefix("--").partition("=")
            if flag.startswith("config."):
                check_field(config or default.get_config(), flag.removeprefix("config."), value)
            else:
                known = wiring.FLAGS[module]
                assert flag in known or flag.removeprefix("no") in known, f"{module} {word}"
            if flag == "config":
                config = experiment(value)


def test_the_messages_of_the_page_on_errors_exist():
    """Every part of a message between two … is in the code, whose strings are joined."""
    code = ""
    for path in [*(ROOT / "latent_diffusion").rglob("*.py"), ROOT / "configs" / "default.py"]:
        code += re.sub(r'"\s+f?"', "", path.read_text("utf-8"))
    code = re.sub(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}", "…", code)
    messages = re.findall(r"^\| `(.+?)` \|", NAMED["docs/errors.md"], re.M)
    assert len(messages) >= 12
    for message in messages:
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert part in code, f"{message}: {part}"


def test_the_site_has_every_page_and_every_field():
    sys.path.insert(0, str(ROOT / "docs"))
    import generated

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = re.findall(r"[\w/]+\.md", str(site["nav"]))
    assert {path.name for path in PAGES[1:]} <= set(listed)
    table = generated.fields((ROOT / "configs" / "default.py").read_text())
    named = set(re.findall(r"^\| `([\w.]+)` \|", table, re.M))
    leaves = flatten_dict(default.get_config().to_dict(), sep=".", keep_empty_nodes=True)
    assert not {leaf for leaf in leaves if not {leaf, leaf.rpartition(".")[0]} & named}
