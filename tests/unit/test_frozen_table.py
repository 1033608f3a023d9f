"""`fastlt reproduce frozen`: every method has a row, runs are the trainer's, and the table is of what they say."""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path

import pytest
import torch
import yaml

from fastlt import cli
from fastlt.losses import LOSSES
from fastlt.models import build_model
from fastlt.recipe import StageRecipe, load_recipe
from fastlt.reproduce import frozen
from fastlt.reproduce.frozen import Method, open_context, plan, read_methods, train_head
from fastlt.reproduce.frozen_tables import best_rate, rows
from fastlt.run.loading import iterations_per_epoch
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer
from fastlt.steps import STEPS

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"
ROWS = read_methods()
STAGE = "stages.end_to_end"


@pytest.fixture
def words(digits_words, tmp_path):
    """A network with given weights whose head is trained on features, for a few iterations."""
    torch.manual_seed(5)
    weights = tmp_path / "weights.pt"
    torch.save(build_model("cifar_resnet8", num_classes=10).state_dict(), weights)
    given = [w for w in digits_words if not w.startswith(f"{STAGE}.options")]
    return [*given, "model.train=head", f"model.checkpoint={weights}", "data.augment=[]", "data.cached_views=1"]


def per_epoch(context):
    return iterations_per_epoch(context, context.recipe.stages["end_to_end"])


# The rows


def test_every_loss_sampling_and_method_has_a_row_or_a_reason():
    reasons = yaml.safe_load(frozen.METHODS.read_text())["left_out"]
    stages = [part for row in ROWS for part in (row.stage, row.second or {})]
    losses = {part.get("loss", "cross_entropy") for part in stages}
    methods = {part.get("method", "plain") for part in stages}
    samplings = {part.get("sampling", "instance") for part in stages}
    known = typing.get_args(typing.get_type_hints(StageRecipe)["sampling"])
    assert losses == LOSSES.keys()
    assert methods | (reasons.keys() & STEPS.keys()) == STEPS.keys()
    assert not methods & reasons.keys()
    assert samplings | (reasons.keys() & set(known)) == set(known)
    assert reasons.keys() <= STEPS.keys() | set(known)


@pytest.mark.parametrize(
    "method", [row for row in (*ROWS, *read_methods(table="ablation")[4:]) if row.of is None], ids=lambda row: row.name
)
def test_a_row_trains(method, words):
    context = open_context(load_recipe(RECIPE, words))
    (run,) = plan(context.recipe, [method], [0.02], 1, per_epoch(context))
    result = train_head(context, RECIPE, [*words, *run.words])
    assert result["problem"] is None
    assert 0 <= result["test"]["top1"] <= 1
    assert (result["weights"] is None) == (method.stage.get("method") not in ("difficulty", "cdb", "cb_da"))


@pytest.mark.parametrize(
    "name", ["Cross-entropy", "Difficulty-Net, absolute", "LAS", "Tau-normalisation", "Cosine head"]
)
def test_a_run_is_that_of_the_trainer(name, words):
    methods = [row for row in ROWS if row.name == name]
    context = open_context(load_recipe(RECIPE, words))
    (run,) = plan(context.recipe, methods, [0.05], 1, per_epoch(context))
    built = {}
    train_head(context, RECIPE, [*words, *run.words], built)
    ours = train_head(context, RECIPE, [*words, *run.words], built)  # from a model that was built before
    assert len(built) == 1
    theirs = Trainer(prepare(load_recipe(RECIPE, [*words, *run.words, "name=whole"]))).fit()
    assert ours["test"]["per_class_accuracy"] == theirs["per_class_accuracy"]
    assert ours["test"]["ece"] == theirs["ece"]


@pytest.mark.parametrize(
    ("words", "milestones"),
    [
        (["iterations=27"], []),
        (["iterations=null", "epochs=3", "warmup=0", "schedule=multistep", "milestones=[1, 2]"], [3, 6]),
    ],
)
def test_a_second_stage_has_a_third_of_the_iterations_of_the_first(words, milestones):
    words = [f"stages.end_to_end.{word}" for word in words]
    (run,) = plan(load_recipe(RECIPE, words), [row for row in ROWS if row.name == "LWS"], [0.05], 1, 9)
    second = load_recipe(RECIPE, [*words, *run.words]).stages["second"]
    assert (second.iterations, second.milestones) == (9, milestones)


def test_a_second_stage_with_a_length_of_its_own_has_milestones_of_it():
    words = [
        f"stages.end_to_end.{word}" for word in ("iterations=2600", "schedule=multistep", "milestones=[1300, 2000]")
    ]
    (run,) = plan(load_recipe(RECIPE, words), [row for row in ROWS if row.name == "Tau-normalisation"], [0.05], 1, 87)
    second = load_recipe(RECIPE, [*words, *run.words]).stages["second"]
    assert (second.iterations, second.milestones) == (21, [10, 16])


@pytest.mark.parametrize("key", ["ema={decay: 0.9}", "select=smoothed"])
def test_a_recipe_whose_result_is_another_model_is_refused(words, key):
    with pytest.raises(ValueError, match=f"stages.end_to_end: has {key.split('=')[0]}.*; set stages.end_to_end"):
        open_context(load_recipe(RECIPE, [*words, f"stages.end_to_end.{key}"]))


# The table


def result(validation, test, *, problem=None, weights=None):
    metrics = {"top1": test, "many": test, "medium": None, "few": test, "ece": 0.1}
    return {
        "validation": {"top1": validation, "adjusted_top1": 1 - validation},
        "test": {**metrics, **{f"adjusted_{key}": value for key, value in metrics.items()}},
        "problem": problem,
        "weights": weights,
        "train_s": 1.0,
    }


def test_a_method_is_shown_at_its_best_rate_by_validation_and_at_the_common_one():
    results = {
        ("A", 0.1, 0): result(0.5, 0.9), ("A", 0.1, 1): result(0.5, 0.9),
        ("A", 0.2, 0): result(0.6, 0.7), ("A", 0.2, 1): result(0.5, 0.8),
        ("B", 0.1, 0): result(0.9, 0.5, weights=[0.5, 1.5]), ("B", 0.1, 1): result(0.1, 0.6, problem="not finite"),
        ("B", 0.2, 0): result(0.2, 0.8), ("B", 0.2, 1): result(0.2, 0.85),
    }  # fmt: skip
    methods = [Method("A"), Method("A, adjusted", of="A", adjusted=True), Method("B"), Method("never run")]
    table = rows(methods, results, common=0.1, rate_seeds=3)
    assert [(r.choice, r.method, r.measured.lr) for r in table] == [
        ("own", "A", 0.2),
        ("own", "A, adjusted", 0.1),
        ("own", "B", 0.2),  # a seed diverged at the other
        ("common", "A", 0.1),
        ("common", "A, adjusted", 0.1),
        ("common", "B", 0.1),
    ]
    assert table[-1].measured.diverged == 1
    assert table[-1].measured.weights == (0.5, 1.5)
    assert table[0].difference is None
    assert table[1].difference == pytest.approx((0.15, 12.706 * math.sqrt(0.005) / math.sqrt(2)), rel=1e-3)


def test_a_rate_is_chosen_on_the_first_seeds():
    results = {
        ("A", 0.1, 0): result(0.6, 0.9), ("A", 0.1, 1): result(0.1, 0.7),
        ("A", 0.2, 0): result(0.5, 0.2), ("A", 0.2, 1): result(0.9, 0.2),
    }  # fmt: skip
    assert best_rate(Method("A"), results, 1) == 0.1
    assert best_rate(Method("A"), results, 2) == 0.2
    assert best_rate(Method("B"), results, 2) is None
    assert best_rate(Method("B", of="A", adjusted=True), results, 1) == 0.2
    assert rows([Method("A")], results, 0.2, 1)[0].measured.test["top1"] == [0.9, 0.7]


def test_a_difference_needs_two_common_seeds():
    results = {("A", 0.1, 0): result(0.5, 0.9), ("B", 0.1, 0): result(0.5, 0.8), ("B", 0.1, 1): result(0.5, 0.8)}
    assert rows([Method("A"), Method("B")], results, 0.1, 3)[1].difference is None


# The command


def test_the_command_runs_what_is_missing_and_writes_the_table(words, tmp_path, capsys, monkeypatch):
    command = ["reproduce", "frozen", "--recipe", "digits_lt", "--rows", "Cross-entropy", "Balanced softmax"]
    command += [
        "--lr",
        "0.02",
        "0.05",
        "--seeds",
        "2",
        "--jobs",
        "2",
        "--imbalance",
        "10",
        "--out",
        str(tmp_path / "out"),
    ]
    given = [w for w in words if not w.startswith(("runs=", "name=", "num_threads="))]
    assert cli.main([*command[:4], "--list"]) == 0
    assert "Difficulty-Net, absolute" in capsys.readouterr().out.splitlines()
    assert cli.main([*command, "--set", *given]) == 2
    assert "--imbalance is for CIFAR" in capsys.readouterr().err
    del command[-4:-2]
    assert cli.main([*command, "--set", *given]) == 0
    files = sorted((tmp_path / "out" / "results").iterdir())
    assert len(files) == 2 * 2 * 2
    times = [f.stat().st_mtime_ns for f in files]
    files[0].unlink()
    # Another number of threads rounds sums otherwise, which makes no other result.
    command[command.index("--jobs") + 1] = "1"
    monkeypatch.setattr("fastlt.commands.reproduce_frozen.available_cores", lambda: 2)
    assert cli.main([*command, "--set", *given]) == 0
    assert sorted((tmp_path / "out" / "results").iterdir()) == files
    assert [f.stat().st_mtime_ns for f in files][1:] == times[1:]
    assert json.loads(files[0].read_text())["threads"] == 2
    records = json.loads((tmp_path / "out" / "frozen.json").read_text())
    assert {(r["method"], r["choice"], r["seeds"]) for r in records} == {
        (method, choice, 2)
        for method in ("Cross-entropy", "Cross-entropy, adjusted afterwards", "Balanced softmax")
        for choice in ("own", "common")
    }
    assert cli.main([*command, "--rate-seeds", "1", "--seeds", "3", "--set", *given]) == 0
    names = {f.name for f in files}
    of_third_seed = [f for f in (tmp_path / "out" / "results").iterdir() if f.name not in names]
    assert 2 * 1 <= len(of_third_seed) <= 2 * 2  # the common rate of two rows, and their best where it is another
    records = json.loads((tmp_path / "out" / "frozen.json").read_text())
    assert {r["seeds"] for r in records if r["choice"] == "common"} == {3}
    assert "| Balanced softmax |" in (tmp_path / "out" / "frozen.md").read_text()


def test_of_weights_whose_head_does_not_fit_the_command_warns_once(words, tmp_path, capfd, caplog):
    weights = tmp_path / "weights.pt"  # as the fixture has them, of seven classes
    torch.save(build_model("cifar_resnet8", num_classes=7).state_dict(), weights)
    given = [w for w in words if not w.startswith(("runs=", "name="))]
    command = ["reproduce", "frozen", "--recipe", "digits_lt", "--rows", "Focal", "--lr", "0.05", "--seeds", "2"]
    assert cli.main([*command, "--jobs", "1", "--out", str(tmp_path / "out"), "--set", *given]) == 0
    assert caplog.text.count("its head does not fit") == 1
    assert "its head does not fit" not in capfd.readouterr().err, "of a process that trains heads"
