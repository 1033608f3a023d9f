"""Groups of parameters by weight decay and by layer, as timm makes them, and by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from types import MappingProxyType
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from fastlt.models import Classifier
from fastlt.models.parameter_names import matching, nearest_names

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


def check_lr_factors(model: Classifier, lr_factors: Mapping[str, float]) -> None:
    """ValueError for a pattern that decides the rate of no parameter of `model`, as a method has prepared it."""
    names = [name for name, _ in model.named_parameters()]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    taken = {pattern: set(matching(names, pattern)) for pattern in lr_factors}
    for one, other in combinations(lr_factors, 2):
        if taken[one] & taken[other] and len(taken[one]) == len(taken[other]):
            raise ValueError(
                f"lr_factors: {one!r} and {other!r} both match {min(taken[one] & taken[other])}, and neither is the "
                "narrower one; name what each of them is for"
            )
    deciding = {pattern for name, pattern in _narrowest(names, lr_factors).items() if name in trained}
    for pattern in lr_factors:
        if pattern in deciding:
            continue
        if taken[pattern] & trained:
            raise ValueError(f"lr_factors: narrower patterns take all parameters of {pattern!r}; leave it out")
        near = nearest_names([name for name in names if name in trained], pattern)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"lr_factors: {pattern!r} matches no parameter that is trained, and no module with such parameters{hint}"
        )


def _narrowest(names: list[str], patterns: Iterable[str]) -> dict[str, str]:
    """The names that patterns take, each with that one of its patterns which takes the fewest names."""
    taken = {pattern: matching(names, pattern) for pattern in patterns}
    ordered = sorted(taken, key=lambda pattern: -len(taken[pattern]))
    return {name: pattern for pattern in ordered for name in taken[pattern]}


def parameter_groups(
    model: Classifier,
    groups: list[dict[str, Any]],
    *,
    weight_decay: float,
    decay: str = "all",
    layer_decay: float | None = None,
    lr_factors: Mapping[str, float] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """The groups of a method, each split by weight decay and by rate; the same groups where nothing of it is asked for.

    decay: all, or weights: norms, biases, other vectors, and what the network itself excludes have no weight decay.
    layer_decay: the rate of a layer over that of the layer after it; the "lr_factor" of a group is multiplied by it.
    lr_factors: patterns of names and by what the "lr_factor" is multiplied too; of several the narrowest one counts.
    Parts of a group whose rate is not multiplied come first, so that the first rate is that of the stage.
    """
    if decay == "all" and layer_decay is None and not lr_factors:
        return groups
    view = _AsOfTimm(model)
    decays = _weight_decays(view, weight_decay) if decay == "weights" else {}
    scales = {} if layer_decay is None else _layer_scales(view, layer_decay)
    parameters = dict(model.named_parameters())
    by_name = {parameters[name]: lr_factors[one] for name, one in _narrowest([*parameters], lr_factors).items()}
    split: dict[tuple[int, bool, float, float], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            scale = scales.get(parameter, 1.0) * by_name.get(parameter, 1.0)
            own_decay = decays.get(parameter, weight_decay)
            new = {**group, "params": [], "weight_decay": own_decay}
            if scale != 1:
                new["lr_factor"] = group.get("lr_factor", 1.0) * scale
            split.setdefault((index, scale != 1, -scale, own_decay), new)["params"].append(parameter)
    return [split[key] for key in sorted(split, key=lambda key: key[:3])]


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
