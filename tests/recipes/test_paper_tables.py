"""Every row of paper_tables.yaml has its recipe, and every cell resolves to the settings that the row names."""

from __future__ import annotations

import functools

import pytest
import yaml

from fastlt.recipe import load_recipe
from fastlt.reproduce.tables import PAPER, load_table

# Recipes that the tables name and that are still to be written: the whole list, so that none goes unnoticed.
MISSING: set[str] = set()
# Of the supplement: the others collect what other papers published.
TABLES = [name for name in yaml.safe_load(PAPER.read_text(encoding="utf-8")) if name.startswith("table")]
CELLS = [(table, run) for table in TABLES for cell in load_table(table)[1] for run in cell.members or [cell]]

# Stage by stage: method, loss, and what of their options the row is about.
CE, OURS, MWN = ("plain", "cross_entropy", {}), ("difficulty", "cross_entropy", {}), ("mwn", "cross_entropy", {})
CRT, LWS = ("crt", "cross_entropy", {}), ("lws", "cross_entropy", {})
LAS = ("las", "label_aware_smoothing", {})
STAGES = {
    "CE": [CE],
    "Focal Loss": [("plain", "focal", {"gamma": 1.0})],
    "MWN": [MWN],
    "Class-Balanced": [("plain", "class_balanced", {"beta": 0.9999})],
    "CB-DA": [("cb_da", "cross_entropy", {"from_epoch": 160})],
    "LDAM": [("plain", "ldam", {"max_margin": 0.5, "scale": 30.0})],
    "EQL": [("plain", "equalization", {"gamma": 0.9, "threshold": 0.005})],
    "CDB-CE": [("cdb", "cross_entropy", {"tau": 1.0})],
    "Bal. Softmax": [("plain", "balanced_softmax", {})],
    "Ours": [OURS],
    "Ours + Bal. Softmax": [("difficulty", "balanced_softmax", {})],
    "cRT": [CE, CRT],
    "LWS": [CE, LWS],
    "LAS": [CE, LAS],
    "BALMS": [CE, ("balms", "balanced_softmax", {})],
    "MiSLAS": [("mixup", "cross_entropy", {"alpha": 0.2}), (*LAS[:2], {"shift_batch_norm": True})],
    "MWN + cRT": [MWN, CRT],
    "MWN + LWS": [MWN, LWS],
    "MWN + LAS": [MWN, LAS],
    "Ours + cRT": [OURS, CRT],
    "Ours + LWS": [OURS, LWS],
    "Ours + LAS": [OURS, LAS],
    "Sample-level": [("sample_difficulty", "cross_entropy", {})],
    "Class-level (ours)": [OURS],
    **{str(width): [("difficulty", "cross_entropy", {"hidden": width})] for width in (128, 256, 512, 1024, 2048)},
}
# Table 8 copies this row from papers whose code has the sigmoid form.
SIGMOID_EQL = [("plain", "equalization", {"kind": "sigmoid", "gamma": 0.95, "threshold": 0.03})]
OF_THEIR_OWN_PAPERS = {"CB-DA", "LDAM"}  # in schedule and augmentation; copied into Table 8 by the paper too
SMOOTHING = {200: (0.4, 0.0), 100: (0.4, 0.1), 50: (0.3, 0.0), 20: (0.2, 0.0), 10: (0.2, 0.0)}  # CIFAR-100-LT


def test_the_recipes_that_are_missing_are_those_that_are_listed():
    assert {cell.recipe for _, cell in CELLS if not cell.path.is_file()} == MISSING


load = functools.cache(load_recipe)


@pytest.fixture(params=[c for c in CELLS if c[1].path.is_file()], ids=lambda c: f"{c[0]}-{c[1].row}-{c[1].column}")
def resolved(request):
    table, cell = request.param
    return table, cell, load(cell.path, tuple(cell.overrides))


def test_a_cell_has_the_data_and_the_network_of_its_column(resolved):
    table, cell, recipe = resolved
    data = recipe.data
    assert data.meta_per_class == 10, "Table 5"
    if data.source == "cifar100":
        assert recipe.model.name == "cifar_resnet32"
        factor = {"table6": 100, "table8": cell.column, "table12": cell.column.split()[0]}[table]
        assert data.imbalance_factor == int(factor)
        strong = [op for op in data.augment if op != "flip" and next(iter(op)) in ("auto_augment", "cutout")]
        assert len(strong) == (0 if table == "table8" else 2)
        table12 = {"100": (99, 19), "10": (196, 98)}  # the thresholds that its cells add up with
        assert data.shots == (table12[cell.column.split()[0]] if table == "table12" else (100, 20))
    else:
        assert (data.source, data.num_classes) == ("list_file", 1000)
        assert recipe.model.name == ("resnet50" if "ResNet-50" in cell.column else "resnet10")
        assert any("rand_augment" in op for op in data.augment) == (table == "table10")


def test_a_cell_has_the_methods_and_losses_of_its_row(resolved):
    table, cell, recipe = resolved
    stages = list(recipe.stages.values())
    of_row = SIGMOID_EQL if (table, cell.row) == ("table8", "EQL") else STAGES.get(cell.row, [])
    for stage, (method, loss, options) in zip(stages, of_row, strict=cell.row in STAGES):
        assert (stage.method, stage.loss) == (method, loss)
        given = {**vars(stage.options), **stage.loss_options}
        assert {key: given.get(key) for key in options} == options
        if stage.loss == "label_aware_smoothing":
            head, tail = SMOOTHING[recipe.data.imbalance_factor] if recipe.data.source == "cifar100" else (0.3, 0.0)
            assert stage.loss_options == {"head": head, "tail": tail}


def test_a_cell_has_the_schedule_of_the_supplement(resolved):
    _, cell, recipe = resolved
    if cell.row not in STAGES or cell.row in OF_THEIR_OWN_PAPERS:
        return
    cifar = recipe.data.source == "cifar100"
    first, *second = recipe.stages.values()
    assert (first.batch_size, first.momentum, first.sampling) == (128, 0.9, "instance")
    if cifar:
        assert (first.iterations, first.warmup, first.warmup_from, first.lr) == (12800, 400, 0.1, 0.2)
        assert (first.schedule, first.milestones, first.gamma) == ("multistep", [6400, 9600], 0.1)
        assert first.weight_decay == 1e-4
    else:
        assert (first.epochs, first.lr, first.schedule, first.weight_decay) == (180, 0.05, "cosine", 5e-4)
    for stage in second:
        if stage.method == "balms":
            continue  # its authors' schedule
        assert (stage.batch_size, stage.sampling) == (128, "class_balanced")
        if cifar:
            assert (stage.epochs, stage.lr, stage.milestones, stage.weight_decay) == (50, 0.1, [30, 40], 1e-4)
        else:
            assert (stage.epochs, stage.lr, stage.schedule, stage.weight_decay) == (10, 0.05, "cosine", 5e-4)
