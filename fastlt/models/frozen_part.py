"""Which weights of a backbone a checkpoint can go without, because they can be had again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FROZEN = "frozen"  # under which a checkpoint says so


@dataclass(frozen=True)
class FrozenPart:
    """Which frozen weights of a pretrained backbone a checkpoint goes without.

    name: of the backbone. source: where its weights come from, in words. sha256: `content_hash` of the frozen ones.
    """

    name: str
    source: str
    sha256: str


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors with their names, types and shapes, whatever their order and layout in memory."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data if values.numel() else b"")
    return digest.hexdigest()
