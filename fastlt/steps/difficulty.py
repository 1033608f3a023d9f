"""Difficulty-Net (WACV 2023): class weights from class accuracies, learned through the exact meta-gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastlt.meta import gradient as meta_gradient
from fastlt.meta.difficulty import DifficultyNet, advice_on_width, class_weights, difficulty_gradient_loss
from fastlt.ranges import at_least
from fastlt.state import Batch
from fastlt.steps.learned_weights import WIDTH, LearnedWeightOptions, LearnedWeightStep
from fastlt.steps.meta import TrainingPass
from fastlt.steps.needs import Allows, Needs


@dataclass(frozen=True)
class DifficultyOptions(LearnedWeightOptions):
    """Options of the methods difficulty and sample_difficulty.

    hidden: width of the hidden layers of the network; null is the supplement's rule for the number of classes, auto the
        rule up to 4,096 classes and 2,048 beyond.
    meta_weight: weight of the meta loss in Eq. 10; at 0 the driver loss alone trains the network, as in the authors'
        release, which loses the meta-gradient: none is computed then.
    driver_weight: weight of the driver loss, lambda of Eq. 10.
    driver_target: target of the driver loss: absolute difficulty, or relative as in the authors' release, which leaves
        the weights nearly uniform; see `fastlt.meta.difficulty.driver_target`.
    """

    hidden: int | Literal["auto"] | None = field(default=None, metadata=WIDTH)
    meta_weight: float = field(default=1.0, metadata=at_least(0))
    driver_weight: float = field(default=0.3, metadata=at_least(0))
    driver_target: Literal["relative", "absolute"] = "absolute"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.meta_weight == 0 and self.driver_weight == 0:
            raise ValueError(
                "meta_weight and driver_weight are both 0, so that nothing trains the network of the weights; set one "
                "above 0, or take method: plain"
            )


class DifficultyStep(LearnedWeightStep[DifficultyOptions]):
    """Algorithm 1 of the supplement, one iteration; the inner loss is any per-sample loss ("Ours + Bal. Softmax")."""

    needs = Needs(meta_batch=True, class_accuracy=True)
    allows = Allows(compilation=True, accumulation=True)

    Options = DifficultyOptions

    @classmethod
    def time_of(cls, options: DifficultyOptions) -> float:
        # Without the meta-gradient what is left is to score the meta set.
        return cls.plain_steps if cls.takes_meta_batches(options) else 1.2

    @classmethod
    def takes_meta_batches(cls, options: DifficultyOptions) -> bool:
        return options.meta_weight > 0

    def make_net(self) -> DifficultyNet:
        return DifficultyNet(self.parts.class_counts.num_classes, self.options.hidden)

    def advice(self) -> list[str]:
        width = advice_on_width(self.parts.class_counts.num_classes, self.options.hidden)
        return [*super().advice(), *([] if width is None else [width])]

    def forward(self, batch: Batch) -> tuple[TrainingPass, Tensor]:
        """What D sees is A_t, taken before the batch moves BatchNorm's statistics."""
        accuracy = self.class_accuracy.update(self.model).to(self.parameters[0].dtype)
        return self.training_pass(batch), accuracy

    def sample_weights(self, seen: Tensor, run: TrainingPass) -> Tensor:
        with torch.no_grad():
            self.difficulty = self.net(seen)
            self.class_weights = class_weights(self.difficulty)
        return self.class_weights[run.labels]

    def objective(self, seen: Tensor, run: TrainingPass, per_sample: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        class_gradient = meta_gradient.sum_by_class(per_sample, run.labels, len(seen))
        self.reducer.mean_([class_gradient])
        options = self.options
        scalar, driver = difficulty_gradient_loss(
            self.net, seen, options.meta_weight * class_gradient, options.driver_weight, options.driver_target
        )
        return scalar, {"driver_loss": driver, "meta_grad_norm": class_gradient.norm()}

    def per_class(self, seen: Tensor) -> dict[str, Tensor]:
        return {"weight": self.class_weights, "difficulty": self.difficulty, "meta_accuracy": seen}
