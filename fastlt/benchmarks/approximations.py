"""How far the approximations of the meta-step are from the exact one while a network trains.

    fastlt benchmark approximations recipes/cifar10_lt.yaml data.root=DIR --every 2 4 --modules head

Trains a stage of the recipe (method: difficulty) exactly. Beside it, for every approximation, a copy of Difficulty-Net
takes the Adam steps that the approximation would take, on the same network, batches and accuracies; compared are the
class weights of both. Meta batches are not augmented, so that each of the ways sees the same. Nothing is validated or
saved.

|dw|       difference between approximate and exact class weights: mean, and largest, over classes and iterations
second     the same mean over the second half of the iterations
gradient   difference between approximate and exact dL_meta/dw, relative to the exact one, in norm: mean over iterations
w std      for comparison: the standard deviation of the exact weights over classes, mean over iterations
"""

from __future__ import annotations

import copy
import platform
import tempfile
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastlt.arguments import positive
from fastlt.benchmarks.rounds import report
from fastlt.benchmarks.stage_loop import DifficultyLoop, parser
from fastlt.meta import gradient as meta_gradient
from fastlt.meta.difficulty import class_weights, difficulty_gradient_loss
from fastlt.state import Batch
from fastlt.steps.difficulty import DifficultyOptions, DifficultyStep
from fastlt.steps.learned_weights import Approximation
from fastlt.steps.meta import TrainingPass

NAME = "fastlt benchmark approximations"


@dataclass(frozen=True)
class Row:
    """One approximation; weights have mean 1. grad_rel_error: None where the gradient is the exact one."""

    name: str
    mean_weight_error: float
    second_half_mean_weight_error: float
    max_weight_error: float
    grad_rel_error: float | None


def main(arguments: list[str], prog: str = NAME) -> int:
    """Train, compare and print; returns the exit code. A mistake in the recipe is a ValueError."""
    options = parser(__doc__, NAME, prog)
    options.add_argument("--every", type=positive, nargs="+", default=[2, 4], metavar="K")
    options.add_argument(
        "--modules", nargs="+", default=["head"], metavar="NAME,…", help="each a list of modules that look ahead"
    )
    words = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as runs:
        loop = DifficultyLoop(words, runs, lambda stage: ["data.meta_augment=[]"])
        options = loop.step.options
        assert isinstance(options, DifficultyOptions)
        if options.meta_weight == 0 or options.approximate != Approximation():
            raise ValueError(
                f"stages.{loop.name}.options: the exact step is compared with here; set meta_weight above 0, and leave "
                "approximate out"
            )
        shadows = [LateWeights("late_weights"), *(Every(f"every {k}", k, loop.step) for k in words.every)]
        shadows += [LookaheadOnly(f"lookahead_only {m}", m.split(","), loop.step) for m in words.modules]
        exact = follow(loop, shadows)
    rows = [shadow.row(exact) for shadow in shadows]
    settings = {**loop.settings, "exact_weight_std": exact.std(1).mean().item()}
    settings |= {"torch": torch.__version__, "python": platform.python_version()}
    table = partial(print_table, weight_std=settings["exact_weight_std"])
    report(rows, settings, as_json=words.json, table=table)
    return 0


@dataclass(frozen=True)
class Moment:
    """What is known in an iteration when theta is about to move.

    before: class weights (C,) that the lookahead took. gradient: exact dL_meta/dw (C,).
    """

    step: DifficultyStep
    run: TrainingPass
    meta_batch: Batch
    accuracy: Tensor
    before: Tensor
    gradient: Tensor


class Shadow:
    """The course of the class weights under one approximation."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.weights: list[Tensor] = []
        self.errors: list[Tensor] = []

    def observe(self, moment: Moment) -> None:
        """Append the weights (C,) that the update of this iteration would take."""
        raise NotImplementedError

    def row(self, exact: Tensor) -> Row:
        """exact: the exact weights (iterations, C)."""
        error = (torch.stack(self.weights).cpu() - exact).abs()
        gradient = torch.stack(self.errors).mean().item() if self.errors else None
        return Row(self.name, error.mean().item(), error[len(error) // 2 :].mean().item(), error.max().item(), gradient)


class LateWeights(Shadow):
    """The update takes the weights of the lookahead."""

    def observe(self, moment: Moment) -> None:
        self.weights.append(moment.before)


class OwnTheta(Shadow):
    """A Difficulty-Net and an Adam of its own, from the same start."""

    def __init__(self, name: str, step: DifficultyStep) -> None:
        super().__init__(name)
        self.net = copy.deepcopy(step.net)
        options = step.options
        self.optimizer = torch.optim.Adam(self.net.parameters(), options.lr, weight_decay=options.weight_decay)

    def move(self, moment: Moment, gradient: Tensor) -> None:
        """One Adam step, as the step takes it, with another dL_meta/dw (C,)."""
        options = moment.step.options
        scalar, _ = difficulty_gradient_loss(
            self.net, moment.accuracy, options.meta_weight * gradient, options.driver_weight, options.driver_target
        )
        self.optimizer.zero_grad()
        scalar.backward()
        self.optimizer.step()

    def observe(self, moment: Moment) -> None:
        self.learn(moment)
        with torch.no_grad():
            self.weights.append(class_weights(self.net(moment.accuracy)))

    def learn(self, moment: Moment) -> None:
        """Move theta, or leave it."""
        raise NotImplementedError


class Every(OwnTheta):
    """theta moves in every k-th iteration."""

    def __init__(self, name: str, k: int, step: DifficultyStep) -> None:
        super().__init__(name, step)
        self.k, self.iteration = k, 0

    def learn(self, moment: Moment) -> None:
        if self.iteration % self.k == 0:
            self.move(moment, moment.gradient)
        self.iteration += 1


class LookaheadOnly(OwnTheta):
    """Some modules take the lookahead."""

    def __init__(self, name: str, modules: list[str], step: DifficultyStep) -> None:
        super().__init__(name, step)
        self.ahead = Approximation(lookahead_only=modules).parameters_of(step.model)

    def learn(self, moment: Moment) -> None:
        step, run = moment.step, replace(moment.run, record=None)
        everything, step.ahead = step.ahead, self.ahead
        try:
            per_sample, _ = step.per_sample_gradient(run, moment.before[run.labels], moment.meta_batch)
        finally:
            step.ahead = everything
        gradient = meta_gradient.sum_by_class(per_sample, run.labels, len(moment.gradient))
        # At a learning rate of 0, where a warm-up may begin, both are 0.
        self.errors.append((gradient - moment.gradient).norm() / moment.gradient.norm().clamp_min(1e-30))
        self.move(moment, gradient)


def follow(loop: DifficultyLoop, shadows: list[Shadow]) -> Tensor:
    """Train exactly, with the shadows beside; returns the exact weights (iterations, C)."""
    step = loop.step
    exact: list[Tensor] = []
    now: dict[str, Batch] = {}
    objective = step.objective

    def observed(seen: Tensor, run: TrainingPass, per_sample: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        gradient = meta_gradient.sum_by_class(per_sample, run.labels, len(seen))
        moment = Moment(step, run, now["meta_batch"], seen, step.class_weights, gradient)
        for shadow in shadows:
            shadow.observe(moment)
        return objective(seen, run, per_sample)

    step.objective = observed
    for batch, meta_batch in loop.batches():
        now["meta_batch"] = meta_batch
        exact.append(step(batch, meta_batch).per_class["weight"])
    return torch.stack(exact).cpu()


def print_table(rows: list[Row], weight_std: float) -> None:
    """The rows for people."""
    width = max(len(one.name) for one in rows)
    print(f"{'':{width}}  {'mean |dw|':>9}  {'second':>9}  {'max |dw|':>8}  {'gradient':>8}  {'w std':>6}")
    for one in rows:
        gradient = "exact" if one.grad_rel_error is None else f"{one.grad_rel_error:.3f}"
        print(
            f"{one.name:{width}}  {one.mean_weight_error:9.5f}  {one.second_half_mean_weight_error:9.5f}  "
            f"{one.max_weight_error:8.4f}  {gradient:>8}  {weight_std:6.3f}"
        )
