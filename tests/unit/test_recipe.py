"""A recipe is composed, overridden and typed; a mistake is answered with key, value and what is allowed."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from fastlt.ranges import RANGE
from fastlt.recipe import (
    AccuracyRecipe,
    DataRecipe,
    ModelRecipe,
    Recipe,
    RecipeError,
    StageRecipe,
    Standing,
    StorageRecipe,
    changes,
    load_recipe,
)
from fastlt.recipe.compose import Override, merge
from fastlt.state import ShotRanks
from fastlt.steps import STEPS
from fastlt.steps.difficulty import DifficultyStep
from fastlt.steps.learned_weights import Approximation

BASE = {
    "data": {"source": "digits", "image_size": 8, "mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4], "augment": ["flip"]},
    "model": {"name": "cifar_resnet8"},
    "stages": {"end_to_end": {"method": "plain", "lr": 0.1, "iterations": 100}},
}
STAGE = "stages.end_to_end"


@pytest.fixture
def write(tmp_path):
    def write(tree, name="row.yaml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def test_a_row_says_only_what_is_particular_to_it(write):
    write(BASE, "base/all.yaml")
    row = {
        "base": ["base/all.yaml"],
        "data": {"augment": []},
        "stages": {"end_to_end": {"method": "difficulty", "options": {"driver_target": "absolute"}}},
    }
    recipe = load_recipe(write(row))
    stage = recipe.stages["end_to_end"]
    assert (stage.method, stage.lr) == ("difficulty", 0.1)
    assert stage.options == DifficultyStep.Options(driver_target="absolute")
    assert recipe.data.augment == [], "lists replace"
    assert recipe.name == "row", "named after its file"


def test_overrides_reach_every_depth_and_read_yaml(write):
    words = [
        "seed=3",
        f"{STAGE}.lr=1e-2",
        f"{STAGE}.milestones=[10, 20]",
        f"{STAGE}.schedule=multistep",
        "data.root=null",
    ]
    recipe = load_recipe(write(BASE), [*words, f"{STAGE}.options={{}}", "name=other"])
    stage = recipe.stages["end_to_end"]
    assert (recipe.seed, recipe.name, stage.lr, stage.milestones) == (3, "other", 0.01, [10.0, 20.0])


def test_a_tilde_is_the_home_folder_in_every_path(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "images").mkdir()
    for name in ("train.txt", "test.txt", "weights.pt"):
        (tmp_path / name).touch()
    write(BASE, "low.yaml")
    images = {"source": "list_file", "root": "~/images", "converted": "~/x", "train_list": "~/train.txt"}
    recipe = load_recipe(
        write({"base": ["~/low.yaml"], "data": images, "runs": "~/runs"}, "mine.yaml").replace(tmp_path / "my.yaml"),
        ["data.test_list=~/test.txt", "model.checkpoint=~/weights.pt"],
    )
    assert load_recipe("~/my.yaml", ["data.test_list=~/test.txt", "model.checkpoint=~/weights.pt"]) == recipe
    data = recipe.data
    paths = [data.root, data.converted, data.train_list, data.test_list, recipe.model.checkpoint, recipe.runs]
    assert paths == [str(tmp_path / n) for n in ("images", "x", "train.txt", "test.txt", "weights.pt", "runs")]
    assert load_recipe("~/my.yaml", ["data.converted=a//$HOME/~"]).data.converted == "a//$HOME/~"


def test_every_number_has_a_range():
    """But those whose checks say more, or whose limits lie in other keys."""
    apart = {"DataRecipe.mean", "DataRecipe.std"}
    options = [step.Options for step in STEPS.values()]
    for cls in (Recipe, DataRecipe, StorageRecipe, ModelRecipe, StageRecipe, AccuracyRecipe, Approximation, *options):
        for field in dataclasses.fields(cls):
            number = re.search(r"\b(int|float)\b", str(field.type))
            assert not number or RANGE in field.metadata or f"{cls.__name__}.{field.name}" in apart, (
                f"{cls}.{field.name}"
            )


def test_the_resolved_recipe_is_the_same_recipe(write, tmp_path):
    recipe = load_recipe(write(BASE), ["seed=5"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(resolved) == recipe


def test_the_resolved_recipe_has_every_option_of_the_method(write, tmp_path):
    words = [f"{STAGE}.method=difficulty", f"{STAGE}.options.approximate={{every: 2}}"]
    recipe = load_recipe(write(BASE), words)
    written = yaml.safe_load(recipe.to_yaml())["stages"]["end_to_end"]["options"]
    assert written["approximate"] == {"late_weights": False, "every": 2, "lookahead_only": None}
    assert (written["hidden"], written["driver_weight"]) == (None, 0.3)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(resolved) == recipe
    (change,) = changes(recipe, load_recipe(write(BASE), words[:1]), Standing(0))
    assert change.line == f"{STAGE}.options.approximate.every: 2 and 1"


def test_an_option_without_a_default_is_missed_even_where_no_option_is_given(write):
    with pytest.raises(RecipeError, match=rf"{STAGE}\.options\.experts: is missing; .* \(options of method 'lfme'\)"):
        load_recipe(write(BASE), [f"{STAGE}.method=lfme"])


def test_a_stage_can_be_left_out(write):
    tree = merge(BASE, {"stages": {"second": {"method": "plain", "lr": 0.1, "epochs": 2}}})
    assert list(load_recipe(write(tree)).stages) == ["end_to_end", "second"]
    assert list(load_recipe(write(tree), ["stages.second=null"]).stages) == ["end_to_end"]


MISTAKES = [
    ("sede=1", ["sede", "unknown key", "seed"]),
    ("data.imbalance=100", ["data.imbalance", "data.imbalance_factor"]),
    (f"{STAGE}.learning_rate=1", [f"{STAGE}.learning_rate", "allowed keys here"]),
    ("seed=one", ["seed", "'one'", "an integer"]),
    ("seed=1.5", ["seed", "1.5", "an integer"]),
    ("seed=true", ["seed", "True", "an integer"]),
    ("channels_last=1", ["channels_last", "true or false"]),
    (f"{STAGE}.lr=fast", [f"{STAGE}.lr", "'fast'", "a number"]),
    ("data.shots=[100]", ["data.shots", "a list of 2 values"]),
    ("data.augment=flip", ["data.augment", "a list"]),
    ("data=digits", ["data", "a mapping"]),
    ("data.source=cifar", ["data.source", "'cifar'", "cifar10"]),
    ("precision=fp16", ["precision", "fp16", "underflow", "set precision=bf16"]),
    (f"{STAGE}.accuracy.precision=fp16", [f"{STAGE}.accuracy.precision", "fp16", "bf16"]),
    ("sync_batch_norm=1", ["sync_batch_norm", "true or false"]),
    ("precision=bf61", ["precision", "bf61", "did you mean 'bf16'"]),
    (f"{STAGE}.method=dificulty", [f"{STAGE}.method", "difficulty", "did you mean"]),
    (f"{STAGE}.options.driver_target=absolute", [f"{STAGE}.options.driver_target", "plain"]),
    (f"{STAGE}.loss=balanced", [f"{STAGE}.loss", "balanced_softmax"]),
    (f"{STAGE}.loss_options.gamma=1", [f"{STAGE}.loss", "gamma"]),
    ("model.name=resnet23", ["model.name", "resnet23", "resnet"]),
    ("data.augment=[flop]", ["data.augment", "flop", "flip"]),
    (f"{STAGE}.lr=.nan", [f"{STAGE}.lr", "no finite number (nan)", "allowed: a number"]),
    (f"{STAGE}.weight_decay=inf", [f"{STAGE}.weight_decay", "no finite number (inf)"]),
    (f"{STAGE}.milestones=[.nan]", [f"{STAGE}.milestones[0]", "no finite number"]),
    ("checkpoint_every_s=.nan", ["checkpoint_every_s", "no finite number"]),
    (f"{STAGE}.iterations=null", [STAGE, "neither"]),
    (f"{STAGE}.iterations=0", [f"{STAGE}.iterations", ">= 1"]),
    (f"{STAGE}.lr=0", [f"{STAGE}.lr", "> 0"]),
    (f"{STAGE}.momentum=1.0", [f"{STAGE}.momentum", "[0, 1)"]),
    (f"{STAGE}.warmup=100", [f"{STAGE}.warmup", "less than the length"]),
    (f"{STAGE}.milestones=[5]", [f"{STAGE}.milestones", "multistep"]),
    (f"{STAGE}.schedule=multistep", [f"{STAGE}.milestones", "needs milestones"]),
    (f"{STAGE}.accuracy.window=0", [f"{STAGE}.accuracy.window", ">= 1"]),
    ("data.shots=[20,100]", ["data.shots", "upper threshold first"]),
    ("data.std=[0.1,0.0,0.1]", ["data.std", "above 0"]),
    ("data.std=[60,60,60]", ["data.std", "divide by 255?"]),
    ("data.mean=[120,120,120]", ["data.mean", "divide by 255?"]),
    ("data.mean=[.nan,0,0]", ["data.mean", "nan"]),
    ("data.eval_ratio=1.5", ["data.eval_ratio", "1.5", "in (0, 1]"]),
    ("data.crop_scale=[0.5,2]", ["data.crop_scale", "[0.5, 2]", "numbers in (0, 1]"]),
    ("data.crop_scale=[0.9,0.1]", ["data.crop_scale", "(0.9, 0.1)", "0 < low <= high <= 1"]),
    ("data.crop_aspect=[0,2]", ["data.crop_aspect", "[0, 2]", "numbers > 0"]),
    ("data.num_workers=-1", ["data.num_workers", "-1", "from 0 to 1024"]),
    ("seed=-1", ["seed: is -1", "from 0 to 4294967295"]),
    ("model.drop_rate=1", ["model.drop_rate: is 1", "in [0, 1)"]),
    ("data.image_size=0", ["data.image_size: is 0", "from 1 to 65535"]),
    (f"seed={'9' * 401}", ["seed", "an integer of 401 digits", "64 bits"]),
    (f"{STAGE}.lr={'9' * 401}", [f"{STAGE}.lr", "an integer of 401 digits"]),
    (f"seed={'9' * 5000}", ["seed", "an integer of 5000 digits"]),
    (f"{STAGE}.lr=1e999", [f"{STAGE}.lr", "no finite number"]),
    ("seed=2001-01-01", ["seed", "a string ('2001-01-01')", "an integer"]),
    ("seed=!!int ''", ["seed", "line 1", "the tag of a number"]),
    ("seed=1:30", ["seed", "a string ('1:30')"]),
    ("name=!!binary aGk=", ["name", "tag", "binary"]),
    ("data.augment=!!set {flip}", ["data.augment", "tag", "set"]),
    ("name=!!python/object/apply:os.system [ls]", ["name", "tag", "python"]),
    (f'name="{chr(92)}0"', ["name", "holds a character"]),
    (f"name={'x' * 300}", ["name", "at most 200 bytes"]),
    ("stages.a/b={method: plain, lr: 1, epochs: 1}", ["stages", "a/b", "no slash"]),
    (f"data.augment={'[' * 100}{']' * 100}", ["data.augment", "nested more than 50 levels"]),
    ("data.augment=&a [*a]", ["data.augment", "more than 50 levels"]),
    (f"{STAGE}.loss=[focal]", [f"{STAGE}.loss", "a string"]),
    (f"{STAGE}.loss_options.gamma=x", [f"{STAGE}.loss", "gamma"]),
    (f"{STAGE}.loss=focal {STAGE}.loss_options.gamma=-1", [f"{STAGE}.loss", "gamma", "at least 0"]),
    ("data.augment=[{auto_augment: {policy: [a]}}]", ["data.augment", "policy"]),
    ("runs=~no_such_user/x", ["runs", "~no_such_user"]),
    ("data.num_workers=0", ["data.num_workers", "0 with data.loader torch"]),
    ("data.imbalance_factor=0.5", ["data.imbalance_factor", ">= 1"]),
    ("data.convention=ldam", ["data.convention", "cifar10"]),
    ("data.train_list=list.txt", ["data.train_list", "list_file"]),
    ("model.checkpoint=absent.pt", ["model.checkpoint", "absent.pt"]),
    ("name=a/b", ["name", "no slash"]),
    ("stages=null", ["stages"]),
    ("stages={}", ["stages", "at least one"]),
]


@pytest.mark.parametrize(("word", "expected"), MISTAKES, ids=[word for word, _ in MISTAKES])
def test_every_mistake_is_named(write, word, expected):
    words = word.split(" stages") if " stages" in word else [word]
    with pytest.raises(RecipeError) as error:
        load_recipe(write(BASE), [words[0], *(f"stages{more}" for more in words[1:])])
    for part in expected:
        assert part in str(error.value)
    assert len(str(error.value)) < 1500


def test_lean_is_refused_where_nothing_is_recorded(write):
    lean = [f"{STAGE}.method=difficulty", f"{STAGE}.options.lean=true"]
    for word in ("precision=bf16", "compile=cudagraph"):
        assert load_recipe(write(BASE), [*lean, word]).stages["end_to_end"].options.lean
    with pytest.raises(RecipeError, match=r"options\.lean: .* set compile: none"):
        load_recipe(write(BASE), [*lean, "compile=inductor"])


def test_a_tangent_in_mixed_precision_needs_mixed_precision(write):
    words = [f"{STAGE}.method=difficulty", f"{STAGE}.options.tangent=autocast"]
    assert load_recipe(write(BASE), [*words, "precision=bf16"]).stages["end_to_end"].options.tangent == "autocast"
    with pytest.raises(RecipeError, match=r"options\.tangent: is autocast with precision: fp32"):
        load_recipe(write(BASE), words)
    with pytest.raises(RecipeError, match=r"options\.tangent: is autocast with compile: inductor"):
        load_recipe(write(BASE), [*words, "precision=bf16", "compile=inductor"])
    with pytest.raises(RecipeError, match="did you mean 'autocast'"):
        load_recipe(write(BASE), [words[0], f"{STAGE}.options.tangent=autocst", "precision=bf16"])


@pytest.mark.parametrize("option", ["lr", "weight_decay", "driver_weight"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-1"])
def test_a_meta_step_takes_no_number_that_it_could_not_train_with(write, option, value):
    words = [f"{STAGE}.method=difficulty", f"{STAGE}.options.{option}={value}"]
    with pytest.raises(RecipeError, match=rf"^{STAGE}\.options.*{option}.*number"):
        load_recipe(write(BASE), words)


def test_several_mistakes_come_in_one_message(write):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(BASE), ["sede=1", "data.shots=3"])
    assert len(str(error.value).splitlines()) == 2


def test_a_missing_key_is_named_with_its_type(write):
    tree = merge(BASE, {})
    tree["model"] = {}
    with pytest.raises(RecipeError, match=r"model\.name: is missing; give a string"):
        load_recipe(write(tree))


@pytest.mark.parametrize("word", ["seed", "=1", "data..root=1", "seed=[1"])
def test_a_word_that_is_no_override_is_refused(word):
    with pytest.raises(RecipeError, match=r"override|YAML"):
        Override.read(word).apply({})


def test_an_override_below_a_value_is_refused(write):
    with pytest.raises(RecipeError, match="seed is an integer"):
        load_recipe(write(merge(BASE, {"seed": 1})), ["seed.deeper=1"])


@pytest.mark.parametrize(("content", "expected"), [("a: [1", "not valid YAML"), ("- 1", "a list"), ("", "nothing")])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, expected):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=expected):
        load_recipe(path)


def test_an_absent_file_and_a_base_of_a_base_are_refused(write, tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.yaml: cannot be read"):
        load_recipe(tmp_path / "absent.yaml")
    write(BASE, "base/low.yaml")
    write({"base": ["low.yaml"]}, "base/middle.yaml")
    with pytest.raises(RecipeError, match="one level"):
        load_recipe(write({"base": ["base/middle.yaml"]}))


HARMLESS = [
    "name=b",
    "runs=elsewhere",
    "resume=never",
    "log_every=1",
    "checkpoint_every_s=1",
    "num_threads=1",
    "trackers=[tensorboard]",
    "data.root=/images",
    "data.download=false",
    "data.num_workers=1",
]


@pytest.mark.parametrize("word", HARMLESS)
def test_a_harmless_key_changes_no_result(write, word):
    (change,) = changes(load_recipe(write(BASE)), load_recipe(write(BASE), [word]), Standing(0))
    assert change.rule in ("harmless", "rounding")


@pytest.mark.parametrize("word", ["seed=1", "precision=bf16", "data.converted=x", "data.augment=[]"])
def test_a_key_that_changes_the_result_is_not_harmless(write, word):
    (change,) = changes(load_recipe(write(BASE)), load_recipe(write(BASE), [word]), Standing(0))
    assert change.key == word.split("=")[0]
    assert change.rule in ("fixed", "same_content")


def test_shots_are_thresholds_or_ranks():
    recipe = load_recipe("digits_lt", ["data.shots={ranks: [3, 4, 3]}"])
    assert recipe.data.shots == ShotRanks((3, 4, 3))
    with pytest.raises(RecipeError, match=r"data\.shots"):
        load_recipe("digits_lt", ["data.shots={ranks: [3, 4]}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"{STAGE}.optimizer=adamv"], "stages.end_to_end.optimizer: unknown optimizer 'adamv'.*did you mean"),
        (
            [f"{STAGE}.optimizer=adamw", f"{STAGE}.optimizer_options.beta=1"],
            "end_to_end.optimizer_options.beta: unknown",
        ),
        ([f"{STAGE}.min_lr=0.2", f"{STAGE}.schedule=cosine"], "end_to_end.min_lr: is 0.2; allowed: not above lr, 0.1"),
        ([f"{STAGE}.min_lr=0.01"], "end_to_end.min_lr: is 0.01 with schedule 'constant'"),
        ([f"{STAGE}.clip={{norm: 1, value: 1}}"], "end_to_end.clip: .*norm and value of norm"),
        ([f"{STAGE}.clip={{norm: 0}}"], "end_to_end.clip.norm: is 0; allowed: a number > 0"),
        ([f"{STAGE}.lr_factors={{head: 0}}"], "end_to_end.lr_factors: is {'head': 0}; allowed: numbers > 0"),
        ([f"{STAGE}.accumulate=3"], "end_to_end.accumulate: is 3, but batch_size 128 does not divide"),
        (
            [f"{STAGE}.method=difficulty", f"{STAGE}.accumulate=4", f"{STAGE}.meta_batch_size=10"],
            "end_to_end.accumulate: is 4, but meta_batch_size 10 does not divide",
        ),
        ([f"{STAGE}.method=mixup", f"{STAGE}.accumulate=2"], "end_to_end.accumulate: is 2, but method 'mixup'.*plain"),
        ([f"{STAGE}.loss=equalization", f"{STAGE}.accumulate=2"], "end_to_end.accumulate: .*draws for a batch"),
        (
            [f"{STAGE}.method=difficulty", f"{STAGE}.accumulate=2", f"{STAGE}.options.lean=true"],
            "end_to_end.options.lean: is true with accumulate 2",
        ),
        (
            [f"{STAGE}.method=difficulty", f"{STAGE}.options.lookahead=preconditioned"],
            "end_to_end.options.lookahead: is 'preconditioned' with optimizer 'sgd'.*adamw",
        ),
        (
            [f"{STAGE}.method=mwn", f"{STAGE}.optimizer=lion", f"{STAGE}.options.lookahead=preconditioned"],
            "end_to_end.options.lookahead: is 'preconditioned' with optimizer 'lion'",
        ),
    ],
)
def test_what_the_optimizer_of_a_stage_does_not_allow_is_refused(write, words, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(BASE), words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "options.lookahead is sgd, with optimizer sgd"),
        ([f"{STAGE}.optimizer=adamw"], "options.lookahead is preconditioned, with optimizer adamw"),
        ([f"{STAGE}.optimizer=lamb"], "options.lookahead is sgd, with optimizer lamb"),
        (
            [f"{STAGE}.optimizer=adamw", f"{STAGE}.options.lookahead=sgd"],
            "options.lookahead is sgd, with optimizer adamw",
        ),
    ],
)
def test_a_recipe_tells_which_lookahead_follows(write, words, expected):
    recipe = load_recipe(write(BASE), [f"{STAGE}.method=difficulty", *words])
    assert recipe.follows() == [f"{STAGE}.{expected}"]
