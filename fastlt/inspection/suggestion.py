"""A recipe that fits a data set: its values, why they are so, and its file."""

from __future__ import annotations

import math
import re
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import fastlt.models  # noqa: F401  (registers the networks that timm lacks)
from fastlt.inspection.profile import SMALL_SIDE, Profile
from fastlt.models.pretrained import check_reachable, config_of, input_config, is_published, read_published
from fastlt.recipe import load_recipe
from fastlt.recipe.yaml_text import dump
from fastlt.run.atomic_file import write_atomically
from fastlt.run.dataset import conversion_command
from fastlt.run.preflight import check_without_data
from loaders.order.crop import common_shape
from loaders.sources import SOURCES
from loaders.stored.atomic_folder import MANIFEST

FEW_IMAGES = 5000  # training images for which a small network is taken
BALANCED, MILD = 2, 10  # imbalance factors below which one loss is enough
SMALL_NETWORK, LARGE_NETWORK, FEW_NETWORK = "cifar_resnet32", "resnet50", "resnet18"
PHOTO_SIDE, PHOTO_LONGEST = 224, 400
SCORED_AT_ONCE = 1024  # meta images that are scored in every iteration
NAMES_OF_NOTHING = ("train", "training", "images", "data")  # folders that say nothing of what is in them
RUN_NAME = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Suggestion:
    """tree: the recipe as plain containers. reasons: a sentence each. interpolation: timm's, for pretrained weights."""

    tree: dict[str, Any]
    reasons: tuple[str, ...]
    interpolation: str | None = None

    @property
    def data(self) -> Mapping[str, Any]:
        return self.tree["data"]

    @property
    def stage(self) -> Mapping[str, Any]:
        return self.tree["stages"]["end_to_end"]

    @property
    def model(self) -> Mapping[str, Any]:
        return self.tree["model"]


def suggest(
    profile: Profile, data: Mapping[str, Any], backbone: str | None = None, *, fetchable: bool = True
) -> Suggestion:
    """A recipe for the images of a profile.

    data: the keys of the recipe's data that say which images they are. backbone: None chooses one.
    fetchable: whether pretrained weights can be had; without, the network begins at random.
    ValueError for a backbone that is not known.
    """
    name, why = (backbone, "as asked") if backbone else _choose_backbone(profile)
    config = pretrained_config(name) if fetchable else None
    pretrained = config is not None
    weights = "with its pretrained weights" if pretrained else "from random weights"
    reasons = [f"Network: {name}, {weights}: {why}."]
    if not fetchable:
        reasons.append(
            "Its pretrained weights are not on this machine and cannot be fetched, and a network that begins at random "
            "needs more epochs. Where they can be had, let `fastlt inspect` write this recipe anew."
        )
    images = _images(profile, name, config, reasons)
    tree: dict[str, Any] = {
        "data": {**data, "num_classes": len(profile.class_names), **_shots(profile, reasons), **images},
        "model": {"name": name, **({"pretrained": True} if pretrained else {})},
        "precision": "bf16" if torch.cuda.is_available() else "fp32",
        "stages": {"end_to_end": {**_method(profile, reasons), **_schedule(profile, name, pretrained, reasons)}},
    }
    stage = tree["stages"]["end_to_end"]
    if stage["method"] == "difficulty":
        stage["meta_batch_size"] = min(stage["batch_size"], len(profile.splits["meta"]))
    return Suggestion(tree, tuple(reasons), input_config(config).interpolation if config is not None else None)


def _choose_backbone(profile: Profile) -> tuple[str, str]:
    """The name of a network, and why."""
    side, count = _median_side(profile), len(profile.splits["train"])
    if side <= SMALL_SIDE:
        return SMALL_NETWORK, (
            f"half of the images have {side} pixels or less on their shorter side, and networks for photographs expect "
            "more"
        )
    if count >= FEW_IMAGES:
        return LARGE_NETWORK, f"there are {count:,} photographs to train on"
    return FEW_NETWORK, f"a small one, for {count:,} training images are few (below {FEW_IMAGES:,})"


def _median_side(profile: Profile) -> int:
    sizes = profile.known_sizes
    return int(np.median(sizes.min(axis=1))) if len(sizes) else PHOTO_SIDE


def pretrained_config(name: str) -> dict[str, Any] | None:
    """timm's configuration of a network's pretrained weights; None where there are none.

    ValueError for a network that is not known.
    """
    if is_published(name):
        return read_published(name).config
    if not timm.is_model(name.partition(".")[0]):
        near = timm.list_models(f"*{name}*")[:3]
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() has the names"
        raise ValueError(f"--backbone {name} is no network of timm{hint}")
    config = config_of(name)
    return config if config.get("hf_hub_id") or config.get("url") or config.get("file") else None


def _images(profile: Profile, name: str, config: dict[str, Any] | None, reasons: list[str]) -> dict[str, Any]:
    """The keys of the data that say how images are stored, cut and normalised."""
    for_small = name.startswith("cifar_")
    found: dict[str, Any]
    if config is not None:
        side = int(config.get("input_size", (3, PHOTO_SIDE, PHOTO_SIDE))[-1])
    else:
        side = min(SMALL_SIDE, max(32, 8 * round(_median_side(profile) / 8))) if for_small else PHOTO_SIDE
    sizes = profile.known_sizes
    same = common_shape(sizes[:, 0], sizes[:, 1]) if len(sizes) else None
    whole = config is None and same is not None and same[0] == same[1] and (for_small or same[0] == side)
    if whole and same is not None and same[0] <= SMALL_SIDE:
        side = same[0]
        found = {"image_size": side, "train_crop": "none", "eval_crop": "none"}
        augment: list[Any] = ["flip", {"random_crop": {"padding": max(1, side // 8)}}, {"cutout": {"size": side // 4}}]
    else:
        found = {"image_size": side, "train_crop": "random_resized", "eval_crop": "center"}
        if for_small:
            found["crop_scale"] = [0.5, 1.0]
        augment = ["flip", {"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.0}}]
    if not profile.converted and not SOURCES[profile.source].small and _median_side(profile) > SMALL_SIDE:
        found["storage"] = {"mode": "jpg", "max_resolution": max(PHOTO_LONGEST, math.ceil(1.15 * side))}
    if config is not None:
        found |= {"mean": "model", "std": "model", "eval_ratio": "model"}
    elif profile.decoding is not None:
        found |= {"mean": list(profile.decoding.mean), "std": list(profile.decoding.std)}
        reasons.append(f"mean and std: of the pixels of {profile.decoding.images:,} training images.")
    else:
        found |= {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    reasons.append("Images are flipped in training: take `flip` out where left and right mean something.")
    return {**found, "augment": augment}


def _shots(profile: Profile, reasons: list[str]) -> dict[str, Any]:
    """Groups by rank where (100, 20) puts all classes into one."""
    counts, classes = profile.class_counts, len(profile.class_names)
    if (
        sum(mask.any() for mask in counts.shot_masks().values()) > 1
        or classes < 3
        or counts.imbalance_factor < BALANCED
    ):
        return {}
    third = classes // 3
    reasons.append("Shots: thirds of the classes by rank, for by 100 and 20 images all are in one group.")
    return {"shots": {"ranks": [third, classes - 2 * third, third]}}


def _method(profile: Profile, reasons: list[str]) -> dict[str, Any]:
    """Method, loss, and how accuracies are kept."""
    factor, classes = profile.class_counts.imbalance_factor, len(profile.class_names)
    if factor < BALANCED:
        reasons.append(
            f"Method: plain cross-entropy, for the classes are nearly equal (imbalance factor {factor:.4g})."
        )
        return {"method": "plain", "loss": "cross_entropy"}
    meta, absent = len(profile.splits["meta"]), len(profile.absent("meta"))
    if factor < MILD:
        reasons.append(f"Method: balanced softmax, which costs nothing more, for an imbalance factor of {factor:.4g}.")
        return {"method": "plain", "loss": "balanced_softmax"}
    if 2 * absent > classes:
        reasons.append(
            f"Method: balanced softmax alone, for an imbalance factor of {factor:.4g}: {absent:,} of {classes:,} "
            "classes have no validation image, from which difficulty would learn their weights."
        )
        return {"method": "plain", "loss": "balanced_softmax"}
    reasons.append(
        f"Method: difficulty with balanced softmax, for an imbalance factor of {factor:.4g}. An iteration takes 2 to 4 "
        "plain ones; `method: plain` leaves the learned weights out."
    )
    exact = meta <= SCORED_AT_ONCE
    accuracy = {"refresh": "exact"} if exact else {"refresh": "rolling", "window": min(50, math.ceil(meta / 128))}
    return {"method": "difficulty", "loss": "balanced_softmax", "accuracy": accuracy}


def _schedule(profile: Profile, name: str, pretrained: bool, reasons: list[str]) -> dict[str, Any]:
    """Length, batch and learning rate, by the number of training images."""
    count = len(profile.splits["train"])
    batch = min(128, max(8, 2 ** int(math.log2(max(count / 16, 1)))), count)
    if pretrained:
        epochs, lr, decay, like = 30 * math.sqrt(62_500 / count), 0.01, 1e-4, "Places-LT's: 30 for 62,500 images"
        epochs = min(100, max(10, round(epochs)))
    elif name.startswith("cifar_"):
        epochs, lr, decay, like = 12_800 * 128 / count, 0.1, 2e-4, "CIFAR-LT's: 12,800 batches of 128"
        epochs = min(300, max(30, round(epochs)))
    else:
        epochs, lr, decay, like = 180 * 115_846 / count, 0.05, 5e-4, "ImageNet-LT's: 180 for 115,846 images"
        epochs = min(300, max(90, round(epochs)))
    reasons.append(
        f"Length: {epochs} epochs of {count:,} images, after {like}. Learning rate: {lr:g} for a batch of 128, in "
        f"proportion to {batch}."
    )
    return {
        "epochs": epochs,
        "batch_size": batch,
        "lr": float(f"{lr * batch / 128:.3g}"),
        "schedule": "cosine",
        "warmup": min(5, max(1, epochs // 20)),
        "weight_decay": decay,
        "evaluate_every": max(1, epochs // 20),
    }


def folder_for(place: Path) -> Path:
    """Where the converted data set goes: below data/, under the name of the folder or list, beside what is there."""
    whole = place.resolve()
    while whole.name.lower() in NAMES_OF_NOTHING:
        whole = whole.parent
    name = RUN_NAME.sub("_", whole.stem if place.is_file() else whole.name).strip("._") or "mine"
    folder = Path("data") / name
    return folder if not folder.exists() or (folder / MANIFEST).is_file() else Path("data") / f"{name}_converted"


def write_recipe(
    path: Path, profile: Profile, data: Mapping[str, Any], backbone: str | None
) -> tuple[Suggestion, str | None]:
    """Write the suggested recipe to a file that is not there yet, after `fastlt check`'s checks of it.

    Returns it, and the command that converts its data set; None where nothing is to be converted by hand.
    ValueError for a file that is there, and for what the checks refuse.
    """
    suggestion = suggest(profile, data, backbone)
    if suggestion.model.get("pretrained") and not is_published(suggestion.model["name"]):
        try:
            check_reachable(suggestion.model["name"])
        except ValueError:
            suggestion = suggest(profile, data, backbone, fetchable=False)
    body = dump(suggestion.tree)
    command = _conversion(path, profile, body)
    text = _header(path, profile, suggestion, command) + body
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(text, encoding="utf-8", errors="surrogateescape")
        check_without_data(load_recipe(draft))
    refuse_existing(path)
    write_atomically(path, text.encode("utf-8", "surrogateescape"))
    return suggestion, command


def refuse_existing(path: Path) -> None:
    """ValueError for a recipe's file that is there already."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"--recipe {path} is there already, and is not overwritten: give another name")


def _header(path: Path, profile: Profile, suggestion: Suggestion, command: str | None) -> str:
    """The comment above a recipe. command: that converts its data set."""
    counts = profile.class_counts
    lines = [
        f"{profile.place}: {len(profile.class_names):,} classes, {len(profile.splits['train']):,} training images, "
        f"imbalance factor {counts.imbalance_factor:.4g}. Written by `fastlt inspect`."
    ]
    header = _comment(lines)
    if command:
        header += f"# Convert once:\n#   {command}\n"
    header += f"# Then:\n#   fastlt train {path}\n"
    more = list(suggestion.reasons)
    shared = profile.copies.groups["two_splits"]
    if shared:
        more.append(f"{shared:,} groups of equal images are in two splits: accuracies will be too high while they are.")
    if suggestion.interpolation:
        more.append(
            "mean, std and eval_ratio are those of timm's configuration of the weights. It resamples images by "
            f"{suggestion.interpolation} interpolation, and fastlt's loaders shrink by area."
        )
    return header + _comment(more)


def _conversion(path: Path, profile: Profile, body: str) -> str | None:
    """The command that makes the data set of the recipe; None where nothing is to be converted by hand."""
    if profile.converted or SOURCES[profile.source].small:
        return None
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(body, encoding="utf-8", errors="surrogateescape")
        data = load_recipe(draft).data
    assert data.converted is not None
    command = conversion_command(data, Path(data.converted))
    if any(profile.copies.groups.values()):
        command += " --allow-duplicates"
    return command + (" --on-error skip" if profile.unreadable else "")


def _comment(lines: list[str]) -> str:
    wrapped = [part for line in lines for part in textwrap.wrap(line, 116, break_on_hyphens=False)]
    return "".join(f"# {line}\n" for line in wrapped)
