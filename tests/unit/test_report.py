"""The table of runs: what is one row, its mean and spread, and how the weights moved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlt import cli
from fastlt.recipe import load_recipe
from fastlt.report.seeds import spread

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"


@pytest.fixture
def run(tmp_path):
    """Write the folder of a finished run with this test accuracy."""

    def write(name, seed, top1, *words, weights=(0.5, 1.5)):
        recipe = load_recipe(RECIPE, [f"name={name}-{seed}", f"seed={seed}", *words])
        folder = tmp_path / recipe.name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        measured = {"top1": top1, "many": top1, "medium": top1, "few": None, "macro_f1": top1}
        result = {**measured, "train_s": 10.0, "class_weights": list(weights), "class_counts": [9, 3]}
        (folder / "result.json").write_text(json.dumps(result))
        lines = [{"kind": "evaluation", "iteration": i, "weight": [1.0, 1.0 + i / 10]} for i in (1, 2)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(folder)

    return write


def test_a_damaged_result_is_named(run, capsys):
    folder = Path(run("one", 0, 0.5))
    (folder / "result.json").write_text("{")
    assert cli.main(["report", str(folder)]) == 2
    assert f"fastlt report: error: {folder / 'result.json'} is damaged" in capsys.readouterr().err


def test_runs_that_differ_in_seed_only_are_one_row(run, capsys):
    folders = [run("one", s, t) for s, t in ((0, 0.50), (1, 0.52), (2, 0.54))]
    folders.append(run("other", 0, 0.7, "stages.end_to_end.loss=balanced_softmax"))
    assert cli.main(["report", *folders]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 2
    assert rows[0].startswith("| one | 3 | 52.00 ± 2.00 |")
    assert rows[1].startswith("| other | 1 | 70.00 |")
    assert "0.50 … 1.50" in rows[0]


def test_spread():
    assert spread([0.5]) == "50.00"
    assert spread([0.5, None]) == "-"
    assert spread([1.0, 3.0], scale=1.0) == "2.00 ± 1.41"


def test_weights_are_printed_and_drawn(run, tmp_path, capsys):
    folder = run("one", 0, 0.5)
    assert cli.main(["report", folder, "--weights"]) == 0
    assert "2  1.000 1.200" in capsys.readouterr().out
    picture = tmp_path / "weights.png"
    assert cli.main(["report", folder, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["report", folder, "--plot", str(tmp_path / "weights.svg")]) == 0
    assert "<svg" in (tmp_path / "weights.svg").read_text()
    assert cli.main(["report", folder, "--plot", str(tmp_path / "weights.bmp")]) == 2
    assert "give a name that ends in .png or .svg" in capsys.readouterr().err
    assert cli.main(["report", folder, "--weights", "--out", str(tmp_path / "page.html")]) == 2
    assert "--weights is a task of its own: leave out --out" in capsys.readouterr().err


def test_a_folder_without_a_finished_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
