"""BALMS as slow and plain as its definition: one draw after the other, the head's step unrolled and differentiated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LR, MOMENTUM, DECAY, RATE_LR = 0.3, 0.9, 0.01, 0.05


def balanced_softmax(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    return F.cross_entropy(logits + counts.log(), labels, reduction="none")


def first_rates(counts: Tensor, power: float) -> Tensor:
    """1 / pi^power over (its minimum + its maximum), through the inverse of the sigmoid."""
    rates = 1 / (counts / counts.sum()) ** power
    rates = rates / (min(rates) + max(rates))
    return torch.log(rates) - torch.log(1 - rates)


def draw(psi: Tensor, pool_labels: Tensor, noise: Tensor) -> tuple[list[int], Tensor]:
    """Which image each draw takes, and the draws' straight-through weights."""
    chosen, weights = [], []
    for row in noise:
        sums = torch.stack([torch.log(torch.sigmoid(psi[y])) for y in pool_labels]) + row
        soft = torch.exp(sums) / torch.exp(sums).sum()
        hard = torch.zeros(len(row), dtype=row.dtype)
        hard[sums.argmax()] = 1
        straight_through = hard + soft - soft.detach()
        chosen.append(int(sums.argmax()))
        weights.append((hard * straight_through).sum())
    return chosen, torch.stack(weights)


def follow(head, features_of, batches, counts: Tensor, *, power: float, factor: int, processes: int, seed: int):
    """Train the weight and bias of `head` (a dict, changed in place) on the batches; returns psi (C,).

    features_of: images to features. batches: ((images, labels), (meta_images, meta_labels)). With several processes the
    pool and the draws are cut into as many parts, in order.
    """
    psi = first_rates(counts, power).clone().requires_grad_()
    adam = torch.optim.Adam([psi], lr=RATE_LR, foreach=False)
    velocity = dict.fromkeys(head, 0.0)
    generator = torch.Generator().manual_seed(seed)
    for (images, labels), (meta_images, meta_labels) in batches:
        size = len(labels) // processes
        draws = size // factor
        waiting = torch.empty((draws * processes, size), dtype=torch.float64).exponential_(generator=generator)
        features, noise = features_of(images), -torch.log(waiting)
        leaves = {name: value.clone().requires_grad_() for name, value in head.items()}

        weighted = []
        for part in range(processes):
            mine, rows = slice(part * size, (part + 1) * size), slice(part * draws, (part + 1) * draws)
            chosen, weights = draw(psi, labels[mine], noise[rows])
            logits = F.linear(features[mine][chosen], leaves["weight"], leaves["bias"])
            weighted.append(weights * balanced_softmax(logits, labels[mine][chosen], counts))
        objective = torch.cat(weighted).mean()
        slopes = torch.autograd.grad(objective, list(leaves.values()), create_graph=True)
        ahead, after = {}, {}
        for (name, value), slope in zip(leaves.items(), slopes, strict=True):
            velocity[name] = MOMENTUM * velocity[name] + (slope + DECAY * value)
            ahead[name] = value - LR * velocity[name]
            after[name] = ahead[name].detach()
            velocity[name] = velocity[name].detach()
        meta_logits = F.linear(features_of(meta_images), ahead["weight"], ahead["bias"])
        (psi.grad,) = torch.autograd.grad(F.cross_entropy(meta_logits, meta_labels), [psi])
        adam.step()
        head.update(after)
    return psi.detach()
