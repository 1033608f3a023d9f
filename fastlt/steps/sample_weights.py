"""Weights of single samples from their own losses, learned through the exact meta-gradient.

Meta-Weight-Net (Shu et al. 2019), and the sample-level difficulty of Difficulty-Net's Tables 4 and 12.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastlt.meta.difficulty import chosen_width, driver_loss
from fastlt.state import Batch
from fastlt.steps.difficulty import DifficultyOptions
from fastlt.steps.learned_weights import WIDTH, LearnedT, LearnedWeightOptions, LearnedWeightStep
from fastlt.steps.meta import TrainingPass
from fastlt.steps.needs import Allows, LogitsPrior


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


class SampleWeightStep(LearnedWeightStep[LearnedT]):
    """A lookahead with w_i = batch_weights(V(l_i)), one Adam step on V, and the update with the new weights.

    The losses that V sees are constants, in the lookahead as in the update: weights say how much a sample counts, not
    which way its loss is differentiated. (Meta-Weight-Net's general release detaches them too; its class-imbalance
    release does not in the lookahead.) With several processes the losses are gathered, so that the normalisation is
    over the whole batch and every process makes the same step on V.
    """

    allows = Allows(compilation=True, accumulation=True)
    logits_prior = LogitsPrior("batches", "the weights of single samples are left out: they have no one value a class")

    def make_net(self) -> SampleNet:
        return SampleNet(self.widths())

    def widths(self) -> tuple[int, ...]:
        """The hidden layers of V."""
        raise NotImplementedError

    @property
    def meta_weight(self) -> float:
        """The weight of the meta loss in what V descends."""
        return 1.0

    def regulariser(self, values: Tensor, losses: Tensor) -> Tensor | None:
        """What is added to the meta loss, 0-d, from V's values (B,) and the losses (B,) they belong to."""
        return None

    def forward(self, batch: Batch) -> tuple[TrainingPass, Tensor]:
        """What V sees are the losses (B,) of all processes."""
        run = self.training_pass(batch)
        return run, self.reducer.gather(run.losses.detach()).to(self.parameters[0].dtype)

    def sample_weights(self, seen: Tensor, run: TrainingPass) -> Tensor:
        with torch.no_grad():
            return self.reducer.mine(batch_weights(self.net(seen)))

    def objective(self, seen: Tensor, run: TrainingPass, per_sample: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        gradient = self.reducer.gather(per_sample) / self.reducer.world_size
        values = self.net(seen)
        # The inner product with dL_meta/dw has the gradient of the meta loss.
        scalar = self.meta_weight * torch.dot(gradient.detach().to(values.dtype), batch_weights(values))
        metrics = {"meta_grad_norm": gradient.norm()}
        regulariser = self.regulariser(values, seen)
        if regulariser is None:
            return scalar, metrics
        return scalar + regulariser, {"driver_loss": regulariser.detach(), **metrics}


@dataclass(frozen=True)
class MetaWeightNetOptions(LearnedWeightOptions):
    """Options of method mwn.

    hidden: width of the hidden layers of the network that weighs samples.
    """

    hidden: int = field(default=100, metadata=WIDTH)


class MetaWeightNetStep(SampleWeightStep[MetaWeightNetOptions]):
    """MWN: V is an MLP 1-100-1, and the meta loss alone trains it."""

    Options = MetaWeightNetOptions

    def widths(self) -> tuple[int, ...]:
        return (self.options.hidden,)


class SampleDifficultyStep(SampleWeightStep[DifficultyOptions]):
    """Difficulty-Net with a sample in the place of a class: D is an MLP 1-H-H-1, Eq. 4 runs over the batch.

    The supplement (Sec. 2.5) says no more than that. The driver loss needs an accuracy; a sample's is the probability
    of its label, exp(-l_i) of a cross-entropy, in [0, 1]. `driver_weight: 0` leaves the meta loss alone, as in MWN.
    """

    Options = DifficultyOptions

    @classmethod
    def takes_meta_batches(cls, options: DifficultyOptions) -> bool:
        return options.meta_weight > 0

    @property
    def meta_weight(self) -> float:
        return self.options.meta_weight

    def widths(self) -> tuple[int, ...]:
        width = chosen_width(self.parts.class_counts.num_classes, self.options.hidden)
        return (width, width)

    def regulariser(self, values: Tensor, losses: Tensor) -> Tensor:
        # A loss that is no cross-entropy may be negative; a probability is 1 at most.
        confidence = torch.exp(-losses).clamp_max(1)
        return self.options.driver_weight * driver_loss(values, confidence, self.options.driver_target)
