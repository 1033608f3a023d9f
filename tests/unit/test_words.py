"""What a new user writes wrongly is answered with what to write: keys, stages, names, lengths, files of weights."""

from __future__ import annotations

import re

import pytest
import torch
import yaml

from fastlt import cli
from fastlt.models import build_model
from fastlt.models.known_networks import network_like
from fastlt.names import nearest
from fastlt.recipe import load_recipe

STAGE = "stages.end_to_end"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # A key at the wrong place: the real stages of the recipe are named.
        (["digits_lt", "lr=0.1"], "lr: unknown key.*did you mean stages.end_to_end.lr?"),
        (["cifar100_lt_ours_crt", "epochs=5"], "did you mean stages.end_to_end.epochs or stages.{second}.epochs?"),
        (["digits_lt", "batch_size=32"], "did you mean stages.end_to_end.batch_size"),
        (["digits_lt", "method=plain"], "did you mean stages.end_to_end.method?"),
        (["digits_lt", "driver_weight=1"], "did you mean stages.end_to_end.options.driver_weight?"),
        (["digits_lt", f"{STAGE}.driver_weight=1"], "did you mean stages.end_to_end.options.driver_weight?"),
        (["digits_lt", f"{STAGE}.refresh=epoch"], "did you mean stages.end_to_end.accuracy.refresh?"),
        (["digits_lt", "root=/data"], "did you mean data.root?"),
        (["digits_lt", "num_workers=2"], "did you mean data.num_workers?"),
        (["digits_lt", "loader=ffcv"], "did you mean data.loader?"),
        (["digits_lt", "checkpoint=x.pth"], "did you mean model.checkpoint?"),
        (["digits_lt", "pretrained=true"], "did you mean model.pretrained?"),
        (["digits_lt", "imbalance_factor=10"], "did you mean data.imbalance_factor?"),
        (["digits_lt", "data.seed=1"], "did you mean seed?"),
        # A word of other libraries.
        (["digits_lt", "learning_rate=0.1"], "did you mean stages.end_to_end.lr?"),
        (["digits_lt", f"{STAGE}.scheduler=cosine"], "did you mean stages.end_to_end.schedule?"),
        (["digits_lt", "backbone=resnet50"], "did you mean model.name?"),
        (["digits_lt", "model.arch=resnet50"], "did you mean model.name?"),
        (["digits_lt", "output_dir=x"], "did you mean runs?"),
        (["digits_lt", "Seed=1"], "did you mean seed?"),
        # A stage that is not there.
        (
            ["digits_lt", "stages.e2e.lr=0.1"],
            "stages.e2e.lr: there is no stage 'e2e'.*did you mean stages.end_to_end.lr?",
        ),
        (["cifar100_lt_ours_crt", "stages.stage_2.lr=1"], "there is no stage 'stage_2', the stages of the recipe are "),
        # Names of a table, in other spellings.
        (["digits_lt", f"{STAGE}.method=Difficulty-Net"], "did you mean 'difficulty'?"),
        (["digits_lt", f"{STAGE}.loss=CrossEntropy"], "did you mean 'cross_entropy'?"),
        (["digits_lt", f"{STAGE}.loss=ce"], "did you mean 'cross_entropy'?"),
        (["digits_lt", "data.loader=DALI"], "did you mean 'dali'?"),
        # Values of another form.
        (["digits_lt", "trackers=tensorboard"], "trackers: .*allowed: a list, such as [tensorboard]"),
        (["digits_lt", "data.augment=flip"], "data.augment: .*allowed: a list, such as [flip]"),
        (["digits_lt", "data.split=0.8/0.1/0.1"], "data.split: .*allowed: a list of 3 values, such as [0.8, 0.1, 0.1]"),
        (["digits_lt", f"{STAGE}.lr=0,1"], "allowed: a number, as 0.1"),
        # Not a recipe.
        (["seed=1", "digits_lt"], "seed=1: is an override and no recipe; the recipe comes first"),
        (["digits_lt.yml"], "nearest: digits_lt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_with_what_was_meant(words, expected):
    second = list(load_recipe("cifar100_lt_ours_crt").stages)[-1]
    with pytest.raises(
        ValueError, match="(?s)" + re.escape(expected.replace("{second}", second)).replace(r"\.\*", ".*")
    ):
        load_recipe(words[0], words[1:])


def test_a_run_folder_in_the_place_of_a_recipe_is_answered_with_its_recipe(tmp_path):
    with pytest.raises(ValueError, match="is a folder; give the path of a recipe file"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text("x")
    with pytest.raises(ValueError, match=rf"the recipe of the run in it is {tmp_path}/recipe\.yaml"):
        load_recipe(tmp_path)


def test_dashes_before_a_key_are_answered_with_the_word(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", "digits_lt", "--lr=0.1"])
    assert stopped.value.code == 2
    assert "a key of the recipe is written without dashes, lr=0.1" in capsys.readouterr().err


def test_capitals_dashes_and_initials_are_no_mistakes():
    assert nearest("Class-Balanced", ["class_balanced", "focal"]) == "class_balanced"
    assert nearest("las", ["label_aware_smoothing", "focal"]) == "label_aware_smoothing"
    assert nearest("zzz", ["label_aware_smoothing", "focal"]) is None


# epochs and iterations


def lengths(recipe):
    stage = next(iter(recipe.stages.values()))
    return stage.iterations, stage.epochs, stage.warmup, stage.milestones, stage.evaluate_every


@pytest.fixture
def over(tmp_path):
    """A recipe over a base whose stage has these keys."""

    def make(base, own, *words):
        tree = load_recipe("digits_lt").to_tree()
        del tree["name"]
        kept = {"method": "plain", "lr": 0.1, "batch_size": 32}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump({**tree, "stages": {"one": {**kept, **base}}}))
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"base": ["base.yaml"], "stages": {"one": own}}))
        return load_recipe(path, words)

    return make


IN_ITERATIONS = {
    "iterations": 600,
    "warmup": 60,
    "evaluate_every": 50,
    "schedule": "multistep",
    "milestones": [300, 480],
}
IN_EPOCHS = {"epochs": 200, "warmup": 5, "schedule": "multistep", "milestones": [160, 180]}


def test_epochs_replace_the_iterations_of_a_base_and_the_other_way_round(over):
    for recipe in (over(IN_ITERATIONS, {"epochs": 10}), over(IN_ITERATIONS, {}, "stages.one.epochs=10")):
        assert lengths(recipe) == (None, 10, pytest.approx(1.0), pytest.approx([5, 8]), 1)
    for recipe in (over(IN_EPOCHS, {"iterations": 1000}), over(IN_EPOCHS, {}, "stages.one.iterations=1000")):
        assert lengths(recipe) == (1000, None, pytest.approx(25), pytest.approx([800, 900]), 5)


def test_what_is_given_with_the_new_length_stays(over):
    new = {"epochs": 10, "warmup": 2, "milestones": [4], "evaluate_every": 3}
    words = [f"stages.one.{key}={value}" for key, value in new.items()]
    for recipe in (over(IN_ITERATIONS, new), over(IN_ITERATIONS, {}, *words), over(IN_ITERATIONS, {}, *words[::-1])):
        assert lengths(recipe) == (None, 10, 2, [4], 3)


def test_the_same_unit_changes_nothing_else_and_both_are_still_refused(over):
    assert lengths(over(IN_EPOCHS, {"epochs": 400})) == (None, 400, 5, [160, 180], 1)
    whole = "stages.one={method: plain, lr: 1, iterations: 3}"
    assert lengths(over(IN_EPOCHS, {}, whole, "stages.one.iterations=4")) == (4, None, 0, [], 1)
    with pytest.raises(ValueError, match="both are given of iterations and epochs"):
        over(IN_EPOCHS, {}, "stages.one.iterations=5", "stages.one.epochs=5")
    with pytest.raises(ValueError, match=r"stages\.one\.epochs: is a string"):
        over(IN_ITERATIONS, {}, "stages.one.epochs=many")


# Files of weights


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "resnet18 with 7 classes"),
        ("resnet50", "resnet50 with 7 classes"),
        ("cifar_resnet32", "cifar_resnet32 with 7 classes"),
        ("resnet10", "resnet10 with 7 classes"),
        ("vit_tiny_patch16_224", "vit_tiny_patch16, 12 blocks with 7 classes"),
        ("convnext_atto", "a ConvNeXt with 7 classes"),
        ("tf_efficientnet_lite0", "an EfficientNet or a MobileNet with 7 classes"),
    ],
)
def test_a_network_is_known_by_its_weights(name, expected):
    with torch.device("meta"):
        model = build_model(name, num_classes=7)
    assert network_like(model.state_dict()) == expected
    assert network_like({f"module.{key}": value for key, value in model.state_dict().items()}) == expected


def test_a_wrong_checkpoint_says_which_network_it_is_of(tmp_path):
    other = build_model("resnet18", num_classes=7)
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"not of this model.*the file is of resnet18 with 7 classes; "):
        build_model("resnet10", num_classes=7, checkpoint=tmp_path / "weights.pt")
    saved = {"model": other.state_dict(), "recipe": {"name": "mine", "model": {"name": "resnet18"}}}
    torch.save(saved, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="the file is of resnet18, a checkpoint of the run 'mine'"):
        build_model("resnet10", num_classes=7, checkpoint=tmp_path / "best.pt")
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "strange.pt")
    with pytest.raises(ValueError, match=r"which has \d+ weights; \d+ missing"):
        build_model("resnet10", num_classes=7, checkpoint=tmp_path / "strange.pt")
