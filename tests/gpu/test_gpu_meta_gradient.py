"""The meta-gradient of a step on a GPU against differentiating twice in float64 on a CPU, and A as a CPU has it."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from on_gpu import DEVICE
from reference import eq4, meta_objective
from test_meta_gradient import CLASSES, DRAWING, cross_entropy, make, relative_error
from test_mixed_precision import BOUNDS, step_on
from torch import nn

from fastlt.meta import gradient as meta_gradient
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.models import build_model
from fastlt.state import Batch
from fastlt.steps import meta as meta_steps

pytestmark = pytest.mark.gpu

LR = 0.1
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
NETWORKS = [("cifar_resnet8", 16), ("cifar_resnet32", 16), ("resnet18", 32), ("vit_tiny_patch16_224", 32)]


def smooth(model: nn.Module) -> nn.Module:
    """Exchange, in place, what has kinks: a unit that switches between two precisions is an error of its own."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.Identity())
    return model


def problem_of(name, size, batch, is_smooth, memory_format=torch.contiguous_format):
    problem = make(name, memory_format=memory_format, size=size, batch=batch)
    if is_smooth:
        smooth(problem[0])
    return problem


@functools.cache
def exact_gradient(name, size, batch=8, is_smooth=False):
    """dL_meta/dtheta of the problem by double backward in float64 on the CPU, flat."""
    model, net, accuracy, *pairs = problem_of(name, size, batch, is_smooth)
    objective = meta_objective(model, net, accuracy, *pairs, lr=LR, loss=cross_entropy)
    return torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(net.parameters()))])


def gradient_on_gpu(name, size, dtype, batch=8, is_smooth=False, memory_format=torch.contiguous_format, **step):
    """The same by a step on the GPU."""
    model, net, accuracy, *pairs = problem_of(name, size, batch, is_smooth, memory_format)
    (images, labels), (meta_images, meta_labels) = ((x.to(DEVICE, dtype), y.to(DEVICE)) for x, y in pairs)
    ours = step_on(model.to(device=DEVICE, dtype=dtype), images, labels, **step)
    weights = eq4(net, accuracy)
    run = ours.training_pass(Batch(images, labels, labels))
    of_sample = weights.detach().to(DEVICE, dtype)[labels]
    per_sample, _ = ours.per_sample_gradient(run, of_sample, Batch(meta_images, meta_labels, meta_labels))
    assert per_sample.device.type == DEVICE.type
    per_class = meta_gradient.sum_by_class(per_sample, labels, CLASSES).cpu().double()
    return torch.cat([g.flatten() for g in torch.autograd.grad(weights, list(net.parameters()), per_class)])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_equals_the_reference_in_float64(name, size, memory_format):
    fast = gradient_on_gpu(name, size, torch.float64, memory_format=FORMATS[memory_format])
    assert relative_error(fast, exact_gradient(name, size)) <= 1e-10


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("name", "size"), [*NETWORKS, ("convnext_atto", 32)])
def test_equals_the_reference_in_float32_where_nothing_has_a_kink(name, size, memory_format):
    problem = {"name": name, "size": size, "is_smooth": True}
    fast = gradient_on_gpu(dtype=torch.float32, memory_format=FORMATS[memory_format], **problem)
    error = relative_error(fast, exact_gradient(**problem))
    print(f"{name} float32: {error:.1e}")
    assert error <= 1e-4


@pytest.mark.parametrize(("name", "size", "bound"), [case[:3] for case in BOUNDS if case[0] != "resnet10"])
def test_the_error_under_autocast_is_within_the_cpus_bound(name, size, bound):
    exact = exact_gradient(name, size, batch=16)
    autocast = functools.partial(torch.autocast, DEVICE.type, torch.bfloat16)
    low = gradient_on_gpu(name, size, torch.float32, batch=16, autocast=autocast)
    single = gradient_on_gpu(name, size, torch.float32, batch=16)
    print(f"{name} float32 {relative_error(single, exact):.1e}, bfloat16 {relative_error(low, exact):.1e}")
    assert relative_error(low, exact) <= bound
    assert relative_error(low, single) > 1e-4, "autocast changed nothing: these are not the passes in bfloat16"


@pytest.mark.parametrize("network", DRAWING)
def test_a_step_is_exact_about_the_noise_that_its_training_pass_drew(network, monkeypatch):
    monkeypatch.setattr(meta_steps, "META_PARTS", 1)  # parts would draw in another order than the reference
    torch.manual_seed(3)
    model = DRAWING[network]().double().train().to(DEVICE)
    images, labels = torch.randn(20, 3, 32, 32, dtype=torch.float64).to(DEVICE), (torch.arange(20) % CLASSES).to(DEVICE)
    step = step_on(model, images, labels)
    batch, meta_batch = (Batch(images[i], labels[i], labels[i]) for i in (slice(0, 8), slice(8, 20)))
    weights = torch.linspace(0.5, 1.5, CLASSES, dtype=torch.float64, device=DEVICE).requires_grad_()
    state = meta_gradient.random_state(images.device)
    run = step.training_pass(batch)
    per_sample, _ = step.per_sample_gradient(run, weights.detach()[batch.labels], meta_batch)
    fast = meta_gradient.sum_by_class(per_sample, batch.labels, CLASSES)
    # Both go forward on the training batch, then on the meta batch.
    meta_gradient.set_random_state(state, images.device)
    pairs = [(b.images, b.labels) for b in (batch, meta_batch)]
    objective = meta_objective(model, None, weights, *pairs, lr=LR, loss=cross_entropy, weights=weights)
    assert relative_error(fast, torch.autograd.grad(objective, weights)[0]) <= 1e-10


@pytest.mark.parametrize("options", [{}, {"batch_size": 30}, {"refresh": "rolling", "window": 3}], ids=str)
def test_class_accuracy_is_a_cpus(options):
    """In float64, where no two logits are so near that rounding decides; while the network moves from call to call."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (90, 3, 12, 12), dtype=torch.uint8, generator=draw)
    labels = torch.arange(90) % CLASSES
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", num_classes=CLASSES).double().train()
    options = {"prepare": lambda images: images.double() / 255 - 0.5, **options}
    sides = []
    for device in (DEVICE, "cpu"):
        accuracy = ClassAccuracy(images.to(device), labels.to(device), CLASSES, **options)
        sides.append((accuracy, copy.deepcopy(model).to(device)))
    seen = []
    for _ in range(6):
        ours, cpus = (accuracy.update(network) for accuracy, network in sides)
        assert ours.device.type == DEVICE.type
        assert torch.equal(ours.cpu(), cpus)
        seen.append(cpus)
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=draw)
            for _, network in sides:
                with torch.no_grad():
                    network.get_parameter(name).add_(noise.to(network.get_parameter(name).device))
    assert len({tuple(accuracy.tolist()) for accuracy in seen}) > 1
