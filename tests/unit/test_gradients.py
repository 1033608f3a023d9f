"""Gradients averaged in buckets while they are computed, with processes that all do the same, in one process."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from fastlt.device import gradients as module
from fastlt.device.distributed import Reducer
from fastlt.device.gradients import mean_gradients, mean_of_each


@dataclass(frozen=True)
class Twins(Reducer):
    """Two processes with the same gradients: their sum is twice each. Notes what is sent."""

    world_size: int = 2
    sent: list = field(default_factory=list)

    def start_sum(self, tensor):
        self.sent.append((tensor.numel(), tensor.dtype))
        tensor.mul_(2)
        return lambda: None


@pytest.fixture(autouse=True)
def small_first_bucket(monkeypatch):
    monkeypatch.setattr(module, "FIRST_BUCKET_BYTES", 64)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False), nn.Flatten(), nn.Linear(20, 4)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def objective_of(model):
    return model(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))).square().mean()


@pytest.mark.parametrize("bucket_bytes", [1, 600, sys.maxsize])
def test_the_means_of_twins_are_their_gradients(bucket_bytes):
    model, reducer = network(), Twins(bucket_bytes=bucket_bytes)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(objective_of(model), parameters)
    found = mean_gradients(reducer, objective_of(model), parameters)
    alone = mean_gradients(Reducer(), objective_of(model), parameters)
    for ours, of_one, gradient, parameter in zip(found, alone, expected, parameters, strict=True):
        assert torch.equal(ours, gradient)
        assert torch.equal(of_one, gradient)
        assert ours.stride() == parameter.stride()
    assert sum(count for count, _ in reducer.sent) == sum(p.numel() for p in parameters)
    assert not any(p._backward_hooks for p in parameters)


def test_buckets_hold_what_fits_from_the_last_parameter_on_and_the_first_is_small():
    sizes = [10, 30, 100, 5, 4, 7, 9]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    buckets = module._divided(parameters, 200)
    assert [[sizes[i] for i in bucket] for bucket in buckets] == [[9, 7], [4, 5], [100], [30, 10]]
    assert module._divided(parameters, sys.maxsize)[0] == [6, 5]


def test_buckets_are_on_their_way_before_the_pass_is_over():
    model, reducer = network(), Twins(bucket_bytes=1)
    parameters, sent_before = list(model.parameters()), []
    of_first = model[0](torch.randn(2, 3, 6, 6))
    of_first.register_hook(lambda gradient: sent_before.append(len(reducer.sent)))
    mean_gradients(reducer, model[1:](of_first).square().mean(), parameters)
    assert sent_before == [3], "the head's weight and bias and the second convolution's weight, before the first's"
    assert [count for count, _ in reducer.sent] == [p.numel() for p in reversed(parameters)]


def test_the_order_of_buckets_is_fixed_and_what_is_unused_counts_as_zero():
    one, two, three = (nn.Parameter(torch.full((n,), 2.0)) for n in (3, 5, 7))
    for used in ([one], [two], [one, three], [three, two, one]):
        reducer = Twins(bucket_bytes=1)
        objective = torch.stack([p.square().sum() for p in used]).sum()
        means = mean_gradients(reducer, objective, [one, two, three])
        assert [count for count, _ in reducer.sent] == [7, 5, 3]
        for parameter, mean in zip([one, two, three], means, strict=True):
            used_here = any(parameter is p for p in used)
            assert torch.equal(mean, 2 * parameter.detach() if used_here else torch.zeros_like(parameter))


@pytest.mark.parametrize("reducer", [Reducer(), Twins(bucket_bytes=1)], ids=["alone", "twins"])
def test_gradients_are_added_to_what_is_there(reducer):
    one, two = (nn.Parameter(torch.arange(3.0)) for _ in range(2))
    before = [torch.ones(3), torch.full((3,), 5.0)]
    found = mean_gradients(reducer, one.square().sum(), [one, two], added_to=before, share=0.5)
    assert torch.equal(found[0], 1 + torch.arange(3.0))
    assert torch.equal(found[1], torch.full((3,), 5.0))


def test_gradients_that_share_memory_are_averaged_once_each():
    """Autograd hands the same tensor to both terms of a sum, and one number for all of a sum's entries."""
    one, two = (nn.Parameter(torch.arange(3.0)) for _ in range(2))
    for bucket_bytes in (1, sys.maxsize):
        found = mean_gradients(Twins(bucket_bytes=bucket_bytes), (one + two).sum(), [one, two])
        assert all(torch.equal(gradient, torch.ones(3)) for gradient in found)


def test_compressed_gradients_are_sent_in_bfloat16_and_lose_three_digits_at_most():
    model, reducer = network(), Twins(compressed=True, bucket_bytes=600)
    parameters = list(model.parameters())
    exact = torch.autograd.grad(objective_of(model), parameters)
    found = mean_gradients(reducer, objective_of(model), parameters)
    assert {dtype for _, dtype in reducer.sent} == {torch.bfloat16}
    for ours, gradient in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        error = (ours - gradient).abs()
        assert error.max() > 0
        assert (error <= 2.0**-8 * gradient.abs()).all()


def test_gradients_that_come_one_by_one_go_into_the_same_buckets():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 5, 7)]
    reducer = Twins(bucket_bytes=1)

    def gradients():
        for i, parameter in reversed(list(enumerate(parameters))):
            assert len(reducer.sent) == 2 - i, "the gradients before are on their way"
            yield i, torch.full_like(parameter, i)

    found = mean_of_each(reducer, parameters, gradients())
    assert [mean[0].item() for mean in found] == [0, 1, 2]
    assert [
        mean[0].item() for mean in mean_of_each(Reducer(), parameters, ((i, parameters[i] + i) for i in (2, 0, 1)))
    ] == [0, 1, 2]
