"""Operations that are recorded once and repeated do what the function did, and what cannot be repeated is refused."""

from __future__ import annotations

import pytest
import torch

from fastlt.device.recorded_operations import CpuCapture


def test_operations_are_repeated_on_what_is_there_now():
    given, total = torch.ones(3), torch.zeros(3)

    def function():
        total.add_(given * 2)
        return total.sum()

    replay, result = CpuCapture()(function)
    assert torch.equal(total, torch.zeros(3)), "recording must leave no trace"
    replay()
    assert torch.equal(total, torch.full((3,), 2.0))
    assert result.item() == 6
    given.fill_(5)
    replay()
    assert torch.equal(total, torch.full((3,), 12.0))
    assert result.item() == 36


def test_a_view_of_what_was_there_is_written_through():
    matrix = torch.zeros(2, 3)

    def function():
        matrix[1].add_(1)
        matrix.t()[0].mul_(2)

    replay, _ = CpuCapture()(function)
    assert torch.equal(matrix, torch.zeros(2, 3))
    for _ in range(2):
        replay()
    assert matrix.tolist() == [[0, 0, 0], [6, 2, 2]]


def test_gradients_are_repeated_with_what_the_forward_pass_saves():
    """Autograd hands saved results to the backward pass as new tensors."""
    weight, x = torch.tensor([[1.0, -2.0], [0.5, 3.0]], requires_grad=True), torch.tensor([[1.0, 2.0]])

    def function():
        loss = torch.log_softmax(x @ weight, 1)[0, 0].exp() + torch.tanh(x @ weight).sum()
        return torch.autograd.grad(loss, [weight])[0]

    replay, gradient = CpuCapture()(function)
    x.copy_(torch.tensor([[-1.0, 0.3]]))
    with torch.no_grad():
        weight.mul_(-0.5)
    replay()
    assert torch.equal(gradient, function())


def test_what_an_object_keeps_is_overwritten():
    class Holder:
        latest = None

    holder, given = Holder(), torch.ones(2)

    def function():
        holder.latest = given + 1
        return given * 3

    replay, _ = CpuCapture()(function)
    given.fill_(4)
    replay()
    assert holder.latest.tolist() == [5, 5]


def test_random_numbers_are_drawn_again_and_recording_draws_none():
    torch.manual_seed(0)
    expected = [torch.rand(2) for _ in range(2)]
    torch.manual_seed(0)
    replay, drawn = CpuCapture()(lambda: torch.rand_like(torch.zeros(2)))
    for numbers in expected:
        replay()
        assert torch.equal(drawn, numbers)


def test_a_generator_goes_on_with_every_replay():
    numbers = torch.Generator().manual_seed(3)
    expected = [torch.rand(2, generator=numbers) for _ in range(2)]
    numbers.manual_seed(3)
    replay, drawn = CpuCapture()(lambda: torch.rand(2, generator=numbers))
    for one in expected:
        replay()
        assert torch.equal(drawn, one)


def test_lists_of_tensors_and_operations_that_return_several():
    ones = [torch.tensor([1.0, 5.0, 3.0]), torch.tensor([2.0])]

    def function():
        torch._foreach_add_(ones, 1.0)
        return torch.sort(ones[0], descending=True)

    replay, (values, places) = CpuCapture()(function)
    replay()
    assert [one.tolist() for one in ones] == [[2, 6, 4], [3]]
    assert (values.tolist(), places.tolist()) == ([6, 4, 2], [1, 2, 0])


@pytest.mark.parametrize(("function", "why"), [
    (lambda x: x.add_(1).sum().item(), "decides by the value"),
    (lambda x: x.add_(1) if x.sum() > 0 else x, "decides by the value"),
    (lambda x: torch.equal(x.add_(1), x), "decides by the value"),
    (lambda x: x.add_(1) * torch.tensor(2.0), "made from numbers"),
    (lambda x: x.add_(1)[x > 1], "decides by the value"),
])  # fmt: skip
def test_what_cannot_be_repeated_is_refused_without_a_trace(function, why):
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match=why):
        CpuCapture()(lambda: function(x))
    assert torch.equal(x, torch.ones(3))
