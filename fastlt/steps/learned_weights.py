"""A learned network gives the weight of every sample: its options, and the iteration of Eq. 9 to 11."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from fastlt.autograd import recordable
from fastlt.device.compiled import adam_options, load_optimizer
from fastlt.device.host_memory import why_holes_stay
from fastlt.meta import gradient as meta_gradient
from fastlt.models import Classifier
from fastlt.optim import OPTIMIZERS, ShardedAdam, optimizer_class
from fastlt.ranges import at_least, check_ranges, within
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import StepParts
from fastlt.steps.meta import MetaOptions, MetaStep, TrainingPass
from fastlt.steps.needs import LogitsPrior
from fastlt.steps.settings import RecipeSettings, StageSettings

WIDTH = within(1, 65536)  # of a layer
# Weights of theta from which several processes share Adam's state, 268 MB of 33 million. In return theta, 134 MB, is
# sent to all processes in every iteration.
SHARDED_FROM = 2**25
WHERE_LEAN = "activations are made again on CPUs and CUDA devices, in what is not compiled by inductor"


@dataclass(frozen=True)
class Approximation:
    """Ways below the cost of the exact meta-gradient; by default none of them is taken.

    late_weights: the update takes the weights of the lookahead, and theta's new value counts from the next iteration on
        (Eq. 11 with theta_t in the place of theta_{t+1}). The two gradients are then one: a backward pass less.
    every: theta moves in every k-th iteration only; the others are plain iterations with the weights it gives.
    lookahead_only: names of submodules (`head`, `backbone.layer3`, ...); only their parameters take the lookahead of
        Eq. 9. The backward passes and the tangent of the meta-gradient end there. null is all of them.
    """

    late_weights: bool = False
    every: int = field(default=1, metadata=at_least(1))
    lookahead_only: list[str] | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.lookahead_only is not None and not self.lookahead_only:
            raise ValueError("lookahead_only is empty: name a submodule, such as head, or leave it out")

    def parameters_of(self, model: nn.Module) -> meta_gradient.Tensors:
        """The trainable parameters of `model` that the lookahead moves, by name; ValueError for a name without any."""
        trainable = meta_gradient.trainable_parameters(model)
        if self.lookahead_only is None:
            return trainable
        for module in self.lookahead_only:
            if not any(name.startswith(f"{module}.") for name in trainable):
                modules = sorted(
                    {".".join(n.split(".")[:depth]) for n in trainable for depth in (1, 2)} - set(trainable)
                )
                raise ValueError(
                    f"approximate.lookahead_only names {module!r}, which has no trained parameters; "
                    f"allowed are modules of the network, such as {', '.join(modules)}"
                )
        return {name: p for name, p in trainable.items() if any(name.startswith(f"{m}.") for m in self.lookahead_only)}


@dataclass(frozen=True)
class LearnedWeightOptions(MetaOptions):
    """Options of every method whose weights come from a learned network.

    lr: learning rate of Adam for the network's parameters theta (supplement, Sec. 1.2).
    weight_decay: of Adam for theta.
    approximate: ways below the cost of the exact meta-gradient.
    lean: activations that are cheap to compute (BatchNorm, ReLU, sums) are released and computed again, as exact and a
        little slower; not with `compile: inductor`.
    tangent: how the meta-gradient's tangent is computed under mixed precision: fp32 by a forward pass of its own,
        autocast from the training pass's activations and in their types, as differentiating twice would. null is
        autocast where those are kept, and fp32 under `compile: inductor` and where the batch is cut (`accumulate`).
    """

    lr: float = field(default=1e-3, metadata=at_least(0))
    weight_decay: float = field(default=1e-4, metadata=at_least(0))
    approximate: Approximation = field(default_factory=Approximation)
    lean: bool = False
    tangent: Literal["fp32", "autocast"] | None = None


LearnedT = TypeVar("LearnedT", bound=LearnedWeightOptions, default=LearnedWeightOptions)


class LearnedWeightStep(MetaStep[LearnedT]):
    """A network with parameters theta gives the weight of each sample; Eq. 9 to 11 in turn, one Adam step on theta.

    Subclasses give the network, its input, and the objective of its Adam step.
    """

    logits_prior = LogitsPrior("weighted", "class weights, which change while a model is trained, count as logged last")

    Options = LearnedWeightOptions

    @classmethod
    def check_stage(cls, options: LearnedT, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = super().check_stage(options, stage, recipe)
        if stage.accumulate > 1:
            why = f"with accumulate {stage.accumulate}, which keeps no activations; leave it out"
            mistakes += [f"options.lean: is true {why}"] if options.lean else []
            mistakes += [f"options.tangent: is autocast {why}"] if options.tangent == "autocast" else []
        clipped = stage.clip is not None and stage.clip.norm is not None
        adaptive = stage.optimizer in OPTIMIZERS and options.preconditions(optimizer_class(stage.optimizer))
        if clipped and adaptive and options.approximate.lookahead_only is not None:
            mistakes.append(
                "clip: has norm, that of all gradients, and options.approximate.lookahead_only takes the gradients of "
                "some of them: take clip value, options.lookahead: sgd, or the whole lookahead"
            )
        if options.lean and recipe.compile == "inductor":
            mistakes.append(f"options.lean: is true with compile: inductor; {WHERE_LEAN}; set compile: none")
        if options.tangent == "autocast":
            if recipe.precision == "fp32":
                mistakes.append("options.tangent: is autocast with precision: fp32, where all is float32; leave it out")
            if recipe.compile == "inductor":
                mistakes.append(
                    "options.tangent: is autocast with compile: inductor, which records no passes; set compile: none"
                )
        return mistakes

    @classmethod
    def check_model(cls, model: Classifier, options: LearnedT) -> None:
        super().check_model(model, options)
        if options.lean and not recordable(next(model.parameters())):
            raise ValueError(f"lean is true; {WHERE_LEAN}; leave it out")
        options.approximate.parameters_of(model)

    def __init__(self, parts: StepParts, options: LearnedT | None = None) -> None:
        super().__init__(parts, options)
        self.lean, self.low_tangent = self.options.lean, self.options.tangent != "fp32"
        if self.lean and (parts.compiler.traces or not recordable(self.parameters[0])):
            raise ValueError(f"options.lean is true; {WHERE_LEAN}")
        self.ahead = self.options.approximate.parameters_of(parts.model)
        self.ahead_positions = [i for i, p in enumerate(self.parameters) if any(p is a for a in self.ahead.values())]
        first = self.parameters[0]
        self.net = self.make_net().to(device=first.device, dtype=first.dtype)
        self.net_parameters = list(self.net.parameters())
        weights = sum(p.numel() for p in self.net_parameters)
        kind = ShardedAdam if self.reducer.world_size > 1 and weights >= SHARDED_FROM else torch.optim.Adam
        self.net_optimizer = kind(
            self.net_parameters,
            lr=self.options.lr,
            weight_decay=self.options.weight_decay,
            **adam_options(parts.compiler.mode, first.device, weights),
        )
        self.iteration = 0
        self.metrics: dict[str, Tensor] = {}  # of the latest step on theta

    def advice(self) -> list[str]:
        holes = why_holes_stay() if self.lean and self.parameters[0].device.type == "cpu" else None
        return [*super().advice(), *([] if holes is None else [f"options.lean: {holes}"])]

    def why_not_compiled(self, batch: Batch) -> str | None:
        if self.parts.compiler.captures and self.options.approximate.every > 1:
            return "approximate.every makes iterations that are not alike; choose one of the two"
        return super().why_not_compiled(batch)

    def counters(self) -> Any:
        return self.iteration, super().counters()

    def set_counters(self, counters: Any) -> None:
        self.iteration, others = counters
        super().set_counters(others)

    def advance(self) -> None:
        super().advance()
        self.iteration += 1

    def moves_theta(self) -> bool:
        """Whether theta takes a step in this iteration."""
        return self.iteration % self.options.approximate.every == 0

    def learns(self) -> bool:
        return self.uses_meta_batch() and self.moves_theta()

    def make_net(self) -> nn.Module:
        """The network with parameters theta, as it is initialised."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[TrainingPass, Tensor]:
        """The training pass, and what the network sees in this iteration."""
        raise NotImplementedError

    def sample_weights(self, seen: Tensor, run: TrainingPass) -> Tensor:
        """The weights (b,) of this process's batch under the current theta."""
        raise NotImplementedError

    def objective(self, seen: Tensor, run: TrainingPass, per_sample: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What Adam minimises in theta (0-d, with a graph), the same on every process, and metrics of it.

        per_sample: dL_meta/dw_i (b,) of this process, see `per_sample_gradient`; zeros where no meta-gradient is taken.
        """
        raise NotImplementedError

    def per_class(self, seen: Tensor) -> dict[str, Tensor]:
        """What the log shows of every class."""
        return {}

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        run, seen = self.forward(batch)
        weights = self._weights(seen, run)
        due, learns, late = self.moves_theta(), self.learns(), self.options.approximate.late_weights
        self.iteration += 1
        gradients = None
        if learns:
            assert meta_batch is not None, "needs.meta_batch is not set"
            if late:
                gradients = self.weighted_gradients(run, weights, self.parameters, retain_graph=True)
                ahead = [gradients[i] for i in self.ahead_positions]
                self._update_net(seen, run, *self.gradient_at(run, ahead, meta_batch))
            else:
                self._update_net(seen, run, *self.per_sample_gradient(run, weights, meta_batch))
        elif due:
            self._update_net(seen, run, torch.zeros_like(run.losses))
        if due and not late:
            weights = self._weights(seen, run)
        self.apply(self.weighted_gradients(run, weights, self.parameters) if gradients is None else gradients)
        objective = (weights * run.losses.detach()).mean()
        spread = weights.std(correction=min(1, len(weights) - 1))  # 0 of a single weight
        return StepOutput(objective, metrics={**self.metrics, "weight_std": spread}, per_class=self.per_class(seen))

    def _weights(self, seen: Tensor, run: TrainingPass) -> Tensor:
        with _without_autocast(seen):
            return self.sample_weights(seen, run)

    def _update_net(self, seen: Tensor, run: TrainingPass, per_sample: Tensor, meta_loss: Tensor | None = None) -> None:
        """Eq. 10: one Adam step on theta."""
        with _without_autocast(seen):
            objective, metrics = self.objective(seen, run, per_sample)
        gradients = torch.autograd.grad(objective, self.net_parameters)
        if isinstance(self.net_optimizer, ShardedAdam):
            self.net_optimizer.step(gradients)
        else:
            for parameter, gradient in zip(self.net_parameters, gradients, strict=True):
                parameter.grad = gradient
            self.net_optimizer.step()
            self.net_optimizer.zero_grad(set_to_none=True)
        self.metrics = metrics if meta_loss is None else {"meta_loss": meta_loss, **metrics}

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "net": self.net.state_dict(),
            "net_optimizer": self.net_optimizer.state_dict(),
            "iteration": self.iteration,
        }

    def gather_state(self, state: dict[str, Any]) -> dict[str, Any]:
        if isinstance(self.net_optimizer, ShardedAdam):
            return {**state, "net_optimizer": self.net_optimizer.gathered()}
        return super().gather_state(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.net.load_state_dict(state["net"])
        if isinstance(self.net_optimizer, ShardedAdam):
            self.net_optimizer.load_state_dict(state["net_optimizer"])
        else:
            load_optimizer(self.net_optimizer, state["net_optimizer"])
        self.iteration = state["iteration"]
        self.metrics = {}


def _without_autocast(seen: Tensor) -> torch.autocast:
    """For theta, which has so few numbers that half types save nothing; a loop of one's own may have autocast on."""
    return torch.autocast(seen.device.type, enabled=False)
