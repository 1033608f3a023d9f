"""Mixup (Zhang et al. 2018), stage 1 of MiSLAS, and CutMix (Yun et al. 2019): descent on blended images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastlt.augment import cutmix, mixup
from fastlt.ranges import above
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import Step, StepOptions, StepParts
from fastlt.steps.needs import Allows


@dataclass(frozen=True)
class MixupOptions(StepOptions):
    """Options of methods mixup and cutmix.

    alpha: the share of an image is drawn from Beta(alpha, alpha). MiSLAS takes 1.0 on CIFAR-LT and 0.2 on larger
        images.
    """

    alpha: float = field(default=1.0, metadata=above(0))


class MixupStep(Step[MixupOptions]):
    """SGD on the mean of lam * l(z, y) + (1 - lam) * l(z, y of the partner), z of the blended images.

    One lam and one permutation an iteration, drawn on the host after the augmentation; several processes share lam, and
    each blends within its own batch. The loss is any per-sample loss: both terms see the same draws of it.
    """

    mix: Callable = staticmethod(mixup)
    allows = Allows(features=False)

    Options = MixupOptions

    def __init__(self, parts: StepParts, options: MixupOptions | None = None) -> None:
        super().__init__(parts, options)
        # Of the run's seed, and so the same on all processes.
        self.generator = torch.Generator().manual_seed(parts.seed)

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        images = self.parts.augment(batch.images)
        mixed, labels, partners, lam = self.mix(images, batch.labels, self.options.alpha, self.generator)
        self.loss.draw(len(labels))
        with self.parts.autocast():
            logits = self.model(mixed)
            losses = lam * self.loss(logits, labels) + (1 - lam) * self.loss(logits, partners)
        weight, of_partners = self.loss.mean_weight(labels), self.loss.mean_weight(partners)
        if weight is not None and of_partners is not None:
            weight = lam * weight + (1 - lam) * of_partners
        objective = self.mean_by_weight(losses, weight)
        self.descend(objective)
        return StepOutput(objective.detach(), metrics={"lam": lam})

    def state_dict(self) -> dict:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())


class CutmixStep(MixupStep):
    """Mixup with a rectangle of the partner's pixels in place of the blend; lam is the share of pixels that stay."""

    mix: Callable = staticmethod(cutmix)
