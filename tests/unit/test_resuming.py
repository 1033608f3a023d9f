"""What a run that goes on may change of its recipe: the rules, and the page that states them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fastlt.recipe import Standing, changes, load_recipe, recipe_from_tree
from fastlt.recipe.resuming import RULES, table
from fastlt.run.recorded import recorded_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "digits_lt.yaml"
STAGE, SECOND = "stages.end_to_end", "stages.second"
TWO = f"{SECOND}={{method: plain, iterations: 4, batch_size: 32, lr: 0.01}}"
FIRST_STAGE, SECOND_STAGE = Standing(0), Standing(1)


def rules(words, standing, *, before=(TWO,)):
    """The rules under which these words change the recipe of a run of two stages."""
    old, new = load_recipe(RECIPE, before), load_recipe(RECIPE, [*before, *words])
    return [change.rule for change in changes(old, new, standing)]


@pytest.mark.parametrize(
    ("word", "standing", "rule"),
    [
        ("name=b", FIRST_STAGE, "harmless"),
        ("runs=elsewhere", FIRST_STAGE, "harmless"),
        ("data.root=/images", FIRST_STAGE, "harmless"),
        ("data.num_workers=1", FIRST_STAGE, "harmless"),
        ("checkpoints_kept=5", FIRST_STAGE, "harmless"),
        ("num_threads=3", FIRST_STAGE, "rounding"),
        ("data.converted=/moved", FIRST_STAGE, "same_content"),
        ("data.num_classes=10", FIRST_STAGE, "same_content"),
        (f"{STAGE}.iterations=5000", FIRST_STAGE, "longer"),
        (f"{STAGE}.iterations=5000", SECOND_STAGE, "fixed"),
        (f"{STAGE}.iterations=60", FIRST_STAGE, "fixed"),
        (f"{STAGE}.lr=0.01", FIRST_STAGE, "fixed"),
        (f"{STAGE}.lr=0.01", Standing(0, diverged="end_to_end"), "lower"),
        (f"{STAGE}.lr=0.5", Standing(0, diverged="end_to_end"), "fixed"),
        (f"{STAGE}.lr=0.01", Standing(1, diverged="second"), "fixed"),
        (f"{SECOND}.lr=0.5", FIRST_STAGE, "not_begun"),
        (f"{SECOND}.iterations=2", FIRST_STAGE, "not_begun"),
        (f"{SECOND}.iterations=2", SECOND_STAGE, "fixed"),
        (f"{STAGE}.batch_size=16", FIRST_STAGE, "fixed"),
        (f"{STAGE}.loss=focal", FIRST_STAGE, "fixed"),
        ("precision=bf16", FIRST_STAGE, "fixed"),
        ("seed=1", FIRST_STAGE, "fixed"),
        ("data.loader=torch", FIRST_STAGE, "fixed"),
        ("data.augment=[flip]", FIRST_STAGE, "fixed"),
    ],
)
def test_each_change_falls_under_its_rule(word, standing, rule):
    assert rules([word], standing) == [rule]


def test_epochs_in_place_of_iterations_are_refused():
    assert rules([f"{STAGE}.iterations=null", f"{STAGE}.epochs=900"], FIRST_STAGE) == ["fixed", "fixed"]


def test_stages_that_have_not_begun_may_come_and_go():
    assert set(rules([f"{SECOND}=null"], FIRST_STAGE)) == {"not_begun"}
    assert rules([f"{SECOND}=null"], SECOND_STAGE) == ["fixed"]
    assert set(rules([TWO], FIRST_STAGE, before=())) == {"not_begun"}


def test_a_change_names_the_key_and_both_values():
    old, new = load_recipe(RECIPE), load_recipe(RECIPE, ["seed=1"])
    (change,) = changes(old, new, FIRST_STAGE)
    assert (change.line, change.refused, change.trains_more) == ("seed: 0 and 1", True, False)


def test_a_recipe_comes_back_from_its_tree():
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = load_recipe(path)
        assert recipe_from_tree(recipe.to_tree()) == recipe, path


def test_the_page_has_the_table_of_the_rules():
    assert table() in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert all(rule.change in table() for rule in RULES.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_of_the_first_version_has_that_versions_defaults(tmp_path, precision):
    """It did not write them down; those of today are others."""
    recipe = load_recipe("digits_lt", [f"runs={tmp_path}", "name=old", f"precision={precision}"])
    tree = recipe.to_tree()
    tree["stages"]["end_to_end"]["options"] = {}
    recipe.folder.mkdir()
    (recipe.folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    before = recorded_recipe(recipe.folder).stages["end_to_end"].options
    assert (before.driver_target, before.tangent) == ("relative", "fp32" if precision == "bf16" else None)
    found = changes(recorded_recipe(recipe.folder), recipe, Standing(0))
    assert any("driver_target" in change.line for change in found), "to go on with another target is told"
