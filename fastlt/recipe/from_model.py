"""Keys whose values are those of the pretrained weights that a recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm

from fastlt.models.pretrained import config_of, input_config, is_published, read_published
from fastlt.recipe.schema import Recipe
from fastlt.typed_yaml import RecipeError

MODEL = "model"  # the value that stands for that of the network
ALIKE = 1e-3  # recipes round means
KEYS = {"mean": "mean", "std": "std", "eval_ratio": "crop"}


def take_from_model(tree: dict[str, Any]) -> None:
    """Put numbers and names in for what a recipe takes from its network, in place, before its types are checked.

    `model.name: local-dir:PATH` and `hf-hub:NAME` become the name of the network and, with `pretrained: true`, the file
    of its weights as `model.checkpoint`. `data.mean`, `data.std` and `data.eval_ratio` that are `model` become those of
    the pretrained weights, and so do a mean and a std that are not given. RecipeError where that cannot be.
    """
    data, model = tree.get("data"), tree.get("model")
    if not isinstance(data, dict) or not isinstance(model, dict) or not isinstance(model.get("name"), str):
        return  # noted where types are checked
    pretrained = bool(model.get("pretrained") or model.get("checkpoint"))
    try:
        config = _published(model) if is_published(model["name"]) else None
        wanted = [key for key in KEYS if data.get(key) == MODEL]
        if pretrained:
            wanted += [key for key in ("mean", "std") if key not in data]
        if not wanted:
            return
        if not pretrained:
            raise RecipeError(
                f"data.{wanted[0]}: is model, the value of pretrained weights, but model.pretrained is false and "
                "model.checkpoint is not set; give numbers"
            )
        if config is None and not timm.is_model(model["name"]):
            return
        found = input_config(config_of(model["name"]) if config is None else config)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"model.name: {error}") from None
    for key in wanted:
        value = getattr(found, KEYS[key])
        data[key] = list(value) if isinstance(value, tuple) else value


def _published(model: dict[str, Any]) -> dict[str, Any]:
    """Exchange a name that says where a network is published, in place; returns timm's configuration of it."""
    if model.get("checkpoint"):
        raise RecipeError(
            f"model.checkpoint: is set, and model.name {model['name']} names weights too; give one source of them"
        )
    published = read_published(model["name"])
    model["name"] = published.architecture
    if model.pop("pretrained", False):
        model["checkpoint"] = str(published.weights)
    return published.config


def unlike_model(recipe: Recipe) -> list[str]:
    """A line that says in what a recipe prepares images otherwise than its pretrained weights had them, if it does."""
    data, model = recipe.data, recipe.model
    if not (model.pretrained or model.checkpoint) or not timm.is_model(model.name):
        return []
    theirs = input_config(config_of(model.name))
    others = [
        f"data.{key} {_shown(ours)} for {_shown(of_model)}"
        for key, ours, of_model in (
            ("mean", data.mean, theirs.mean),
            ("std", data.std, theirs.std),
            ("eval_ratio", (data.eval_ratio,), (theirs.crop if data.eval_crop == "center" else data.eval_ratio,)),
        )
        if any(abs(a - b) >= ALIKE for a, b in zip(ours, of_model, strict=True))
    ]
    if data.train_crop != "none" or data.eval_crop != "none":
        others.append(f"shrinking by area for {theirs.interpolation}")
    if not others:
        return []
    return [
        f"images are prepared otherwise than for the pretrained weights of {model.name}: {', '.join(others)}; mean, "
        "std and eval_ratio may be model, and loaders have no other resampling (dali: bilinear)"
    ]


def _shown(values: Sequence[float]) -> str:
    numbers = ", ".join(f"{value:.4g}" for value in values)
    return numbers if len(values) == 1 else f"[{numbers}]"
