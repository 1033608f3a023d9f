"""RIDE (Wang et al. 2021): experts trained to be right each on its own and to differ, then a router between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt.losses.base import at_least_float32
from fastlt.losses.class_balanced import DeferredWeights
from fastlt.losses.experts import class_temperatures, distillation, expert_divergence
from fastlt.models import Classifier, ExpertClassifier
from fastlt.models.experts import ExpertRouter
from fastlt.paths import PATH
from fastlt.ranges import above, at_least, within
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import Step, StepOptions, StepParts
from fastlt.steps.needs import Allows, LogitsPrior, Needs
from fastlt.steps.settings import RecipeSettings, StageSettings

WITHOUT_EXPERTS = "method: is {!r}, which trains a model of several experts; set model.experts (the paper: 2 to 4)"


def experts_of(model: Classifier) -> ExpertClassifier:
    """The model, of which `check_stage` knows that it has experts."""
    assert isinstance(model, ExpertClassifier), type(model)
    return model


def router_of(model: Classifier) -> ExpertRouter:
    """The router that `RideRouterStep.prepare_model` has given the model."""
    router = experts_of(model).router
    assert router is not None
    return router


@dataclass(frozen=True)
class RideOptions(StepOptions):
    """Options of method ride.

    diversity: weight of the term that keeps experts apart; the authors' is 0.45 on CIFAR-100-LT and 0.2 on ImageNet-LT.
    temperature: of the softmax in that term.
    spread: how far the temperature differs among classes, in [0, 1); see `fastlt.losses.experts.class_temperatures`.
    spread_from_epoch: the first epoch with temperatures by class, counted from 0; null is never.
    teacher: checkpoint of a run with experts of the same backbone, width and heads, usually more of them.
    distillation: weight of the teacher's term.
    distillation_temperature: of the softmax in the teacher's term.
    """

    diversity: float = field(default=0.2, metadata=at_least(0))
    temperature: float = field(default=1.0, metadata=above(0))
    spread: float = field(default=0.02, metadata=within(0, 1, below=True))
    spread_from_epoch: int | None = field(default=None, metadata=at_least(0))
    teacher: str | None = field(default=None, metadata=PATH)
    distillation: float = field(default=1.0, metadata=at_least(0))
    distillation_temperature: float = field(default=1.5, metadata=above(0))


class RideStep(Step[RideOptions]):
    """SGD on the mean of sum_e l(z_ie, y_i) - k * T^2 * sum_e KL(mean || expert e), and a teacher's term if given.

    l is the stage's loss, the paper's is LDAM with deferred re-weighting. Losses with class weights are divided by the
    batch's sum of weights, as in the authors' code: without, l would fall to a fifth (CIFAR-100-LT) or a third
    (ImageNet-LT) when the weights set in, and k with its constant weight would take over. T is one number until
    `spread_from_epoch` and one a class from then on. The teacher's term is w * T'^2 * KL(teacher || mean of experts).

    Deviations from the authors' code: with a teacher it takes the whole objective E times, which is a learning rate E
    times as large, and leaves the teacher in training mode; with k = 0 it trains the mean and not each expert.
    """

    allows = Allows(experts=True, features=False, trained_part=False)

    Options = RideOptions

    @classmethod
    def check_stage(cls, options: RideOptions, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = [] if recipe.model.experts is not None else [WITHOUT_EXPERTS.format("ride")]
        if options.teacher is not None and not Path(options.teacher).is_file():
            mistakes.append(f"options.teacher: {options.teacher} is not a file; give final_STAGE.pt of a finished run")
        return mistakes

    def __init__(self, parts: StepParts, options: RideOptions | None = None) -> None:
        super().__init__(parts, options)
        temperature, path = self.options.temperature, self.options.teacher
        spread = class_temperatures(parts.class_counts.counts, temperature, self.options.spread)
        self.spread = torch.from_numpy(spread).to(self.parameters[0])
        self.temperature = torch.full_like(self.spread, temperature)
        self.teacher = None if path is None else experts_of(self.model).teacher(path)

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        start = self.options.spread_from_epoch
        if start is not None and epoch >= start:
            self.temperature.copy_(self.spread)

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        options, labels = self.options, batch.labels
        images = self.parts.augment(batch.images)
        with self.parts.autocast():
            logits = at_least_float32(experts_of(self.model).expert_logits(images))
            experts = len(logits)
            self.loss.draw(experts * len(labels))
            own = self.loss(logits.flatten(0, 1), labels.repeat(experts)).mean() * (
                experts / self._mean_weight(labels, logits.dtype)
            )
            divergence = expert_divergence(logits, self.temperature).mean()
        objective = own - options.diversity * divergence
        metrics = {"expert_loss": own.detach() / experts, "divergence": divergence.detach()}
        if self.teacher is not None:
            learned = self._learned(self.teacher, images, logits.mean(0))
            objective = objective + options.distillation * learned
            metrics["distillation"] = learned.detach()
        self.descend(objective)
        return StepOutput(objective.detach(), metrics=metrics)

    def _mean_weight(self, labels: Tensor, dtype: torch.dtype) -> Tensor | float:
        """The mean class weight in the batches of all processes (0-d); 1 for a loss without class weights."""
        if not isinstance(self.loss, DeferredWeights):
            return 1.0
        weight = self.loss.class_weights[labels].mean()
        self.reducer.mean_([weight])
        return weight.to(dtype)

    def _learned(self, teacher: ExpertClassifier, images: Tensor, logits: Tensor) -> Tensor:
        """How far the mean of the experts is from the teacher's on the same images (0-d)."""
        with torch.no_grad(), self.parts.autocast():
            taught = at_least_float32(teacher(images))
        return distillation(logits, taught, self.options.distillation_temperature).mean()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "temperature": self.temperature}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.temperature.copy_(state["temperature"])


def helpful(mean_logits: Tensor, labels: Tensor) -> Tensor:
    """Whether a further expert would help after expert i: bool (E - 1, N) from mean logits (E, N, C) of experts 0..i.

    The mean of experts 0..i is wrong, and that of 0..j is right for some j > i.
    """
    right = mean_logits.argmax(-1) == labels
    later = torch.stack([right[i + 1 :].any(0) for i in range(len(right) - 1)])
    return ~right[:-1] & later


@dataclass(frozen=True)
class RideRouterOptions(StepOptions):
    """Options of method ride_router.

    top: how many of the largest logits the router sees; the authors' is 30 on CIFAR-100-LT and 50 on ImageNet-LT.
    positive_weight: weight of a decision in which a further expert helps.
    """

    top: int = field(default=30, metadata=at_least(1))
    positive_weight: float = field(default=100.0, metadata=above(0))


class RideRouterStep(Step[RideRouterOptions]):
    """RIDE's second stage: the router learns, after each expert, whether a further one will help (`helpful`).

    Binary cross-entropy, averaged over the E - 1 decisions, in which helpful ones weigh `positive_weight` as much; all
    else is frozen and in eval mode, bit for bit. Evaluation goes through the router: `experts_asked` in the log and
    in result.json is the mean number of experts that an image was shown to. The checkpoint is chosen by validation
    accuracy alone, whatever it costs in experts: `positive_weight` is what trades one for the other.
    """

    needs = Needs(trained_model=True, trained_head=True)
    allows = Allows(experts=True, features=False, trained_part=False)
    plain_steps = 0.35
    logits_prior = LogitsPrior("before")

    Options = RideRouterOptions

    @classmethod
    def check_stage(cls, options: RideRouterOptions, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = []
        if recipe.model.experts is None:
            mistakes.append(WITHOUT_EXPERTS.format("ride_router"))
        elif recipe.model.experts < 2:
            mistakes.append("method: is 'ride_router' with model.experts=1; there is nothing to route between")
        if stage is not list(recipe.stages.values())[-1]:
            mistakes.append(
                "method: is 'ride_router' with a stage after it, which would change the experts that the router "
                "learned to judge; put this stage last"
            )
        if stage.loss != "cross_entropy" or stage.loss_options:
            mistakes.append(
                f"loss: is {stage.loss!r}; ride_router has a loss of its own: leave loss and its options out"
            )
        return mistakes

    @classmethod
    def prepare_model(cls, model: Classifier, options: RideRouterOptions, *, seed: int) -> None:
        model.requires_grad_(False)
        experts_of(model).add_router(options.top, seed)

    @classmethod
    def set_train_mode(cls, model: Classifier, options: RideRouterOptions) -> None:
        model.eval()
        router_of(model).train()

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        images = self.parts.augment(batch.images)
        with self.parts.autocast():
            with torch.no_grad():
                features = self.model.features(images)
                mean_logits = running_mean(at_least_float32(self.model.head(features)))
            router = router_of(self.model)
            scores = torch.stack([router(i, features[i], mean_logits[i]) for i in range(len(features) - 1)])
        scores, target = at_least_float32(scores), helpful(mean_logits, batch.labels)
        weight = torch.where(target, self.options.positive_weight, 1.0)
        objective = F.binary_cross_entropy_with_logits(scores, target.to(scores.dtype), weight=weight)
        self.descend(objective)
        shares = {"asks": (scores > 0).float().mean(), "helpful": target.float().mean()}
        return StepOutput(objective.detach(), metrics=shares)


def running_mean(logits: Tensor) -> Tensor:
    """The mean of the logits of experts 0..i for each i: (E, N, C)."""
    count = torch.arange(1, len(logits) + 1, device=logits.device, dtype=logits.dtype)
    return logits.cumsum(0) / count[:, None, None]
