"""Every recipe in the repository parses as it stands and trains two iterations on a data set of its kind."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fastlt.models import build_model
from fastlt.recipe import load_recipe
from fastlt.run.dataset import conversion_command
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer
from fastlt.steps import STEPS, StepOptions
from loaders.sources import open_source
from loaders.stored.convert import conversion_request, convert
from loaders.stored.ffcv_format import FfcvOptions

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
ROWS = [p for p in RECIPES if p.parent.name != "base"]
CLASSES = 4
NETWORKS = ("digits_lt", "cifar10_lt", "cifar100_lt", "imagenet_lt", "places_lt", "inaturalist2018")


@pytest.fixture(scope="session")
def vit_weights(tmp_path_factory):
    """A file with weights of a small transformer."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "vit.pt"
    torch.save(build_model("vit_tiny_patch16_224", num_classes=CLASSES, image_size=32).state_dict(), file)
    return file


@pytest.fixture(scope="session")
def tiny_jpegs(tmp_path_factory):
    """A long-tailed list-file data set of JPEGs in several sizes, converted."""
    root = tmp_path_factory.mktemp("tiny")
    draw = np.random.default_rng(0)
    for split, per_class in (("train", [12, 8, 4, 2]), ("val", [2] * CLASSES), ("test", [2] * CLASSES)):
        lines = []
        for c, count in enumerate(per_class):
            for i in range(count):
                path = root / split / f"{c}_{i}.jpg"
                path.parent.mkdir(exist_ok=True)
                shape = (int(draw.integers(40, 90)), int(draw.integers(40, 90)), 3)
                Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(path)
                lines.append(f"{split}/{path.name} {c}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    lists = {
        f"{key}_list": root / f"{name}.txt" for key, name in (("train", "train"), ("meta", "val"), ("test", "test"))
    }
    source = open_source("list_file", root=root, meta_per_class=2, **lists)
    options = FfcvOptions("jpg")
    request = conversion_request("list_file", meta_per_class=2, options=options, **lists)
    convert(source, root / "converted", options=options, request=request, progress=False)
    return root / "converted"


def header(path: Path) -> str:
    return "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))


@pytest.mark.parametrize("path", ROWS, ids=lambda p: p.stem)
def test_a_recipe_parses_and_its_header_gives_the_command_and_the_cost(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert f"accelerate launch fastlt/train.py recipes/{path.relative_to(FOLDER)}" in header(path)
    assert "Cost:" in header(path)
    if recipe.data.source in ("list_file", "image_folder", "coco"):
        # The command that converts stands in the row or in its base.
        bases = yaml.safe_load(path.read_text()).get("base", [])
        text = header(path) + "".join(header(FOLDER / base) for base in bases)
        command, *options = conversion_command(recipe.data, Path(recipe.data.converted)).split(" --")
        assert f"#   {command} --out " in text
        for option in options:
            if not option.startswith("root"):
                # meta-per-class is the tool's default as well.
                assert f"--{option}" in text or option == "meta-per-class 10", option


def switched(options: StepOptions) -> list[str]:
    """The names of the options that a recipe switches on or off, unlike their default."""
    return [f.name for f in fields(options) if bool(getattr(options, f.name)) != bool(f.default)]


def each_combination_once() -> list:
    """Every row; those that repeat an earlier one's head, methods and losses on other data are slow tests."""
    seen, rows = set(), []
    for path in sorted(ROWS, key=lambda p: (p.stem not in NETWORKS, p.stem)):
        recipe = load_recipe(path)
        stages = [(s.method, s.loss, *switched(s.options), *s.loss_options) for s in recipe.stages.values()]
        combination = (recipe.model.head, *stages)
        again = combination in seen and path.stem not in NETWORKS
        rows.append(pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if again else []))
        seen.add(combination)
    return rows


@pytest.mark.parametrize("path", each_combination_once())
def test_a_recipe_trains_two_iterations(path, digits, tiny_jpegs, vit_weights, tmp_path):
    recipe = load_recipe(path)
    tuned = path.parent.name == "finetune" and recipe.model.pretrained  # what is trained may be a part
    small = recipe.data.image_size <= 32
    words = [
        f"runs={tmp_path}",
        "num_threads=1",
        "model.pretrained=false",
        f"data.converted={digits if small else tiny_jpegs}",
        "data.num_classes=null",
        # Rows differ in method, not in network: one row of each data set builds the network it names.
        *([] if path.stem in NETWORKS else [f"model.name={'vit_tiny_patch16_224' if tuned else 'cifar_resnet8'}"]),
        *([f"model.checkpoint={vit_weights}", "data.imbalance_factor=null", "data.root=null"] if tuned else []),
        "data.image_size=8" if recipe.data.source == "digits" else f"data.image_size={min(32, recipe.data.image_size)}",
    ]
    if small:
        words += ["data.source=digits", "data.imbalance_factor=20", "data.image_size=8", "data.meta_per_class=10"]
    else:
        words += ["data.source=list_file", "data.meta_per_class=2"]
    for name, stage in recipe.stages.items():
        where = f"stages.{name}"
        words += [f"{where}.epochs=null", f"{where}.iterations=2", f"{where}.evaluate_every=2", f"{where}.batch_size=8"]
        words += [f"{where}.warmup=0", f"{where}.schedule=constant", f"{where}.milestones=[]", f"{where}.min_lr=0"]
        if stage.method == "tau_norm":
            words += [f"{where}.options.taus=[0, 1]", f"{where}.evaluate_every=1"]
        if getattr(stage.options, "attention_side", 0):
            words += [f"{where}.options.attention_side=8"]
        if stage.classes != "all" and not small:
            words += ["data.shots=[9, 5]", f"{where}.batch_size=4"]  # of the classes, one, one and two are such
        if STEPS[stage.method].needs.meta_batch:
            words += [f"{where}.meta_batch_size=4"]
        if stage.lr_factors:
            words += [f"{where}.lr_factors={{backbone: 0.1, layer3: 1}}"]  # of the small network
    result = Trainer(prepare(load_recipe(path, words))).fit()
    assert result["iterations"] == 2 * len(recipe.stages)
    assert 0 <= result["top1"] <= 1
