"""Balanced Meta-Softmax (BALMS, Ren et al. 2020): a new head on frozen features, and learned class sampling rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlt.device.compiled import load_optimizer
from fastlt.device.gradients import mean_gradients
from fastlt.meta import gradient as meta_gradient
from fastlt.ranges import at_least
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import StepOptions, StepParts
from fastlt.steps.decoupled import CrtStep, rates_by_layer
from fastlt.steps.meta import MetaStep
from fastlt.steps.needs import Allows, LogitsPrior, Needs
from fastlt.steps.settings import RecipeSettings, StageSettings


def initial_logits(class_counts: np.ndarray, init_pow: float) -> Tensor:
    """Logits of rates proportional to pi_c^(-init_pow), the smallest and the largest adding up to 1: float64 (C,).

    class_counts: int64 (C,), each >= 1. init_pow = 0 gives zeros: every image counts the same.
    """
    share = torch.from_numpy(class_counts / class_counts.sum())
    rates = share**-init_pow
    return torch.logit(rates / (rates.min() + rates.max()))


def gumbel(shape: tuple[int, int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise of a shape, in the precision and on the device of `like`."""
    waiting = torch.empty(shape, dtype=like.dtype, device=like.device).exponential_(generator=generator)
    return -waiting.clamp_min_(torch.finfo(like.dtype).tiny).log_()


def sgd_direction(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: list[Tensor]
) -> list[Tensor]:
    """What `optimizer` would multiply by its learning rate and subtract, given these gradients; changes nothing.

    The optimizer has one group and is SGD with weight decay and (not Nesterov's) momentum.
    """
    (group,) = optimizer.param_groups
    decayed = torch._foreach_add(  # pyright: ignore[reportPrivateImportUsage]  # public all the same
        gradients, [p.detach() for p in parameters], alpha=group["weight_decay"]
    )
    buffers = [optimizer.state[p].get("momentum_buffer") for p in parameters]
    if group["momentum"] == 0 or any(b is None for b in buffers):
        return list(decayed)
    moved = torch._foreach_add(  # pyright: ignore[reportPrivateImportUsage]  # public all the same
        decayed, buffers, alpha=group["momentum"]
    )
    return list(moved)


@dataclass(frozen=True)
class BalmsOptions(StepOptions):
    """Options of method balms.

    lr: learning rate of Adam for the sampling rates.
    init_pow: rates start proportional to pi_c^(-init_pow): 0 on CIFAR, 0.1 on ImageNet-LT, and 0.3 on Places-LT with lr
        0.001.
    pool_factor: images of a batch over those that are drawn from it, rounded down on each process.
    """

    lr: float = field(default=0.01, metadata=at_least(0))
    init_pow: float = field(default=0.0, metadata=at_least(0))
    pool_factor: int = field(default=4, metadata=at_least(1))


class BalmsStep(MetaStep[BalmsOptions], CrtStep[BalmsOptions]):
    """A head retrained on images that are drawn by class sampling rates, and the rates learned through the head.

    An image is drawn with a probability proportional to r_y, r = sigmoid(psi), psi (C,): a class has n_c r_c of the
    draws. Each of the b draws takes the largest of log r_{y_i} + Gumbel noise over the images i. A draw counts with the
    weight w = 1; backwards, w is the softmax of the same sums at that image (straight-through). One step of the head,
    the very one that the optimizer would take, is looked ahead; d(meta loss)/dw of the drawn samples goes through the
    softmax into psi, for one Adam step. Then the head descends the mean loss of the draws. The loss of the paper is
    balanced softmax; with cross-entropy this is the paper's ablation of a meta sampler on decoupled training.

    As in the authors' code: rates and their initial values, the noise, the straight-through weights, momentum and
    weight decay in the lookahead, Adam, cross-entropy on the meta batch, a new head. Otherwise:
    the images to draw from are those of one batch of the loader, not the whole training set, so `sampling` is instance
    and batches are `pool_factor` times as large as what is drawn; a draw sees the newest rates, where prefetching in
    the authors' code leaves it with older ones; the backbone is in eval mode, as in every method on frozen features;
    the meta set is the recipe's on every data set (on CIFAR the authors' is the training set, class-balanced).

    With several processes each draws its share from its own batch, and gradients are those of all of them.
    """

    needs = Needs(meta_batch=True, trained_model=True)
    allows = Allows()
    logits_prior = LogitsPrior("uniform", "the learned sampling rates are taken to have balanced the classes")
    plain_steps = 0.7

    Options = BalmsOptions

    @classmethod
    def check_stage(cls, options: BalmsOptions, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        mistakes = rates_by_layer(stage)
        if stage.sampling != "instance":
            mistakes.append(
                f"sampling: is {stage.sampling!r}; balms learns its own class sampling rates, and draws by them from "
                "batches in which every image is equally likely: set sampling: instance"
            )
        factor = options.pool_factor
        if stage.batch_size % factor:
            mistakes.append(
                f"batch_size: is {stage.batch_size}, of which balms draws one in {factor} (options.pool_factor); "
                f"give a multiple of {factor}"
            )
        if stage.nesterov:
            mistakes.append("nesterov: is true; balms looks one step of SGD with plain momentum ahead: set it to false")
        if stage.optimizer != "sgd":
            mistakes.append(f"optimizer: is {stage.optimizer!r}; balms looks one step of SGD ahead: set optimizer: sgd")
        if stage.clip is not None:
            mistakes.append(
                "clip: is set; balms looks the optimizer's own step ahead, which is not clipped: leave it out"
            )
        if stage.optimizer_options.get("dampening"):
            mistakes.append(
                "optimizer_options: have dampening; balms looks one step of SGD without it ahead: leave it out"
            )
        if stage.decay != "all":
            mistakes.append("decay: is 'weights'; balms looks one step with one weight decay ahead: set decay: all")
        return mistakes

    def __init__(self, parts: StepParts, options: BalmsOptions | None = None) -> None:
        super().__init__(parts, options)
        self.network = nn.Sequential(self.model.dropout, self.model.head)
        self.ahead = meta_gradient.trainable_parameters(self.network)
        logits = initial_logits(parts.class_counts.counts, self.options.init_pow)
        self.rate_logits = nn.Parameter(logits.to(self.parameters[0]))
        self.rate_optimizer = torch.optim.Adam([self.rate_logits], lr=self.options.lr)
        self.counts = torch.from_numpy(parts.class_counts.counts).to(self.rate_logits)
        # Of the run's seed, and the same on all processes: each uses rows of its own of the noise.
        self.generator = torch.Generator(self.rate_logits.device).manual_seed(parts.seed)

    @classmethod
    def why_general(cls, traces: bool, float32_tangent: bool) -> str | None:
        return "balms trains a head on features, whose passes take no time"

    def inputs(self, images: Tensor) -> Tensor:
        """Features (N, D) in the head's precision; nothing flows back through them."""
        with self.parts.autocast(), torch.no_grad():
            return self.model.features(images).to(self.rate_logits.dtype)

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Per-sample losses (b,) of features (b, D)."""
        self.loss.draw(len(labels))
        with self.parts.autocast():
            return self.loss(self.network(inputs), labels)

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        assert meta_batch is not None, "needs.meta_batch is not set"
        noise = self._noise(max(1, len(batch) // self.options.pool_factor), len(batch))
        with torch.no_grad():
            scores = F.logsigmoid(self.rate_logits)[batch.labels] + noise
            drawn = scores.argmax(1)
        run = self.training_pass(Batch(batch.images[drawn], batch.labels[drawn], batch.index[drawn]))
        # The weights are 1, so that the lookahead and the update have one gradient.
        objective = run.losses.mean()
        gradients = mean_gradients(self.reducer, objective, self.parameters, retain_graph=True)
        direction = sgd_direction(self.optimizer, self.parameters, gradients)
        own_gradient, meta_loss = self.gradient_at(run, direction, meta_batch)
        self._update_rates(batch.labels, noise, drawn, own_gradient)
        self.apply(gradients)
        return StepOutput(
            objective.detach(),
            metrics={"meta_loss": meta_loss},
            per_class={"sampling_rate": self.class_probabilities()},
        )

    def class_probabilities(self) -> Tensor:
        """The share of the draws that each class has: (C,), sum 1."""
        with torch.no_grad():
            share = self.counts * torch.sigmoid(self.rate_logits)
            return share / share.sum()

    def _noise(self, draws: int, pool: int) -> Tensor:
        """Gumbel noise (draws, pool) of this process."""
        rank, processes = self.reducer.rank, self.reducer.world_size
        rows = gumbel((draws * processes, pool), self.rate_logits, self.generator)
        return rows[rank * draws : (rank + 1) * draws]

    def _update_rates(self, labels: Tensor, noise: Tensor, drawn: Tensor, gradient: Tensor) -> None:
        """One Adam step on psi. labels: of the pool. gradient: d(meta loss)/dw of the drawn samples (b,)."""
        soft = torch.softmax(F.logsigmoid(self.rate_logits)[labels] + noise, dim=1)
        weights = soft.gather(1, drawn[:, None]).squeeze(1)
        (slope,) = torch.autograd.grad(torch.dot(gradient.detach().to(weights.dtype), weights), [self.rate_logits])
        self.reducer.mean_([slope])
        self.rate_logits.grad = slope
        self.rate_optimizer.step()
        self.rate_optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {
            **super().state_dict(),
            "rate_logits": self.rate_logits.detach(),
            "rate_optimizer": self.rate_optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            self.rate_logits.copy_(state["rate_logits"])
        load_optimizer(self.rate_optimizer, state["rate_optimizer"])
        self.generator.set_state(state["generator"].cpu())
