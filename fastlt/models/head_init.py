"""How a new head begins: with class means of the features, rows of a file, zeros, or the bias that sigmoids want."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from fastlt.models.classifier import Classifier
from fastlt.models.heads import CosineHead, Head, LinearHead

CLASS_MEAN, ZEROS, UNIFORM_PRIOR = "class_mean", "zeros", "uniform_prior"
NAMES = (CLASS_MEAN, ZEROS, UNIFORM_PRIOR)


def read_rows(path: str | Path) -> Tensor:
    """The one matrix in a .npy, .safetensors or torch.save file: float32 (R, C), on the CPU; ValueError otherwise."""
    path, key = Path(path), "model.head_init"
    if not path.is_file():
        raise ValueError(f"{key}: {path} is not a file; give {', '.join(NAMES)}, or a file with one row a class")
    try:
        if path.suffix == ".npy":
            held = torch.from_numpy(np.load(path, allow_pickle=False))
        elif path.suffix == ".safetensors":
            held = load_file(path)
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
        found = list(held.values()) if isinstance(held, dict) else [held]
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:150]
        raise ValueError(f"{key}: {path} cannot be read ({reason}); write it by numpy.save or torch.save") from None
    if len(found) != 1 or not isinstance(found[0], Tensor) or found[0].ndim != 2:
        raise ValueError(f"{key}: {path} holds no single matrix; write one, with a row for each class")
    rows = found[0].float()
    if not rows.isfinite().all() or not rows.any(dim=1).all():
        raise ValueError(f"{key}: {path} has a row that is zero or not finite; write the features of every class")
    return rows


def check_head_init(init: str, model: Classifier) -> None:
    """ValueError for a beginning that the head of `model` cannot have."""
    if init in NAMES:
        return
    rows, head = read_rows(init), model.head
    if rows.shape != (head.out_features, head.in_features):
        raise ValueError(
            f"model.head_init: {init} has {rows.shape[0]} rows of {rows.shape[1]} numbers, where the head has "
            f"{head.out_features} classes and {head.in_features} features; write one row a class, in the order of the "
            "labels, in the space of the pooled features"
        )


def init_head(
    head: Head, init: str, class_means: Callable[[], Tensor], read: Callable[[str], Tensor] = read_rows
) -> None:
    """Let a head begin as `model.head_init` says, in place.

    class_means: gives the mean features (C, D). read: gives the rows of a file.
    """
    if init == CLASS_MEAN:
        set_head(head, class_means(), means=True)
    elif init == ZEROS:
        set_head(head, torch.zeros(head.out_features, head.in_features), means=False)
    elif init == UNIFORM_PRIOR:
        set_uniform_prior(head)
    else:
        set_head(head, read(init), means=False)


@torch.no_grad()
def set_head(head: Head, rows: Tensor, *, means: bool) -> None:
    """Let a head begin with a row of weights (C, D) a class, in place.

    A cosine head takes their directions. A linear head takes them as they are with a bias of 0, and class `means` with
    a bias of -|row|^2 / 2: its largest logit is then that of the nearest mean.
    """
    head = _plain(head)
    rows = rows.to(next(head.parameters()).device)
    if isinstance(head, CosineHead):
        head.weight.copy_(F.normalize(rows, dim=1))
        return
    assert isinstance(head, LinearHead), type(head)
    head.weight.copy_(rows)
    head.bias.copy_(-rows.square().sum(1) / 2 if means else torch.zeros_like(head.bias))


@torch.no_grad()
def set_uniform_prior(head: Head) -> None:
    """Let a linear head begin with a bias of -log(C - 1), in place; its weights stay random.

    A sigmoid of each logit then begins near 1 / C, and a sum of C binary losses is not led by the C - 1 classes that a
    sample is not of. Lin et al. 2017 (RetinaNet); Cui et al. 2019 and their code.
    """
    head = _plain(head)
    assert isinstance(head, LinearHead), type(head)
    head.bias.fill_(-math.log(head.out_features - 1))


def _plain(head: Head) -> Head:
    """The head inside one that wraps it, such as that of an expert for some classes."""
    inner = getattr(head, "inner", None)
    return _plain(inner) if isinstance(inner, Head) else head
