"""One temperature for all logits, fitted on validation (Guo et al. 2017).

A network whose probabilities are calibrated is right as often as they say.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastlt.run.metrics import Metrics

LOWEST, HIGHEST = 0.01, 100.0
ROWS = 4096  # images whose logits are float64 at a time


@dataclass(frozen=True)
class Temperature:
    """The temperature with the smallest negative log-likelihood, and what it does on the images that it was fitted on.

    value: T, logits are divided by it. images: how many it was fitted on.
    nll_before, nll_after: mean negative log-likelihood at T = 1 and at `value`, in nats.
    ece_before, ece_after: expected calibration error, 15 bins, in [0, 1].
    """

    value: float
    images: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float

    @property
    def at_bound(self) -> bool:
        """Whether the likelihood grows up to the end of the range: the images do not say which temperature is right."""
        return self.value in (LOWEST, HIGHEST)

    def __str__(self) -> str:
        text = (
            f"temperature {self.value:.3g}, fitted on {self.images:,} validation images: negative log-likelihood "
            f"{self.nll_before:.4f} -> {self.nll_after:.4f}, calibration error {100 * self.ece_before:.1f} -> "
            f"{100 * self.ece_after:.1f} %"
        )
        return text + (" (at the end of its range: these images do not determine it)" if self.at_bound else "")


def fit_temperature(logits: Tensor, labels: Tensor, offset: np.ndarray | None = None) -> Temperature:
    """T that minimises the mean of -log softmax(z / T + offset)_y, within LOWEST and HIGHEST.

    logits: z, (N, C). labels: int64 (N,). offset: (C,), of `CarriedPrior.replaced_by`; None is 0.
    The objective is convex in 1/T, and the root of its derivative is found by Brent's method, in float64. ValueError
    where a label has a logit of -inf: no temperature gives it a probability.
    """
    from scipy.optimize import root_scalar  # lazily: whoever loads a model need not wait for scipy

    shift = torch.zeros(logits.shape[1], dtype=torch.float64) if offset is None else torch.from_numpy(offset)
    own = logits.gather(1, labels[:, None])[:, 0].double() + shift[labels]
    if not bool(torch.isfinite(own).all()):
        raise ValueError(
            "the validation set has images of classes that the network cannot predict: no temperature fits"
        )
    slope = partial(_slope, logits, labels, shift)
    if slope(1 / HIGHEST) >= 0:
        value = HIGHEST
    elif slope(1 / LOWEST) <= 0:
        value = LOWEST
    else:
        found = root_scalar(slope, method="brentq", bracket=(1 / HIGHEST, 1 / LOWEST), xtol=1e-13, rtol=1e-12)
        value = 1 / found.root
    before, after = (_measured(logits, labels, shift, t) for t in (1.0, value))
    return Temperature(value, len(labels), before[0], after[0], before[1], after[1])


def _slope(logits: Tensor, labels: Tensor, shift: Tensor, inverse: float) -> float:
    """The derivative of the summed objective by 1/T: sum_i (E_p z - z_y)."""
    slope = 0.0
    for z, y in zip(logits.split(ROWS), labels.split(ROWS), strict=True):
        z = z.double()
        p = torch.softmax(z * inverse + shift, dim=1)
        z = torch.where(torch.isfinite(z), z, 0.0)  # a logit of -inf has no part in the mean
        slope += float(((p * z).sum(1) - z.gather(1, y[:, None])[:, 0]).sum())
    return slope


def _measured(logits: Tensor, labels: Tensor, shift: Tensor, temperature: float) -> tuple[float, float]:
    """Mean negative log-likelihood, and expected calibration error."""
    metrics, total = Metrics(logits.shape[1]), 0.0
    for z, y in zip(logits.split(ROWS), labels.split(ROWS), strict=True):
        log_p = torch.log_softmax(z.double() / temperature + shift, dim=1)
        total -= float(log_p.gather(1, y[:, None]).sum())
        metrics.update(log_p, y)
    error = float((metrics.bin_confidence - metrics.bin_correct).abs().sum())
    return total / len(labels), error / len(labels)
