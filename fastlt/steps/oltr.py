"""OLTR, the second stage (Liu et al. 2019): a memory of class centroids, learned along with the features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastlt.models import Classifier, head_of
from fastlt.models.meta_embedding import MetaEmbeddingHead, insert_attention, pooling_of, side_of_maps
from fastlt.ranges import above, at_least
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import Step, StepOptions
from fastlt.steps.decoupled import head_rebuilt_by
from fastlt.steps.needs import Allows, Needs
from fastlt.steps.settings import RecipeSettings, StageSettings


@dataclass(frozen=True)
class OltrOptions(StepOptions):
    """Options of method oltr.

    centroid_loss_weight: weight of the loss on centroids.
    repel_weight: weight of its repelling part, where the attracting part has 1.
    margin: mean squared distance to the other classes' centroids from which the repelling part is 0.
    backbone_lr_factor: learning rate of the backbone over that of the head.
    centroid_lr_factor: learning rate of the centroids over that of the head.
    freeze_backbone: keep the layers of the stage before as they are; the attention is still trained.
    attention_side: side of the last feature maps, to put modulated attention before the pooling; 0 is none.
    """

    centroid_loss_weight: float = field(default=0.01, metadata=at_least(0))
    repel_weight: float = field(default=0.01, metadata=at_least(0))
    margin: float = field(default=10.0, metadata=at_least(0))
    backbone_lr_factor: float = field(default=0.1, metadata=above(0))
    centroid_lr_factor: float = field(default=0.1, metadata=above(0))
    freeze_backbone: bool = False
    attention_side: int = field(default=0, metadata=at_least(0))


class OltrStep(Step[OltrOptions]):
    """SGD on mean_i l_i + weight * (attract + repel_weight * repel), with a `MetaEmbeddingHead` on the features x.

        attract = 1/(2b) sum_i ||x_i - M_{y_i}||^2
        repel   = max(0, margin - 1/(bC) sum_i sum_{c != y_i} ||x_i - M_c||^2)

    M, the centroids, starts as the mean features of the classes' training images, with the model that the stage starts
    from, in one pass before the first iteration. As in the authors' code (and in the center loss it comes from) the
    attracting part moves M_c at a rate that is free of `weight`, by 1/b sum_{i: y_i = c} (M_c - x_i) / (1 + n_c), where
    the batch holds n_c images of c. With several processes all of this is over the batch of all of them.

    Against the authors' release: features are the backbone's pooled ones, without a further layer of 512 units; each
    class comes once a round of class-balanced sampling, not four times in a row; a frozen backbone keeps its BatchNorm
    statistics; attention starts as the identity.
    """

    needs = Needs(trained_model=True, trained_head=True, first_pass=True)
    allows = Allows(features=False)

    Options = OltrOptions

    @classmethod
    def check_stage(cls, options: OltrOptions, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = []
        before = head_rebuilt_by(stage, recipe)
        if recipe.model.head != "linear" or before:
            what = f"after a stage of method {before!r}" if before else f"with model.head {recipe.model.head!r}"
            mistakes.append(
                f"method: is 'oltr' {what}, but its hallucinator starts as a plain linear head; set model.head: linear "
                "and put oltr behind a stage that leaves the head one, such as crt"
            )
        side = options.attention_side
        expected = side_of_maps(recipe.model.name, recipe.data.image_size)
        if side and expected and side != expected:
            mistakes.append(
                f"options.attention_side: is {side}, but the last feature maps of {recipe.model.name} at image_size "
                f"{recipe.data.image_size} are {expected} x {expected}; set attention_side: {expected}, or 0 for none"
            )
        return mistakes

    @classmethod
    def check_model(cls, model: Classifier, options: OltrOptions) -> None:
        if options.attention_side:
            pooling_of(model.backbone)

    @classmethod
    def prepare_model(cls, model: Classifier, options: OltrOptions, *, seed: int) -> None:
        model.head = MetaEmbeddingHead(model.head, seed)
        model.unfreeze()
        if options.freeze_backbone:
            model.backbone.requires_grad_(False)
        if options.attention_side:
            insert_attention(model.backbone, options.attention_side, seed).requires_grad_(True)

    @classmethod
    def parameter_groups(cls, model: Classifier, options: OltrOptions) -> list[dict[str, Any]]:
        # The head first: the learning rate that is logged is the first group's.
        centroids = head_of(model, MetaEmbeddingHead).centroids
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.head.parameters() if p is not centroids]},
            {"params": [centroids], "lr_factor": options.centroid_lr_factor},
        ]
        backbone = [p for p in model.backbone.parameters() if p.requires_grad]
        if backbone:
            groups.append({"params": backbone, "lr_factor": options.backbone_lr_factor})
        return groups

    @classmethod
    def set_train_mode(cls, model: Classifier, options: OltrOptions) -> None:
        model.train()
        if options.freeze_backbone:
            model.backbone.eval()

    @torch.no_grad()
    def first_pass(self, batches: Iterator[Batch], prepare: Callable[[Tensor], Tensor]) -> None:
        """Set the centroids to the mean feature of each class: M_c = 1/n_c sum_{i: y_i = c} x_i."""
        centroids = head_of(self.model, MetaEmbeddingHead).centroids
        # float64, so that neither their number nor the order of the additions shows in the float32 mean.
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=centroids.device)
        images = sums.new_zeros(len(sums), 1)
        for batch in batches:
            sums.index_add_(0, batch.labels, self.model.features(prepare(batch.images)).double())
            images.index_add_(0, batch.labels, images.new_ones(len(batch), 1))
        self.reducer.sum_([sums, images])
        centroids.copy_(sums / images)

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        images, labels = self.parts.augment(batch.images), batch.labels
        self.loss.draw(len(labels))
        with self.parts.autocast():
            features = self.model.features(images)
            losses = self.loss(self.model.head(self.model.dropout(features)), labels)
        classification = losses.mean()
        attract, repel, pull = self._centroid_loss(features, labels)
        weight = self.options.centroid_loss_weight
        objective = classification + weight * (attract + self.options.repel_weight * repel)
        self.descend(objective + (pull - pull.detach()))
        return StepOutput(
            objective.detach(),
            metrics={"classification": classification.detach(), "attract": attract.detach(), "repel": repel.detach()},
        )

    def _centroid_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """attract and repel, and the term whose gradient moves the centroids towards the features: each 0-d."""
        centroids = head_of(self.model, MetaEmbeddingHead).centroids
        features = features.to(centroids.dtype)
        size, (num_classes, _) = len(labels), centroids.shape
        own = centroids[labels]
        attract = (features - own.detach()).square().sum() / (2 * size)

        in_batch = centroids.new_zeros(num_classes).index_add_(0, labels, centroids.new_ones(size))
        self.reducer.sum_([in_batch])
        share = 1 / (1 + in_batch[labels])
        pull = (share * (features.detach() - own).square().sum(1)).sum() / (2 * size)

        # sum_i sum_c ||x_i - M_c||^2 without the (b, C) matrix: both sums go inside the square.
        every = num_classes * features.square().sum() + size * centroids.square().sum()
        every = every - 2 * torch.dot(features.sum(0), centroids.sum(0))
        others = (every - (features - own).square().sum()) / (size * num_classes)
        over_all = others.detach().clone()
        self.reducer.mean_([over_all])
        # The hinge is on the mean over all processes; this process's part of its slope, and the value of the whole.
        slope = (over_all < self.options.margin).to(others.dtype)
        repel = slope * (self.options.margin - over_all - (others - others.detach()))
        return attract, repel, pull
