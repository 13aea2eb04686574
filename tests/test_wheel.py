"""The built wheel, without the repository: its commands, and its experiments in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest
from conftest import FAST_COMPILATION, ROOT

OLD = tuple(map(int, version("setuptools").split(".")[:2])) < (70, 1)
pytestmark = pytest.mark.skipif(OLD, reason="wheels are built by setuptools >= 70.1")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs a command of the installed wheel in an empty folder; returns what it prints."""
    root = tmp_path_factory.mktemp("wheel")
    source, site, empty = root / "source", root / "site", root / "empty"
    empty.mkdir()
    for name in ("latent_diffusion", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", root, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    env = os.environ | {"PYTHONPATH": str(site), "XLA_FLAGS": FAST_COMPILATION}

    def run(name, *words):
        done = subprocess.run(
            [site / "bin" / name, *words], cwd=empty, env=env, capture_output=True, text=True
        )
        assert (done.returncode == 0) != ("--help" in words), done.stdout + done.stderr
        return done.stdout

    run.folder, run.site = empty, site
    return run


def test_nothing_but_the_package_and_its_commands_is_installed(command):
    installed = {path.name for path in command.site.iterdir() if path.suffix != ".dist-info"}
    assert installed == {"latent_diffusion", "bin"}
    assert {path.name for path in (command.site / "bin").iterdir()} == set(SCRIPTS)
    experiments = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {p.name for p in (command.site / "latent_diffusion/configs").glob("*.py")} == experiments


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_shows_its_flags(command, name):
    known = "--to:" if name == "ldm-convert" else "--workdir:"
    shown = command(name, "--help")  # absl then ends with status 1
    assert known in shown and "python " in shown


def test_the_demo_trains_and_samples_in_an_empty_folder(command):
    few = ("--config.num_steps=1", "--config.log.images_every_steps=0")
    where = "--workdir=runs/demo/first_stage"
    command("ldm-train", "--config=configs/openmoji_autoencoder.py:smoke", where, *few)
    where = "--workdir=runs/demo/denoiser"
    command("ldm-train", "--config", "configs/openmoji_text.py:smoke", where, *few)
    config = json.loads((command.folder / "runs/demo/denoiser/config.json").read_text())
    assert config["num_steps"] == 1
    words = ("--prompts=red circle", "--num_images=1", "--num_steps=1", "--out=pictures")
    command("ldm-sample", where, *words)
    assert (command.folder / "pictures" / "00000.png").exists()
