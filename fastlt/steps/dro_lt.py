"""Distributionally robust features (DRO-LT; Samuel and Chechik 2021): classes around centroids, at a worst distance."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt.losses.base import at_least_float32
from fastlt.losses.contrastive import robust_contrastive
from fastlt.meta.class_accuracy import evaluation_mode
from fastlt.models import Classifier
from fastlt.models.auxiliary import ClassRadii
from fastlt.ranges import above, at_least
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import Step, StepOptions, StepParts
from fastlt.steps.needs import Allows, LogitsPrior, Needs
from fastlt.steps.settings import RecipeSettings, StageSettings


@dataclass(frozen=True)
class DroLtOptions(StepOptions):
    """Options of method dro_lt.

    temperature: of the softmax over distances.
    robust_weight: weight of the contrastive term, where cross-entropy has 1.
    radius: where the radius of every class starts.
    radius_floor: the smallest radius that is allowed; null is no limit.
    """

    temperature: float = field(default=1.0, metadata=above(0))
    robust_weight: float = field(default=1.0, metadata=above(0))
    radius: float = field(default=1.0, metadata=at_least(0))
    radius_floor: float | None = field(default=None, metadata=at_least(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius_floor is not None and self.radius < self.radius_floor:
            raise ValueError(f"radius is {self.radius}, below radius_floor {self.radius_floor}: start above it")


class DroLtStep(Step[DroLtOptions]):
    """SGD on a weighted cross-entropy plus `robust_contrastive`, over a trained model whose head stays as it is.

    Batches are class-aware, so that every class in them has samples to compare; the weights n_y / max n give the
    cross-entropy the long tail back. A radius a class is learned with the features. As in the authors' release the
    head only passes gradients on: what retrains it is the next stage (`crt`), which here starts a new head where the
    release goes on with this one.

    Centroids are the mean features of each class's training images, taken anew at the start of every epoch in eval
    mode; unlike the release's, from unaugmented images, each once. With several processes the features of all of them
    are compared, so that the batch alone decides.

    The derivative of the loss by a radius is never negative, so learned radii shrink; below 0 they are radii no more,
    and the term fades as the samples' own logits grow. The release lets them; `radius_floor: 0` stops them there.
    """

    needs = Needs(trained_model=True, trained_head=True, training_images=True)
    allows = Allows(features=False)
    logits_prior = LogitsPrior("before", "the head stays as it is, and the prior of its logits with it")

    Options = DroLtOptions

    @classmethod
    def check_stage(cls, options: DroLtOptions, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = []
        if stage.sampling != "class_aware_4":
            mistakes.append(
                f"sampling: is {stage.sampling!r}; dro_lt compares the images of a class in a batch and weights "
                "cross-entropy for batches that are balanced over classes: set sampling: class_aware_4"
            )
        if recipe.model.train == "head" and recipe.model.adapt is None:
            mistakes.append(
                "method: is 'dro_lt', which trains the features and leaves the head as it is, but model.train is "
                "'head'; set model.train: norms, all, or a list of modules"
            )
        return mistakes

    @classmethod
    def prepare_model(cls, model: Classifier, options: DroLtOptions, *, seed: int) -> None:
        like = next(model.head.parameters())
        model.auxiliary = ClassRadii(model.head.out_features, options.radius).to(device=like.device, dtype=like.dtype)
        model.unfreeze()
        model.head.requires_grad_(False)

    @classmethod
    def set_train_mode(cls, model: Classifier, options: DroLtOptions) -> None:
        model.train()
        model.head.eval()

    def __init__(self, parts: StepParts, options: DroLtOptions | None = None) -> None:
        super().__init__(parts, options)
        assert isinstance(self.model.auxiliary, ClassRadii), type(self.model.auxiliary)
        self.radius = self.model.auxiliary.radius
        counts = torch.from_numpy(parts.class_counts.counts).to(self.radius)
        self.class_weights = counts / counts.max()
        head = self.model.head
        self.centroids = self.radius.new_zeros(head.out_features, head.in_features)

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        self.centroids = self._class_means()

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        self.loss.draw(len(batch))
        with self.parts.autocast():
            features = self.model.features(self.parts.augment(batch.images))
            losses = self.loss(self.model.head(self.model.dropout(features)), batch.labels)
        weights = self.class_weights[batch.labels]
        total = weights.sum()
        self.reducer.sum_([total])
        cross_entropy = (weights * losses).sum() * (self.reducer.world_size / total)
        robust = robust_contrastive(
            self.reducer.gather_with_gradient(at_least_float32(features)),
            self.reducer.gather(batch.labels),
            self.centroids,
            self.radius,
            self.options.temperature,
        )
        objective = cross_entropy + self.options.robust_weight * robust
        self.descend(objective)
        if self.options.radius_floor is not None:
            with torch.no_grad():
                self.radius.clamp_min_(self.options.radius_floor)
        return StepOutput(
            objective.detach(),
            metrics={"robust_loss": robust.detach()},
            per_class={"radius": self.radius.detach().clone()},
        )

    def _class_means(self) -> Tensor:
        """Mean features of each class over the training set of all processes: (C, D). Moves nothing of the model."""
        assert self.parts.training_images is not None, "needs.training_images is not set"
        sums = torch.zeros_like(self.centroids)
        counts = sums.new_zeros(len(sums))
        with evaluation_mode(self.model):
            for images, labels in self.parts.training_images():
                with self.parts.autocast():
                    features = self.model.features(images)
                # A product and not index_add_, whose order of summation changes from call to call on a GPU.
                members = F.one_hot(labels, len(sums)).to(sums.dtype)
                sums += members.T @ features.to(sums.dtype)
                counts += members.sum(0)
        self.reducer.sum_([sums, counts])
        return sums / counts[:, None]

    def state_dict(self) -> dict:
        return {**super().state_dict(), "centroids": self.centroids}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.centroids = state["centroids"].clone()
