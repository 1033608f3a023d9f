"""Steps whose samples do not couple do the same as steps with passes of their own, whatever the method and setting."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from float64_steps import Scaled
from thread_ranks import SEEDED, run_ranks
from torch import nn

from fastlt.device.distributed import Reducer
from fastlt.losses import build_loss
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.meta.per_sample import Trial
from fastlt.models import build_model
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts
from fastlt.steps import meta as meta_steps
from fastlt.steps.learned_weights import Approximation

CLASSES, LR, ITERATIONS = 5, 0.1, 4
COUNTS = ClassCounts(np.array([40, 20, 10, 5, 2]), tuple("abcde"))
GENERAL = Trial("the test asks for it")


def network(dtype=torch.float64, **options):
    torch.manual_seed(1)
    options = {"name": "vit_tiny_patch16_224", "image_size": 32, **options}
    model = build_model(num_classes=CLASSES, **options).to(dtype).train()
    if "vit" in options["name"]:
        model.backbone.blocks = model.backbone.blocks[:2]
    return model


def make(method, model, reducer=None, autocast=None, dtype=torch.float64, loss="cross_entropy", **options):
    """A step that has its own copy of `model`."""
    kind, model, prepare = STEPS[method], copy.deepcopy(model), Scaled(dtype=dtype)
    options = kind.Options(**options)
    accuracy = None
    if kind.needs.class_accuracy:
        batch = draw(20, torch.Generator().manual_seed(7))
        accuracy = ClassAccuracy(
            batch.images, torch.arange(20) % CLASSES, CLASSES, prepare=prepare, reducer=reducer or Reducer()
        )
    parts = StepParts(
        model=model,
        loss=build_loss(loss, COUNTS),
        optimizer=torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=LR, momentum=0.9, weight_decay=5e-4
        ),
        augment=prepare,
        meta_augment=prepare,
        class_counts=COUNTS,
        class_accuracy=accuracy,
        reducer=reducer or Reducer(),
        **({} if autocast is None else {"autocast": autocast}),
    )
    state = torch.get_rng_state()
    torch.manual_seed(3)
    step = kind(parts, options)  # which draws a network of its own
    torch.set_rng_state(state)
    step.start_epoch(0)
    return step


def draw(size, generator):
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.randint(0, CLASSES, (size,), generator=generator), torch.arange(size))


def pairs(number=ITERATIONS):
    generator = torch.Generator().manual_seed(2)
    return [(draw(8, generator), draw(6, generator)) for _ in range(number)]


def train(step, general=False):
    """The state after a few iterations, and how many of their passes kept the gradients of all samples."""
    if general:
        step.trial = GENERAL
    kept, training_pass = [], step.training_pass
    step.training_pass = lambda batch: kept.append(training_pass(batch)) or kept[-1]
    outputs = [step(*pair) for pair in pairs()]
    state = {**step.model.state_dict(), **(step.net.state_dict() if hasattr(step, "net") else {})}
    return state, sum(run.gradients is not None for run in kept), outputs


def assert_same(one, other, rtol=1e-9):
    for name, value in one.items():
        assert torch.allclose(value, other[name], rtol=rtol, atol=rtol / 100), name


def compare(method, model=None, passes=ITERATIONS, **options):
    model = network() if model is None else model
    fast, kept, outputs = train(make(method, model, **options))
    slow, none_kept, expected = train(make(method, model, **options), general=True)
    assert (kept, none_kept) == (passes, 0)
    assert_same(fast, slow)
    for one, other in zip(outputs, expected, strict=True):
        assert torch.allclose(one.loss, other.loss, rtol=1e-9)
        assert one.metrics.keys() == other.metrics.keys()


METHODS = {
    "difficulty": {},
    "sample_difficulty": {},
    "mwn": {},
    "cb_da": {"from_epoch": 0, "eps_lr": 1.0},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_does_the_same(method):
    compare(method, **METHODS[method])


VARIANTS = {
    "balanced softmax": ({"loss": "balanced_softmax"}, ITERATIONS),
    "equalization, which draws": ({"loss": "equalization"}, ITERATIONS),
    "lean": ({"lean": True}, ITERATIONS),
    "late weights": ({"approximate": Approximation(late_weights=True)}, ITERATIONS),
    "every other": ({"approximate": Approximation(every=2)}, ITERATIONS // 2),
    "head ahead": ({"approximate": Approximation(lookahead_only=["head"])}, ITERATIONS),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_does_the_same(variant):
    options, passes = VARIANTS[variant]
    compare("difficulty", passes=passes, **options)


NETWORKS = {
    "frozen batch norm": {"name": "cifar_resnet8", "image_size": None, "norm": "frozen"},
    "norms and head": {"name": "cifar_resnet8", "image_size": None, "train": "norms", "norm": "frozen"},
    "head": {"train": "head"},
    "cosine head": {"head": "cosine"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_does_the_same(name):
    compare("difficulty", network(**NETWORKS[name]))


def test_dropout_and_stochastic_depth_draw_once(monkeypatch):
    """Meta images in parts would draw in another order than the whole batch."""
    monkeypatch.setattr(meta_steps, "META_PARTS", 1)
    model = network(drop_rate=0.3, drop_path_rate=0.3)
    results = []
    for general in (False, True):
        torch.manual_seed(5)
        results.append(train(make("difficulty", model), general))
    assert [kept for _, kept, _ in results] == [ITERATIONS, 0]
    assert_same(results[0][0], results[1][0])


def test_two_processes_do_as_one():
    model = network()
    alone, kept, _ = train(make("difficulty", model))
    assert kept == ITERATIONS

    def work(reducer):
        with SEEDED:
            step = make("difficulty", model, reducer)
        for pair in pairs():
            step(*(Batch(*(reducer.mine(t) for t in (b.images, b.labels, b.index))) for b in pair))
        assert step.trial.refused is None
        return {**step.model.state_dict(), **step.net.state_dict()}

    for state in run_ranks(2, work):
        assert_same(state, alone)


def test_batch_statistics_take_the_general_way_in_silence():
    model = network(name="cifar_resnet8", image_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = make("difficulty", model)
        _, kept, _ = train(step)
    assert kept == 0
    assert "normalises with its batch" in step.trial.refused


class Multiplies(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.factor = model, nn.Parameter(torch.eye(CLASSES, dtype=torch.float64))

    def forward(self, images):
        return self.model(images) @ self.factor


def test_a_parameter_without_a_rule_takes_the_general_way_with_one_warning():
    step = make("mwn", Multiplies(network()))
    with pytest.warns(UserWarning, match="factor is used by matmul, which has no rule") as caught:
        _, kept, _ = train(step)
    assert kept == 0
    assert len(caught) == 1


def test_a_pass_that_differs_from_the_trial_is_made_again_the_general_way():
    model = network(drop_rate=0.3)
    results = []
    for general in (False, True):
        torch.manual_seed(5)
        step = make("mwn", model)
        if not general:
            step.trial = Trial(None, uses=("head.weight linear 1",))
            with pytest.warns(UserWarning, match="otherwise than when it was tried"):
                results.append(train(step))
        else:
            results.append(train(step, general=True))
    assert_same(results[0][0], results[1][0], rtol=0)


def test_one_image_a_process_takes_the_general_way():
    step = make("mwn", network())
    batch, meta_batch = pairs(1)[0]
    step(Batch(batch.images[:1], batch.labels[:1], batch.index[:1]), meta_batch)
    assert step.trial is None


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def test_mixed_precision_keeps_gradients_where_the_tangent_has_its_types():
    model = network(torch.float32)
    step = make("difficulty", model, autocast=bf16, dtype=torch.float32, tangent="fp32")
    assert train(step)[1] == 0, "its tangent is float32"
    weights = torch.linspace(0.5, 1.5, 8)
    gradients = {}
    batch, meta_batch = pairs(1)[0]
    for name, dtype, general in (
        ("exact", torch.float64, True),
        ("kept", torch.float32, False),
        ("own", torch.float32, True),
    ):
        mixed = {} if name == "exact" else {"autocast": bf16}
        step = make("difficulty", model.to(dtype), dtype=dtype, **mixed)
        step.trial = GENERAL if general else None
        run = step.training_pass(batch)
        assert (run.gradients is None) == general
        gradients[name] = step.per_sample_gradient(run, weights.to(dtype), meta_batch)[0].double()
    errors = {
        n: ((gradients[n] - gradients["exact"]).norm() / gradients["exact"].norm()).item() for n in ("kept", "own")
    }
    assert errors["kept"] <= max(1.5 * errors["own"], 0.02), errors
