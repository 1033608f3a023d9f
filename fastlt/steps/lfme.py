"""Learning from multiple experts (LFME, Xiang et al. 2020): experts for a part of the classes teach one student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlt.losses.base import at_least_float32
from fastlt.losses.experts import distillation
from fastlt.models import Classifier, head_of
from fastlt.models.restricted_head import RestrictedHead
from fastlt.ranges import above, at_least, within
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import Step, StepOptions, StepParts
from fastlt.steps.needs import Allows, LogitsPrior, Needs
from fastlt.steps.plain import PlainStep
from fastlt.steps.settings import RecipeSettings, StageSettings


class ExpertStep(PlainStep):
    """SGD on the mean loss over the images and logits of the classes that the stage's `classes` name, and no others.

    The model keeps logits for all classes; those of the others are minus infinity, so that validation, and the choice
    of its model with it, counts right what the expert knows and everything else as wrong.
    """

    allows = Allows(compilation=True, experts=True, some_classes=True, accumulation=True)

    @classmethod
    def check_stage(cls, options: StepOptions, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = super().check_stage(options, stage, recipe)
        smooths = stage.loss == "label_aware_smoothing" or stage.loss_options.get("label_smoothing")
        if stage.classes != "all" and smooths:
            mistakes.append(
                f"loss: smooths labels with classes: {stage.classes}, over classes that the expert does not know; take "
                "a loss without smoothing"
            )
        return mistakes

    @classmethod
    def prepare_model(cls, model: Classifier, options: StepOptions, *, seed: int) -> None:
        model.head = RestrictedHead(model.head)
        model.unfreeze()

    def __init__(self, parts: StepParts, options: StepOptions | None = None) -> None:
        super().__init__(parts, options)
        if parts.trained_classes is not None:
            head_of(self.model, RestrictedHead).known.copy_(torch.from_numpy(parts.trained_classes))


@dataclass(frozen=True)
class LfmeOptions(StepOptions):
    """Options of method lfme.

    experts: names of the stages that trained the experts.
    temperature: of the softmax of student and experts in the distillation.
    distil_until: an expert teaches with full weight until the student has this share of the expert's accuracy, in
        [0, 1).
    curriculum_epochs: the first epoch in which every image weighs 1, counted from 0; 0 is no curriculum.
    """

    experts: list[str]
    temperature: float = field(default=2.0, metadata=above(0))
    distil_until: float = field(default=0.3, metadata=within(0, 1, below=True))
    curriculum_epochs: int = field(default=45, metadata=at_least(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.experts or len(set(self.experts)) < len(self.experts):
            raise ValueError(f"experts is {self.experts}: give names of earlier stages, at least one, each once")


class LfmeStep(Step[LfmeOptions]):
    """SGD on 1/b sum_i v_i l_i + sum_e w_e KD_e, from the experts' models and the classes S_e each knows.

    KD_e is the mean over the batch, all of it, of KL(softmax(z_e[S_e] / T) || softmax(z[S_e] / T)).

    Self-paced: with A and A_e, the mean accuracies of student and expert on validation, over classes S_e with images
    there, w_e is 1 until A reaches `distil_until` of A_e, and falls from there to 0, where A reaches A_e:
    w_e = min(1, max(0, (A_e - A) / (A_e (1 - distil_until)))).

    Curriculum: an image starts with the weight that its expert's confidence in its label gives it, scaled in each class
    to [f, 1], f the fewest mean training images of a class that any expert has over this expert's; so the student first
    sees about as much of every part, and of the large ones what is easy. Weights grow linearly to 1 until epoch
    `curriculum_epochs`. Classes that no expert knows weigh 1 and are not distilled.

    Against the authors' release: v multiplies the loss, not the logits, of an image; it stays at 1 once it is there and
    does not grow on to 2 - v; a class whose images have one confidence weighs 1 where theirs divides by zero.
    """

    needs = Needs(class_accuracy=True, first_pass=True)
    allows = Allows(features=False)
    logits_prior = LogitsPrior("batches", "distillation and curriculum are left out, the loss alone counts")

    Options = LfmeOptions

    @classmethod
    def check_stage(cls, options: LfmeOptions, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = []
        earlier = {}
        for name, other in recipe.stages.items():
            if other is stage:
                break
            earlier[name] = other
        absent = [name for name in options.experts if name not in earlier]
        if absent:
            mistakes.append(
                f"options.experts: names {absent}, but the stages before this one are {list(earlier)}; an expert is "
                "the model of an earlier stage"
            )
        others = {n: earlier[n].method for n in options.experts if n in earlier and earlier[n].method != "expert"}
        if others:
            mistakes.append(f"options.experts: are stages of methods {others}; an expert is a stage of method expert")
        taught = [earlier[name].classes for name in options.experts if name in earlier]
        if len(set(taught)) < len(taught) or ("all" in taught and len(taught) > 1):
            mistakes.append(
                f"options.experts: they know the classes {taught}; each class has one expert at most: one stage with "
                "classes: all, or one each with many, medium and few"
            )
        return mistakes

    @classmethod
    def models_of_stages(cls, options: LfmeOptions) -> list[str]:
        return options.experts

    def __init__(self, parts: StepParts, options: LfmeOptions) -> None:
        super().__init__(parts, options)
        counts, device = parts.class_counts, self.parameters[0].device
        self.experts = [parts.stage_models[name] for name in options.experts]
        self.names = options.experts
        self.known = [torch.from_numpy(e.classes.nonzero()[0]).to(device) for e in self.experts]
        absent = self.class_accuracy.absent
        # The classes of each with validation images: of one without, nothing is known.
        self.measured = self.known if absent is None else [known[~absent[known]] for known in self.known]
        mean_images = [counts.counts[e.classes].mean() for e in self.experts]
        # f of each class: where the curriculum starts.
        floors = torch.ones(counts.num_classes, device=device)
        for known, mean in zip(self.known, mean_images, strict=True):
            floors[known] = float(min(mean_images) / mean)
        self.floors = floors
        # What the first pass finds out.
        self.expert_accuracy = torch.zeros(len(self.experts), device=device)
        self.instance_weights = torch.ones(int(counts.counts.sum()), device=device)

    @torch.no_grad()
    def first_pass(self, batches: Iterator[Batch], prepare: Callable[[Tensor], Tensor]) -> None:
        """Learn each training image's start weight from the expert that knows its class, and how good experts are."""
        confidences = torch.zeros(2, len(self.instance_weights), device=self.instance_weights.device)
        labels = torch.zeros(len(self.instance_weights), dtype=torch.int64, device=confidences.device)
        for batch in batches:
            # (2, N): probability of the label, and whether an expert gave one.
            confidences[:, batch.index] = self._confidence(prepare(batch.images), batch.labels)
            labels[batch.index] = batch.labels
        # Each image was on one process: the others' zeros add nothing.
        self.reducer.sum_([confidences])
        self.reducer.sum_([labels])
        scaled = scaled_in_class(confidences[0], labels, self.floors)
        self.instance_weights = torch.where(confidences[1] > 0, scaled, torch.ones_like(scaled))
        for e, (expert, known) in enumerate(zip(self.experts, self.measured, strict=True)):
            self.expert_accuracy[e] = self.class_accuracy.of(expert.model)[known].mean()

    def _confidence(self, images: Tensor, labels: Tensor) -> Tensor:
        found = torch.zeros(2, len(labels), device=images.device)
        for expert, known in zip(self.experts, self.known, strict=True):
            logits = at_least_float32(expert.model(images)[:, known])
            place = (labels[:, None] == known).float()
            found[0] += (torch.softmax(logits, dim=1) * place).sum(1)
            found[1] += place.sum(1)
        return found

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        accuracy = self.class_accuracy.update(self.model)
        student = torch.stack([accuracy[known].mean() for known in self.measured])
        expert_weights = self_paced_weights(student, self.expert_accuracy, self.options.distil_until)

        images, labels = self.parts.augment(batch.images), batch.labels
        self.loss.draw(len(labels))
        with self.parts.autocast():
            logits = self.model(images)
            losses = self.loss(logits, labels)
            with torch.no_grad():
                taught = [expert.model(images) for expert in self.experts]
        weights = curriculum_weights(self.instance_weights[batch.index], self.epoch, self.options.curriculum_epochs)
        classification = (weights * losses).mean()
        temperature, logits = self.options.temperature, at_least_float32(logits)
        distances = torch.stack(
            [
                distillation(logits[:, known], at_least_float32(theirs[:, known]), temperature).mean()
                for theirs, known in zip(taught, self.known, strict=True)
            ]
        )
        distances = distances / temperature**2  # LFME's code has no factor T^2
        objective = classification + torch.dot(expert_weights.to(distances.dtype), distances)
        self.descend(objective)
        return StepOutput(
            objective.detach(),
            metrics={
                "classification": classification.detach(),
                "instance_weight": weights.mean(),
                **{f"distance_{n}": d for n, d in zip(self.names, distances.detach(), strict=True)},
                **{f"expert_weight_{n}": w for n, w in zip(self.names, expert_weights, strict=True)},
            },
            per_class={"meta_accuracy": accuracy},
        )

    def state_dict(self) -> dict:
        return {
            **super().state_dict(),
            "expert_accuracy": self.expert_accuracy,
            "instance_weights": self.instance_weights,
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.expert_accuracy = state["expert_accuracy"]
        self.instance_weights = state["instance_weights"]


def self_paced_weights(student: Tensor, expert: Tensor, until: float) -> Tensor:
    """min(1, max(0, (A_e - A) / (A_e (1 - until)))) elementwise: 1 up to A = until * A_e, 0 from A = A_e on.

    student, expert: accuracies in [0, 1], of one shape. An expert that knows nothing (A_e = 0) teaches nothing.
    """
    gap = (expert - student) / (expert * (1 - until)).clamp_min(torch.finfo(expert.dtype).tiny)
    return gap.clamp(0, 1)


def curriculum_weights(start: Tensor, epoch: int, epochs: int) -> Tensor:
    """v + (1 - v) * epoch / epochs for start weights v (N,), and 1 from epoch `epochs` on."""
    if epoch >= epochs:
        return torch.ones_like(start)
    return start + (1 - start) * (epoch / epochs)


def scaled_in_class(values: Tensor, labels: Tensor, floors: Tensor) -> Tensor:
    """Values (N,) moved and scaled so that those of class c go from floors[c] to 1; 1 where a class has one value only.

    labels: int64 (N,). floors: (C,), each in [0, 1].
    """
    low = values.new_full(floors.shape, float("inf")).scatter_reduce(0, labels, values, "amin")
    high = values.new_full(floors.shape, float("-inf")).scatter_reduce(0, labels, values, "amax")
    low, high, floor = low[labels], high[labels], floors[labels].to(values.dtype)
    spread = high - low
    share = torch.where(spread > 0, (values - low) / spread.clamp_min(torch.finfo(values.dtype).tiny), 1.0)
    return floor + (1 - floor) * share
