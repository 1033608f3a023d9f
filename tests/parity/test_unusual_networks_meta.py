"""The meta-gradient of networks that do more than a function of their input, against differentiating twice."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlt.losses import build_loss
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.meta.per_sample import try_network
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts

CLASSES, LR = 5, 0.1


def cross_entropy(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def some(count=8):
    images = torch.rand(count, 3, 8, 8, dtype=torch.float64)
    return Batch(images, torch.arange(count) % CLASSES, torch.arange(count))


def copied(batch):
    return Batch(batch.images.clone(), batch.labels, batch.index)


def make_network(*layers):
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, CLASSES)).double().train()


def make_step(model, accumulate=1, **options):
    meta = some()
    given = lambda images: images  # noqa: E731
    counts = ClassCounts.of([5, 4, 3, 2, 1])
    parts = StepParts(
        model=model,
        loss=build_loss("cross_entropy", counts),
        optimizer=torch.optim.SGD(model.parameters(), lr=LR),
        augment=given,
        meta_augment=given,
        class_counts=counts,
        class_accuracy=ClassAccuracy(meta.images, meta.labels, CLASSES, prepare=given),
        accumulate=accumulate,
    )
    return STEPS["difficulty"](parts, STEPS["difficulty"].Options(**options))


def twice_differentiated(model, batch, meta_batch, weights, accumulate):
    """dL_meta/dw, and the gradient of the weighted loss; moves the buffers of `model` as one training pass does."""
    parameters, w = dict(model.named_parameters()), weights.clone().requires_grad_()

    def parts(b):
        return zip([i.clone() for i in b.images.chunk(accumulate)], b.labels.chunk(accumulate), strict=True)

    losses = torch.cat([cross_entropy(model(images), labels) for images, labels in parts(batch)])
    gradients = torch.autograd.grad((w * losses).mean(), list(parameters.values()), create_graph=True)
    ahead = {n: p - LR * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
    meta_losses = []
    for images, labels in parts(meta_batch):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        meta_losses.append(cross_entropy(torch.func.functional_call(model, {**buffers, **ahead}, (images,)), labels))
    return torch.autograd.grad(torch.cat(meta_losses).mean(), w)[0], gradients


def check(model, accumulate=1, iterations=1, **options):
    """The meta-gradient and the update of a few iterations, each from where the one before left the network."""
    step = make_step(model, accumulate, **options)
    weights = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    for _ in range(iterations):
        batch, meta_batch, slow_model = some(), some(), copy.deepcopy(model)
        run = step.training_pass(copied(batch))
        fast, _ = step.per_sample_gradient(run, weights, copied(meta_batch))
        update = step.weighted_gradients(run, weights, step.parameters)
        slow, gradients = twice_differentiated(slow_model, batch, meta_batch, weights, accumulate)
        assert slow.norm() > 0
        assert (fast - slow).norm() / slow.norm() < 1e-10
        for one, other in zip(update, gradients, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-12)
        for (name, one), other in zip(model.named_buffers(), slow_model.buffers(), strict=True):
            torch.testing.assert_close(one, other, msg=name)
    return step


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class BatchRenorm(nn.BatchNorm2d):
    """Normalises with the batch, and corrects that by the running statistics, which it has moved before."""

    def forward(self, x):
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(variance, 0.1)
            deviation = (self.running_var + self.eps).sqrt()
            scale = (variance + self.eps).sqrt() / deviation
            shift = (mean - self.running_mean) / deviation
        x = (x - mean[:, None, None]) / (variance + self.eps).sqrt()[:, None, None]
        x = x * scale[:, None, None] + shift[:, None, None]
        return x * self.weight[:, None, None] + self.bias[:, None, None]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_norm_that_computes_with_its_statistics(accumulate):
    check(make_network(nn.Conv2d(3, 4, 3), BatchRenorm(4)), accumulate, iterations=2)


def test_the_statistics_of_batch_norm_are_not_copied():
    step = make_step(make_network(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert step.training_pass(some()).buffers == {}


class FollowsLater(nn.Module):
    """Takes off a running mean that begins to follow after some passes, and computes with what it has moved."""

    def __init__(self, passes, exchange):
        super().__init__()
        self.passes, self.exchange = passes, exchange
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        self.seen += 1
        if self.seen > self.passes:
            mean = x.detach().mean((0, 2, 3))
            self.mean = self.mean.lerp(mean, 0.5) if self.exchange else self.mean.lerp_(mean, 0.5)
        return x - self.mean[:, None, None]


@pytest.mark.parametrize("exchange", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_a_buffer_that_begins_to_move_later(passes, accumulate, exchange):
    check(make_network(nn.Conv2d(3, 4, 3), FollowsLater(passes, exchange)), accumulate, iterations=5)


class FollowsWhenTold(nn.Module):
    """Takes off a running mean that follows once `follows` is set."""

    def __init__(self):
        super().__init__()
        self.follows = False
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        if self.follows:
            self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.5)
        return x - self.mean[:, None, None]


def test_a_buffer_that_moves_after_the_trial_couples_the_meta_images():
    layer = FollowsWhenTold()
    model = make_network(nn.Conv2d(3, 4, 3), layer)
    step = make_step(model)
    weights = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    for layer.follows in (False, True, True):
        batch, meta_batch, slow_model = some(), some(), copy.deepcopy(model)
        run = step.training_pass(batch)
        fast, _ = step.per_sample_gradient(run, weights, meta_batch)
        slow, _ = twice_differentiated(slow_model, batch, meta_batch, weights, 1)
        assert (fast - slow).norm() / slow.norm() < 1e-10
    assert step.trial.refused == "a forward pass changes the buffer 1.mean"


def test_a_buffer_that_stays_is_copied_once():
    layer = FollowsWhenTold()
    step = make_step(make_network(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), layer))
    kept = []
    for _ in range(2):
        assert step.training_pass(some()).buffers == {}
        kept.append(step.buffers.copies["2.mean"][2])
    assert kept[0] is kept[1]
    with torch.no_grad():
        layer.mean.fill_(1.0)  # a state that is loaded, say
    layer.follows = True
    assert torch.equal(step.training_pass(some()).buffers["2.mean"], torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("method", ["difficulty", "sample_difficulty", "mwn", "cb_da"])
def test_a_network_that_recomputes_activations_is_refused(method):
    """The lookahead's parameters have left the network by then, which would recompute with its own."""
    model = make_network(nn.Conv2d(3, 4, 3))
    model[0].grad_checkpointing = True
    with pytest.raises(ValueError, match="0 recomputes activations"):
        STEPS[method].check_model(model, STEPS[method].Options())


class Recomputes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return checkpoint(self.conv, x, use_reentrant=False)  # torch itself refuses the other kind


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])
def test_a_network_that_recomputes_without_saying_so_is_refused(accumulate, norm):
    model = make_network(nn.Conv2d(3, 4, 3), copy.deepcopy(norm), Recomputes())
    step = make_step(model, accumulate)
    before = copy.deepcopy(dict(model.named_parameters()))
    for _ in range(2):
        with pytest.raises(ValueError, match="conv goes forward again in the backward pass"):
            step(some(), some())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model[2].conv._forward_pre_hooks


def test_a_network_with_nothing_to_refuse_is_watched_once():
    model = make_network(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    step = make_step(model)
    step(some(), some())
    assert not step.refuses_recomputation
    assert not any(module._forward_pre_hooks for module in model.modules())


class NormalisesInPlace(nn.Module):
    def forward(self, x):
        return x.sub_(0.5).div_(0.25)


NORMS = {"without a norm": nn.Identity, "batch norm": lambda: nn.BatchNorm2d(4)}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("accumulate", "options"), [(1, {}), (2, {}), (1, {"lean": True})])
def test_a_network_that_overwrites_its_input(accumulate, options, norm):
    model = make_network(NormalisesInPlace(), nn.Conv2d(3, 4, 3), NORMS[norm]())
    step = check(model, accumulate, iterations=2, **options)
    batch, meta_batch = some(), some()
    given = batch.images.clone(), meta_batch.images.clone()
    step(batch, meta_batch)
    assert torch.equal(batch.images, given[0])
    assert torch.equal(meta_batch.images, given[1])


def test_a_network_that_leaves_its_input_alone_gets_no_copy():
    step = check(make_network(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    seen = []
    step.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = some()
    run = step.training_pass(batch)
    assert seen[0] is batch.images
    assert run.inputs is batch.images


class Lazy(nn.Module):
    """A running mean that begins with that of the first batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, x):
        mean = x.detach().mean((0, 2, 3))
        self.mean = mean.clone() if self.mean is None else self.mean.lerp(mean, 0.5)
        return x - self.mean[:, None, None]


class MakesItsBuffer(nn.Module):
    """A buffer that the first pass registers."""

    def forward(self, x):
        if not hasattr(self, "scale"):
            self.register_buffer("scale", x.detach().abs().mean((0, 2, 3)))
        return x * self.scale[:, None, None]


@pytest.mark.parametrize(("layer", "buffer"), [(Lazy, "mean"), (MakesItsBuffer, "scale")])
def test_a_trial_leaves_no_buffer_that_it_has_made(layer, buffer):
    model = make_network(nn.Conv2d(3, 4, 3), layer())
    trial = try_network(model, cross_entropy, some(1).images, CLASSES)
    assert trial.refused == f"a forward pass changes the buffer 1.{buffer}"
    assert getattr(model[1], buffer, None) is None
    assert not dict(model.named_buffers())


class ScalesByItsBatch(nn.Module):
    """A statistic of the batch that is a constant to autograd."""

    def __init__(self, constant):
        super().__init__()
        self.constant = constant

    def forward(self, x):
        if self.constant == "detach":
            return x * (torch.relu(x.detach()).mean() + 1)
        with torch.no_grad():
            scale = torch.relu(x).mean() + 1
        return x * scale


@pytest.mark.parametrize("constant", ["detach", "no_grad"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_images_that_couple_through_a_constant(accumulate, constant):
    step = check(make_network(nn.Conv2d(3, 4, 3), ScalesByItsBatch(constant)), accumulate, iterations=2)
    if accumulate == 1:
        assert step.trial.refused == "the loss of an image depends on the other images of its batch"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_buffer_that_the_first_pass_makes(accumulate):
    check(make_network(nn.Conv2d(3, 4, 3), Lazy()), accumulate, iterations=3)
