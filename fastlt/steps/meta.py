"""Common to all meta-learned weightings: one forward of the batch, the lookahead, the meta loss, the tangent."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastlt.autograd import ForwardRecord, NoGradWatch, OverwrittenError, recordable, with_recompute
from fastlt.device.distributed import Reducer
from fastlt.device.gradients import mean_gradients, mean_of_each
from fastlt.losses.base import at_least_float32
from fastlt.meta import gradient as meta_gradient
from fastlt.meta.per_sample import NotCoveredError, PerSampleGradients, Trial, kept_pass, recomputes, try_network
from fastlt.models import Classifier
from fastlt.optim import OPTIMIZERS, PRECONDITIONED, PRECONDITIONERS, optimizer_class, preconditioner
from fastlt.state import Batch
from fastlt.steps.base import GradientSum, OptionsT, Step, StepOptions, StepParts
from fastlt.steps.needs import Needs
from fastlt.steps.settings import RecipeSettings, StageSettings

# Where samples do not couple and most of the network is trained, the meta batch goes forward and back in parts: what is
# kept of the training batch and the activations of half of the meta batch take 1.4 times the memory of a whole batch's.
META_PARTS = 2

# Where the forward passes of BatchNorm are that move its statistics and do not compute with them; what is derived from
# it elsewhere may.
BATCH_NORMS = ("torch.nn.modules.batchnorm", "timm.layers.norm_act", "fastlt.models.sync_batch_norm")


def meta_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each meta image (m,): the meta set is balanced, so its loss carries no class prior."""
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


@dataclass(frozen=True)
class TrainingPass:
    """The one forward of a training batch, which lookahead, tangent and update share.

    inputs: what the step's network took. labels, losses: (b,); losses have their graph, unless `gradients` is there.
    random_state: of the generators before the forward, for what the model draws in it; None where it is compiled, which
        no model is that draws.
    record: of the forward, for the tangent or to release activations; None where neither is done.
    gradients: of every loss, where samples do not couple; None where lookahead, tangent and update take passes of their
        own.
    parts: the passes of the micro-batches where the batch has several. No losses have a graph then: what is
        differentiated is computed again, one micro-batch at a time, see `MetaStep.losses_again`.
    buffers: before the forward, of those that it or a later micro-batch moves and may compute with, by name.
    """

    inputs: Tensor
    labels: Tensor
    losses: Tensor
    random_state: Mapping[str, Tensor] | None
    record: ForwardRecord | None = None
    gradients: PerSampleGradients | None = None
    parts: tuple[TrainingPass, ...] = ()
    buffers: Mapping[str, Tensor | None] = field(default_factory=dict)


def refuse_recomputation(network: nn.Module) -> None:
    """ValueError for a network whose backward pass goes forward again: with its own parameters, not the lookahead's."""
    again = recomputes(network)
    if again is not None:
        raise ValueError(
            f"{again} recomputes activations (grad_checkpointing), and a meta-gradient cannot be taken through that: "
            "turn it off; options.lean: true lowers memory"
        )


@contextmanager
def refused_recomputation(network: nn.Module) -> Iterator[None]:
    """Inside is a backward pass: ValueError when a part of the network goes forward again, see `refuse_recomputation`.

    For networks that do so by code of their own, such as calls of torch.utils.checkpoint, which no attribute tells.
    """

    def refuse(module: nn.Module, args: Any) -> None:
        raise ValueError(
            f"{name_of[module] or 'the network'} goes forward again in the backward pass (torch.utils.checkpoint), and "
            "a meta-gradient cannot be taken through that: turn it off; options.lean: true lowers memory"
        )

    name_of = {module: name for name, module in network.named_modules()}
    hooks = [module.register_forward_pre_hook(refuse) for module in name_of]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class KeptBuffers:
    """Buffers of a network as they are before a forward pass: `keep()`, then the pass, then `moved()`.

    A buffer is copied anew only when something has moved it since its copy was made; which ones move, any pass tells.

    left_out: ids of buffers that are not looked at.
    """

    def __init__(self, network: nn.Module, left_out: set[int]) -> None:
        self.places = [
            (f"{prefix}.{key}" if prefix else key, module._buffers, key)
            for prefix, module in network.named_modules()
            for key, buffer in module._buffers.items()
            if id(buffer) not in left_out
        ]
        # A buffer, its version counter then, and its copy; None, 0 and None before a first pass that makes it.
        self.copies: dict[str, tuple[Tensor | None, int, Tensor | None]] = {}

    def keep(self) -> None:
        """Have a copy of every buffer as it is now."""
        for name, buffers, key in self.places:
            now = buffers[key]
            if not self._as_copied(name, now):
                self.copies[name] = (None, 0, None) if now is None else (now, now._version, now.detach().clone())

    def moved(self) -> dict[str, Tensor | None]:
        """The copies of those that have been moved or exchanged since, by name."""
        return {n: self.copies[n][2] for n, buffers, key in self.places if not self._as_copied(n, buffers[key])}

    def _as_copied(self, name: str, now: Tensor | None) -> bool:
        then = self.copies.get(name)
        return then is not None and then[0] is now and (now is None or now._version == then[1])


@dataclass(frozen=True)
class MetaOptions(StepOptions):
    """Options of the methods that look a step of the optimizer ahead.

    lookahead: the step of Eq. 9, sgd, or preconditioned by the running mean of squared gradients of an adaptive
        optimizer, in whose units lr is then; null is preconditioned where the optimizer has such a mean, and else sgd.
    """

    lookahead: Literal["sgd", "preconditioned"] | None = None

    def preconditions(self, optimizer: type[torch.optim.Optimizer]) -> bool:
        """Whether the lookahead is preconditioned in a stage with this optimizer."""
        return optimizer in PRECONDITIONERS if self.lookahead is None else self.lookahead == "preconditioned"

    def mistakes(self, optimizer: str) -> list[str]:
        """What of the options does not go with the optimizer of this name, see `Step.check_stage`."""
        if self.lookahead != "preconditioned" or optimizer in PRECONDITIONED:
            return []
        return [
            f"options.lookahead: is 'preconditioned' with optimizer {optimizer!r}, which has no diagonal "
            f"preconditioner; set lookahead: sgd, or an optimizer of {', '.join(PRECONDITIONED)}"
        ]


class MetaStep(Step[OptionsT]):
    """A step whose sample weights are learned through the exact meta-gradient.

    The training batch goes forward once: the lookahead and the update are two backward passes through the same graph
    with different weights, so BatchNorm's running statistics move once. Lookahead, meta and tangent passes leave no
    trace in the model's buffers.

    Where the samples of a batch do not couple, one backward pass keeps what all three need, see
    `fastlt.meta.per_sample`: found out with the first batch.

    network: what the passes run: the model. A method that trains a part of it only sets the part here and its
    parameters in `ahead`, and overrides `inputs` and `losses` to feed it.
    """

    needs = Needs(meta_batch=True)
    plain_steps = 3.5

    @classmethod
    def check_stage(cls, options: OptionsT, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = super().check_stage(options, stage, recipe)
        return mistakes + (options.mistakes(stage.optimizer) if isinstance(options, MetaOptions) else [])

    @classmethod
    def follows(cls, options: OptionsT, stage: StageSettings) -> list[str]:
        if not isinstance(options, MetaOptions) or stage.optimizer not in OPTIMIZERS:
            return super().follows(options, stage)
        kind = "preconditioned" if options.preconditions(optimizer_class(stage.optimizer)) else "sgd"
        return [*super().follows(options, stage), f"options.lookahead is {kind}, with optimizer {stage.optimizer}"]

    @classmethod
    def check_model(cls, model: Classifier, options: OptionsT) -> None:
        if cls.takes_meta_batches(options):
            refuse_recomputation(model)

    @classmethod
    def why_general(cls, traces: bool, float32_tangent: bool) -> str | None:
        """Why lookahead, tangent and update take passes of their own whatever the network is; None where it decides.

        traces: whether passes are compiled by inductor. float32_tangent: whether, in mixed precision, the tangent has
        not the types of the training pass.
        """
        if traces:
            return "compile: inductor takes the passes apart"
        if float32_tangent:
            return "options.tangent is fp32, and keeps nothing of the training pass"
        return None

    def __init__(self, parts: StepParts, options: OptionsT | None = None) -> None:
        super().__init__(parts, options)
        self.network: nn.Module = parts.model
        self.low_tangent = True  # whether, in mixed precision, the tangent has the types of the training pass
        self.lean = False  # whether activations that are cheap to compute are computed again to save memory
        self.lean_meta_pass = True  # until the model overwrites a tensor that they are recomputed from
        # The parameters that the lookahead moves: all that are trained, unless an approximation says otherwise.
        self.ahead = meta_gradient.trainable_parameters(parts.model)
        options = self.options
        self.preconditions = isinstance(options, MetaOptions) and options.preconditions(type(parts.optimizer))
        self.overwrites: bool | None = None  # whether the network does so with its input; None before the first pass
        self.refuses_recomputation = True  # until the first backward pass of a meta batch is over
        self.trial: Trial | None = None  # whether a batch can go through `kept_pass`; None before the first one

    @functools.cached_property
    def lr_factors(self) -> list[float]:
        """The learning rate of each of `self.ahead` over `lr`, the first group's: layer_decay, lr_factors."""
        groups = self.optimizer.param_groups
        factor_of = {p: group.get("lr_factor", 1.0) for group in groups for p in group["params"]}
        return [factor_of[p] / groups[0].get("lr_factor", 1.0) for p in self.ahead.values()]

    @functools.cached_property
    def buffers(self) -> KeptBuffers:
        """For `TrainingPass.buffers`, without BatchNorm's statistics: a pass that moves them does not use them."""
        modules = (m for m in self.network.modules() if isinstance(m, _BatchNorm))
        own = {id(b) for m in modules if type(m).forward.__module__ in BATCH_NORMS for b in m.buffers(recurse=False)}
        return KeptBuffers(self.network, own)

    @functools.cached_property
    def draws_in_attention(self) -> bool:
        """Of the network, see `meta_gradient.draws_in_attention`."""
        return meta_gradient.draws_in_attention(self.network)

    @functools.cached_property
    def divides_meta_batch(self) -> bool:
        """Whether the meta batch goes in parts: of few trained numbers little is kept, and so of a single layer."""
        sizes = [(p.numel(), p.requires_grad) for p in self.network.parameters()]
        layers = [m for m in self.network.modules() if next(m.parameters(recurse=False), None) is not None]
        return len(layers) > 1 and 2 * sum(n for n, trained in sizes if trained) > sum(n for n, _ in sizes)

    @functools.cached_property
    def meta_losses(self) -> Callable[..., Tensor]:
        """The meta loss of each image as a function of everything, see `meta_gradient.losses_at`."""
        return self.parts.compiler(meta_gradient.losses_at(self.network, meta_cross_entropy, self._overwrites))

    @functools.cached_property
    def tangents(self) -> Callable[..., Tensor]:
        """The tangents of the losses as a function of everything, see `meta_gradient.tangents_at`."""
        return self.parts.compiler(meta_gradient.tangents_at(self.network, self.loss, self._overwrites))

    def why_not_compiled(self, batch: Batch) -> str | None:
        if self.parts.accumulate > 1 and self.parts.compiler.mode == "inductor":
            return "the passes of micro-batches are computed again, which is not compiled by inductor"
        if meta_gradient.is_stochastic(self.network):
            return "the network draws random numbers, and compiled passes over one batch would not draw the same"
        reason = super().why_not_compiled(batch)
        if reason is None and self.parts.compiler.mode == "inductor" and self._computes_constants(batch):
            reason = "the network computes under torch.no_grad, which its compiled tangent would differentiate"
        return reason

    def _computes_constants(self, batch: Batch) -> bool:
        """Whether the losses of a batch are computed from something that `torch.no_grad` makes a constant."""
        inputs = self.inputs(self.parts.augment(batch.images))
        losses = meta_gradient.functional_losses(self.network, self.loss, inputs, batch.labels)
        with torch.enable_grad(), self.parts.autocast(), NoGradWatch() as watch:
            losses(self.ahead)
        return watch.found

    def inputs(self, images: Tensor) -> Tensor:
        """What `network` takes, from augmented images."""
        return images

    def training_pass(self, batch: Batch) -> TrainingPass:
        """Augment a batch and run it forward, and back where its samples do not couple."""
        inputs = self.inputs(self.parts.augment(batch.images))
        if self.parts.accumulate > 1:
            return self._pass_in_parts(inputs, batch.labels)
        # Whatever the model: not every one that draws shows it from outside. Some 20 us on a CPU.
        random_state = None if self.parts.compiler.active else meta_gradient.random_state(inputs.device)
        if self._keeps(inputs):
            assert self.trial is not None
            self.buffers.keep()
            try:
                with self._given(inputs) as given:
                    losses, gradients = kept_pass(
                        lambda: self.losses(given, batch.labels), self.network, len(given), self.trial.uses
                    )
                moved = self.buffers.moved()
                if moved:  # later than in the trial: the meta batch may couple through it, and is not divided any more
                    self._take(Trial(f"a forward pass changes the buffer {next(iter(moved))}"))
                return TrainingPass(inputs, batch.labels, losses, random_state, gradients=gradients)
            except NotCoveredError as error:
                self._take(Trial(str(error), error.parameter))
                meta_gradient.set_random_state(random_state or {}, inputs.device)
        if not self._records(inputs):
            losses, buffers = self._losses_and_buffers(inputs, batch.labels, nullcontext())
            return TrainingPass(inputs, batch.labels, losses, random_state, buffers=buffers)
        record = ForwardRecord(self.lean, self.parts.autocast)
        losses, buffers = self._losses_and_buffers(inputs, batch.labels, record.recording())
        return TrainingPass(inputs, batch.labels, losses, random_state, record, buffers=buffers)

    def _losses_and_buffers(
        self, inputs: Tensor, labels: Tensor, within: AbstractContextManager[object]
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """`losses`, computed inside a context, and `TrainingPass.buffers`."""
        repeatable = meta_gradient.repeatable_attention(self.draws_in_attention, inputs.device)
        self.buffers.keep()
        with self._given(inputs) as given, within, repeatable:
            losses = self.losses(given, labels)
        return losses, self.buffers.moved()

    def _pass_in_parts(self, inputs: Tensor, labels: Tensor) -> TrainingPass:
        """The forward passes of the micro-batches, for their losses and for BatchNorm's running statistics alone."""
        parts = []
        for part in self.micro_batches(len(labels)):
            random_state = None if self.parts.compiler.active else meta_gradient.random_state(inputs.device)
            losses, buffers = self._losses_and_buffers(inputs[part], labels[part], torch.no_grad())
            parts.append(TrainingPass(inputs[part], labels[part], losses, random_state, buffers=buffers))
        moved: dict[str, Tensor | None] = {}  # what a later pass moves, an earlier one had as it was before
        for i, part in reversed(list(enumerate(parts))):
            moved = {**moved, **part.buffers}
            parts[i] = replace(part, buffers=moved)
        return TrainingPass(inputs, labels, torch.cat([part.losses for part in parts]), None, parts=tuple(parts))

    def losses_again(self, part: TrainingPass) -> Tensor:
        """The losses of a micro-batch with their graph, from the same random draws; leaves no trace in buffers."""
        losses = self._functional_losses(part)
        repeatable = meta_gradient.repeatable_attention(self.draws_in_attention, part.inputs.device)
        with self._drawn_by(part), self.parts.autocast(), repeatable:
            return losses(meta_gradient.trainable_parameters(self.network))

    def _functional_losses(self, run: TrainingPass) -> meta_gradient.LossOfParameters:
        return meta_gradient.functional_losses(
            self.network, self.loss, run.inputs, run.labels, run.buffers, self._overwrites
        )

    @property
    def _overwrites(self) -> bool:
        assert self.overwrites is not None, "asked before the first training pass"
        return self.overwrites

    @contextmanager
    def _given(self, inputs: Tensor) -> Iterator[Tensor]:
        """What the network gets of inputs that later passes need: a copy, until it is known to leave it alone."""
        if self.overwrites is False:
            yield inputs
            return
        given = inputs.clone()
        version = given._version
        yield given
        self.overwrites = given._version != version

    def _keeps(self, inputs: Tensor) -> bool:
        """Whether one pass keeps what lookahead, tangent and update need; tries the network with the first batch."""
        traces, float32_tangent = self.parts.compiler.traces, not self._replays(inputs.device)
        if len(inputs) == 1 or not self.learns() or self.why_general(traces, float32_tangent) is not None:
            return False
        if self.trial is None:
            self._take(try_network(self.network, self.loss, inputs[:1], self.parts.class_counts.num_classes))
            assert self.trial is not None
        return self.trial.refused is None

    def _take(self, trial: Trial) -> None:
        self.trial = trial
        if trial.parameter is not None:
            warnings.warn(
                f"{trial.refused}: the meta-gradient takes forward and backward passes of its own, as exact and slower"
            )

    def learns(self) -> bool:
        """Whether this iteration takes a meta-gradient."""
        return self.uses_meta_batch()

    def _records(self, inputs: Tensor) -> bool:
        """Whether a pass is recorded: for the meta-gradient's tangent or for `lean`, unless inductor compiles it."""
        if self.parts.compiler.traces or not recordable(inputs) or not self.learns():
            return False
        return self.lean or self._replays(inputs.device)

    def _replays(self, device: torch.device) -> bool:
        """Whether the tangent is taken from the recorded training pass: if it has the types of that pass."""
        with self.parts.autocast():
            return self.low_tangent or not torch.is_autocast_enabled(device.type)

    def per_sample_gradient(
        self, run: TrainingPass, weights: Tensor, meta_batch: Batch, lr: float | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """dL_meta/dw_i (b,) at phi - lr * grad (1/b) sum_i w_i l_i, and the meta loss there (0-d).

        weights: (b,), constant. lr: by default the current learning rate, alpha of Eq. 9. With several processes the
        lookahead and the meta loss are those of all their batches, and b is still this process's: the mean over
        processes of sums over these values is the derivative.
        """
        gradients = self.weighted_gradients(run, weights, list(self.ahead.values()), retain_graph=True)
        return self.gradient_at(run, gradients, meta_batch, lr)

    def weighted_gradients(
        self, run: TrainingPass, weights: Tensor | None, parameters: Sequence[Tensor], *, retain_graph: bool = False
    ) -> list[Tensor]:
        """The gradient of (1/b) sum_i w_i l_i, averaged over processes: a tensor a parameter.

        weights: (b,), constant; None is 1 for each. retain_graph: whether those with other weights are asked for
            later.
        """
        if run.parts:
            return self._gradients_in_parts(run, weights, parameters)
        if run.gradients is None:
            objective = (run.losses if weights is None else weights * run.losses).mean()
            return mean_gradients(self.reducer, objective, parameters, retain_graph=retain_graph)
        weights = torch.ones_like(run.losses) if weights is None else weights
        gradients = run.gradients.weighted(weights / len(run.labels), parameters)
        return mean_of_each(self.reducer, parameters, gradients)

    def _gradients_in_parts(
        self, run: TrainingPass, weights: Tensor | None, parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        sums = GradientSum(self.reducer, parameters, len(run.parts))
        for place, part in zip(self.micro_batches(len(run.labels)), run.parts, strict=True):
            losses = self.losses_again(part)
            sums.add((losses if weights is None else weights[place] * losses).mean() / len(run.parts))
        return sums.gradients

    def gradient_at(
        self, run: TrainingPass, gradients: list[Tensor], meta_batch: Batch, lr: float | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `per_sample_gradient`, from the gradients of the weighted mean loss in `self.ahead`, in its order.

        Any other direction that the lookahead is to take may stand in their place, if it has the same derivative in w.
        """
        lr = self.lr if lr is None else lr
        diagonal = self.lookahead_diagonal(gradients)
        ahead = meta_gradient.lookahead(self.ahead, meta_gradient.scaled(gradients, diagonal), lr)
        if self.lean and run.gradients is None:
            assert run.record is not None, "lean records every training pass"
            run.record.release()  # the meta batch's activations are about to come on top of the training batch's
        assert self.parts.meta_augment is not None, "needs.meta_batch is not set"
        meta_inputs = self.inputs(self.parts.meta_augment(meta_batch.images))
        with self.parts.autocast():
            meta_loss, direction = self._meta_gradient(ahead, meta_inputs, meta_batch.labels, run)
        derivative = self._tangent(run, meta_gradient.scaled(direction, diagonal))
        if run.record is not None:
            run.record.clear()  # activations it holds would otherwise outlive the last backward pass's need of them
        return meta_gradient.weight_gradient(derivative, lr, len(run.labels)), meta_loss

    def lookahead_diagonal(self, gradients: list[Tensor]) -> meta_gradient.Diagonal | None:
        """P of the lookahead phi - lr P grad, for each of `self.ahead`; None where it is the identity.

        The preconditioner of the optimizer if the stage asks for it, times the rate of the parameter over `lr`. Where
        gradients are clipped, it is that of clipped ones, times what clipping multiplies them by: the optimizer's mean
        of squares is of clipped gradients, so that another one would be thrown far off.
        """
        ahead = list(self.ahead.values())
        diagonal = self._preconditioner(ahead, gradients) if self.preconditions else None
        if all(factor == 1 for factor in self.lr_factors):
            return diagonal
        if diagonal is None:
            return self.lr_factors
        return [p.mul_(factor) for p, factor in zip(diagonal, self.lr_factors, strict=True)]

    @torch.no_grad()
    def _preconditioner(self, ahead: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        if self.parts.clip is None:
            return preconditioner(self.optimizer, ahead, gradients)
        factors = self.parts.clip.factors(ahead, gradients, list(self.model.head.parameters()))
        clipped = [g * factor for g, factor in zip(gradients, factors, strict=True)]
        return [p.mul_(f) for p, f in zip(preconditioner(self.optimizer, ahead, clipped), factors, strict=True)]

    def _meta_gradient(self, ahead: meta_gradient.Tensors, inputs: Tensor, labels: Tensor, run: TrainingPass):
        """The meta loss (0-d) at the lookahead, and its gradient there, averaged over processes.

        In parts, where images do not couple and most of the network is trained, or where a batch has micro-batches.
        """
        parts = self.parts.accumulate
        uncoupled = self.trial is not None and self.trial.refused is None
        if run.gradients is not None and uncoupled and self.divides_meta_batch and len(labels) >= 2 * META_PARTS:
            parts = META_PARTS
        if parts == 1:
            return self._gradient_of_meta_images(ahead, inputs, labels, partial(mean_gradients, self.reducer))
        meta_loss, direction = inputs.new_zeros(()), [torch.zeros_like(p) for p in ahead.values()]
        chunks = list(zip(inputs.chunk(parts), labels.chunk(parts), strict=True))
        for number, (part, of_part) in enumerate(chunks, 1):
            share, reducer = len(part) / len(inputs), self.reducer if number == len(chunks) else Reducer()
            differentiate = partial(mean_gradients, reducer, added_to=direction, share=share)
            loss, direction = self._gradient_of_meta_images(ahead, part, of_part, differentiate)
            meta_loss = meta_loss + loss * share
        return meta_loss, direction

    def _gradient_of_meta_images(
        self,
        ahead: meta_gradient.Tensors,
        inputs: Tensor,
        labels: Tensor,
        differentiate: meta_gradient.Differentiate,
    ) -> tuple[Tensor, list[Tensor]]:
        if self.refuses_recomputation and not self.parts.compiler.traces:
            differentiate = self._refusing_recomputation(differentiate)
        stays = meta_gradient.what_stays(self.network, ahead)

        def losses(parameters: meta_gradient.Tensors) -> Tensor:
            return self.meta_losses(parameters, *stays, inputs, labels)

        if self.lean and self.lean_meta_pass:
            random_state = meta_gradient.random_state(inputs.device)
            try:
                return meta_gradient.mean_loss_gradient(with_recompute(losses), ahead, differentiate)
            except OverwrittenError as error:
                self.lean_meta_pass = False
                # As if it had not been tried: a run that resumes tries it again, and has to draw what this one draws.
                meta_gradient.set_random_state(random_state, inputs.device)
                warnings.warn(f"the meta pass keeps all of its activations, which takes more memory: {error}")
        return meta_gradient.mean_loss_gradient(losses, ahead, differentiate)

    def _refusing_recomputation(self, differentiate: meta_gradient.Differentiate) -> meta_gradient.Differentiate:
        def refusing(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
            with refused_recomputation(self.network):
                found = differentiate(value, leaves)
            self.refuses_recomputation = False
            return found

        return refusing

    def _tangent(self, run: TrainingPass, direction: list[Tensor]) -> Tensor:
        if run.gradients is not None:
            return run.gradients.tangents(self.ahead, direction)
        if run.parts:
            return torch.cat([self._tangent(part, direction) for part in run.parts])
        with self._drawn_by(run):
            return self._tangent_of_pass(run, direction)

    def _drawn_by(self, run: TrainingPass) -> AbstractContextManager[None]:
        """Inside, the network draws what it drew in a training pass."""
        if run.random_state is None:
            return nullcontext()
        return meta_gradient.replayed_randomness(run.random_state, run.inputs.device)

    def _tangent_of_pass(self, run: TrainingPass, direction: list[Tensor]) -> Tensor:
        if self.parts.compiler.traces:
            stays = meta_gradient.what_stays(self.network, self.ahead, run.buffers)
            return meta_gradient.along_unit_direction(
                lambda primals, unit: self.tangents(primals, unit, *stays, run.inputs, run.labels),
                self.ahead,
                direction,
            )
        # A float32 tangent is 1e-4 off along one direction, one in the training pass's types 1e-2.
        losses = self._functional_losses(run)
        record = run.record if self._replays(run.inputs.device) else None
        return meta_gradient.directional_derivative(losses, self.ahead, direction, record)
