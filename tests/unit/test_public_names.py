"""The public names of fastlt: these and no others, each loaded on use, each known to type checkers."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fastlt

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "Batch",
    "Batches",
    "ClassCounts",
    "FinishedRun",
    "Prediction",
    "Predictions",
    "Predictor",
    "StepOutput",
    "TrainingStep",
    "build_augment",
    "build_loader",
    "build_loss",
    "build_model",
    "build_sampler",
    "build_step",
    "fit",
    "load",
    "load_recipe",
]


def test_these_are_the_public_names():
    assert fastlt.__all__ == NAMES
    assert set(fastlt._HOMES) == set(NAMES)
    assert set(NAMES) <= set(dir(fastlt))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there_and_says_what_it_does(name):
    assert inspect.getdoc(getattr(fastlt, name))


def test_type_checkers_see_each_name_where_it_is_loaded_from():
    tree = ast.parse((ROOT / "fastlt" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == fastlt._HOMES


def test_no_public_name_is_that_of_a_submodule():
    """Importing the submodule would put it in the place of the name."""
    modules = {path.stem for path in (ROOT / "fastlt").iterdir()}
    assert not modules & set(NAMES)


def test_importing_fastlt_loads_nothing_heavy_and_an_unknown_name_is_no_attribute():
    code = (
        "import sys, fastlt; dir(fastlt)\n"
        "heavy = {'torch', 'numpy', 'timm', 'accelerate', 'yaml', 'loaders'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not hasattr(fastlt, 'trian')\n"
        "from fastlt import *\n"
        "assert build_loss is fastlt.build_loss is sys.modules['fastlt.losses'].build_loss\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
