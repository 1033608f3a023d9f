"""What lies below the cost of the exact meta-gradient does what it says, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import eq4, meta_objective
from test_meta_gradient import CLASSES, Float64Augment, cross_entropy, relative_error

from fastlt.losses import build_loss
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.models import build_model
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts
from fastlt.steps.learned_weights import Approximation

LR = 0.1
COUNTS = ClassCounts(torch.tensor([40, 20, 10, 5, 2]).numpy(), tuple("abcde"))
META_SET = (
    torch.randint(0, 256, (20, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.arange(20) % CLASSES,
)


def make_step(method="difficulty", **approximate):
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", num_classes=CLASSES).double().train()
    kind, prepare = STEPS[method], Float64Augment()
    parts = StepParts(
        model=model,
        loss=build_loss("cross_entropy", COUNTS),
        optimizer=torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9),
        augment=prepare,
        meta_augment=prepare,
        class_counts=COUNTS,
        class_accuracy=ClassAccuracy(*META_SET, CLASSES, prepare=prepare) if kind.needs.class_accuracy else None,
    )
    return kind(parts, kind.Options(approximate=Approximation(**approximate)))


def batches(seed):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (10, 3, 12, 12), dtype=torch.uint8, generator=draw)
    index = torch.randperm(20, generator=draw)[:8]
    batch = Batch(images, torch.randint(0, CLASSES, (10,), generator=draw), torch.arange(10))
    return batch, Batch(META_SET[0][index], META_SET[1][index], index)


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def prepared(batch):
    return Float64Augment()(batch.images), batch.labels


@pytest.mark.parametrize("method", ["difficulty", "mwn"])
def test_late_weights_move_theta_exactly_and_phi_by_the_weights_of_the_lookahead(method):
    exact, late = make_step(method), make_step(method, late_weights=True)
    before = copy.deepcopy(late.model)
    old_net = copy.deepcopy(late.net)
    batch, meta_batch = batches(1)
    exact(batch, meta_batch)
    output = late(batch, meta_batch)
    assert torch.allclose(flat(late.net), flat(exact.net), rtol=1e-9, atol=1e-13)
    assert not torch.equal(flat(late.model), flat(exact.model))

    images, labels = prepared(batch)
    losses = cross_entropy(before(images), labels)
    if method == "difficulty":
        weights = eq4(old_net, output.per_class["meta_accuracy"])[labels]
    else:
        values = old_net(losses.detach())
        weights = len(values) * values / values.sum()
    gradients = torch.autograd.grad((weights.detach() * losses).mean(), list(before.parameters()))
    expected = torch.cat([(p - LR * g).flatten() for p, g in zip(before.parameters(), gradients, strict=True)])
    assert torch.allclose(flat(late.model), expected, rtol=1e-9, atol=1e-13)


def test_theta_moves_in_every_third_iteration_only_and_a_resumed_step_keeps_count():
    step = make_step(every=3)
    moved = []
    for iteration in range(7):
        if iteration == 4:
            state = copy.deepcopy(step.state_dict())
            step = make_step(every=3)
            step.load_state_dict(state)
        before = flat(step.net)
        step(*batches(iteration))
        moved.append(not torch.equal(before, flat(step.net)))
    assert moved == [True, False, False, True, False, False, True]


def test_iterations_between_are_descent_on_the_weighted_loss():
    step = make_step(every=2)
    step(*batches(0))
    step.optimizer.state.clear()
    before = copy.deepcopy(step.model)
    batch, meta_batch = batches(1)
    output = step(batch, meta_batch)
    images, labels = prepared(batch)
    weights = eq4(step.net, output.per_class["meta_accuracy"]).detach()
    loss = (weights[labels] * cross_entropy(before(images), labels)).mean()
    gradients = torch.autograd.grad(loss, list(before.parameters()))
    expected = torch.cat([(p - LR * g).flatten() for p, g in zip(before.parameters(), gradients, strict=True)])
    assert torch.allclose(flat(step.model), expected, rtol=1e-9, atol=1e-13)


def class_gradient_of_the_reference(model, weights, batch, meta_batch, moved):
    """dL_meta/dw by differentiating twice, where only the parameters in `moved` take the lookahead."""
    weights = weights.clone().requires_grad_()
    objective = meta_objective(
        model,
        None,
        weights,
        prepared(batch),
        prepared(meta_batch),
        lr=LR,
        loss=cross_entropy,
        weights=weights,
        moved=moved,
    )
    return torch.autograd.grad(objective, weights)[0]


@pytest.mark.parametrize("modules", [["head"], ["head", "backbone.layer3"], ["head", "backbone"]])
def test_lookahead_of_some_modules_is_the_derivative_through_them(modules):
    step = make_step(lookahead_only=modules)
    moved = [n for n, _ in step.model.named_parameters() if any(n.startswith(m + ".") for m in modules)]
    batch, meta_batch = batches(2)
    weights = torch.linspace(0.5, 1.5, CLASSES, dtype=torch.float64)
    expected = class_gradient_of_the_reference(step.model, weights, batch, meta_batch, moved)
    run = step.training_pass(batch)
    per_sample, _ = step.per_sample_gradient(run, weights[batch.labels], meta_batch)
    fast = torch.zeros_like(weights).index_add_(0, batch.labels, per_sample)
    assert relative_error(fast, expected) <= 1e-10
    everything = class_gradient_of_the_reference(step.model, weights, batch, meta_batch, None)
    assert (relative_error(fast, everything) <= 1e-10) == ("backbone" in modules)


def test_all_approximations_work_together():
    step = make_step(late_weights=True, every=2, lookahead_only=["head"])
    start = flat(step.model)
    for iteration in range(4):
        output = step(*batches(iteration))
    assert torch.isfinite(output.loss)
    assert not torch.equal(start, flat(step.model))


def test_bad_values_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"every is 0.*>= 1"):
        Approximation(every=0)
    with pytest.raises(ValueError, match="lookahead_only is empty"):
        Approximation(lookahead_only=[])
    with pytest.raises(ValueError, match=r"'backbone.layer9'.*head"):
        make_step(lookahead_only=["backbone.layer9"])
