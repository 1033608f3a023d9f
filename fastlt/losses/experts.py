"""Two terms of RIDE (Wang et al. 2021) beside the experts' losses: diversity between them, a teacher's knowledge."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def class_temperatures(counts: np.ndarray, temperature: float, spread: float) -> np.ndarray:
    """T_c = T * (1 + spread * (C * pi_c - 1)), divided by the largest of the factors: float64 (C,), in (0, T].

    The largest class has T, rarer ones less, the rarest about T * (1 - spread) / (1 + spread * (C * max pi - 1)).
    0 <= spread < 1. Source: the authors' code, 0.05 on CIFAR-100-LT and 0.02 on ImageNet-LT.
    """
    factors = 1 + spread * (len(counts) * counts / counts.sum() - 1)
    return temperature * factors / factors.max()


def expert_divergence(logits: Tensor, temperature: Tensor) -> Tensor:
    """T^2 * sum_e KL(q || p_e), q = softmax(mean_e z_e / T), p_e = softmax(z_e / T): float (N,), each >= 0.

    logits: z, float (E, N, C), not half precision. temperature: T, one for all classes (0-d), or (C,), where each
    class's logits have their own; T^2 is then the square of its mean. q is a constant: experts move away from their
    mean, the mean is not moved. That is the direction and the gradient of the authors' code; E = 1 gives 0.
    """
    p = F.log_softmax(logits / temperature, dim=-1)
    with torch.no_grad():
        q = F.log_softmax(logits.mean(0) / temperature, dim=-1)
    return temperature.mean() ** 2 * (q.exp() * (q - p)).sum(-1).sum(0)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) (N,) for logits (N, C), no half type (Hinton 2015)."""
    p = F.log_softmax(student / temperature, dim=-1)
    q = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * (q.exp() * (q - p)).sum(-1)
