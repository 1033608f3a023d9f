"""The first-order-cost meta-gradient equals differentiating twice, and both equal a finite difference."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import ReferenceTrainer, accuracy_of, driver, eq4, forward, meta_objective

from fastlt.augment import build_augment
from fastlt.autograd import ForwardRecord
from fastlt.device.compiled import Compiler
from fastlt.losses import build_loss
from fastlt.meta import gradient as meta_gradient
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.meta.difficulty import DifficultyNet, difficulty_gradient_loss
from fastlt.models import build_model
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts
from fastlt.steps import meta as meta_steps

CLASSES = 5


def cross_entropy(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def make(name, dtype=torch.float64, memory_format=torch.contiguous_format, size=16, batch=8, seed=0, **options):
    torch.manual_seed(seed)
    model = build_model(name, num_classes=CLASSES, image_size=size, **options)
    model = twice_differentiable(model).to(dtype=dtype, memory_format=memory_format).train()
    images = torch.randn(batch, 3, size, size, dtype=dtype).contiguous(memory_format=memory_format)
    labels = torch.arange(batch) % CLASSES
    meta_images = torch.randn(batch, 3, size, size, dtype=dtype).contiguous(memory_format=memory_format)
    meta_labels = (torch.arange(batch) * 2) % CLASSES
    net = DifficultyNet(CLASSES).to(dtype)
    accuracy = torch.rand(CLASSES, dtype=dtype)
    return model, net, accuracy, (images, labels), (meta_images, meta_labels)


def fast_class_gradient(model, weights, batch, meta_batch, lr, random_state=None):
    """dL_meta/dw through the functions a step uses."""
    (images, labels), (meta_images, meta_labels) = batch, meta_batch
    parameters = meta_gradient.trainable_parameters(model)
    losses_of = meta_gradient.functional_losses(model, cross_entropy, images, labels)
    if random_state is not None:
        meta_gradient.set_random_state(random_state, images.device)
    losses = losses_of({n: p.detach().requires_grad_() for n, p in parameters.items()})
    inputs = meta_gradient.trainable_parameters(model)
    if random_state is not None:
        meta_gradient.set_random_state(random_state, images.device)
    losses = losses_of(inputs)
    gradients = torch.autograd.grad((weights[labels] * losses).mean(), list(inputs.values()))
    ahead = meta_gradient.lookahead(inputs, gradients, lr)
    meta_losses = meta_gradient.functional_losses(model, cross_entropy, meta_images, meta_labels)
    _, direction = meta_gradient.mean_loss_gradient(meta_losses, ahead)
    if random_state is not None:
        with meta_gradient.replayed_randomness(random_state, images.device):
            derivative = meta_gradient.directional_derivative(losses_of, inputs, direction)
    else:
        derivative = meta_gradient.directional_derivative(losses_of, inputs, direction)
    return meta_gradient.sum_by_class(meta_gradient.weight_gradient(derivative, lr, len(labels)), labels, CLASSES)


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


class TwiceDifferentiableHardsigmoid(torch.nn.Module):
    """hardsigmoid from operations that torch can differentiate twice.

    Its own has no second derivative, and its first one multiplies by 1/6 rounded to float32 even in float64.
    """

    def forward(self, x):
        return F.relu6(x + 3) / 6


def twice_differentiable(model):
    """Exchange, in place, the activations that the slow reference could not differentiate twice."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Hardsigmoid):
                setattr(module, name, TwiceDifferentiableHardsigmoid())
    return model


def theta_gradients(model, net, accuracy, batch, meta_batch, *, lr=0.2, driver_weight=0.3, target="relative"):
    """(fast, reference) gradients of Eq. 10 in theta, flattened."""
    with torch.no_grad():
        weights = eq4(net, accuracy)
    class_gradient = fast_class_gradient(model, weights, batch, meta_batch, lr)
    scalar, _ = difficulty_gradient_loss(net, accuracy, class_gradient, driver_weight, target)
    fast = torch.autograd.grad(scalar, list(net.parameters()))
    slow = meta_objective(model, net, accuracy, batch, meta_batch, lr=lr, loss=cross_entropy)
    slow = slow + driver_weight * driver(net, accuracy, target)
    slow = torch.autograd.grad(slow, list(net.parameters()))
    return torch.cat([g.flatten() for g in fast]), torch.cat([g.flatten() for g in slow])


BACKBONES = [
    ("cifar_resnet32", 16),
    ("resnet10", 32),
    ("resnet18", 32),
    ("convnext_atto", 32),
    ("vit_tiny_patch16_224", 32),
    ("mobilenetv3_small_100", 32),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("name", "size"), BACKBONES)
def test_equals_double_backward_in_float64(name, size, memory_format):
    fast, slow = theta_gradients(*make(name, memory_format=memory_format, size=size))
    assert slow.norm() > 0
    assert relative_error(fast, slow) <= 1e-10


def whole_procedure(model, net, accuracy, batch, meta_batch, lr):
    """L_meta(phi_hat(theta)) + 0.3 L_driver(theta), as a number: a gradient, a step, a forward pass."""
    (images, labels), (meta_images, meta_labels) = batch, meta_batch
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    with torch.no_grad():
        weights = eq4(net, accuracy)
    losses = cross_entropy(forward(model, parameters, images), labels)
    gradients = torch.autograd.grad((weights[labels] * losses).mean(), list(parameters.values()))
    with torch.no_grad():
        ahead = {n: p - lr * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
        meta_loss = F.cross_entropy(forward(model, ahead, meta_images), meta_labels)
        return (meta_loss + 0.3 * driver(net, accuracy, "relative")).item()


@pytest.mark.parametrize(("name", "size"), BACKBONES)
def test_equals_a_central_difference_of_the_whole_procedure_in_theta(name, size):
    model, net, accuracy, batch, meta_batch = make(name, size=size)
    class_gradient = fast_class_gradient(model, eq4(net, accuracy).detach(), batch, meta_batch, 0.2)
    scalar, _ = difficulty_gradient_loss(net, accuracy, class_gradient, 0.3, "relative")
    fast = torch.autograd.grad(scalar, list(net.parameters()))
    start = [p.detach().clone() for p in net.parameters()]
    # Along the gradient itself, where the difference is largest against the rounding of the two values.
    length = torch.cat([g.flatten() for g in fast]).norm()
    step = 1e-6 / length  # small: a ReLU that switches in between would add to the difference
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, old, g in zip(net.parameters(), start, fast, strict=True):
                p.copy_(old + sign * step * g)
        values.append(whole_procedure(model, net, accuracy, batch, meta_batch, 0.2))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(length.item(), rel=1e-6)


@pytest.mark.parametrize("target", ["relative", "absolute"])
def test_both_driver_targets_equal_the_reference(target):
    fast, slow = theta_gradients(*make("cifar_resnet8"), target=target)
    assert relative_error(fast, slow) <= 1e-10


def test_float32_is_close_to_float64_and_no_worse_than_double_backward():
    problem = make("cifar_resnet32", size=32, batch=48)
    _, exact = theta_gradients(*problem, driver_weight=0.0)
    model, net, accuracy, (x, y), (xm, ym) = problem
    single = (model.float(), net.float(), accuracy.float(), (x.float(), y), (xm.float(), ym))
    fast, slow = theta_gradients(*single, driver_weight=0.0)
    assert relative_error(fast.double(), exact) <= 1e-4
    assert relative_error(fast.double(), exact) <= 1.5 * relative_error(slow.double(), exact)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_float32_is_close_to_float64_on_smooth_backbones(name, memory_format):
    """4e-7 was measured. With ReLU or hardswish a unit that switches between the two precisions is a step of its own.

    ResNet-10, ResNet-18 and MobileNetV3: 2e-7 to 1e-4 where none switches and up to 3e-2 where one does, in double
    backward as well as here.
    """
    problem = make(name, memory_format=memory_format, size=32)
    _, exact = theta_gradients(*problem, driver_weight=0.0)
    model, net, accuracy, (x, y), (xm, ym) = problem
    weights = eq4(net, accuracy).detach().float()
    fast = fast_class_gradient(model.float(), weights, (x.float(), y), (xm.float(), ym), 0.2)
    gradient = torch.autograd.grad(eq4(net, accuracy), list(net.parameters()), fast.double())
    assert relative_error(torch.cat([g.flatten() for g in gradient]), exact) <= 1e-4


def test_class_gradient_equals_a_central_difference_in_the_weights():
    model, net, accuracy, batch, meta_batch = make("cifar_resnet8")
    weights = eq4(net, accuracy).detach()
    fast = fast_class_gradient(model, weights, batch, meta_batch, 0.2)
    for c in range(CLASSES):
        step = torch.zeros(CLASSES, dtype=torch.float64)
        step[c] = 1e-4

        def objective(w):
            return meta_objective(model, net, accuracy, batch, meta_batch, lr=0.2, loss=cross_entropy, weights=w)

        difference = (objective(weights + step) - objective(weights - step)).detach() / 2e-4
        assert torch.isclose(fast[c], difference, rtol=1e-6, atol=1e-12)


def test_dropout_and_stochastic_depth_see_the_same_noise_twice():
    options = {"drop_rate": 0.4, "drop_path_rate": 0.3}
    model, _, _, batch, _ = make("convnext_atto", size=32, **options)
    assert meta_gradient.is_stochastic(model)
    parameters = meta_gradient.trainable_parameters(model)
    losses_of = meta_gradient.functional_losses(model, cross_entropy, *batch)
    state = meta_gradient.random_state(batch[0].device)
    losses = losses_of(parameters)
    direction = [torch.randn_like(p) for p in parameters.values()]
    after = torch.get_rng_state()
    with meta_gradient.replayed_randomness(state, batch[0].device):
        derivative = meta_gradient.directional_derivative(losses_of, parameters, direction)
    assert torch.equal(after, torch.get_rng_state()), "the tangent pass must not move the generator"
    by_backward = torch.stack(
        [
            sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
            for gradients in (
                torch.autograd.grad(
                    sample_loss, list(parameters.values()), retain_graph=True, materialize_grads=True, allow_unused=True
                )
                for sample_loss in losses
            )
        ]
    )
    assert relative_error(derivative, by_backward) <= 1e-10


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("name", "size"), [*BACKBONES, ("densenet121", 32)])
def test_tangent_from_a_recorded_pass_equals_the_one_computed_anew(name, size, memory_format):
    model, _, _, batch, _ = make(name, memory_format=memory_format, size=size)
    parameters = meta_gradient.trainable_parameters(model)
    losses_of = meta_gradient.functional_losses(model, cross_entropy, *batch)
    direction = [torch.randn_like(p) for p in parameters.values()]
    record = ForwardRecord()
    with record.recording():
        losses = losses_of(parameters)
    before = torch.autograd.grad(losses.mean(), list(parameters.values()), retain_graph=True, materialize_grads=True)
    assert len(record.recorded) > 10
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fast = meta_gradient.directional_derivative(losses_of, parameters, direction, record)
    assert relative_error(fast, meta_gradient.directional_derivative(losses_of, parameters, direction)) <= 1e-12
    after = torch.autograd.grad(losses.mean(), list(parameters.values()), materialize_grads=True)
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True)), "activations were changed"


def test_a_pass_that_changes_is_computed_anew_with_a_warning():
    model, _, _, batch, _ = make("cifar_resnet8")
    parameters = meta_gradient.trainable_parameters(model)
    losses_of = meta_gradient.functional_losses(model, cross_entropy, *batch)
    direction = [torch.randn_like(p) for p in parameters.values()]
    record = ForwardRecord()
    with record.recording():
        losses_of(parameters)
    record.recorded.pop()
    with pytest.warns(UserWarning, match="does not do the same twice"):
        fast = meta_gradient.directional_derivative(losses_of, parameters, direction, record)
    assert torch.equal(fast, meta_gradient.directional_derivative(losses_of, parameters, direction))


def test_the_tangent_is_taken_along_a_unit_direction_and_scaled_back():
    direction = [torch.tensor([3e-9, 0.0]), torch.tensor([[4e-9]])]
    parameters = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(1, 1, requires_grad=True)}
    seen = {}

    def tangents(primals, unit):
        assert not any(p.requires_grad for p in primals.values())
        seen.update(unit)
        return torch.tensor([1.0, -2.0])

    scaled = meta_gradient.along_unit_direction(tangents, parameters, direction)
    assert torch.allclose(seen["a"], torch.tensor([0.6, 0.0]))
    assert torch.allclose(seen["b"], torch.tensor([[0.8]]))
    assert torch.allclose(scaled, torch.tensor([5e-9, -1e-8]), atol=0)


def test_zero_direction_gives_zeros_and_not_nan():
    model, _, _, (images, labels), _ = make("cifar_resnet8")
    parameters = meta_gradient.trainable_parameters(model)
    losses_of = meta_gradient.functional_losses(model, cross_entropy, images, labels)
    zeros = [torch.zeros_like(p) for p in parameters.values()]
    assert torch.equal(meta_gradient.directional_derivative(losses_of, parameters, zeros), torch.zeros(8).double())


def test_nothing_is_left_behind_in_model_or_buffers():
    model, net, accuracy, batch, meta_batch = make("cifar_resnet8")
    before = copy.deepcopy(model.state_dict())
    fast_class_gradient(model, eq4(net, accuracy).detach(), batch, meta_batch, 0.2)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in model.parameters())


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Float64Augment:
    """Normalises in float64, so that a whole step can be compared at that precision."""

    def __call__(self, images, dtype=None):
        mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
        return (images.double() / 255 - mean) / std

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def make_step(loss_name, model, meta_set, counts, lr, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, foreach=True)
    prepare = Float64Augment()
    parts = StepParts(
        model=model,
        loss=build_loss(loss_name, counts),
        optimizer=optimizer,
        augment=prepare,
        meta_augment=prepare,
        class_counts=counts,
        class_accuracy=ClassAccuracy(*meta_set, CLASSES, prepare=prepare),
    )
    kind = STEPS["difficulty"]
    return kind(parts, kind.Options(**options))


@pytest.mark.parametrize(
    ("loss_name", "target", "lean", "meta_weight"),
    [
        ("cross_entropy", "relative", False, 1),
        ("balanced_softmax", "absolute", False, 1),
        ("cross_entropy", "absolute", True, 0.4),
        ("cross_entropy", "relative", False, 0),  # the driver loss alone, as in the authors' release
        ("cross_entropy", "absolute", True, 0),
    ],
)
def test_ten_iterations_follow_the_reference_in_every_parameter_and_buffer(loss_name, target, lean, meta_weight):
    torch.manual_seed(3)
    counts = ClassCounts(torch.tensor([40, 20, 10, 5, 2]).numpy(), tuple("abcde"))
    model = build_model("cifar_resnet8", num_classes=CLASSES).double().train()
    meta_set = (torch.randint(0, 256, (20, 3, 12, 12), dtype=torch.uint8), torch.arange(20) % CLASSES)
    lr = 0.1
    slow_model = copy.deepcopy(model)
    step = make_step(loss_name, model, meta_set, counts, lr, driver_target=target, lean=lean, meta_weight=meta_weight)
    slow_net = copy.deepcopy(step.net)
    prepare = Float64Augment()
    shift = torch.log(torch.from_numpy(counts.counts).double()) if loss_name == "balanced_softmax" else 0.0
    reference = ReferenceTrainer(
        slow_model,
        slow_net,
        lr=lr,
        momentum=0.9,
        weight_decay=5e-4,
        net_lr=1e-3,
        net_weight_decay=1e-4,
        driver_weight=0.3,
        target=target,
        meta_weight=meta_weight,
        loss=lambda logits, labels: F.cross_entropy(logits + shift, labels, reduction="none"),
    )
    for _ in range(10):
        images = torch.randint(0, 256, (12, 3, 12, 12), dtype=torch.uint8)
        labels = torch.randint(0, CLASSES, (12,))
        meta_index = torch.randperm(20)[:10]
        batch = Batch(images, labels, torch.arange(12))
        meta_batch = Batch(meta_set[0][meta_index], meta_set[1][meta_index], meta_index)
        assert step.uses_meta_batch() == (meta_weight > 0)
        output = step(batch, meta_batch if step.uses_meta_batch() else None)
        assert ("meta_loss" in output.metrics) == step.uses_meta_batch()
        reference.iterate(
            (prepare(images), labels),
            (prepare(meta_batch.images), meta_batch.labels),
            (prepare(meta_set[0]), meta_set[1]),
            CLASSES,
        )
    for (name, fast), slow in zip(model.state_dict().items(), slow_model.state_dict().values(), strict=True):
        assert torch.allclose(fast.double(), slow.double(), rtol=1e-9, atol=1e-11), name
    for (name, fast), slow in zip(step.net.state_dict().items(), slow_net.state_dict().values(), strict=True):
        assert torch.allclose(fast, slow, rtol=1e-9, atol=1e-11), name


class Noisy(torch.nn.Module):
    """Draws in its forward pass, and has nothing that tells so from outside."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, CLASSES)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        return self.head((x * torch.rand_like(x)).mean((2, 3)))


DRAWING = {
    "dropout": lambda: build_model("cifar_resnet8", num_classes=CLASSES, drop_rate=0.4),
    "stochastic_depth": lambda: build_model("convnext_atto", num_classes=CLASSES, drop_path_rate=0.5),
    "unseen": Noisy,
}


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("network", DRAWING)
def test_a_step_is_exact_about_the_noise_that_its_training_pass_drew(network, lean, monkeypatch):
    monkeypatch.setattr(meta_steps, "META_PARTS", 1)  # parts would draw in another order than the reference
    torch.manual_seed(3)
    counts = ClassCounts(torch.tensor([40, 20, 10, 5, 2]).numpy(), tuple("abcde"))
    model = DRAWING[network]().double().train()
    images, labels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(20) % CLASSES
    step = make_step("cross_entropy", model, (images, labels), counts, 0.1, lean=lean)
    batch, meta_batch = (Batch(images[i], labels[i], i) for i in (torch.arange(8), torch.arange(8, 20)))
    weights = torch.linspace(0.5, 1.5, CLASSES, dtype=torch.float64).requires_grad_()
    state = torch.get_rng_state()
    run = step.training_pass(batch)
    per_sample, _ = step.per_sample_gradient(run, weights.detach()[batch.labels], meta_batch)
    fast = meta_gradient.sum_by_class(per_sample, batch.labels, CLASSES)
    # Both go forward on the training batch, then on the meta batch.
    torch.set_rng_state(state)
    pairs = [(step.parts.augment(b.images), b.labels) for b in (batch, meta_batch)]
    objective = meta_objective(model, None, weights, *pairs, lr=0.1, loss=cross_entropy, weights=weights)
    assert relative_error(fast, torch.autograd.grad(objective, weights)[0]) <= 1e-10


def test_a_step_measures_the_accuracy_before_its_batch_moves_the_statistics():
    torch.manual_seed(3)
    counts = ClassCounts(torch.tensor([40, 20, 10, 5, 2]).numpy(), tuple("abcde"))
    images, labels = torch.randint(0, 256, (20, 3, 12, 12), dtype=torch.uint8), torch.arange(20) % CLASSES
    model = build_model("cifar_resnet8", num_classes=CLASSES).double().train()
    step = make_step("cross_entropy", model, (images, labels), counts, 0.1)
    seen, update = [], step.parts.class_accuracy.update

    def note(network):
        seen.append(int(network.backbone.bn1.num_batches_tracked))
        return update(network)

    step.parts.class_accuracy.update = note
    for _ in range(3):
        step(Batch(images, labels, labels), Batch(images, labels, labels))
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("lean", [False, True])
def test_a_step_lets_go_of_its_record_before_the_last_backward_pass(lean, monkeypatch):
    torch.manual_seed(3)
    counts = ClassCounts(torch.tensor([40, 20, 10, 5, 2]).numpy(), tuple("abcde"))
    images, labels = torch.randint(0, 256, (20, 3, 12, 12), dtype=torch.uint8), torch.arange(20) % CLASSES
    model = build_model("cifar_resnet8", num_classes=CLASSES).double().train()
    step = make_step("cross_entropy", model, (images, labels), counts, 0.1, lean=lean)
    runs, training_pass, descend = [], step.training_pass, step.descend
    monkeypatch.setattr(step, "training_pass", lambda batch: runs.append(training_pass(batch)) or runs[-1])

    def watched(objective):
        assert runs[-1].record.recorded == []
        descend(objective)

    monkeypatch.setattr(step, "descend", watched)
    step(Batch(images, labels, labels), Batch(images, labels, labels))
    assert len(runs) == 1


class AddsConstant(torch.nn.Module):
    """Adds a constant to a normalised convolution, and then overwrites the constant, which autograd allows."""

    def __init__(self, drop_rate=0.0):
        super().__init__()
        self.drop_rate = drop_rate
        self.conv, self.bn = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3)
        self.head = torch.nn.Linear(3, CLASSES)

    def forward(self, x):
        constant = x.clone()
        square = F.relu(self.bn(self.conv(x)) + constant, inplace=True).square()
        constant.zero_()
        return self.head(F.dropout(square.mean((2, 3)), self.drop_rate))


def test_a_lean_step_says_when_the_model_does_not_allow_it_and_stays_exact():
    torch.manual_seed(3)
    counts = ClassCounts(torch.tensor([40, 20, 10, 5, 2]).numpy(), tuple("abcde"))
    model = AddsConstant(drop_rate=0.5).double().train()
    batch = Batch(torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8), torch.arange(10) % CLASSES, torch.arange(10))
    nets = []
    for lean in (False, True):
        torch.manual_seed(0)
        step = make_step("cross_entropy", copy.deepcopy(model), (batch.images, batch.labels), counts, 0.1, lean=lean)
        if lean:
            with pytest.warns(UserWarning, match="keeps all of its activations"):
                step(batch, batch)
        else:
            step(batch, batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            step(batch, batch)
        nets.append(torch.cat([p.detach().flatten() for p in [*step.net.parameters(), *step.model.parameters()]]))
    assert relative_error(nets[1], nets[0]) <= 1e-12


def test_a_lean_step_is_refused_where_activations_are_not_recorded():
    model = build_model("cifar_resnet8", num_classes=CLASSES)
    counts = ClassCounts(torch.tensor([40, 20, 10, 5, 2]).numpy(), tuple("abcde"))
    kind = STEPS["difficulty"]
    parts = StepParts(
        model=model,
        loss=build_loss("cross_entropy", counts),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        augment=Float64Augment(),
        meta_augment=Float64Augment(),
        class_counts=counts,
        compiler=Compiler("inductor"),
    )
    with pytest.raises(ValueError, match=r"options\.lean .* not compiled by inductor"):
        kind(parts, kind.Options(lean=True))


def test_step_in_float32_with_augmentation_moves_statistics_exactly_once():
    counts = ClassCounts(torch.tensor([40, 20, 10, 5, 2]).numpy(), tuple("abcde"))
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", num_classes=CLASSES).train()
    meta_set = (torch.randint(0, 256, (20, 3, 12, 12), dtype=torch.uint8), torch.arange(20) % CLASSES)

    def augment(seed):
        return build_augment(["flip"], image_size=12, mean=MEAN, std=STD, seed=seed, device="cpu")

    parts = StepParts(
        model=model,
        loss=build_loss("cross_entropy", counts),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        augment=augment(0),
        meta_augment=augment(1),
        class_counts=counts,
        class_accuracy=ClassAccuracy(*meta_set, CLASSES, prepare=augment(2)),
    )
    step = STEPS["difficulty"](parts)
    images = torch.randint(0, 256, (12, 3, 12, 12), dtype=torch.uint8)
    output = step(Batch(images, torch.arange(12) % CLASSES, torch.arange(12)), Batch(*meta_set, torch.arange(20)))
    tracked = {int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    assert tracked == {1}
    assert output.loss.ndim == 0
    assert abs(output.per_class["weight"].mean().item() - 1) < 1e-5


def test_accuracy_of_reference_and_class_accuracy_agree():
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", num_classes=CLASSES).double().train()
    images, labels = torch.randint(0, 256, (23, 3, 12, 12), dtype=torch.uint8), torch.arange(23) % CLASSES
    prepare = Float64Augment()
    fast = ClassAccuracy(images, labels, CLASSES, prepare=prepare, batch_size=7).update(model)
    assert torch.allclose(fast.double(), accuracy_of(model, prepare(images), labels, CLASSES))


class Centring(torch.nn.Module):
    """Takes off a running mean that this very pass has moved: unlike BatchNorm it computes with its buffer."""

    def __init__(self, channels, constant):
        super().__init__()
        self.constant = constant
        self.register_buffer("mean", torch.zeros(channels, dtype=torch.float64))

    def forward(self, x):
        if self.training and self.constant == "detach":
            self.mean.mul_(0.5).add_(x.detach().mean((0, 2, 3)), alpha=0.5)
        if self.training and self.constant == "no_grad":
            with torch.no_grad():
                self.mean.mul_(0.5).add_(x.mean((0, 2, 3)), alpha=0.5)
        return x - self.mean[None, :, None, None]


@pytest.mark.parametrize("constant", ["detach", "no_grad", "spectral_norm"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_layer_that_computes_with_the_buffer_that_it_moves_is_differentiated_where_it_was(accumulate, constant):
    """Spectral normalisation moves its vectors by the weights, without gradients, and divides the weights by them."""
    torch.manual_seed(0)
    first = torch.nn.Conv2d(3, 4, 3)
    if constant == "spectral_norm":
        first = torch.nn.utils.parametrizations.spectral_norm(first)
    model = torch.nn.Sequential(
        *(
            first,
            Centring(4, constant),
            torch.nn.Tanh(),
            torch.nn.Flatten(),
            torch.nn.Linear(4 * 36, CLASSES),
        )
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = ClassCounts.of([5, 4, 3, 2, 1])
    given = lambda images: images  # noqa: E731
    meta = Batch(torch.rand(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % CLASSES, torch.arange(8))
    accuracy = ClassAccuracy(meta.images, meta.labels, CLASSES, prepare=given)
    loss = build_loss("cross_entropy", counts)
    parts = StepParts(model, loss, optimizer, given, given, counts, class_accuracy=accuracy, accumulate=accumulate)
    step = STEPS["difficulty"](parts, STEPS["difficulty"].Options())
    batch = Batch(torch.rand(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % CLASSES, torch.arange(8))
    weights = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    start = copy.deepcopy(model)
    fast, _ = step.per_sample_gradient(step.training_pass(batch), weights, meta)

    model = start.train()
    parameters, w = dict(model.named_parameters()), weights.clone().requires_grad_()
    losses = torch.cat(
        [
            cross_entropy(model(i), y)
            for i, y in zip(batch.images.chunk(accumulate), batch.labels.chunk(accumulate), strict=True)
        ]
    )
    gradients = torch.autograd.grad((w * losses).mean(), list(parameters.values()), create_graph=True)
    ahead = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
    meta_losses = []
    for images, labels in zip(meta.images.chunk(accumulate), meta.labels.chunk(accumulate), strict=True):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        meta_losses.append(cross_entropy(torch.func.functional_call(model, {**buffers, **ahead}, (images,)), labels))
    (slow,) = torch.autograd.grad(torch.cat(meta_losses).mean(), w)
    assert slow.norm() > 0
    assert (fast - slow).norm() / slow.norm() < 1e-10


def test_attention_with_dropout_is_computed_the_same_way_twice_on_a_gpu():
    """Fused kernels draw their masks in another order than the matrix products that have a forward-mode derivative."""
    with_dropout = torch.nn.TransformerEncoderLayer(8, 2, dropout=0.1)
    vit = build_model("vit_tiny_patch16_224", num_classes=CLASSES, image_size=32)
    assert meta_gradient.draws_in_attention(with_dropout)
    assert meta_gradient.is_stochastic(torch.nn.MultiheadAttention(8, 2, dropout=0.1))
    assert not meta_gradient.draws_in_attention(vit)
    vit.backbone.blocks[3].attn.attn_drop.p = 0.1
    assert meta_gradient.draws_in_attention(vit)
    fused = torch.backends.cuda.flash_sdp_enabled
    for drops, device, expected in ((True, "cuda", False), (False, "cuda", fused()), (True, "cpu", fused())):
        with meta_gradient.repeatable_attention(drops, torch.device(device)):
            assert fused() == expected
