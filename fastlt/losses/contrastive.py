"""Losses that compare the samples of a batch with each other: parametric contrastive (PaCo) and robust (DRO-LT).

They take more than logits and labels, so a step calls them by name; they are not in the table of per-sample losses.
"""

from __future__ import annotations

import torch
from torch import Tensor


def parametric_contrastive(
    class_logits: Tensor,
    similarities: Tensor,
    labels: Tensor,
    other_labels: Tensor,
    own: Tensor,
    alpha: float,
) -> Tensor:
    """PaCo's loss of each anchor (b,): cross-entropy over class centres and other samples, with several positives.

    -sum_p w_p log softmax(logits)_p / sum_p w_p over the logits [class_logits, similarities], where the anchor's class
    centre has w = 1, each sample of its class w = `alpha`, and the anchor itself is no candidate at all.

    class_logits: (b, C), with the log prior added where balanced softmax is wanted. similarities: (b, S), q·k / T.
    labels: int64 (b,); other_labels: int64 (S,). own: int64 (b,), the column of `similarities` that is the anchor.
    Float32 or float64; nothing is changed. alpha = 0 is cross-entropy over C + S - 1 candidates, and with no samples
    but the anchor it is that of the class logits alone. Source: Cui et al. 2021, with the weights of the authors'
    release (beta = gamma = 1).
    """
    itself = torch.zeros_like(similarities, dtype=torch.bool).scatter_(1, own[:, None], True)
    candidates = torch.cat([class_logits, similarities.masked_fill(itself, -torch.inf)], dim=1)
    positive = (labels[:, None] == other_labels[None, :]) & ~itself
    # Products with 0 instead of a sum over -inf: the anchor's own column holds a finite number here.
    from_samples = (similarities * positive).sum(1)
    from_centre = class_logits.gather(1, labels[:, None])[:, 0]
    mean_positive = (from_centre + alpha * from_samples) / (1 + alpha * positive.sum(1, dtype=class_logits.dtype))
    return torch.logsumexp(candidates, dim=1) - mean_positive


def robust_contrastive(
    features: Tensor, labels: Tensor, centroids: Tensor, radius: Tensor, temperature: float
) -> Tensor:
    """DRO-LT's loss, 0-d: each class of the batch finds its samples among all of the batch, at their worst distance.

    For a class c of the batch with samples P_c: the mean over i in P_c of -log softmax_j(-d_cj / T)_i, where d_cj is
    the distance |z_j - mu_c|, plus eps_c for j in P_c: as far as a distribution within eps_c of the class's may put
    them. The mean over those classes is returned.

    features: z (b, D). labels: int64 (b,). centroids: mu (C, D), constant. radius: eps (C,), learnable. Float32 or
    float64. Source: Samuel and Chechik 2021, in the form of the authors' release, which gives radii
    to the samples in the order of their classes: to the wrong ones, unless the batch is sorted.
    """
    distance = torch.cdist(centroids, features, compute_mode="donot_use_mm_for_euclid_dist")
    own = torch.arange(len(centroids), device=labels.device)[:, None] == labels[None, :]
    logits = -(distance + radius[:, None] * own) / temperature
    log_share = torch.log_softmax(logits, dim=1)
    count = own.sum(1)
    per_class = -(log_share * own).sum(1) / count.clamp_min(1)
    return per_class.sum() / (count > 0).sum()
