"""Weights of single samples from their own losses, learned through the exact meta-gradient.

Meta-Weight-Net (Shu et al. 2019), and the sample-level difficulty of Difficulty-Net's Tables 4 and 12.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlt.difficulty import DRIVER_TARGETS, driver_loss, hidden_width
from fastlt.names import pick
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import StepParts
from fastlt.steps.meta import MetaStep


def batch_weights(values: Tensor) -> Tensor:
    """w_i = B * v_i / sum_j v_j over the batch of all processes (B,), as Eq. 4 over classes; zeros when all v are 0."""
    total = values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return values * (values.numel() / total)


class SampleNet(nn.Module):
    """An MLP from a sample's loss to a value in (0, 1): ReLU between the layers, a sigmoid at the end."""

    def __init__(self, hidden: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, following in zip((1, *hidden), hidden, strict=False):
            layers += [nn.Linear(width, following), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        """losses: (B,). Returns (B,)."""
        return self.layers(losses[:, None])[:, 0]


class SampleWeightStep(MetaStep):
    """A lookahead with w_i = batch_weights(V(l_i)), one Adam step on V, and the update with the new weights.

    The losses that V sees are constants, in the lookahead as in the update: weights say how much a sample counts, not
    which way its loss is differentiated. (Meta-Weight-Net's general release detaches them too; its class-imbalance
    release does not in the lookahead.) With several processes the losses are gathered, so that the normalisation is
    over the whole batch and every process makes the same step on V.
    """

    @dataclass(frozen=True)
    class Options:
        """hidden: width of V's hidden layers. lr, weight_decay: of Adam for V (supplement, Sec. 1.2)."""

        hidden: int = 100
        lr: float = 1e-3
        weight_decay: float = 1e-4

        def __post_init__(self) -> None:
            _check_adam(self)

    def __init__(self, parts: StepParts, options: Options | None = None) -> None:
        super().__init__(parts, options)
        first = self.parameters[0]
        self.net = SampleNet(self.widths()).to(device=first.device, dtype=first.dtype)
        self.net_optimizer = torch.optim.Adam(
            self.net.parameters(), lr=self.options.lr, weight_decay=self.options.weight_decay, foreach=True
        )

    def widths(self) -> tuple[int, ...]:
        """The hidden layers of V."""
        raise NotImplementedError

    def regulariser(self, values: Tensor, losses: Tensor) -> Tensor | None:
        """What is added to the meta loss, 0-d, from V's values (B,) and the losses (B,) they belong to."""
        return None

    def __call__(self, batch: Batch, meta_batch: Batch) -> StepOutput:
        run = self.training_pass(batch)
        seen = self.reducer.gather(run.losses.detach()).to(self.parameters[0].dtype)
        with torch.no_grad():
            weights = self.reducer.mine(batch_weights(self.net(seen)))
        own_gradient, meta_loss = self.per_sample_gradient(run, weights, meta_batch)
        gradient = self.reducer.gather(own_gradient) / self.reducer.world_size
        metrics = self._update_net(seen, gradient)

        with torch.no_grad():
            weights = self.reducer.mine(batch_weights(self.net(seen)))
        objective = (weights * run.losses).mean()
        self.descend(objective)
        return StepOutput(
            objective.detach(),
            metrics={"meta_loss": meta_loss, "meta_grad_norm": gradient.norm(), "weight_std": weights.std(), **metrics},
        )

    def _update_net(self, losses: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """One Adam step on V. gradient: dL_meta/dw (B,), whose inner product with w has the meta loss's gradient."""
        values = self.net(losses)
        scalar, metrics = torch.dot(gradient.detach().to(values.dtype), batch_weights(values)), {}
        regulariser = self.regulariser(values, losses)
        if regulariser is not None:
            scalar = scalar + regulariser
            metrics["driver_loss"] = regulariser.detach()
        parameters = list(self.net.parameters())
        for parameter, g in zip(parameters, torch.autograd.grad(scalar, parameters), strict=True):
            parameter.grad = g
        self.net_optimizer.step()
        self.net_optimizer.zero_grad(set_to_none=True)
        return metrics

    def state_dict(self) -> dict:
        return {
            **super().state_dict(),
            "net": self.net.state_dict(),
            "net_optimizer": self.net_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.net.load_state_dict(state["net"])
        self.net_optimizer.load_state_dict(state["net_optimizer"])


class MetaWeightNetStep(SampleWeightStep):
    """MWN: V is an MLP 1-100-1, and the meta loss alone trains it."""

    def widths(self) -> tuple[int, ...]:
        return (self.options.hidden,)


class SampleDifficultyStep(SampleWeightStep):
    """Difficulty-Net with a sample in the place of a class: D is an MLP 1-H-H-1, Eq. 4 runs over the batch.

    The supplement (Sec. 2.5) says no more than that. The driver loss needs an accuracy; a sample's is the probability
    of its label, exp(-l_i) of a cross-entropy, in [0, 1]. `driver_weight: 0` leaves the meta loss alone, as in MWN.
    """

    @dataclass(frozen=True)
    class Options:
        """hidden: width H, by default the supplement's rule for the number of classes. lr, weight_decay: of Adam.
        driver_weight: lambda of Eq. 10. driver_target: relative or absolute, see `fastlt.difficulty.driver_target`.
        """

        hidden: int | None = None
        lr: float = 1e-3
        weight_decay: float = 1e-4
        driver_weight: float = 0.3
        driver_target: str = "relative"

        def __post_init__(self) -> None:
            pick("driver_target", self.driver_target, dict.fromkeys(DRIVER_TARGETS))
            _check_adam(self)
            if self.driver_weight < 0:
                raise ValueError(f"driver_weight is {self.driver_weight}: give a number >= 0")

    def widths(self) -> tuple[int, ...]:
        width = self.options.hidden or hidden_width(self.parts.class_counts.num_classes)
        return (width, width)

    def regulariser(self, values: Tensor, losses: Tensor) -> Tensor:
        # A loss that is no cross-entropy may be negative; a probability is 1 at most.
        confidence = torch.exp(-losses).clamp_max(1)
        return self.options.driver_weight * driver_loss(values, confidence, self.options.driver_target)


def _check_adam(options) -> None:
    """ValueError for options that no network or Adam can have."""
    for name in ("lr", "weight_decay"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name} is {getattr(options, name)}: give a number >= 0")
    if options.hidden is not None and options.hidden < 1:
        raise ValueError(f"hidden is {options.hidden}: give a width >= 1, or leave it out")
