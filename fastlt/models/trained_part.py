"""Which parameters of a backbone are trained, and which of its BatchNorm layers keep their statistics.

The head, and what a method puts beside the network, is trained whatever is chosen here; a method may freeze more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastlt.models.parameter_names import BACKBONE, matching, nearest_names

WORDS = ("all", "head", "norms")


def trained_parameters(backbone: nn.Module, train: str | Sequence[str]) -> set[str]:
    """The names of the parameters of `backbone` that are trained.

    train: "all"; "head" for none of them; "norms" for those of its normalisation layers; or patterns, each of which
        takes every parameter whose name it matches, and all parameters of a module whose name it matches. The names are
        the backbone's own or the model's, which begin with "backbone."; `*` stands for any characters, dots too.
    Raises ValueError for norms without a normalisation layer, and for a pattern that matches nothing.
    """
    names = [name for name, _ in backbone.named_parameters()]
    if not isinstance(train, str):
        return {name for pattern in train for name in _matching(backbone, pattern, names)}
    assert train in WORDS, train
    if train == "norms":
        return _norms(backbone)
    return set(names) if train == "all" else set()


def frozen_norms(backbone: nn.Module, norm: str | None, trained: set[str]) -> set[str]:
    """The names of the BatchNorm layers of `backbone` that normalise with their running statistics in training too.

    norm: "train" for none of them, "frozen" for all; None for those whose parameters are not in `trained`.
    """
    layers = {name: layer for name, layer in backbone.named_modules() if isinstance(layer, _BatchNorm)}
    if norm is not None:
        return set(layers) if norm == "frozen" else set()
    if trained >= {name for name, _ in backbone.named_parameters()}:
        return set()
    return {name for name, layer in layers.items() if not any(f"{name}.{own}" in trained for own, _ in _own(layer))}


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a layer of `model` normalises with the statistics of a batch in training."""
    return any(isinstance(layer, _BatchNorm) for layer in model.modules())


def _norms(backbone: nn.Module) -> set[str]:
    # By the name of its class: timm has layers of its own, such as RmsNorm, which share no base with torch's.
    layers = [(name, layer) for name, layer in backbone.named_modules() if "norm" in type(layer).__name__.lower()]
    found = {f"{name}.{own}" if name else own for name, layer in layers for own, _ in _own(layer)}
    if not found:
        raise ValueError(
            "model.train: is 'norms', but the backbone has no normalisation layer with parameters; take head, all, or "
            "a list of names of its modules"
        )
    return found


def _own(layer: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return layer.named_parameters(recurse=False)


def _matching(backbone: nn.Module, pattern: str, names: list[str]) -> list[str]:
    own = pattern.removeprefix(BACKBONE)
    if pattern == "backbone":
        return names
    found = matching(names, own)
    if not found:
        near = nearest_names(names, own)
        top = [name for name, child in backbone.named_children() if next(child.parameters(), None) is not None]
        hint = f"; did you mean {' or '.join(near)}?" if near else f". Its modules are {', '.join(top)}"
        raise ValueError(
            f"model.train: {pattern!r} matches no parameter and no module with parameters of the backbone{hint}"
        )
    return found
