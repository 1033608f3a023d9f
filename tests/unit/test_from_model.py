"""What a recipe takes from its pretrained network: mean, std, crop, folders in timm's form, other input sizes."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from fastlt.models import build_model, pretrained
from fastlt.recipe import RecipeError, load_recipe, unlike_model
from fastlt.recipe.from_model import take_from_model

VIT = "vit_tiny_patch16_224"
TREE = {
    "data": {"source": "digits", "image_size": 32},
    "model": {"name": VIT, "pretrained": True},
    "stages": {"end_to_end": {"method": "plain", "lr": 0.1, "iterations": 10}},
}
HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def load(tmp_path):
    def load(*words, tree=TREE):
        path = tmp_path / "row.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_recipe(path, words)

    return load


@pytest.fixture
def folder(tmp_path):
    """A network in timm's form: config.json and model.safetensors."""
    torch.manual_seed(3)
    model = timm.create_model("cifar_resnet8", num_classes=5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "cifar_resnet8",
        "num_classes": 5,
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.4, 0.4], "crop_pct": 0.9, "classifier": "fc"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, model


def test_pretrained_weights_bring_their_mean_and_std(load):
    recipe = load()
    assert (recipe.data.mean, recipe.data.std) == (HALF, HALF)
    assert recipe.data.eval_ratio == 224 / 256, "which is a default of its own"
    assert load("model.name=resnet18").data.mean == (0.485, 0.456, 0.406)
    assert load("data.eval_ratio=model").data.eval_ratio == 0.9
    own = load("data.mean=[0.1, 0.2, 0.3]")
    assert (own.data.mean, own.data.std) == ((0.1, 0.2, 0.3), HALF)


def test_a_tag_brings_its_own(load):
    assert load("model.name=vit_base_patch16_clip_224.openai").data.mean == pytest.approx(
        (0.4815, 0.4578, 0.4082), abs=1e-3
    )
    with pytest.raises(
        RecipeError, match=r"model.name: vit_tiny_patch16_224 has no pretrained weights 'nowhere'; there are augreg"
    ):
        load(f"model.name={VIT}.nowhere")


def test_the_resolved_recipe_holds_the_numbers(load, tmp_path):
    recipe = load("data.eval_ratio=model")
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe


def test_without_pretrained_weights_there_is_nothing_to_take(load):
    with pytest.raises(
        RecipeError, match=r"data.mean: is model, the value of pretrained weights, but model.pretrained"
    ):
        load("model.pretrained=false", "data.mean=model")
    with pytest.raises(RecipeError, match=r"data.mean: is missing"):
        load("model.pretrained=false")


def test_a_difference_to_the_weights_is_said_in_one_line(load):
    assert unlike_model(load()) == []
    (line,) = unlike_model(load("data.mean=[0.485, 0.456, 0.406]", "data.eval_crop=center"))
    assert "data.mean [0.485, 0.456, 0.406] for [0.5, 0.5, 0.5]" in line
    assert "data.eval_ratio 0.875 for 0.9" in line
    assert "shrinking by area for bicubic" in line
    assert "data.std" not in line
    assert unlike_model(load("model.pretrained=false", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]")) == []


def test_a_folder_in_timms_form_becomes_its_network_and_its_file(load, folder):
    place, model = folder
    recipe = load(f"model.name=local-dir:{place}", "data.eval_ratio=model")
    assert recipe.model.name == "cifar_resnet8"
    assert (recipe.model.checkpoint, recipe.model.pretrained) == (str(place / "model.safetensors"), False)
    assert (recipe.data.mean, recipe.data.eval_ratio) == ((0.1, 0.2, 0.3), 0.9)
    built = build_model(recipe.model.name, num_classes=7, checkpoint=recipe.model.checkpoint)
    for name, value in built.backbone.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    untrained = load(f"model.name=local-dir:{place}", "model.pretrained=false", "data.mean=[0,0,0]", "data.std=[1,1,1]")
    assert (untrained.model.name, untrained.model.checkpoint) == ("cifar_resnet8", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: (place / "model.safetensors").unlink(), "has no model.safetensors or pytorch_model.bin"),
        (lambda place: (place / "config.json").unlink(), "has no config.json"),
        (lambda place: (place / "config.json").write_text("{"), "is not timm's config.json"),
        (
            lambda place: (place / "config.json").write_text('{"architecture": "bert"}'),
            "of 'bert', which is no network",
        ),
        (
            lambda place: (place / "config.json").write_text(
                '{"architecture": "resnet18", "model_args": {"output_stride": 8}}'
            ),
            "model_args .*output_stride",
        ),
    ],
)
def test_a_folder_that_holds_no_network_is_refused(load, folder, change, message):
    change(folder[0])
    with pytest.raises(RecipeError, match=f"model.name: .*{message}"):
        load(f"model.name=local-dir:{folder[0]}")


def test_two_sources_of_weights_are_refused(load, folder):
    with pytest.raises(RecipeError, match=r"model.checkpoint: is set, and model.name local-dir:"):
        load(f"model.name=local-dir:{folder[0]}", f"model.checkpoint={folder[0] / 'model.safetensors'}")


def test_without_the_hub_a_repository_is_refused_in_one_sentence(load, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=r"hf-hub:timm/nothing is not on this machine.*local-dir:FOLDER") as error:
        load("model.name=hf-hub:timm/nothing")
    assert "\n" not in str(error.value)


def test_a_repository_in_the_cache_is_taken_from_there(load, folder, monkeypatch):
    place, _ = folder
    asked = []

    def cached(repository, name, revision=None):
        asked.append((repository, revision))
        return str(place / name) if (place / name).is_file() else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    recipe = load("model.name=hf-hub:me/mine@v2")
    assert set(asked) == {("me/mine", "v2")}
    assert (recipe.model.name, recipe.model.checkpoint) == ("cifar_resnet8", str(place / "model.safetensors"))


@pytest.mark.parametrize("name", [VIT, "swin_tiny_patch4_window7_224"])
def test_weights_of_another_input_size_are_resampled_by_timm(name, tmp_path, caplog):
    torch.manual_seed(0)
    size = {VIT: (64, 32), "swin_tiny_patch4_window7_224": (224, 256)}[name]
    window = {} if name == VIT else {"window_size": 7}
    other = timm.create_model(name, num_classes=3, img_size=size[0], **window)
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    built = build_model(name, num_classes=3, image_size=size[1], checkpoint=tmp_path / "weights.pt")
    whole = timm.create_model(name, num_classes=3, img_size=size[1])
    convert = import_module(type(other).__module__).checkpoint_filter_fn
    whole.load_state_dict(convert(dict(other.state_dict()), whole), strict=False)
    for key, value in built.backbone.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key
    if name == VIT:
        assert "resampled for the input size of the network: backbone.pos_embed" not in caplog.text
        assert "pos_embed (1, 17, 192) to (1, 5, 192)" in caplog.text
        expected = resample_abs_pos_embed(other.pos_embed, (2, 2), (4, 4), num_prefix_tokens=1)
        torch.testing.assert_close(built.backbone.pos_embed, expected)


def test_weights_of_another_network_are_still_refused(tmp_path):
    other = timm.create_model("vit_small_patch16_224", num_classes=3, img_size=64)
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="not of this model"):
        build_model(VIT, num_classes=3, image_size=32, checkpoint=tmp_path / "weights.pt")


def test_a_tree_of_wrong_types_is_left_to_the_check_of_types():
    for tree in ({}, {"data": 1, "model": {}}, {"data": {}, "model": {"name": 3}}, {"data": {}, "model": "x"}):
        before = json.dumps(tree)
        take_from_model(tree)
        assert json.dumps(tree) == before


def test_the_input_of_weights_is_that_of_timm():
    found = pretrained.input_config(pretrained.config_of(VIT))
    assert (found.mean, found.crop, found.interpolation) == (HALF, 0.9, "bicubic")
