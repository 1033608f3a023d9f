"""Common to all losses: the base class, the precision, and the check of an option's value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastlt.state import ClassCounts


class PerSampleLoss(nn.Module):
    """Logits float (N, C) and labels int64 (N,) to losses (N,): float32, or float64 for float64 logits.

    Buffers made from class counts are float64; a loss takes them in the precision of its logits.
    At the start, between epochs and between iterations a loss is told something; most losses do nothing with it.

    corrects_prior: whether the loss makes up for class frequencies, and so needs batches that have them.
    draws: whether `draw` draws something for every sample of a batch.
    without_imbalance: of a loss made from class counts, how it ends up where all counts are equal; None for the others.
    prior_assumption: what `log_prior_factor` takes for granted, where it does not follow from the loss; None where it
        does.
    """

    corrects_prior: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    without_imbalance: ClassVar[str | None] = None
    prior_assumption: ClassVar[str | None] = None

    @classmethod
    def makes_up_for_frequencies(cls, options: Mapping[str, Any]) -> bool:
        """`corrects_prior` of a loss with these options."""
        return cls.corrects_prior

    def on_epoch(self, epoch: int) -> None:
        """Called before the first iteration of `epoch` (from 0 in each stage); for deferred re-weighting."""

    def share_draws(self, seed: int, rank: int, world_size: int) -> None:
        """Told once, before the first `draw`: the run's seed, and which of how many processes this is."""

    def draw(self, batch_size: int) -> None:
        """Called once an iteration, before the first evaluation of the loss: draws what is random in it.

        A meta-step evaluates the loss of one batch several times (forward, tangent) and all of them have to be the same
        function, so no loss draws inside `forward`.
        """

    def mean_weight(self, labels: Tensor) -> Tensor | None:
        """The divisor of the batch's mean loss, 0-d, where the loss's authors divide by one; None is 1.

        labels: int64 (N,). Methods with sample weights of their own, learned or given, average over the batch size
        instead.
        """
        return None

    def log_prior_factor(self) -> Tensor | None:
        """log f, float64 (C,), of the class prior b f / sum(b f) that logits carry; None where f is 1 for every class.

        b: the class shares of the batches. The logits that minimise the expected loss are log p(x|c) + log b_c +
        log f_c, up to a constant that the classes share. Who puts in another prior subtracts this one first. f is that
        of the epoch that `on_epoch` was told last.
        """
        return None


def log_prior(class_counts: ClassCounts) -> Tensor:
    """log pi_c, pi_c = n_c / sum n: float64 (C,)."""
    counts = torch.from_numpy(class_counts.counts).double()
    return torch.log(counts / counts.sum())


def at_least_float32(logits: Tensor) -> Tensor:
    """Values in the precision that losses and metrics are computed in: half types become float32, float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def check_number(option: str, value: object, low: float, high: float = float("inf")) -> float:
    """`value` as a float in [low, high), or a ValueError that says what is allowed."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
        limit = f"a number of at least {low:g}" + ("" if high == float("inf") else f" and below {high:g}")
        raise ValueError(f"loss option {option} is {value!r}; it must be {limit}")
    return float(value)


def check_integer(option: str, value: object, low: int) -> int:
    """`value` as an integer >= low, or a ValueError that says what is allowed."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"loss option {option} is {value!r}; it must be an integer of at least {low}")
    return value
