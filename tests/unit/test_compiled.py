"""A compiled step computes what the step computes, warming up leaves no trace, and what cannot be compiled says why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastlt.augment import build_augment
from fastlt.class_accuracy import ClassAccuracy
from fastlt.compiled import Compiler, warm_up
from fastlt.losses import build_loss
from fastlt.models.classifier import Classifier
from fastlt.models.heads import LinearHead
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts
from fastlt.trainer import Trainer

CLASSES = 4
COUNTS = ClassCounts(torch.tensor([40, 20, 10, 5]).numpy(), tuple("abcd"))


def make_step(method, compiler, drop_rate=0.0):
    torch.manual_seed(0)
    # As small as a network with BatchNorm can be: compiling takes longer with every layer.
    layers = [nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    model = Classifier(nn.Sequential(*layers), LinearHead(4 * 9, CLASSES), drop_rate).train()

    def augment(seed, specs=("flip",)):
        return build_augment(specs, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3, seed=seed, device="cpu")

    kind = STEPS[method]
    parts = StepParts(
        model=model,
        loss=build_loss("cross_entropy", COUNTS),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        augment=augment(0),
        meta_augment=augment(1),
        class_counts=COUNTS,
        class_accuracy=ClassAccuracy(*meta_set(), CLASSES, prepare=augment(2, ())) if kind.needs_accuracy else None,
        compiler=compiler,
    )
    return kind(parts)


def meta_set():
    draw = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=draw), torch.arange(12) % CLASSES


def batches(seed):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=draw)
    return Batch(images, torch.arange(8) % CLASSES, torch.arange(8)), Batch(*meta_set(), torch.arange(12))


def tensors(state, where=""):
    if isinstance(state, torch.Tensor):
        yield where, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{where}.{key}")


@pytest.mark.parametrize("method", ["plain", "difficulty"])
def test_a_compiled_step_computes_the_same_and_warming_up_leaves_no_trace(method):
    plain, compiled = make_step(method, Compiler()), make_step(method, Compiler("inductor"))
    before, random = copy.deepcopy(compiled.state_dict()), torch.get_rng_state()
    assert warm_up(compiled, *batches(0)) is None
    assert torch.equal(random, torch.get_rng_state())
    after = compiled.state_dict()
    assert compiled.parts.compiler.active
    for (name, old), (_, new) in zip(tensors(before), tensors(after), strict=True):
        assert torch.equal(old, new), name
    for iteration in range(3):
        plain(*batches(iteration))
        compiled(*batches(iteration))
    for (name, value), (_, other) in zip(tensors(plain.state_dict()), tensors(compiled.state_dict()), strict=True):
        assert torch.allclose(value.double(), other.double(), rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(("method", "drop_rate", "why"), [("mixup", 0.0, "passes of its own"), ("mwn", 0.5, "random")])
def test_what_cannot_be_compiled_says_why_and_trains(method, drop_rate, why):
    step = make_step(method, Compiler("inductor"), drop_rate)
    assert why in warm_up(step, *batches(0))
    assert not step.parts.compiler.active
    assert torch.isfinite(step(*batches(0)).loss)


def test_a_compiler_that_fails_is_given_up_with_its_reason_and_without_a_trace(monkeypatch):
    def failing(function, **options):
        def run(*args):
            function(*args)  # what it computed before it failed must not stay
            raise RuntimeError("no C++ compiler\nand a long story")

        return run

    monkeypatch.setattr(torch, "compile", failing)
    step = make_step("plain", Compiler("inductor"))
    before = copy.deepcopy(step.state_dict())
    assert warm_up(step, *batches(0)) == "RuntimeError: no C++ compiler"
    for (name, old), (_, new) in zip(tensors(before), tensors(step.state_dict()), strict=True):
        assert torch.equal(old, new), name
    assert torch.isfinite(step(*batches(0)).loss)


def test_a_run_says_what_it_compiled_and_ends_as_without(digits_words, capsys, monkeypatch):
    from fastlt.recipe import load_recipe

    words = [*digits_words, "stages.end_to_end.method=plain", "stages.end_to_end.accuracy.refresh=exact"]
    # Compiling the network takes minutes on a small machine; that it is asked to, and once, is what counts here.
    asked = []

    def compiles(function, **options):
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiles)
    results = {}
    for mode in ("none", "inductor"):
        recipe = load_recipe("recipes/digits_lt.yaml", [*words, f"compile={mode}", f"name={mode}"])
        results[mode] = Trainer(recipe).fit()
        assert ("compiled in" in capsys.readouterr().out) == (mode == "inductor")
    assert len(asked) == 1
    assert results["none"]["per_class_accuracy"] == results["inductor"]["per_class_accuracy"]
