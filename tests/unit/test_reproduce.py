"""The paper's numbers are all there, the listing says what can run, and a run of a row ends in the three files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fastlt.recipe import load_recipe  # noqa: E402
from tools import reproduce  # noqa: E402

TABLES = yaml.safe_load(reproduce.PAPER.read_text())
# Numbers printed in each table of the supplement; dashes do not count.
PRINTED = {"table6": 10, "table8": 102, "table9": 88, "table10": 3, "table11": 6, "table12": 16}


def test_every_printed_number_is_there():
    assert {name: len(reproduce.load_table(name)[1]) for name in TABLES} == PRINTED


@pytest.mark.parametrize(
    ("table", "row", "column", "value"),
    [
        ("table6", "256", "CIFAR100-LT", 48.06),
        ("table6", "1024", "ImageNet-LT", 41.4),
        ("table8", "LDAM", "10", 56.91),
        ("table8", "Ours", "100", 43.82),
        ("table8", "Ours + LAS", "200", 42.19),
        ("table8", "MWN + LAS", "10", 59.24),
        ("table9", "Ours + Bal. Softmax", "ResNet-10 Few", 27.8),
        ("table9", "PaCo + Bal. Softmax", "ResNet-50 Few", 36.1),
        ("table9", "MiSLAS", "ResNet-50 Overall", 52.7),
        ("table10", "Ours + LAS", "ResNet-50", 57.4),
        ("table11", "Ours (2 experts)", "ResNet-10", 47.5),
        ("table12", "Sample-level", "100 Few", 18.99),
        ("table12", "Class-level (ours)", "10 All", 63.52),
    ],
)
def test_spot_checks(table, row, column, value):
    (cell,) = reproduce.chosen(reproduce.load_table(table)[1], [row], [column])
    assert cell.paper == value


@pytest.mark.parametrize("name", PRINTED)
def test_the_numbers_are_percentages_in_the_order_that_long_tails_give_them(name):
    for row in TABLES[name]["rows"]:
        printed = [v for v in row["values"] if v is not None]
        assert all(0 < v < 100 for v in printed)
        if name == "table8":
            assert printed == sorted(printed)
        if name in ("table9", "table12"):
            # Overall lies between the best and the worst group.
            for many, medium, few, overall in (row["values"][:4], row["values"][4:]):
                if None not in (many, medium, few, overall):
                    assert min(many, medium, few) < overall < max(many, medium, few)


@pytest.mark.parametrize("name", PRINTED)
@pytest.mark.parametrize("scale", ["short", "paper"])
def test_every_cell_with_a_recipe_resolves(name, scale):
    for cell in (part for whole in reproduce.load_table(name)[1] for part in whole.members or [whole]):
        reproduce.resolve(cell, [], scale, [])
        if not cell.path.is_file():
            assert cell.problem.startswith("no recipe yet")
            continue
        assert cell.problem is None or cell.problem.startswith("data not found"), cell.problem
        recipe = load_recipe(cell.path, cell.overrides)
        if scale == "short":
            lengths = [s.iterations for s in recipe.stages.values()]
            afresh = [n == 0 or s.start == "fresh" for n, s in enumerate(recipe.stages.values())]
            assert lengths == [reproduce.SHORT_ITERATIONS if first else 100 for first in afresh]


def test_las_takes_its_smoothing_from_the_column():
    cells = reproduce.chosen(reproduce.load_table("table8")[1], ["LAS", "Ours + LAS"], None)
    by_column = {"200": (0.4, 0), "100": (0.4, 0.1), "50": (0.3, 0), "20": (0.2, 0), "10": (0.2, 0)}
    assert len(cells) == 10
    for cell in cells:
        recipe = load_recipe(cell.path, cell.overrides)
        assert recipe.data.imbalance_factor == float(cell.column)
        options = recipe.stages["classifier"].loss_options
        assert (options["head"], options["tail"]) == by_column[cell.column]
        assert recipe.data.augment == ["flip", {"random_crop": {"padding": 4}}]


def test_cells_that_differ_share_no_run_and_metrics_of_one_run_do():
    cells = reproduce.load_table("table9")[1]
    names = {}
    for cell in cells:
        names.setdefault(reproduce.run_name(cell, "paper", 0), set()).add((cell.row, cell.column.split()[0]))
    assert all(len(users) == 1 for users in names.values())
    moved = reproduce.load_table("table9")[1][0]
    before = reproduce.run_name(moved, "paper", 0)
    moved.overrides = [*moved.overrides, "data.converted=/elsewhere", "num_threads=1"]
    assert reproduce.run_name(moved, "paper", 0) == before
    assert reproduce.run_name(moved, "short", 0) != before
    assert reproduce.run_name(moved, "paper", 1) != before


def test_the_listing_names_every_row_its_recipe_and_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["table11", "--list"]) == 0
    told = capsys.readouterr().out
    assert "RIDE (4 experts)" in told
    assert "imagenet_lt_ours_las+imagenet_lt_ours_las_cosine data not found: list_file" in told
    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "ROOT", tmp_path)
        assert reproduce.main(["table11", "--list"]) == 0
    told = capsys.readouterr().out
    for recipe in ("imagenet_lt_ride_4", "imagenet_lt_ours_las"):
        assert f"no recipe yet: recipes/{recipe}.yaml" in told
    assert reproduce.main(["table8", "--list", "--data", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert all(row["name"] in told for row in TABLES["table8"]["rows"])
    assert "data not found: cifar100" in told
    assert "46.42" in told
    (tmp_path / "cifar-100-python").mkdir()
    assert reproduce.main(["table8", "--list", "--rows", "Ours", "--data", str(tmp_path)]) == 0
    assert "can run" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [tmp_path / "cifar-100-python"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["table88"], "did you mean 'table8'"),
        (["table8", "--rows", "Our"], "did you mean 'Ours'"),
        (["table8", "--columns", "500"], "unknown column"),
        (["table8", "--seeds", "0"], "at least 1"),
    ],
)
def test_a_mistake_is_one_message(words, expected, capsys):
    assert reproduce.main(words) == 2
    assert expected in capsys.readouterr().err


def test_a_row_runs_is_not_run_again_and_leaves_three_files(digits, tmp_path, capsys, monkeypatch):
    """The row's own recipe on the digits, a few iterations long, beside a row whose recipe is not there."""
    tables = reproduce.PAPER.read_text().replace("recipe: cifar100_lt_paco,", "recipe: cifar100_lt_unwritten,")
    (tmp_path / "tables.yaml").write_text(tables)
    monkeypatch.setattr(reproduce, "load_table", partial(reproduce.load_table, tables=tmp_path / "tables.yaml"))
    words = ["table8", "--rows", "cRT", "PaCo", "--columns", "100", "--scale", "short", "--seeds", "2"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--set"]
    words += ["data.source=digits", "data.num_classes=10", f"data.converted={digits}", "data.image_size=8"]
    words += ["data.imbalance_factor=20", "model.name=cifar_resnet8", "num_threads=1"]
    for stage in ("end_to_end", "classifier"):
        words += [f"stages.{stage}.{key}" for key in ("iterations=2", "evaluate_every=2", "warmup=0", "batch_size=8")]
    assert reproduce.main(words) == 0
    told = capsys.readouterr()
    assert told.err.count("running cifar100_lt_crt-short-") == 2
    rows = json.loads((tmp_path / "out" / "table8.json").read_text())
    paco, crt = sorted(rows, key=lambda r: r["row"])
    assert (paco["ours"], paco["not_run"]) == (None, "no recipe yet: recipes/cifar100_lt_unwritten.yaml")
    assert crt["runs"] == 2
    results = [json.loads(p.read_text()) for p in sorted((tmp_path / "runs").glob("*/result.json"))]
    assert [r["iterations"] for r in results] == [4, 4]
    assert crt["ours"] == pytest.approx(50 * sum(r["top1"] for r in results))
    assert crt["difference"] == pytest.approx(crt["ours"] - 44.04)
    table = (tmp_path / "out" / "table8.md").read_text()
    assert table.strip() in told.out
    assert f"| cRT | 100 | 44.04 | {crt['ours']:.2f} ± " in table
    assert "- PaCo: no recipe yet" in table
    with (tmp_path / "out" / "table8.csv").open() as file:
        assert [r["row"] for r in csv.DictReader(file)] == [r["row"] for r in rows]

    again = (tmp_path / "out" / "table8.json").read_text()
    assert reproduce.main(words) == 0
    assert "running" not in capsys.readouterr().err
    assert (tmp_path / "out" / "table8.json").read_text() == again


def test_a_run_that_fails_is_told_with_its_reason_and_the_exit_code(tmp_path, capsys, monkeypatch):
    def fail(words, stdout, stderr):
        stdout.write("fastlt: the disk is full\n")
        return subprocess.CompletedProcess(words, 2)

    (tmp_path / "cifar-100-python").mkdir()
    monkeypatch.setattr(reproduce.subprocess, "run", fail)
    words = ["table12", "--columns", "100 All", "100 Few", "--rows", "Class-level (ours)", "--data", str(tmp_path)]
    assert reproduce.main([*words, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr()
    assert told.err.count("running") == 1
    assert "failed with code 2: fastlt: the disk is full" in told.out
    assert "(100 Few, 100 All)" in told.out
