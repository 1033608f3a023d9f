"""What learned class weights cost beside the network: how much of the meta set is scored, and the size of theta."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from fastlt.device.available import wait_for
from fastlt.device.compiled import adam_options
from fastlt.meta.bounded_accuracy import rounds
from fastlt.meta.difficulty import RULE_UP_TO, WIDEST_TRIED, DifficultyNet, advice_on_width, chosen_width
from fastlt.recipe import Recipe, StageRecipe
from fastlt.steps import STEPS
from fastlt.steps.difficulty import DifficultyOptions, DifficultyStep
from fastlt.steps.learned_weights import SHARDED_FROM

# Weights of the network that is timed: 16 MB, more than the caches of a core hold. Larger ones take as long a weight.
PROBED, ROUNDS = 2**22, 3
BYTES = 4 * 4  # a weight: itself, its gradient and Adam's two moments, in float32
SAVED_BYTES = 3 * 4  # of it in a checkpoint


def scoring(recipe: Recipe) -> list[str]:
    """How many meta images an iteration of each stage scores, and how old a result can be; a line a stage."""
    classes, lines = recipe.data.num_classes, []
    for name, stage in recipe.stages.items():
        if classes is not None and STEPS[stage.method].needs.class_accuracy:
            lines.append(f"stages.{name}.accuracy: {_scored(stage, classes * recipe.data.meta_per_class)}")
    return lines


def _scored(stage: StageRecipe, images: int) -> str:
    accuracy = stage.accuracy
    if accuracy.refresh != "rolling":
        return f"at most {images:,} meta images are scored in every {_UNIT[accuracy.refresh]}"
    slices = rounds(images, accuracy.window, accuracy.images_per_step)
    return (
        f"{-(-images // slices):,} of at most {images:,} meta images are scored in an iteration; no result is older "
        f"than {slices:,} iterations"
    )


_UNIT = {"exact": "iteration", "epoch": "epoch"}


def theta(recipe: Recipe) -> list[str]:
    """Size, memory and time of the network that weighs classes, for each stage that has one. Times a small one."""
    return [f"stages.{name}.{line}" for name, stage in recipe.stages.items() for line in _theta(recipe, stage)]


def _theta(recipe: Recipe, stage: StageRecipe) -> Iterator[str]:
    if not issubclass(STEPS[stage.method], DifficultyStep):
        return
    assert isinstance(stage.options, DifficultyOptions), stage
    classes, hidden = recipe.data.num_classes, stage.options.hidden
    if classes is None:
        yield "options.hidden: the size of theta follows from the number of classes; data.num_classes says it"
        return
    width = chosen_width(classes, hidden)
    weights = number_of_weights(classes, width)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    auto = f" (auto: the rule up to {RULE_UP_TO:,} classes, {WIDEST_TRIED:,} beyond)" if hidden == "auto" else ""
    among = " (which several processes divide among them)" if weights >= SHARDED_FROM else ""
    yield (
        f"options.hidden: is {width:,}{auto}; theta has {weights:,} weights, {_bytes(BYTES * weights)} "
        f"with gradient and Adam's state{among}, {_bytes(SAVED_BYTES * weights)} of a checkpoint, about "
        f"{_milliseconds(classes, width, device)} ms an iteration on {device}"
    )
    advice = advice_on_width(classes, hidden)
    if advice is not None:
        yield advice


def number_of_weights(classes: int, width: int) -> int:
    """The parameters of Difficulty-Net, without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in DifficultyNet(classes, width).parameters())


def _milliseconds(classes: int, width: int, device: torch.device) -> str:
    """The time of theta in an iteration: two forward passes, another with its gradient, and Adam's step."""
    probed = max(1, min(width, PROBED // (2 * classes)))
    with torch.random.fork_rng(devices=[]):
        net = DifficultyNet(classes, probed).to(device)
    optimizer = torch.optim.Adam(net.parameters(), **adam_options("none", device, number_of_weights(classes, width)))
    seen, seconds = torch.full((classes,), 0.5, device=device), []
    for _ in range(1 + ROUNDS):
        wait_for(device)
        started = time.perf_counter()
        with torch.no_grad():
            for _ in range(2):
                net(seen)
        net(seen).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    scale = number_of_weights(classes, width) / number_of_weights(classes, probed)
    ms = 1e3 * scale * statistics.median(seconds[1:])  # the first makes Adam's state
    return f"{ms:,.0f}" if ms >= 10 else f"{ms:.1f}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
