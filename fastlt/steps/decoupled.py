"""Decoupled training, the second stage: the features of the stage before are frozen, only the head changes.

cRT, LWS and tau-normalisation are Kang et al. 2020; LAS is the second stage of MiSLAS (Zhong et al. 2021). The
supplement's Sec. 1.2 gives their length and learning rates for each data set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastlt.losses import LOSSES
from fastlt.models import Classifier, head_of
from fastlt.models.retrained_heads import ScaledHead, fresh_head, tau_normalised
from fastlt.ranges import at_least
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import OptionsT, Step, StepOptions, StepParts
from fastlt.steps.needs import Allows, LogitsPrior, Needs
from fastlt.steps.settings import RecipeSettings, StageSettings


def rates_by_layer(stage: StageSettings) -> list[str]:
    """The mistakes of a stage that trains the head alone and is to have rates by layer."""
    keys = [key for key in ("layer_decay", "lr_factors") if getattr(stage, key)]
    return [f"{key}: is set, but method {stage.method!r} trains the head alone; leave it out" for key in keys]


def head_rebuilt_by(stage: StageSettings, recipe: RecipeSettings) -> str | None:
    """The method of the stage before that leaves another head than a plain linear one; None where there is none.

    crt and balms make a new plain head.
    """
    method = None
    for before in recipe.lineage(stage)[:-1]:
        if before.method in ("lws", "las", "oltr", "expert"):
            method = before.method
        elif before.method in ("crt", "balms"):
            method = None
    return method


class DecoupledStep(Step[OptionsT]):
    """SGD on the mean loss of a head over frozen features: one forward of the backbone, nothing backward through it.

    The backbone is in eval mode: its parameters and its BatchNorm statistics stay as they are, bit for bit.
    """

    needs = Needs(trained_model=True)
    allows = Allows(accumulation=True)
    plain_steps = 0.35

    @classmethod
    def check_stage(cls, options: OptionsT, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        by_layer = rates_by_layer(stage)
        if by_layer:
            return by_layer
        loss = LOSSES.get(stage.loss)
        if stage.sampling == "instance" and loss is not None and not loss.makes_up_for_frequencies(stage.loss_options):
            return [
                "sampling: is 'instance'; a head retrained on the long tail leans to its head classes again. "
                "Set sampling: class_balanced (the papers' choice) or effective_number, or take a loss that makes up "
                "for class frequencies (balanced_softmax, class_balanced)"
            ]
        return []

    @classmethod
    def prepare_model(cls, model: Classifier, options: OptionsT, *, seed: int) -> None:
        model.requires_grad_(False)
        cls.prepare_head(model, seed)

    @classmethod
    def prepare_head(cls, model: Classifier, seed: int) -> None:
        """Change `model.head` as the method wants it, and mark what of it is trained."""
        raise NotImplementedError

    @classmethod
    def set_train_mode(cls, model: Classifier, options: OptionsT) -> None:
        model.train()
        model.backbone.eval()

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self.loss.draw(len(labels))
        with self.parts.autocast():
            with torch.no_grad():
                features = self.model.features(inputs)
            return self.loss(self.model.head(self.model.dropout(features)), labels)

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        inputs, labels = self.parts.augment(batch.images), batch.labels
        objective = self.minimise(inputs, labels, lambda losses, part: self.mean_loss(losses, labels))
        head = self.model.head
        return StepOutput(
            objective,
            per_class={"scale": head.scale.detach().clone()} if isinstance(head, ScaledHead) else {},
        )


class CrtStep(DecoupledStep[OptionsT]):
    """Classifier re-training (cRT): a new random head, drawn from the recipe's seed."""

    @classmethod
    def prepare_head(cls, model: Classifier, seed: int) -> None:
        model.head = fresh_head(model.head, seed)
        model.head.requires_grad_(True)


class LwsStep(DecoupledStep[OptionsT]):
    """Learnable weight scaling (LWS): W and b stay, one scale a class is learned, logits are (W x + b) ⊙ s."""

    needs = Needs(trained_model=True, trained_head=True)

    @classmethod
    def prepare_head(cls, model: Classifier, seed: int) -> None:
        model.head = head = ScaledHead(model.head)
        head.scale.requires_grad_(True)


@dataclass(frozen=True)
class LasOptions(StepOptions):
    """Options of method las.

    head_lr_factor: learning rate of the head over that of the scales; 0 leaves the head as it is.
    shift_batch_norm: whether BatchNorm's running statistics follow the batches of this stage.
    """

    head_lr_factor: float = field(default=1.0, metadata=at_least(0))
    shift_batch_norm: bool = False


class LasStep(LwsStep[LasOptions]):
    """Label-aware smoothing (LAS): a scale a class as in LWS, the head trained along, under the smoothed loss.

    MiSLAS trains the stage-1 head at a fraction of the scales' learning rate, and lets BatchNorm's statistics follow
    the class-balanced batches ("shifted BatchNorm"). Difficulty-Net's release trains head and scales at one rate on
    CIFAR-LT with BatchNorm fixed, and on ImageNet-LT and Places-LT the scales alone with BatchNorm shifted. The
    options reach each of them.
    """

    Options = LasOptions

    @classmethod
    def check_stage(cls, options: LasOptions, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = super().check_stage(options, stage, recipe)
        if stage.loss != "label_aware_smoothing":
            mistakes.append(
                f"loss: is {stage.loss!r}; las is named after its loss: set loss: label_aware_smoothing, or take "
                "method lws for scales under another loss"
            )
        if options.shift_batch_norm and recipe.model.freezes_norms:
            mistakes.append(
                "options.shift_batch_norm: is true, but BatchNorm keeps its statistics; set model.norm: train"
            )
        return mistakes

    @classmethod
    def prepare_model(cls, model: Classifier, options: LasOptions, *, seed: int) -> None:
        super().prepare_model(model, options, seed=seed)
        head = head_of(model, ScaledHead)
        head.requires_grad_(options.head_lr_factor > 0)
        head.scale.requires_grad_(True)

    @classmethod
    def parameter_groups(cls, model: Classifier, options: LasOptions) -> list[dict[str, Any]]:
        # The scales first: the learning rate that is logged is the first group's.
        head = head_of(model, ScaledHead)
        groups: list[dict[str, Any]] = [{"params": [head.scale]}]
        if options.head_lr_factor > 0:
            groups.append({"params": list(head.inner.parameters()), "lr_factor": options.head_lr_factor})
        return groups

    @classmethod
    def set_train_mode(cls, model: Classifier, options: LasOptions) -> None:
        super().set_train_mode(model, options)
        if options.shift_batch_norm:
            for module in model.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train()


@dataclass(frozen=True)
class TauNormOptions(StepOptions):
    """Options of method tau_norm.

    taus: the exponents that are tried, in this order; null is 0, 0.1, ... 2 as in the authors' release.
    """

    taus: list[float] | None = field(default=None, metadata=at_least(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taus is not None and not self.taus:
            raise ValueError("taus is []: give numbers >= 0, at least one")

    @property
    def grid(self) -> list[float]:
        """The values that are tried."""
        return [k / 10 for k in range(21)] if self.taus is None else self.taus


class TauNormStep(DecoupledStep[TauNormOptions]):
    """Tau-normalisation: w_c / ||w_c||^tau without a bias; no gradient, one value of tau an iteration.

    The stage evaluates after every iteration and the trainer keeps the best on validation (`select: best`): so tau is
    chosen (of equals, the larger). The trained weights are remembered, so each value starts from them.
    """

    needs = Needs(trained_model=True, trained_head=True)
    allows = Allows(ema=False)
    logits_prior = LogitsPrior("uniform", "tau, chosen on validation, is taken to have removed the class frequencies")

    Options = TauNormOptions

    @classmethod
    def check_stage(cls, options: TauNormOptions, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = rates_by_layer(stage)
        size = len(options.grid)
        if stage.iterations != size or stage.evaluate_every != 1:
            mistakes.append(
                f"iterations: is {stage.iterations} with evaluate_every {stage.evaluate_every}; tau_norm tries one of "
                f"its {size} taus an iteration and validates each: set iterations: {size} and evaluate_every: 1"
            )
        if stage.select != "best":
            mistakes.append(f"select: is '{stage.select}'; tau_norm takes its tau by validation: set select: best")
        if recipe.model.head != "linear" or head_rebuilt_by(stage, recipe):
            mistakes.append(
                "method: is 'tau_norm', which shortens the weights of a plain linear head; a cosine head's have unit "
                "length, and lws, las, oltr and expert rebuild it. Set model.head: linear and leave those stages out"
            )
        return mistakes

    @classmethod
    def prepare_head(cls, model: Classifier, seed: int) -> None:
        assert isinstance(model.head, nn.Linear), model.head
        # No gradient reaches it; an optimizer needs something to hold.
        model.head.requires_grad_(True)

    def __init__(self, parts: StepParts, options: TauNormOptions | None = None) -> None:
        super().__init__(parts, options)
        self.trained = head_of(self.model, nn.Linear).weight.detach().clone()
        self.tried = 0

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        tau = self.options.grid[self.tried]
        self.tried += 1
        with torch.no_grad():
            head = head_of(self.model, nn.Linear)
            head.weight.copy_(tau_normalised(self.trained, tau))
            head.bias.zero_()
            loss = self.losses(self.parts.augment(batch.images), batch.labels).mean()
        return StepOutput(loss, metrics={"tau": torch.tensor(tau)})

    def state_dict(self) -> dict:
        return {**super().state_dict(), "trained": self.trained, "tried": self.tried}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.trained.copy_(state["trained"])
        self.tried = state["tried"]
