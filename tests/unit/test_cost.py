"""What `fastlt check` says of learned class weights: theta's size, memory and time, and the age of accuracies."""

from __future__ import annotations

import re

import pytest
import torch

from fastlt import cli
from fastlt.meta.difficulty import DifficultyNet, advice_on_width, chosen_width
from fastlt.recipe import load_recipe
from fastlt.run.cost import number_of_weights, scoring, theta
from fastlt.steps.difficulty import DifficultyOptions

STAGE = "stages.end_to_end"


def recipe(*words):
    return load_recipe("digits_lt", ["data.num_classes=8142", *words])


@pytest.mark.parametrize(
    ("classes", "asked", "width"),
    [
        (100, None, 128),
        (100, "auto", 128),
        (4095, "auto", 4096),
        (4096, "auto", 8192),
        (4097, "auto", 2048),
        (8142, None, 8192),
        (8142, "auto", 2048),
        (8142, 512, 512),
    ],
)
def test_the_width_is_the_rule_a_number_or_the_rule_up_to_4096_classes(classes, asked, width):
    assert chosen_width(classes, asked) == width
    assert (advice_on_width(classes, asked) is None) == (width <= 2048)


def test_a_network_has_the_width_that_is_asked_for():
    assert [layer.out_features for layer in DifficultyNet(5000, "auto").layers[::2][:2]] == [2048, 2048]
    assert DifficultyOptions(hidden="auto").hidden == "auto"


@pytest.mark.parametrize(("classes", "width"), [(10, 16), (37, 5)])
def test_weights_are_counted_without_making_them(classes, width):
    assert number_of_weights(classes, width) == sum(p.numel() for p in DifficultyNet(classes, width).parameters())


def test_theta_is_told_with_its_memory_and_time():
    (size, advice) = theta(recipe())
    assert f"{STAGE}.options.hidden: is 8,192; theta has {number_of_weights(8142, 8192):,} weights" in size
    assert "3.21 GB with gradient and Adam's state (which several processes divide among them), 2.41 GB of a" in size
    assert float(re.search(r"about ([\d,.]+) ms", size)[1].replace(",", "")) > 0
    assert "8,192 by the rule for 8,142 classes" in advice
    assert "Table 6" in advice
    (size,) = theta(recipe(f"{STAGE}.options.hidden=auto"))
    assert "hidden: is 2,048 (auto: the rule up to 4,096 classes, 2,048 beyond)" in size


def test_timing_theta_draws_nothing_from_the_generator():
    before = torch.get_rng_state()
    theta(recipe(f"{STAGE}.options.hidden=64"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "at most 81,420 meta images are scored in every iteration"),
        (["refresh=epoch"], "at most 81,420 meta images are scored in every epoch"),
        (["refresh=rolling"], "8,142 of at most 81,420 .* no result is older than 10 iterations"),
        (["refresh=rolling", "images_per_step=256"], "256 of at most 81,420 .* no result is older than 319 iterations"),
    ],
)
def test_scoring_is_told_with_the_age_of_its_results(words, expected):
    (line,) = scoring(recipe(*(f"{STAGE}.accuracy.{word}" for word in words)))
    assert re.fullmatch(rf"{STAGE}\.accuracy: {expected}", line)


@pytest.mark.parametrize("command", [["check"], ["train", "--check"]])
def test_both_commands_say_so(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["data.num_classes=50", f"{STAGE}.accuracy={{refresh: rolling, images_per_step: 7}}"]
    assert cli.main([*command, "digits_lt", *words]) == 0
    output = capsys.readouterr().out
    assert f"# {STAGE}.accuracy: 7 of at most 500 meta images" in output
    assert f"# {STAGE}.options.hidden: is 64; theta has " in output


def test_a_sample_level_network_takes_auto_too():
    assert load_recipe("cifar100_lt_sample_difficulty", [f"{STAGE}.options.hidden=auto"])
    assert theta(load_recipe("cifar100_lt_sample_difficulty")) == []


def test_without_a_number_of_classes_the_key_is_named():
    (line,) = theta(load_recipe("digits_lt"))
    assert "data.num_classes says it" in line
    assert scoring(load_recipe("digits_lt")) == []
