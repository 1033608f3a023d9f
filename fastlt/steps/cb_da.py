"""Class balance seen as domain adaptation (Jamal et al. 2020): class weights plus a correction for each sample."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastlt.losses import LOSSES
from fastlt.losses.class_balanced import effective_number_weights
from fastlt.ranges import at_least, within
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import StepParts
from fastlt.steps.meta import MetaOptions, MetaStep
from fastlt.steps.needs import Allows, LogitsPrior
from fastlt.steps.settings import RecipeSettings, StageSettings


@dataclass(frozen=True)
class CbDaOptions(MetaOptions):
    """Options of method cb_da.

    from_epoch: the first epoch with the weights, counted from 0.
    beta: of the effective number of samples, for the class weights; in [0, 1).
    eps_lr: length of the step on the corrections of single samples.
    """

    from_epoch: int = field(default=160, metadata=at_least(0))
    beta: float = field(default=0.9999, metadata=within(0, 1, below=True))
    eps_lr: float = field(default=0.01, metadata=at_least(0))


class CbDaStep(MetaStep[CbDaOptions]):
    """CB-DA: the mean loss until `from_epoch`, then weights w_CB[y_i] + eps_i.

    eps is one gradient step from 0 on the meta loss at the lookahead, made anew in every iteration. As in the authors'
    code the lookahead descends the sum of the weighted losses, not their mean, and weights are neither clipped nor
    normalised. For a run that starts from a trained model, give `from_epoch: 0`.
    """

    allows = Allows(compilation=True, accumulation=True)
    logits_prior = LogitsPrior("weighted", "the corrections of single samples are left out, the class weights count")

    Options = CbDaOptions

    @classmethod
    def check_stage(cls, options: CbDaOptions, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = super().check_stage(options, stage, recipe)
        if stage.sampling != "instance":
            mistakes.append(
                f"sampling: is {stage.sampling!r}; cb_da weights classes by their counts, for batches that have the "
                "training set's frequencies: set sampling: instance"
            )
        if stage.loss in LOSSES and LOSSES[stage.loss].makes_up_for_frequencies(stage.loss_options):
            mistakes.append(
                f"loss: is {stage.loss!r}, which makes up for class frequencies as cb_da's weights do: together they "
                "do it twice. Set loss: cross_entropy"
            )
        return mistakes

    def __init__(self, parts: StepParts, options: CbDaOptions | None = None) -> None:
        super().__init__(parts, options)
        balanced = effective_number_weights(parts.class_counts.counts, self.options.beta)
        self.balanced = torch.from_numpy(balanced).to(self.parameters[0])

    def uses_meta_batch(self) -> bool:
        return self.epoch >= self.options.from_epoch

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        run = self.training_pass(batch)
        if not self.uses_meta_batch():
            self.apply(self.weighted_gradients(run, None, self.parameters))
            return StepOutput(run.losses.detach().mean())
        assert meta_batch is not None, "needs.meta_batch is not set"
        weights = self.balanced[run.labels]
        size = len(run.labels) * self.reducer.world_size
        own_gradient, meta_loss = self.per_sample_gradient(run, weights, meta_batch, lr=self.lr * size)
        eps = own_gradient * (-self.options.eps_lr / self.reducer.world_size)
        self.apply(self.weighted_gradients(run, weights + eps, self.parameters))
        return StepOutput(
            ((weights + eps) * run.losses.detach()).mean(),
            metrics={"meta_loss": meta_loss, "eps_norm": eps.norm()},
            per_class={"weight": self.balanced},
        )
