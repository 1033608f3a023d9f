"""Parametric contrastive learning (PaCo; Cui et al. 2021): class centres and samples as candidates of one softmax."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastlt.losses.contrastive import parametric_contrastive
from fastlt.losses.cross_entropy import BalancedSoftmax
from fastlt.models import Classifier
from fastlt.models.auxiliary import attach_projection
from fastlt.ranges import above, at_least, within
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import Step, StepOptions, StepParts
from fastlt.steps.needs import Allows, LogitsPrior, Needs
from fastlt.steps.settings import RecipeSettings, StageSettings


class KeyQueue:
    """The last `size` keys and their labels, first in, first out; empty at first.

    (The authors' release starts with random keys of random labels, which the first few iterations push out.) The
    pointer and the fill are plain integers: every process puts in the same, so nothing is read from the device.
    """

    def __init__(self, size: int, dim: int, like: Tensor) -> None:
        self.keys = torch.zeros(size, dim, device=like.device, dtype=like.dtype)
        self.labels = torch.zeros(size, device=like.device, dtype=torch.int64)
        self.pointer = self.filled = 0

    @property
    def content(self) -> tuple[Tensor, Tensor]:
        """Keys (F, dim) and labels (F,) that have been put in and not yet pushed out: views, valid until `put`."""
        return self.keys[: self.filled], self.labels[: self.filled]

    def put(self, keys: Tensor, labels: Tensor) -> None:
        """Push out the oldest. keys: (B, dim), labels: (B,), with B of at most the queue's size."""
        size = len(self.keys)
        assert len(keys) <= size, (len(keys), size)
        until_end = min(len(keys), size - self.pointer)
        for store, new in ((self.keys, keys), (self.labels, labels)):
            store[self.pointer : self.pointer + until_end] = new[:until_end]
            store[: len(keys) - until_end] = new[until_end:]
        self.pointer = (self.pointer + len(keys)) % size
        self.filled = min(self.filled + len(keys), size)

    def state_dict(self) -> dict:
        return {"keys": self.keys, "labels": self.labels, "pointer": self.pointer, "filled": self.filled}

    def load_state_dict(self, state: dict) -> None:
        self.keys.copy_(state["keys"])
        self.labels.copy_(state["labels"])
        self.pointer, self.filled = state["pointer"], state["filled"]


class KeyEncoder(nn.Module):
    """Backbone and projection of `model`, whose parameters follow the model's as a moving average; never trained.

    BatchNorm always normalises by its batch, as in the authors' release, and keeps no running statistics, which nobody
    would read.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(model.backbone)
        self.projection = copy.deepcopy(model.auxiliary)
        self.requires_grad_(False).train()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.backbone(images))

    @torch.no_grad()
    def follow(self, model: Classifier, momentum: float) -> None:
        """k <- momentum * k + (1 - momentum) * q for every parameter."""
        queries: list[Tensor] = [*model.backbone.parameters(), *model.auxiliary.parameters()]
        keys: list[Tensor] = list(self.parameters())
        torch._foreach_lerp_(keys, queries, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]  # public


@dataclass(frozen=True)
class PacoOptions(StepOptions):
    """Options of method paco.

    dim: width of query and key.
    queue: keys that are remembered; 0 is none.
    alpha: weight of a positive sample, where the class centre has 1.
    temperature: of the similarities.
    momentum: of the key encoder's moving average, in [0, 1].
    """

    dim: int = field(default=128, metadata=within(1, 65536))
    queue: int = field(default=8192, metadata=at_least(0))
    alpha: float = field(default=0.05, metadata=at_least(0))
    temperature: float = field(default=0.2, metadata=above(0))
    momentum: float = field(default=0.999, metadata=within(0, 1))


class PacoStep(Step[PacoOptions]):
    """SGD on `parametric_contrastive` between the first view of a batch and centres, samples, keys and queue.

    The class centres are the head, on the features as in every other method; `loss: balanced_softmax` adds log pi to
    their logits, `loss: cross_entropy` does not. The query is the projection of the first view, the key that of the
    second through the key encoder. Candidates of an anchor are the centres, the other queries of the batch, its keys,
    and the queue's.

    Evaluation needs backbone and head alone. The projection is trained, so it is `model.auxiliary`; the key encoder
    and the queue are the step's.

    With several processes the queries (with their gradients), keys and labels of all of them are candidates and go
    into the queue, so that the batch alone decides and not how it is shared; in the release queries and keys are those
    of one process. Its "shuffling BN" is left out: it keeps a key from knowing its query by the batch statistics they
    share, where that one pair is all the signal. Here the keys of all processes and the queue are candidates, positives
    are whole classes, and BatchNorm has the statistics of each process's own images in both views.
    """

    needs = Needs(second_view=True)
    plain_steps = 2.0
    # The key encoder normalises with its batch in every layer, and follows a network that moves as a whole.
    allows = Allows(trained_part=False, features=False, ema=False)
    logits_prior = LogitsPrior("batches", "the contrastive candidates are left out, the class centres alone count")

    Options = PacoOptions

    @classmethod
    def check_stage(cls, options: PacoOptions, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = []
        if stage.loss not in ("cross_entropy", "balanced_softmax"):
            mistakes.append(
                f"loss: is {stage.loss!r}; paco's loss is its own and takes from here only whether log pi is added to "
                "the logits of the class centres: set loss: balanced_softmax, or cross_entropy for none"
            )
        unused = sorted(stage.loss_options.keys() - {"tau"})
        if unused:
            mistakes.append(f"loss_options: has {', '.join(unused)}, which paco's loss does not take; leave it out")
        queue = options.queue
        if 0 < queue < stage.batch_size:
            mistakes.append(
                f"options.queue: is {queue} with batch_size {stage.batch_size}, so a batch of keys does not fit; "
                f"allowed: at least {stage.batch_size}, or 0 for no queue"
            )
        return mistakes

    @classmethod
    def prepare_model(cls, model: Classifier, options: PacoOptions, *, seed: int) -> None:
        attach_projection(model, options.dim, seed)
        model.unfreeze()

    def __init__(self, parts: StepParts, options: PacoOptions | None = None) -> None:
        super().__init__(parts, options)
        self.log_prior = parts.loss.log_prior if isinstance(parts.loss, BalancedSoftmax) else None
        self.key_encoder = KeyEncoder(self.model)
        self.queue = KeyQueue(self.options.queue, self.options.dim, like=self.parameters[0])

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        options, reducer = self.options, self.reducer
        assert self.parts.second_augment is not None, "needs.second_view is not set"
        first = self.parts.augment(batch.images)
        second = self.parts.second_augment(batch.images if batch.second_crop is None else batch.second_crop)
        keys = self._keys(second)
        with self.parts.autocast():
            features = self.model.features(first)
            class_logits = self.model.head(self.model.dropout(features))
            queries = self.model.auxiliary(features)
        class_logits = class_logits.to(queries.dtype)
        if self.log_prior is not None:
            class_logits = class_logits + self.log_prior.to(class_logits.dtype)

        labels = reducer.gather(batch.labels)
        all_keys = reducer.gather(keys)
        old_keys, old_labels = self.queue.content
        others = torch.cat([reducer.gather_with_gradient(queries), all_keys, old_keys])
        own = reducer.rank * len(queries) + torch.arange(len(queries), device=labels.device)
        losses = parametric_contrastive(
            class_logits,
            queries @ others.T / options.temperature,
            batch.labels,
            torch.cat([labels, labels, old_labels]),
            own,
            options.alpha,
        )
        objective = losses.mean()
        self.descend(objective)
        if options.queue:
            self.queue.put(all_keys, labels)
        return StepOutput(objective.detach())

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """The keys (b, dim) of second views, after the key encoder has moved on."""
        self.key_encoder.follow(self.model, self.options.momentum)
        with self.parts.autocast():
            return self.key_encoder(images)

    def state_dict(self) -> dict:
        return {
            **super().state_dict(),
            "key_encoder": self.key_encoder.state_dict(),
            "queue": self.queue.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.key_encoder.load_state_dict(state["key_encoder"])
        self.queue.load_state_dict(state["queue"])
