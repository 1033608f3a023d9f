"""Whether a state is finite: weights, buffers, moments, and all else that a checkpoint holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlt.device.distributed import Reducer


def not_finite(state: dict[str, Any], reducer: Reducer, device: torch.device) -> list[str]:
    """The places in a nested state whose tensors hold a NaN or an infinity on any process, such as "model.fc.weight".

    state: of the same form on every process. device: over which `reducer` works. Waits for the device, once.
    """
    groups: dict[Any, list[tuple[str, Tensor]]] = defaultdict(list)
    for place, tensor in _floats(state, ""):
        groups[tensor.device, tensor.dtype].append((place, tensor))
    places = [place for group in groups.values() for place, _ in group]
    # The smallest and the largest value are finite when all are, and a NaN is both; a sum of finite ones may overflow.
    extremes = [torch.stack([torch.stack(torch.aminmax(t)) for _, t in group]) for group in groups.values()]
    bad = torch.cat([(~torch.isfinite(one)).any(1).float().to(device) for one in extremes])
    reducer.sum_([bad])
    return [place for place, count in zip(places, bad.tolist(), strict=True) if count]


def _floats(state: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in nested containers, each with its place."""
    if isinstance(state, Tensor):
        if state.is_floating_point() and state.numel():
            yield place, state
    elif isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _floats(value, f"{place}.{key}" if place else str(key))
