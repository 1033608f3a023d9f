"""The lookahead of an adaptive optimizer, and of rates by layer, against differentiating that very function twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from float64_steps import BETA, COUNTS, EPS, Float64Augment, make_step, some
from reference import forward

from fastlt.optim import preconditioner
from fastlt.optim.clipping import Clip


def slow_preconditioner(step, gradients):
    """1 / (sqrt(v_hat) + eps) by the letters of Adam's algorithm, from the state before this gradient.

    With a clip, of the clipped gradient, times what it was multiplied by.
    """
    if step.parts.clip is not None:
        clipped = slowly_clipped(step.parts.clip, gradients)
        unclipped = slow_preconditioner(SimpleNamespace(**{**vars(step), "parts": SimpleNamespace(clip=None)}), clipped)
        return {n: p * torch.where(gradients[n] == 0, 1.0, clipped[n] / gradients[n]) for n, p in unclipped.items()}
    found = {}
    for name, parameter in step.model.named_parameters():
        state, (group,) = (
            step.optimizer.state.get(parameter, {}),
            [g for g in step.optimizer.param_groups if any(p is parameter for p in g["params"])],
        )
        t = int(state["step"]) + 1 if state else 1
        gradient = gradients[name]
        if type(step.optimizer) is torch.optim.Adam:
            gradient = gradient + group["weight_decay"] * parameter.detach()
        v = (BETA * state["exp_avg_sq"] if state else 0) + (1 - BETA) * gradient**2
        found[name] = 1 / ((v / (1 - BETA**t)) ** 0.5 + EPS)
    return found


def slowly_clipped(clip, gradients):
    """By the definition of torch: all numbers by one factor, or each to a largest size."""
    if clip.value is not None:
        return {n: g.clamp(-clip.value, clip.value) for n, g in gradients.items()}
    total = sum(float((g**2).sum()) for g in gradients.values()) ** 0.5
    return {n: g * min(1.0, clip.norm / (total + 1e-6)) for n, g in gradients.items()}


def slow_weight_gradient(step, weights, batch, meta_batch, preconditioned):
    """d L_meta(phi - alpha P grad) / dw with the graph of the gradient kept, P as numbers."""
    model, w = step.model, weights.detach().clone().requires_grad_()
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    shift = torch.log(torch.from_numpy(COUNTS.counts).double())
    images, meta_images = Float64Augment()(batch.images), Float64Augment()(meta_batch.images)
    losses = F.cross_entropy(forward(model, parameters, images) + shift, batch.labels, reduction="none")
    inner = sum(w[i] * loss for i, loss in enumerate(losses)) / len(losses)
    gradients = dict(
        zip(parameters, torch.autograd.grad(inner, list(parameters.values()), create_graph=True), strict=True)
    )
    rates = {p: g["lr"] for g in step.optimizer.param_groups for p in g["params"]}
    alpha = {n: rates[p] for n, p in model.named_parameters()}
    diagonal = slow_preconditioner(step, {n: g.detach() for n, g in gradients.items()}) if preconditioned else None
    ahead = {
        n: p - alpha[n] * (gradients[n] if diagonal is None else diagonal[n] * gradients[n])
        for n, p in parameters.items()
    }
    meta = F.cross_entropy(forward(model, ahead, meta_images), meta_batch.labels)
    return torch.autograd.grad(meta, w)[0], meta.detach()


@pytest.mark.parametrize("iterations", [0, 3], ids=["first", "later"])
@pytest.mark.parametrize(
    ("network", "optimizer", "layer_decay", "options", "preconditioned"),
    [
        ("cifar_resnet8", "adamw", None, {}, True),
        ("cifar_resnet8", "adam", None, {"lookahead": "preconditioned"}, True),
        ("cifar_resnet8", "adamw", None, {"lookahead": "sgd"}, False),
        ("cifar_resnet8", "lamb", None, {}, False),
        ("convnext_atto", "adamw", 0.6, {}, True),
        ("convnext_atto", "sgd", 0.6, {}, False),
        ("cifar_resnet8", "sgd", None, {"lr_factors": {"backbone": 0.1, "layer3": 2}}, False),
        ("cifar_resnet8", "adamw", None, {"lr_factors": {"backbone": 0.1, "layer3": 2}}, True),
    ],
)
def test_it_equals_double_backward_of_that_very_function(
    network, optimizer, layer_decay, options, preconditioned, iterations
):
    step = make_step("difficulty", network, optimizer, layer_decay, **options)
    for _ in range(iterations):
        step(some(8), some(8))
    batch, meta_batch = some(8), some(8)
    weights = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    slow, slow_loss = slow_weight_gradient(step, weights, batch, meta_batch, preconditioned)
    fast, fast_loss = step.per_sample_gradient(step.training_pass(batch), weights, meta_batch)
    assert slow.norm() > 0
    assert (fast - slow).norm() / slow.norm() <= 1e-10
    torch.testing.assert_close(fast_loss, slow_loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("clip", [Clip(norm=0.05), Clip(value=1e-3)], ids=["norm", "value"])
@pytest.mark.parametrize("iterations", [0, 3], ids=["first", "later"])
def test_clipping_is_a_part_of_the_preconditioner(clip, iterations):
    step = make_step("difficulty", "cifar_resnet8", "adamw", clip=clip)
    for _ in range(iterations):
        step(some(8), some(8))
    batch, meta_batch = some(8), some(8)
    weights = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    slow, _ = slow_weight_gradient(step, weights, batch, meta_batch, preconditioned=True)
    fast, _ = step.per_sample_gradient(step.training_pass(batch), weights, meta_batch)
    assert (fast - slow).norm() / slow.norm() <= 1e-10


def test_a_clipped_lookahead_is_the_step_of_the_optimizer():
    """Without momentum and weight decay; P of the clipped gradient on the whole one would be many times as long."""
    step = make_step("plain", "cifar_resnet8", "sgd")
    parameters = list(step.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.0, BETA), weight_decay=0.0)
    clip, head = Clip(norm=1e-3), list(step.model.head.parameters())
    for number in range(3):
        gradients = [torch.randn_like(p) * (number + 1) for p in parameters]
        factors = clip.factors(parameters, gradients, head)
        clipped = [g * f for g, f in zip(gradients, factors, strict=True)]
        ahead = [
            p.detach() - d * f * g
            for p, d, f, g in zip(
                parameters, preconditioner(optimizer, parameters, clipped), factors, gradients, strict=True
            )
        ]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        clip(parameters, head)
        optimizer.step()
        for one, other in zip(ahead, parameters, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adagrad, {"lr_decay": 0.5, "initial_accumulator_value": 0.1}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.Adamax, {"betas": (0.0, BETA)}),
        (torch.optim.AdamW, {"betas": (0.0, BETA), "amsgrad": True}),
    ],
)
def test_the_preconditioned_step_is_that_of_the_optimizer(kind, options):
    parameters = [torch.nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(2)]
    optimizer = kind(parameters, lr=0.3, weight_decay=0.0, **options)
    for number in range(4):
        gradients = [torch.randn_like(p) * (number + 1) for p in parameters]
        diagonal = preconditioner(optimizer, parameters, gradients)
        ahead = [p.detach() - 0.3 * d * g for p, d, g in zip(parameters, diagonal, gradients, strict=True)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for one, other in zip(ahead, parameters, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["difficulty", "sample_difficulty", "mwn", "cb_da"])
def test_every_method_with_a_lookahead_has_the_option(method):
    options = {"from_epoch": 0} if method == "cb_da" else {}
    assert make_step(method, "cifar_resnet8", "adamw", **options).preconditions
    assert not make_step(method, "cifar_resnet8", "sgd", **options).preconditions
    step = make_step(method, "cifar_resnet8", "adamw", lookahead="sgd", **options)
    assert not step.preconditions
    step(some(8), some(8))


def test_sgd_takes_no_diagonal_and_scales_nothing():
    step = make_step("difficulty", "cifar_resnet8", "sgd")
    gradients = [torch.ones_like(p) for p in step.ahead.values()]
    assert step.lookahead_diagonal(gradients) is None
