"""Methods that train a head on the features of a frozen backbone: a method is a row, and its runs take seconds."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fastlt.device.compiled import ready
from fastlt.models import Classifier
from fastlt.models.head_init import init_head
from fastlt.models.trained_state import load_trained_state, trained_state
from fastlt.names import pick
from fastlt.recipe import Recipe, load_recipe
from fastlt.recipe.locations import shipped_recipes
from fastlt.run.background import on_host
from fastlt.run.context import RunContext, make_accelerator, make_context, with_recipe
from fastlt.run.evaluation import Evaluation
from fastlt.run.feature_cache import compute_features
from fastlt.run.loading import endless
from fastlt.run.preflight import check_dataset, check_loaders, check_model
from fastlt.run.stage import Stage, build_stage, new_model, prepare_model

METHODS = Path(__file__).with_name("frozen_methods.yaml")
RECIPE = "cifar10_lt_linear_probe"
STAGE, SECOND = "end_to_end", "second"
# What a row does not say of its stage, whatever the recipe has.
PLAIN = {"method": "plain", "options": {}, "loss": "cross_entropy", "loss_options": {}, "sampling": "instance"}
# By seed and model section of the recipe: the first model of a run, and the state of the random numbers after it.
BuiltModels = dict[tuple[int, str], tuple[Classifier, Tensor]]
SECOND_SHARE = 3  # a second stage has the iterations of the first over this number


@dataclass(frozen=True)
class Method:
    """A row of the table, see frozen_methods.yaml.

    stage, model, second: what it changes in the recipe; second is None without a second stage.
    of: the row whose runs it measures; it has none of its own then, and its metrics are those with logit adjustment.
    """

    name: str
    stage: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    second: Mapping[str, Any] | None = None
    of: str | None = None
    adjusted: bool = False

    @property
    def runs(self) -> str:
        """The name of the row whose runs it measures."""
        return self.of or self.name


def read_methods(names: Sequence[str] | None = None, table: str = "rows") -> list[Method]:
    """The rows of a table, "rows" or "ablation", or those of these names; ValueError for an unknown name."""
    methods = {row["name"]: Method(**row) for row in yaml.safe_load(METHODS.read_text(encoding="utf-8"))[table]}
    for name in names or ():
        pick("row", name, methods)
    return [m for m in methods.values() if names is None or m.name in names or m.of in names]


@dataclass(frozen=True)
class HeadRun:
    """One training of a head. words: what it overrides in the recipe of its data set."""

    method: str
    lr: float
    seed: int
    words: tuple[str, ...]


def base_recipe() -> Path:
    """The recipe whose stage the methods change."""
    return shipped_recipes()[RECIPE]


def plan(
    recipe: Recipe, methods: Sequence[Method], rates: Sequence[float], seeds: int, per_epoch: int
) -> list[HeadRun]:
    """Every run of a data set, the seeds of a method and rate in a row.

    per_epoch: iterations an epoch of the recipe's stage on these data. ValueError for a method that the recipe cannot
    have.
    """
    runs = []
    for method in methods:
        if method.of is not None:
            continue
        for lr in rates:
            words = _words(recipe, method, lr, per_epoch)
            runs += [HeadRun(method.name, lr, seed, (*words, f"seed={seed}")) for seed in range(seeds)]
    return runs


def _words(recipe: Recipe, method: Method, lr: float, per_epoch: int) -> list[str]:
    """The override words of a method at a rate."""
    first = recipe.stages[STAGE]
    iterations = first.length if first.epochs is None else first.length * per_epoch
    stage = {"lr": lr, **PLAIN, **method.stage}
    words = [f"model.{key}={_text(value)}" for key, value in method.model.items()]
    words += [
        f"stages.{STAGE}.{key}={_text(_in_epochs(value, iterations / per_epoch))}" for key, value in stage.items()
    ]
    if method.second is not None:
        length = method.second.get("iterations", max(1, iterations // SECOND_SHARE))
        second = {
            **{key: getattr(first, key) for key in ("batch_size", "meta_batch_size", "schedule", "weight_decay")},
            **{"iterations": length, "evaluate_every": length, "lr": lr},
            "milestones": [round(at / first.length * length) for at in first.milestones],
            **method.second,
        }
        words.append(f"stages.{SECOND}={_text(second)}")
    return words


def _in_epochs(value: Any, epochs: float) -> Any:
    """`value` with each {share: x} in it as the epoch in which the share x of `epochs` is over."""
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"share"}:
        return int(value["share"] * epochs)
    return {key: _in_epochs(one, epochs) for key, one in value.items()}


def _text(value: Any) -> str:
    return json.dumps(value)  # which is YAML


def open_context(recipe: Recipe) -> RunContext:
    """The surroundings of all runs on a data set: the data set, and its features, computed where they are not kept.

    ValueError for what a run with this recipe would be refused for.
    """
    if recipe.data.cached_views is None:
        raise ValueError(f"{recipe.name} trains through the network: set data.cached_views, and model.train: head")
    for name, stage in recipe.stages.items():
        for has, key, instead in (
            (stage.ema is not None, "ema", "ema=null"),
            (stage.select == "smoothed", "select: smoothed", "select=last"),
        ):
            if has:
                raise ValueError(
                    f"stages.{name}: has {key}, and a row is measured with the last or the best model; set "
                    f"stages.{name}.{instead}"
                )
    context = make_context(recipe, make_accelerator(recipe))
    check_dataset(context)
    check_loaders(context)
    model = new_model(context)
    check_model(context, model)
    return replace(context, features=compute_features(context, model))


def train_head(
    context: RunContext, path: Path, words: Sequence[str], built: BuiltModels | None = None
) -> dict[str, Any]:
    """Train what `words` make of the recipe file `path` on the features of `context`; leaves no files.

    built: the models that earlier runs on these features began with; gets those that are not there.
    Returns "validation" and "test", metrics; "weights", the class weights of the last iteration, None without any;
    "train_s"; and "problem", a sentence where numbers were not finite, else None.
    """
    recipe = load_recipe(path, words)
    context = with_recipe(context, recipe)
    model = _first_model(context, {} if built is None else built)
    evaluation, weights = Evaluation(context), None
    started = time.perf_counter()
    for position, (name, stage_recipe) in enumerate(recipe.stages.items()):
        model = prepare_model(context, model, stage_recipe)
        if position == 0 and recipe.model.head_init is not None:
            init_head(model.head, recipe.model.head_init, partial(evaluation.class_means, model))
        stage = build_stage(context, name, model, training_images=evaluation.training_images)
        if stage.step.needs.first_pass:
            evaluation.first_pass(stage.step)
        weights = _train(stage, evaluation)
    took = time.perf_counter() - started
    adjustment = recipe.stages[STAGE].eval_adjustment
    measured = {
        key: evaluation.evaluate(model, split, adjustment=adjustment)
        for key, split in (("validation", "meta"), ("test", "test"))
    }
    finite = all(metrics["ece"] is not None for metrics in measured.values())
    return {
        **measured,
        "weights": weights if weights is not None and all(map(math.isfinite, weights)) else None,
        "train_s": took,
        "problem": None if finite else "the outputs of the network are not finite",
    }


def _first_model(context: RunContext, built: BuiltModels) -> Classifier:
    """The model that the trainer would begin with, and the state of the generator then; without the backbone."""
    key = context.recipe.seed, repr(context.recipe.model)
    if key not in built:
        # Making a backbone and reading its weights takes a fifth of the time that a short run takes.
        model = new_model(context)
        model.drop_backbone()
        built[key] = model, torch.get_rng_state()
    model, state = built[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def _train(stage: Stage, evaluation: Evaluation) -> list[float] | None:
    """All iterations of a stage; the model is then the stage's, by its `select`. Returns the last class weights."""
    step, loaders = stage.step, stage.loaders
    step.train_mode()
    batches = endless(loaders.train, 0)
    meta_batches = None if loaders.meta is None else endless(loaders.meta, 0)
    iterate, output, best, best_state = None, None, -1.0, None
    for iteration in range(stage.iterations):
        batch, meta_batch = next(batches), None if meta_batches is None else next(meta_batches)
        stage.begin(iteration)
        if iterate is None:
            iterate, _ = ready(step, batch, meta_batch)
        output = iterate(batch, meta_batch)
        done = iteration + 1
        stage.end(done)
        if stage.recipe.select == "best" and (done % stage.evaluate_every == 0 or done == stage.iterations):
            accuracy = evaluation.evaluate(step.model, "meta")["top1"]
            if accuracy >= best:  # of equals the later, as the trainer has it
                best, best_state = accuracy, on_host(trained_state(step.model))
    if best_state is not None:
        load_trained_state(step.model, best_state)
    assert output is not None
    weights = output.per_class.get("weight")
    return None if weights is None else weights.tolist()
