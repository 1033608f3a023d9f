"""A batch in micro-batches: the step of the whole batch, for plain and for meta-steps; and clipping."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from float64_steps import COUNTS, LR, Float64Augment, make_step, some
from reference import forward

from fastlt.optim import Clip
from fastlt.steps.learned_weights import Approximation


def assert_same_training(one, other, iterations=2):
    """The same batches leave the same weights, and the same numbers in between."""
    torch.manual_seed(7)
    for _ in range(iterations):
        batch, meta_batch = some(8), some(8)
        outputs = [step(batch, meta_batch) for step in (one, other)]
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-9, atol=1e-12)
        for name, value in outputs[0].metrics.items():
            torch.testing.assert_close(value, outputs[1].metrics[name], rtol=1e-6, atol=1e-12)
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("plain", {"loss": "ldam"}),
        ("cdb", {}),
        ("crt", {}),
        ("difficulty", {"optimizer": "adamw"}),
        ("difficulty", {"approximate_late": True}),
        ("sample_difficulty", {}),
        ("mwn", {"optimizer": "adamw", "clip": Clip(norm=0.1)}),
        ("cb_da", {"from_epoch": 0}),
        ("cb_da", {"from_epoch": 1}),
    ],
)
@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_train_as_the_whole_batch_does(method, more, parts):
    more = dict(more)
    if more.pop("approximate_late", False):
        more["approximate"] = Approximation(late_weights=True)
    one, other = (make_step(method, "small", accumulate=k, **more) for k in (1, parts))
    assert_same_training(one, other)
    for a, b in zip(getattr(one, "net_parameters", []), getattr(other, "net_parameters", []), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_with_batch_norm_the_meta_gradient_is_that_of_the_micro_batches(drop_rate):
    """Against differentiating twice: each micro-batch forward by itself, the lookahead and the meta loss over all."""
    step = make_step("difficulty", "cifar_resnet8", accumulate=2)
    if drop_rate:
        step.model.dropout = torch.nn.Dropout(drop_rate)
    batch, meta_batch = some(8), some(8)
    weights = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    before = {n: b.clone() for n, b in step.model.named_buffers()}
    state = torch.get_rng_state()
    run = step.training_pass(batch)
    once = {n: b.clone() for n, b in step.model.named_buffers()}
    fast, fast_loss = step.per_sample_gradient(run, weights, meta_batch)
    torch.set_rng_state(state)

    def losses_of(parameters, batch, shift):
        images = Float64Augment()(batch.images)
        logits = torch.cat([forward(step.model, parameters, images[half]) for half in (slice(0, 4), slice(4, 8))])
        return F.cross_entropy(logits + shift, batch.labels, reduction="none")

    w = weights.clone().requires_grad_()
    parameters = {n: p.detach().clone().requires_grad_() for n, p in step.model.named_parameters()}
    inner = (w * losses_of(parameters, batch, torch.log(torch.from_numpy(COUNTS.counts).double()))).mean()
    gradients = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
    ahead = {n: p - LR * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
    meta = losses_of(ahead, meta_batch, 0.0).mean()
    slow = torch.autograd.grad(meta, w)[0]
    assert slow.norm() > 0
    assert (fast - slow).norm() / slow.norm() <= 1e-10
    torch.testing.assert_close(fast_loss, meta.detach(), rtol=1e-12, atol=0)
    # The statistics have moved with the first passes, once a micro-batch, and with no others.
    after = dict(step.model.named_buffers())
    assert all(torch.equal(b, after[n]) for n, b in once.items())
    counters = [n for n in before if n.endswith("num_batches_tracked")]
    assert counters
    assert all(after[n] == before[n] + 2 for n in counters)


def test_accumulated_gradients_hold_no_graph_of_another_micro_batch():
    step = make_step("difficulty", "cifar_resnet8", accumulate=4)
    run = step.training_pass(some(8))
    assert not run.losses.requires_grad
    assert [len(part.labels) for part in run.parts] == [2, 2, 2, 2]


def gradients_of(step):
    seen = []
    step.optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in step.parameters]))
    step(some(8), some(8))
    return seen[0]


@pytest.mark.parametrize("method", ["plain", "difficulty"])
def test_clipping_is_of_the_update_and_by_its_definition(method):
    def clipped(**limit):
        step = make_step(method, "cifar_resnet8", clip=Clip(**limit) if limit else None)
        torch.manual_seed(9)
        return step, gradients_of(step)

    free = clipped()[1]
    norm = torch.cat([g.flatten() for g in free]).norm()
    for a, b in zip(clipped(norm=norm.item() / 3)[1], free, strict=True):
        torch.testing.assert_close(a, b / 3, rtol=1e-5, atol=1e-12)
    for a, b in zip(clipped(value=1e-2)[1], free, strict=True):
        torch.testing.assert_close(a, b.clamp(-1e-2, 1e-2))
    step, found = clipped(agc=1e-3)
    head = set(step.model.head.parameters())
    start = make_step(method, "cifar_resnet8").parameters
    for parameter, weight, a, b in zip(step.parameters, start, found, free, strict=True):
        if parameter in head:
            torch.testing.assert_close(a, b)
            continue
        for unit in range(len(b)) if b.ndim > 1 else [slice(None)]:
            limit = 1e-3 * weight[unit].detach().norm().clamp_min(1e-3)
            size = b[unit].norm()
            torch.testing.assert_close(a[unit], b[unit] * (limit / size if size > limit else 1.0))


def test_the_lookahead_is_not_clipped():
    one, other = (make_step("difficulty", "cifar_resnet8", clip=clip) for clip in (None, Clip(norm=1e-3)))
    batch, meta_batch = some(8), some(8)
    weights = torch.ones(8, dtype=torch.float64)
    found = [step.per_sample_gradient(step.training_pass(batch), weights, meta_batch)[0] for step in (one, other)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "none of norm, value and agc"),
        ({"norm": 1.0, "agc": 0.1}, "norm and agc of norm"),
        ({"value": -1.0}, "value is -1.0"),
    ],
)
def test_a_clip_is_exactly_one_limit(given, message):
    with pytest.raises(ValueError, match=message):
        Clip(**given)
