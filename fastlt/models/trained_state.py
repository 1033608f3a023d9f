"""The weights of a model as a checkpoint keeps them: all of them, or the trained part of a pretrained one alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from fastlt.models.classifier import Classifier
from fastlt.models.frozen_part import FROZEN, FrozenPart

WEIGHTS, BACKBONE = "model", "backbone."


def trained_state(model: Classifier) -> dict[str, Any]:
    """What a checkpoint keeps of a model: its weights as "model", and as "frozen" which ones are left out, if any.

    The weights are those of `state_dict`, not copies. Frozen weights are left out where they can be had again: in a
    backbone that began as a pretrained one.
    """
    weights = model.state_dict()
    frozen_part = getattr(model, "frozen_part", None)  # a network that is not ours has none
    if frozen_part is None:
        return {WEIGHTS: weights}
    kept = {name: value for name, value in weights.items() if name not in model.frozen}
    return {WEIGHTS: kept, FROZEN: asdict(frozen_part)}


def load_trained_state(model: Classifier, state: Mapping[str, Any]) -> None:
    """Put a `trained_state` into a model, in place; ValueError as `check_frozen_part`.

    RuntimeError, as `load_state_dict`, for weights of another model.
    """
    check_frozen_part(model, state)
    weights: dict[str, Tensor] = state[WEIGHTS]
    if leaves_out_weights(state):
        own = model.state_dict()
        of_backbone = {name for name in own if name.startswith(BACKBONE)}
        # A run on features has no backbone to keep, neither weights nor statistics: all of it is frozen.
        left_out = model.frozen if weights.keys() & of_backbone else of_backbone
        if model.takes_features:
            weights = {name: value for name, value in weights.items() if not name.startswith(BACKBONE)}
        weights = {**{name: own[name] for name in left_out}, **weights}
    model.load_state_dict(weights)


def leaves_out_weights(state: Mapping[str, Any]) -> bool:
    """Whether a `trained_state` can only be loaded into a model with the pretrained weights that it began with."""
    return FROZEN in state


def check_frozen_part(model: Classifier, state: Mapping[str, Any]) -> None:
    """ValueError where weights are left out of a `trained_state` that are not those of `model`."""
    if not leaves_out_weights(state):
        return
    before = FrozenPart(**state[FROZEN])
    alone = f"the checkpoint keeps the trained part alone, and the rest was {before.name} from {before.source}"
    if model.frozen_part is None:
        raise ValueError(f"{alone}; give these weights again, by model.pretrained or model.checkpoint")
    if model.frozen_part.sha256 != before.sha256:
        raise ValueError(
            f"{alone}, whose weights are others now (sha256 {model.frozen_part.sha256[:12]}, and "
            f"{before.sha256[:12]} when it was saved); bring the same weights back"
        )
