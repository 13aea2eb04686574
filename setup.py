"""An installation holds `configs/` inside the package; pyproject.toml says the rest."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["latent_diffusion*"]), "latent_diffusion.configs"],
    package_dir={"latent_diffusion.configs": "configs"},
)
