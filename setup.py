"""What pyproject.toml cannot say: the packages are found, and recipes/ is installed as data of one of them."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastlt*", "loaders*"]), "fastlt.recipes"],
    package_dir={"fastlt.recipes": "recipes"},
)
