"""Seven ways to take a training step: plain, ours, and three that differentiate twice for the same meta-gradient.

The three get what ours has: one forward of the training batch serves lookahead and update (both are backward passes
through one graph). All start from one model, one Difficulty-Net, one pair of batches.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlt.augment import Augment, normalise
from fastlt.device.compiled import Compiler, adam_options, laid_out, make_sgd, ready
from fastlt.device.distributed import Reducer
from fastlt.device.replay import CudaCapture
from fastlt.losses import build_loss
from fastlt.meta.bounded_accuracy import BoundedAccuracy, class_accuracy
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.meta.difficulty import DifficultyNet, class_weights
from fastlt.meta.per_sample import Trial
from fastlt.models import Classifier, build_model
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts
from fastlt.steps.difficulty import DifficultyOptions, DifficultyStep
from fastlt.steps.learned_weights import Approximation

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
META_PER_CLASS = 10
WINDOW = 10


@dataclass(frozen=True)
class Problem:
    """What is trained on what; `make_problem` draws it from a seed.

    hidden: width of Difficulty-Net, None by the rule. images_per_step: of rolling accuracies, None for a tenth.
    reducer: over the processes, each of which has batches of its own.
    """

    model: Classifier
    net: DifficultyNet
    accuracy: Tensor
    batch: Batch
    meta_batch: Batch
    num_classes: int
    memory_format: torch.memory_format
    precision: str
    compile: str = "none"
    hidden: int | None = None
    images_per_step: int | None = None
    reducer: Reducer = field(default_factory=Reducer)

    @property
    def device(self) -> torch.device:
        return self.batch.images.device

    @functools.cached_property
    def meta_set(self) -> tuple[Tensor, Tensor]:
        """Images and labels, drawn on the device when first asked for: 1.5 GB of 1,000 classes at 224 pixels."""
        labels = torch.arange(META_PER_CLASS * self.num_classes, device=self.device) % self.num_classes
        generator = torch.Generator(self.device).manual_seed(1)
        shape = (len(labels), *self.batch.images.shape[1:])
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=generator)
        return images.contiguous(memory_format=torch.channels_last), labels

    def autocast(self):
        """The context of forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def augment(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalised images in the model's memory format, without random changes: they would be noise in the times."""
        return normalise(images, MEAN, STD, dtype).contiguous(memory_format=self.memory_format)


def make_problem(
    *,
    backbone: str,
    num_classes: int,
    batch: int,
    meta_batch: int,
    image_size: int,
    channels_last: bool,
    precision: str,
    device: str,
    compile: str = "none",
    hidden: int | None = None,
    images_per_step: int | None = None,
    reducer: Reducer | None = None,
    **trained: Any,
) -> Problem:
    """Random images and labels, a network as it is initialised, accuracies between 0.2 and 0.9.

    hidden, images_per_step, reducer: see `Problem`. trained: what of the network is trained, as `build_model` takes it.
    """
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = build_model(backbone, num_classes=num_classes, image_size=image_size, **trained)

    def draw(count: int, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = torch.randint(0, 256, (count, 3, image_size, image_size), dtype=torch.uint8)
        return images.contiguous(memory_format=torch.channels_last).to(device), labels.to(device)

    return Problem(
        model=model.to(device).to(memory_format=memory_format).train(),
        net=DifficultyNet(num_classes, hidden).to(device),
        accuracy=torch.linspace(0.9, 0.2, num_classes, device=device),
        batch=Batch(*draw(batch, torch.randint(num_classes, (batch,))), torch.arange(batch)),
        meta_batch=Batch(*draw(meta_batch, torch.randint(num_classes, (meta_batch,))), torch.arange(meta_batch)),
        num_classes=num_classes,
        memory_format=memory_format,
        precision=precision,
        compile=compile,
        hidden=hidden,
        images_per_step=images_per_step,
        reducer=reducer or Reducer(),
    )


class Way:
    """One way to take a step, on a model of its own: `step()` trains, `theta_gradient()` trains and tells its gradient.

    accuracy: A of the latest step, None where there is none.
    cycle: steps until one is like an earlier one; each of them is captured when it first comes.
    """

    cycle = 1

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.accuracy: Tensor | None = None

    def compiled(self) -> tuple[Callable[[], Any], str | None]:
        """What takes the steps from now on, as the problem's `compile` says, and None or why it is not compiled."""
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def theta_gradient(self) -> Tensor | None:
        """The gradient of the meta loss in the parameters of Difficulty-Net, flat; None for plain training."""
        raise NotImplementedError


class Normalise(Augment):
    """`Problem.augment` as a step takes it, with draws that can be held: of nothing."""

    def __init__(self, problem: Problem) -> None:
        super().__init__((), MEAN, STD, 0, problem.device)
        self.problem = problem

    def apply(self, images: Tensor, draws: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.problem.augment(images, dtype)


class FrozenAccuracy(ClassAccuracy):
    """Stands in for the accuracy on the meta set: always the same, at no cost."""

    def __init__(self, accuracy: Tensor) -> None:
        self.frozen = accuracy

    def update(self, model: nn.Module) -> Tensor:
        return self.frozen

    def variant(self) -> None:
        return None

    def counters(self) -> tuple[int, bool, bool]:
        return 0, False, False

    def set_counters(self, counters: Any) -> None:
        pass

    def advance(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class OwnStep(Way):
    """A step of fastlt itself, as the trainer builds it, without the driver loss (the others have none)."""

    def __init__(self, problem: Problem, method: str, class_accuracy: ClassAccuracy | None, **options: Any) -> None:
        super().__init__(problem)
        counts = ClassCounts(np.full(problem.num_classes, 100), tuple(str(c) for c in range(problem.num_classes)))
        model = copy.deepcopy(problem.model)
        parts = StepParts(
            model=model,
            loss=build_loss("cross_entropy", counts),
            optimizer=new_sgd(trained(model), problem),
            augment=Normalise(problem),
            meta_augment=Normalise(problem),
            class_counts=counts,
            class_accuracy=class_accuracy,
            autocast=problem.autocast,
            reducer=problem.reducer,
            compiler=Compiler(problem.compile),
        )
        if method == "difficulty":
            step = DifficultyStep(parts, DifficultyOptions(driver_weight=0.0, hidden=problem.hidden, **options))
            step.net.load_state_dict(problem.net.state_dict())
        else:
            step = STEPS[method](parts, None)
        self.of_fastlt = step

    def step(self) -> None:
        output = self.of_fastlt(self.problem.batch, self.problem.meta_batch)
        self.accuracy = output.per_class.get("meta_accuracy")

    def compiled(self) -> tuple[Callable[[], Any], str | None]:
        iterate, reason = ready(self.of_fastlt, self.problem.batch, self.problem.meta_batch)
        return lambda: iterate(self.problem.batch, self.problem.meta_batch), reason

    def theta_gradient(self) -> Tensor | None:
        if not isinstance(self.of_fastlt, DifficultyStep):
            self.step()
            return None
        seen: list[Tensor] = []
        net, optimizer = self.of_fastlt.net, self.of_fastlt.net_optimizer
        assert isinstance(optimizer, torch.optim.Adam), "one process has all of Adam's state"
        hook = optimizer.register_step_pre_hook(
            lambda *_: seen.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        )
        self.step()
        hook.remove()
        return seen[0]


class TwiceDifferentiated(Way):
    """The lookahead kept in autograd's graph and differentiated; subclasses say by whose means."""

    def __init__(self, problem: Problem, dtype: torch.dtype = torch.float32, accuracy: Tensor | None = None) -> None:
        super().__init__(problem)
        self.dtype = dtype
        self.model = copy.deepcopy(problem.model).to(dtype)
        self.net = copy.deepcopy(problem.net).to(dtype)
        self.accuracy = (problem.accuracy if accuracy is None else accuracy).to(dtype)
        self.parameters: list[Tensor] = trained(self.model)
        self.optimizer = new_sgd(self.parameters, problem)
        adam = adam_options(problem.compile, problem.device)
        self.net_optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3, weight_decay=1e-4, **adam)

    def losses(self, model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """Per-sample cross-entropy (b,)."""
        # The fused attention kernels cannot be differentiated twice.
        with self.problem.autocast(), sdpa_kernel(SDPBackend.MATH):
            logits = model(self.problem.augment(batch.images).to(self.dtype))
        return F.cross_entropy(logits.to(self.dtype), batch.labels, reduction="none")

    def weights(self) -> Tensor:
        return class_weights(self.net(self.accuracy))[self.problem.batch.labels]

    def meta_gradient(self) -> tuple[Tensor, Sequence[Tensor], tuple[Tensor, ...]]:
        """Losses of the training batch, the parameters they depend on, and the gradient in theta."""
        raise NotImplementedError

    def step(self) -> None:
        self.theta_gradient()

    def compiled(self) -> tuple[Callable[[], Any], str | None]:
        """By hand, as a user of these packages could: a CUDA graph of the whole step; inductor does not do it."""
        if self.problem.compile != "cudagraph":
            return self.step, f"is not compiled by {self.problem.compile}"
        if self.problem.device.type != "cuda":
            return self.step, "CUDA graphs need a CUDA device"
        try:
            return CudaCapture()(self.step)[0], None
        except Exception as error:
            torch.cuda.synchronize()
            return self.step, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"

    def theta_gradient(self) -> Tensor:
        losses, parameters, gradients = self.meta_gradient()
        flat = torch.cat([g.flatten() for g in gradients])
        apply(self.net_optimizer, list(self.net.parameters()), gradients)
        with torch.no_grad():
            weights = self.weights()
        apply(self.optimizer, self.parameters, torch.autograd.grad((weights * losses).mean(), parameters))
        return flat


class DoubleBackward(TwiceDifferentiated):
    """torch alone: create_graph, and a functional call at the lookahead."""

    def meta_gradient(self):
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        losses = self.losses(self.model, self.problem.batch)
        inner = torch.autograd.grad((self.weights() * losses).mean(), self.parameters, create_graph=True)
        ahead = {name: p - LR * g for (name, p), g in zip(named.items(), inner, strict=True)}
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}

        def looking_ahead(images: Tensor) -> Tensor:
            return torch.func.functional_call(self.model, {**buffers, **ahead}, (images,))

        meta = self.losses(looking_ahead, self.problem.meta_batch).mean()
        return losses, self.parameters, torch.autograd.grad(meta, list(self.net.parameters()), retain_graph=True)


class Higher(TwiceDifferentiated):
    """The package `higher`: a functional copy of the model and a differentiable SGD."""

    def meta_gradient(self):
        import higher  # pyright: ignore[reportMissingImports]  # of the extra `bench`

        inner = torch.optim.SGD(self.parameters, lr=LR)
        with higher.innerloop_ctx(self.model, inner, copy_initial_weights=False) as (functional, optimizer):
            losses = self.losses(functional, self.problem.batch)
            optimizer.step((self.weights() * losses).mean())
            meta = self.losses(functional, self.problem.meta_batch).mean()
            gradients = torch.autograd.grad(meta, list(self.net.parameters()), retain_graph=True)
            start = functional.parameters(time=0)  # pyright: ignore[reportCallIssue]  # `higher` types it as a Module
            return losses, list(start), gradients


class TorchOpt(TwiceDifferentiated):
    """The package `torchopt`: MetaSGD moves the model differentiably, and its state is put back."""

    def meta_gradient(self):
        import torchopt  # pyright: ignore[reportMissingImports]  # of the extra `bench`

        before = torchopt.extract_state_dict(self.model, by="reference")
        losses = self.losses(self.model, self.problem.batch)
        torchopt.MetaSGD(self.model, lr=LR).step((self.weights() * losses).mean())
        meta = self.losses(self.model, self.problem.meta_batch).mean()
        gradients = torch.autograd.grad(meta, list(self.net.parameters()), retain_graph=True)
        torchopt.recover_state_dict(self.model, before)
        return losses, self.parameters, gradients


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


def new_sgd(parameters: Sequence[Tensor], problem: Problem) -> torch.optim.Optimizer:
    """The optimizer of every way."""
    groups = [{"params": parameters}]
    return make_sgd(groups, problem.compile, LR, problem.device, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def apply(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: tuple[Tensor, ...]) -> None:
    """One step with these gradients."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = laid_out(gradient, parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _rolling(problem: Problem) -> OwnStep:
    accuracy = _refreshed(problem, "rolling", problem.images_per_step)
    way = OwnStep(problem, "difficulty", accuracy)
    way.cycle = 1 if isinstance(accuracy, BoundedAccuracy) else WINDOW
    return way


def _refreshed(problem: Problem, refresh: str, images_per_step: int | None = None) -> ClassAccuracy:
    return class_accuracy(
        *problem.meta_set,
        problem.num_classes,
        prepare=Normalise(problem),
        refresh=refresh,
        window=WINDOW,
        images_per_step=images_per_step,
        reducer=problem.reducer,
        autocast=problem.autocast,
    )


def _general(problem: Problem) -> OwnStep:
    way = OwnStep(problem, "difficulty", FrozenAccuracy(problem.accuracy))
    assert isinstance(way.of_fastlt, DifficultyStep)
    way.of_fastlt.trial = Trial("the row asks for it")
    return way


def _approximate(problem: Problem, **approximate: Any) -> OwnStep:
    return OwnStep(problem, "difficulty", FrozenAccuracy(problem.accuracy), approximate=Approximation(**approximate))


WAYS: dict[str, Callable[[Problem], Way]] = {
    "plain": lambda problem: OwnStep(problem, "plain", None),
    "ours_frozen": lambda problem: OwnStep(problem, "difficulty", FrozenAccuracy(problem.accuracy)),
    "ours_exact": lambda problem: OwnStep(problem, "difficulty", _refreshed(problem, "exact")),
    "ours_rolling": _rolling,
    "double_backward": DoubleBackward,
    "higher": Higher,
    "torchopt": TorchOpt,
    "general": _general,
    "lean": lambda problem: OwnStep(problem, "difficulty", FrozenAccuracy(problem.accuracy), lean=True),
    "fp32_tangent": lambda problem: OwnStep(problem, "difficulty", FrozenAccuracy(problem.accuracy), tangent="fp32"),
    "late_weights": lambda problem: _approximate(problem, late_weights=True),
    "lookahead_head": lambda problem: _approximate(problem, lookahead_only=["head"]),
    "late_head": lambda problem: _approximate(problem, late_weights=True, lookahead_only=["head"]),
}
OWN = tuple(name for name in WAYS if name not in ("double_backward", "higher", "torchopt"))
ON_REQUEST = ("general", "lean", "fp32_tangent", "late_weights", "lookahead_head", "late_head")
NEEDS_PACKAGE = ("higher", "torchopt")


def missing(name: str, of_all: bool) -> str | None:
    """Why a way cannot be measured here, with what to do about it; None when it can. of_all: if all is trained."""
    if name in NEEDS_PACKAGE and not of_all:
        return f"{name} is written here for networks that are trained as a whole: leave --train and --adapt out"
    if name in NEEDS_PACKAGE and importlib.util.find_spec(name) is None:
        return f"{name} is not installed: pip install 'fastlt[bench]'"
    return None


def float64_gradient(problem: Problem, accuracy: Tensor) -> Tensor:
    """The gradient in theta in float64, by differentiating twice; for float32 and bf16 problems alike."""
    exact = replace(problem, precision="fp32", compile="none")
    return DoubleBackward(exact, torch.float64, accuracy).theta_gradient()
