"""The approximations' errors: none where nothing is approximated, and of the parts that are, the right ones."""

from __future__ import annotations

import json

import pytest

from fastlt import cli


@pytest.fixture
def rows(digits_words, capsys):
    words = [w for w in digits_words if not w.startswith("log_every")]
    command = [
        "approximations",
        "--iterations",
        "8",
        "--every",
        "1",
        "4",
        "--modules",
        "head",
        "head,backbone",
        "--json",
    ]
    assert cli.main(["benchmark", *command, "--", "recipes/digits_lt.yaml", *words]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["settings"]["iterations"] == 8
    return {row["name"]: row for row in printed["rows"]}


def test_what_is_exact_has_no_error_and_what_is_not_has_one(rows):
    assert set(rows) == {"late_weights", "every 1", "every 4", "lookahead_only head", "lookahead_only head,backbone"}
    assert rows["every 1"]["max_weight_error"] < 1e-6
    assert rows["lookahead_only head,backbone"]["max_weight_error"] < 1e-3
    assert rows["lookahead_only head,backbone"]["grad_rel_error"] < 1e-3
    assert rows["lookahead_only head"]["grad_rel_error"] > 0.01
    for name in ("late_weights", "every 4", "lookahead_only head"):
        row = rows[name]
        assert 0 < row["mean_weight_error"] <= row["max_weight_error"], name


def test_another_method_is_refused(digits_words, capsys):
    words = [*digits_words, "stages.end_to_end.method=plain"]
    assert cli.main(["benchmark", "approximations", "--", "recipes/digits_lt.yaml", *words]) == 2
    assert "method=difficulty" in capsys.readouterr().err
    for option in ("meta_weight=0", "approximate={every: 2}"):
        words = [*digits_words, f"stages.end_to_end.options.{option}"]
        assert cli.main(["benchmark", "approximations", "--", "recipes/digits_lt.yaml", *words]) == 2
        assert "the exact step is compared with here" in capsys.readouterr().err
