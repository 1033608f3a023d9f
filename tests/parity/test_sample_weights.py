"""Meta-Weight-Net, sample-level difficulty and CB-DA equal plain versions of themselves that differentiate twice."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from float64_steps import Scaled
from reference import forward

from fastlt.losses import build_loss
from fastlt.models import build_model
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts
from fastlt.steps.sample_weights import batch_weights
from fastlt.typed_yaml import build

CLASSES, LR = 5, 0.1
COUNTS = ClassCounts(np.array([40, 20, 10, 5, 2]), tuple("abcde"))


def make(method, **options):
    torch.manual_seed(1)
    model = build_model("cifar_resnet8", num_classes=CLASSES).double().train()
    parts = StepParts(
        model=model,
        loss=build_loss("cross_entropy", COUNTS),
        optimizer=torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4),
        augment=Scaled(),
        meta_augment=Scaled(),
        class_counts=COUNTS,
    )
    return STEPS[method](parts, STEPS[method].Options(**options))


def batches(number):
    torch.manual_seed(2)
    for _ in range(number):
        pair = []
        for size in (12, 10):
            images = torch.randint(0, 256, (size, 3, 12, 12), dtype=torch.uint8)
            pair.append(Batch(images, torch.randint(0, CLASSES, (size,)), torch.arange(size)))
        yield pair


def meta_loss(model, weights_of, batch, meta_batch, *, scale):
    """The loss on the meta batch after a step of `scale` on sum_i w_i l_i, with the graph of that step kept."""
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    losses = F.cross_entropy(forward(model, parameters, Scaled()(batch.images)), batch.labels, reduction="none")
    weights = weights_of(losses.detach())
    inner = sum(w * value for w, value in zip(weights, losses, strict=True))
    gradients = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
    ahead = {n: p - scale * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
    return F.cross_entropy(forward(model, ahead, Scaled()(meta_batch.images)), meta_batch.labels)


def descend(model, sgd, batch, weights_of):
    """One SGD step on the weighted mean loss."""
    losses = F.cross_entropy(model(Scaled()(batch.images)), batch.labels, reduction="none")
    sgd.zero_grad()
    (weights_of(losses.detach()) * losses).mean().backward()
    sgd.step()


def assert_same(model, slow):
    for (name, fast), other in zip(model.state_dict().items(), slow.state_dict().values(), strict=True):
        assert torch.allclose(fast.double(), other.double(), rtol=1e-9, atol=1e-11), name


def slow_driver(values, losses, weight, target):
    total = 0.0
    confidence = torch.exp(-losses)
    for v, p in zip(values, confidence, strict=True):
        total = total + (v - (1 - (p if target == "absolute" else p / confidence.sum()))) ** 2
    return weight * total / len(values)


@pytest.mark.parametrize(
    ("method", "options", "weight"),
    [
        ("mwn", {}, 0.0),
        ("sample_difficulty", {}, 0.3),
        ("sample_difficulty", {"driver_target": "relative", "driver_weight": 0.7}, 0.7),
    ],
)
def test_weights_from_losses_follow_the_reference(method, options, weight):
    step = make(method, **options)
    model, net = copy.deepcopy(step.model), copy.deepcopy(step.net)
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, foreach=False)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4, foreach=False)
    before = copy.deepcopy(net.state_dict())
    for batch, meta_batch in batches(5):
        step(batch, meta_batch)
        seen = []

        def normalised(losses, seen=seen):
            seen.append(losses)
            values = net(losses)
            return values * len(values) / sum(values)

        objective = meta_loss(model, normalised, batch, meta_batch, scale=LR / len(batch))
        if weight:
            target = options.get("driver_target", "absolute")
            objective = objective + slow_driver(net(seen[0]), seen[0], weight, target)
        adam.zero_grad()
        objective.backward()
        adam.step()
        descend(model, sgd, batch, lambda losses: normalised(losses).detach())
    assert_same(step.model, model)
    assert_same(step.net, net)
    assert any(not torch.equal(before[k], v) for k, v in step.net.state_dict().items())


def test_cb_da_follows_the_reference_on_both_sides_of_its_first_epoch():
    step = make("cb_da", from_epoch=1, eps_lr=5.0)
    model = copy.deepcopy(step.model)
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, foreach=False)
    balanced = torch.tensor([(1 - 0.9999) / (1 - 0.9999**n) for n in COUNTS.counts.tolist()], dtype=torch.float64)
    balanced = balanced * CLASSES / balanced.sum()
    largest = 0.0
    for iteration, (batch, meta_batch) in enumerate(batches(4)):
        step.start_epoch(iteration // 2)
        step(batch, meta_batch)
        weights = torch.ones(len(batch), dtype=torch.float64)
        if iteration >= 2:
            eps = torch.zeros(len(batch), dtype=torch.float64, requires_grad=True)
            objective = meta_loss(model, lambda _, b=batch, e=eps: balanced[b.labels] + e, batch, meta_batch, scale=LR)
            (gradient,) = torch.autograd.grad(objective, eps)
            weights = balanced[batch.labels] - 5.0 * gradient
            largest = max(largest, (5.0 * gradient).abs().max().item())
        descend(model, sgd, batch, lambda _, w=weights: w)
    assert largest > 1e-3, "the corrections must be large enough to show in the parameters"
    assert_same(step.model, model)


def test_a_resumed_cb_da_knows_its_epoch():
    step = make("cb_da", from_epoch=3)
    step.start_epoch(3)
    state = step.state_dict()
    resumed = make("cb_da", from_epoch=3)
    resumed.load_state_dict(state)
    batch, meta_batch = next(batches(1))
    assert "meta_loss" in resumed(batch, meta_batch).metrics


def test_batch_weights_have_mean_one_and_survive_zeros():
    weights = batch_weights(torch.tensor([0.1, 0.2, 0.7]))
    assert torch.allclose(weights, torch.tensor([0.3, 0.6, 2.1]))
    assert torch.equal(batch_weights(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("mwn", {"hidden": 0}, "hidden: is 0"),
        ("mwn", {"lr": -1.0}, "lr: is -1.0"),
        ("sample_difficulty", {"driver_target": "absolut"}, "did you mean 'absolute'"),
        ("sample_difficulty", {"driver_weight": -1.0}, "driver_weight: is -1.0"),
        ("cb_da", {"beta": 1.0}, "beta: is 1.0"),
        ("cb_da", {"from_epoch": -1}, "from_epoch: is -1"),
    ],
)
def test_bad_options_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        build(STEPS[method].Options, options)
