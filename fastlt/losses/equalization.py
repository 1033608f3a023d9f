"""Equalization loss (Tan et al. 2020): the softmax form of Sec. 3.4 and the sigmoid form of Eq. 3."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt.losses.base import PerSampleLoss, at_least_float32, check_number
from fastlt.losses.class_balanced import binary_cross_entropies
from fastlt.names import pick
from fastlt.state import ClassCounts


def softmax_terms(logits: Tensor, labels: Tensor, left_out: Tensor) -> Tensor:
    """Cross-entropy (N,) without the classes `left_out`, bool (N, C), in the denominator."""
    return F.cross_entropy(logits.masked_fill(left_out, float("-inf")), labels, reduction="none")


def sigmoid_terms(logits: Tensor, labels: Tensor, left_out: Tensor) -> Tensor:
    """The sum of the binary cross-entropies (N,) of the classes that are not `left_out`, bool (N, C)."""
    return binary_cross_entropies(logits, labels).masked_fill(left_out, 0.0).sum(1)


KINDS = {"softmax": softmax_terms, "sigmoid": sigmoid_terms}


class Equalization(PerSampleLoss):
    """-log(exp(z_y) / sum_k w_k exp(z_k)), w_k = 1 - b_k * 1[pi_k < threshold] * (1 - y_k), b_k ~ Bernoulli(gamma).

    A rare class leaves the denominator of other classes' samples, so those do not push its logit down. The sigmoid kind
    is sum_k w_k BCE(sigmoid(z_k), y_k), where b_k is the same for all classes: so in the releases of CDB-CE and of
    Difficulty-Net, after the paper's detectors.
    b is drawn by `draw`, from a generator of its own: for every sample and class, of the sigmoid kind once a batch.
    Evaluations in between see the same draws, and several processes draw what one draws for all of their batches, see
    `share_draws`. Without a rare class this is cross-entropy, softmax or sigmoid.

    kind: softmax or sigmoid.
    gamma: probability that a rare class is left out of a sample, in [0, 1].
    threshold: classes with a smaller share of the training set are rare, in [0, 1].
    seed: of the draws, with the run's.
    rare: bool (C,).
    dropped: bool (N, C), where `draw` drew b = 1 for a rare class.
    """

    draws = True
    without_imbalance = "no class is rarer than another"
    prior_assumption = (
        "a rare class counts 1 / (1 - gamma) times, because it is left out of a share gamma of the denominators of "
        "other classes; this is exact for two classes. The sigmoid kind is taken for softmax"
    )
    rare: Tensor
    dropped: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        kind: Literal["softmax", "sigmoid"] = "softmax",
        gamma: float = 0.9,
        threshold: float = 0.005,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.terms = pick("kind of loss equalization", kind, KINDS)
        self.gamma = check_number("gamma", gamma, 0, 1 + 1e-9)
        share = class_counts.counts / class_counts.counts.sum()
        rare = torch.from_numpy(share < check_number("threshold", threshold, 0, 1 + 1e-9))
        self.seed, self.rank, self.world_size = int(seed), 0, 1
        self.generator: torch.Generator | None = None
        self.register_buffer("rare", rare, persistent=False)
        self.register_buffer("dropped", torch.zeros(0, class_counts.num_classes, dtype=torch.bool), persistent=False)

    def share_draws(self, seed: int, rank: int, world_size: int) -> None:
        self.seed, self.rank, self.world_size = self.seed + seed, rank, world_size

    def draw(self, batch_size: int) -> None:
        """Draw b for the next batch; the buffer keeps its storage while the batch size stays the same."""
        if len(self.dropped) != batch_size:
            self.dropped = self.rare.new_zeros(batch_size, len(self.rare))
        if self.terms is sigmoid_terms:
            drawn = torch.zeros(1, dtype=torch.bool, device=self.rare.device)
            self.dropped.copy_(drawn.bernoulli_(self.gamma, generator=self._generator()).logical_and(self.rare))
        else:
            own = slice(self.rank * batch_size, (self.rank + 1) * batch_size)
            drawn = self.dropped.new_empty(self.world_size * batch_size, len(self.rare))
            self.dropped.copy_(drawn.bernoulli_(self.gamma, generator=self._generator())[own].logical_and_(self.rare))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if len(labels) != len(self.dropped):
            raise RuntimeError(
                f"the draws are for a batch of {len(self.dropped)}, this one has {len(labels)} samples; "
                "call draw(batch_size) once an iteration, before the loss"
            )
        own = F.one_hot(labels, logits.shape[1]).bool()
        return self.terms(at_least_float32(logits), labels, self.dropped & ~own)

    def log_prior_factor(self) -> Tensor:
        # With gamma 1 nothing but its own samples moves the logit of a rare class: no prior follows, and none is taken.
        return self.rare.double() * (-math.log1p(-self.gamma) if self.gamma < 1 else 0.0)

    def get_extra_state(self) -> Tensor:
        """The generator's state, so that a resumed run draws what the uninterrupted one would have."""
        return self._generator().get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue where `get_extra_state` was taken, on the same kind of device."""
        self._generator().set_state(state.cpu())

    def _generator(self) -> torch.Generator:
        if self.generator is None or self.generator.device != self.rare.device:
            self.generator = torch.Generator(self.rare.device).manual_seed(self.seed)
        return self.generator
