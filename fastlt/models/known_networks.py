"""Which network a file of weights is of, as far as the file or the names and shapes in it tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlt.models.frozen_part import FROZEN
from fastlt.models.weight_files import Tensors, read_saved

# Blocks of the layers of a ResNet, whether they are bottlenecks, and its name.
RESNETS = {
    ((1, 1, 1, 1), False): "resnet10",
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
VIT_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
# A name that only one family of networks has.
FAMILIES = {
    "visual.transformer.resblocks": "a CLIP model with its text encoder",
    "text_projection": "a CLIP model with its text encoder",
    "absolute_pos_embed": "a Swin transformer",
    "relative_position_bias_table": "a Swin transformer",
    "conv_stem.weight": "an EfficientNet or a MobileNet",
    "conv_dw.weight": "a ConvNeXt",
    "denseblock1": "a DenseNet",
    "features.0.weight": "a VGG or an AlexNet",
}
CLASSIFIERS = re.compile(r"(?:^|\.)(?:fc|head|classifier|head\.fc|head\.linear|head\.layer)\.weight$")


def network_of_run(path: str | Path) -> str | None:
    """The network of a checkpoint of fastlt, by the recipe that is in it; None for other files."""
    saved = read_saved(path)
    recipe = saved.get("recipe") if isinstance(saved, Mapping) else None
    model = recipe.get("model") if isinstance(recipe, Mapping) else None
    if not isinstance(recipe, Mapping) or not isinstance(model, Mapping) or "name" not in model:
        return None
    return f"{model['name']}, a checkpoint of the run {recipe.get('name')!r}"


def left_out_of(path: str | Path) -> str | None:
    """What a checkpoint of fastlt leaves out that keeps the trained part of a network alone; None for other files."""
    saved = read_saved(path)
    frozen = saved.get(FROZEN) if isinstance(saved, Mapping) else None
    if not isinstance(frozen, Mapping) or not {"name", "source"} <= frozen.keys():
        return None
    return f"{frozen['name']} from {frozen['source']}"


def network_like(state: Tensors) -> str | None:
    """The network that has weights of these names and shapes, and its number of classes; None when it is not known."""
    network = _resnet(state) or _vit(state) or _family(state)
    if network is None:
        return None
    heads = [tensor for name, tensor in state.items() if CLASSIFIERS.search(name) and tensor.ndim == 2]
    return f"{network} with {len(heads[0])} classes" if heads else network


def _resnet(state: Tensors) -> str | None:
    blocks = [_count(rf"layer{number}\.(\d+)\.", state) for number in range(1, 5)]
    if not all(blocks[:3]):
        return None
    if not blocks[3]:
        return f"cifar_resnet{6 * blocks[0] + 2}"
    bottleneck = any(re.search(r"layer1\.0\.conv3\.weight$", name) for name in state)
    one, two, three, four = blocks
    known = RESNETS.get(((one, two, three, four), bottleneck))
    return known or f"a ResNet with {', '.join(map(str, blocks))} blocks in its layers"


def _vit(state: Tensors) -> str | None:
    patch = _first(r"patch_embed\.proj\.weight$", state)
    if patch is None or patch.ndim != 4 or _first(r"cls_token$", state) is None:
        return None
    size = VIT_WIDTHS.get(patch.shape[0], f"of width {patch.shape[0]}")
    blocks = _count(r"blocks\.(\d+)\.", state)
    return f"vit_{size}_patch{patch.shape[-1]}, {blocks} blocks"


def _family(state: Tensors) -> str | None:
    return next((what for part, what in FAMILIES.items() if any(part in name for name in state)), None)


def _count(numbered: str, state: Tensors) -> int:
    """How many numbers stand in names where the pattern has its group."""
    return len({found[1] for name in state if (found := re.search(numbered, name))})


def _first(pattern: str, state: Tensors) -> Any:
    return next((tensor for name, tensor in state.items() if re.search(pattern, name)), None)
