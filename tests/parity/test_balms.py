"""BALMS equals a slow version of itself that unrolls the head's step, and draws classes as often as its rates say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from balms_reference import DECAY, LR, MOMENTUM, RATE_LR, first_rates, follow
from float64_steps import Scaled

from fastlt.losses import build_loss
from fastlt.models import build_model
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts
from fastlt.steps.balms import gumbel, initial_logits

CLASSES, SEED = 5, 3
COUNTS = ClassCounts(np.array([40, 20, 10, 5, 2]), tuple("abcde"))
BalmsStep = STEPS["balms"]


def make(**options):
    torch.manual_seed(SEED)
    options = BalmsStep.Options(lr=RATE_LR, **options)
    model = build_model("cifar_resnet8", num_classes=CLASSES).double()
    BalmsStep.prepare_model(model, options, seed=1)
    optimizer = torch.optim.SGD(
        BalmsStep.parameter_groups(model, options), lr=LR, momentum=MOMENTUM, weight_decay=DECAY, foreach=True
    )
    loss = build_loss("balanced_softmax", COUNTS)
    step = BalmsStep(StepParts(model, loss, optimizer, Scaled(), Scaled(), COUNTS, seed=SEED), options)
    step.train_mode()
    return step


def batches(number, size=24):
    generator = torch.Generator().manual_seed(2)
    for _ in range(number):
        pair = []
        for count in (size, 10):
            images = torch.randint(0, 256, (count, 3, 9, 9), dtype=torch.uint8, generator=generator)
            labels = torch.randint(0, CLASSES, (count,), generator=generator)
            pair.append(Batch(images, labels, torch.arange(count)))
        yield pair


@pytest.mark.parametrize(("power", "factor"), [(0.0, 1), (0.3, 4)])
def test_head_and_rates_follow_the_reference(power, factor):
    step = make(init_pow=power, pool_factor=factor)
    head = {name: p.detach().clone() for name, p in step.model.head.named_parameters()}
    features = step.model.backbone
    start = step.rate_logits.detach().clone()
    pairs = [[(b.images, b.labels) for b in pair] for pair in batches(6)]
    with torch.no_grad():
        known = {id(images): features(Scaled()(images)) for pair in pairs for images, _ in pair}
    for batch, meta_batch in batches(6):
        step(batch, meta_batch)
    counts = torch.from_numpy(COUNTS.counts).double()
    psi = follow(head, lambda i: known[id(i)], pairs, counts, power=power, factor=factor, processes=1, seed=SEED)
    assert torch.allclose(step.rate_logits, psi, rtol=1e-9, atol=1e-11)
    for name, p in step.model.head.named_parameters():
        assert torch.allclose(p, head[name], rtol=1e-9, atol=1e-11), name
    assert (step.rate_logits - start).abs().max() > 0.1, "the rates must move far enough to show"


@pytest.mark.parametrize("power", [0.0, 0.1, 0.3, 1.0])
def test_rates_start_where_the_definition_says(power):
    counts = torch.from_numpy(COUNTS.counts).double()
    assert torch.allclose(initial_logits(COUNTS.counts, power), first_rates(counts, power), rtol=1e-12, atol=1e-12)


def test_a_class_is_drawn_in_proportion_to_its_images_and_its_rate():
    labels = torch.arange(CLASSES).repeat_interleave(torch.from_numpy(COUNTS.counts))
    rates = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    noise = gumbel((20_000, len(labels)), rates, torch.Generator().manual_seed(0))
    drawn = labels[(rates.log()[labels] + noise).argmax(1)]
    expected = torch.from_numpy(COUNTS.counts) * rates
    expected = expected / expected.sum()
    share = torch.bincount(drawn, minlength=CLASSES) / len(drawn)
    assert (share - expected).abs().max() < 4 * (0.25 / len(drawn)) ** 0.5
    step = make()
    with torch.no_grad():
        step.rate_logits.copy_(torch.logit(rates))
    assert torch.allclose(step.class_probabilities(), expected)


def test_a_batch_passes_through_the_network_once_and_only_its_draws():
    step = make(pool_factor=4)
    seen = []
    step.model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    for batch, meta_batch in batches(2):
        step(batch, meta_batch)
    assert seen == [6, 10, 6, 10]
    assert F.mse_loss(step.class_probabilities().sum(), torch.ones((), dtype=torch.float64)) < 1e-20


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1.0}, "lr is -1.0"), ({"init_pow": -0.1}, "init_pow is -0.1"), ({"pool_factor": 0}, "pool_factor is 0")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BalmsStep.Options(**options)
