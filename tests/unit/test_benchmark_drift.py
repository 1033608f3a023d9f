"""tools/benchmark.py drift: a window of 1 does not drift, a longer one does, and what cannot be compared is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastlt import cli
from fastlt.benchmarks import drift

ROOT = Path(__file__).resolve().parents[2]

RECIPE = str(ROOT / "recipes" / "digits_lt.yaml")


def test_a_window_of_one_is_exact_and_a_longer_one_drifts(digits_words, capsys):
    words = ["--json", "--iterations", "10", "--windows", "1", "5", "--", RECIPE, *digits_words]
    assert cli.main(["benchmark", "drift", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    still, moving = found["rows"]
    assert [still[key] for key in still if key != "window"] == [0.0] * 5
    assert 0 < moving["mean_accuracy_error"] < moving["max_accuracy_error"] <= 1
    assert 0 < moving["mean_weight_error"] < moving["max_weight_error"]
    assert found["settings"]["iterations"] == 10


def test_the_row_is_the_mean_and_the_largest_difference():
    exact = torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    rolling = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[1.0, 1.0], [1.5, 1.0]])
    assert drift.row(3, exact, rolling) == drift.Row(3, 0.125, 0.25, 0.25, 0.125, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stages.end_to_end.method=cdb"], "set stages.end_to_end.method=difficulty"),
        (["--stage", "second"], "has no stage 'second'"),
    ],
)
def test_what_cannot_be_compared_is_refused(digits_words, capsys, words, message):
    assert cli.main(["benchmark", "drift", RECIPE, *digits_words, *words]) == 2
    assert message in capsys.readouterr().err
