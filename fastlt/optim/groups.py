"""Groups of parameters by weight decay and by layer, as timm makes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from fastlt.models import Classifier

LAST = "head"  # the name of the last layer in a network that says none


class _AsOfTimm(nn.Module):
    """A classifier under the names that timm gives a whole network: backbone's own, then those of its last layer.

    Our head and what a method trains beside the two count as the last layer.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        last = getattr(model.backbone, "pretrained_cfg", {}).get("classifier") or LAST
        self.last = last if isinstance(last, str) else last[0]
        if hasattr(model.backbone, "group_matcher"):
            self.group_matcher = model.backbone.group_matcher

    def named_parameters(self, *arguments: Any, **more: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            inside = name.removeprefix("backbone.")
            yield (inside if inside != name else f"{self.last}.{name.partition('.')[2]}"), parameter


def check_layer_decay(model: Classifier, name: str) -> None:
    """ValueError unless the network `name` says which parameters are of which layer."""
    if not hasattr(model.backbone, "group_matcher"):
        raise ValueError(
            f"layer_decay: is set, but {name} does not say which of its parameters are of which layer (timm's "
            "group_matcher); leave it out, or take another network"
        )


def parameter_groups(
    model: Classifier,
    groups: list[dict[str, Any]],
    *,
    weight_decay: float,
    decay: str = "all",
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """The groups of a method, each split by weight decay and by layer; the same groups where neither is asked for.

    decay: all, or weights: norms, biases, other vectors, and what the network itself excludes have no weight decay.
    layer_decay: the rate of a layer over that of the layer after it; the "lr_factor" of a group is multiplied by it.
        The groups of the last layer come first, so that the first rate is that of the stage.
    """
    if decay == "all" and layer_decay is None:
        return groups
    view = _AsOfTimm(model)
    decays = _weight_decays(view, weight_decay) if decay == "weights" else {}
    scales = {} if layer_decay is None else _layer_scales(view, layer_decay)
    split: dict[tuple[int, float, float], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            scale, own_decay = scales.get(parameter, 1.0), decays.get(parameter, weight_decay)
            new = {**group, "params": [], "weight_decay": own_decay}
            if scale != 1:
                new["lr_factor"] = group.get("lr_factor", 1.0) * scale
            split.setdefault((index, -scale, own_decay), new)["params"].append(parameter)
    return [split[key] for key in sorted(split, key=lambda key: (key[0], key[1]))]


def _weight_decays(view: _AsOfTimm, weight_decay: float) -> dict[Tensor, float]:
    excluded = getattr(view.model.backbone, "no_weight_decay", set)()
    made = param_groups_weight_decay(view, weight_decay, no_weight_decay_list=excluded)
    return {p: group["weight_decay"] for group in made for p in group["params"]}


def _layer_scales(view: _AsOfTimm, layer_decay: float) -> dict[Tensor, float]:
    return {
        p: group["lr_scale"]
        for group in param_groups_layer_decay(view, layer_decay=layer_decay)
        for p in group["params"]
    }
