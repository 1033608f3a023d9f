"""What the network of a recipe refuses: found by trying it, before anything is trained."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastlt.meta.per_sample import Trial, try_network
from fastlt.models import Classifier
from fastlt.models.adapters import idle_adapters
from fastlt.models.trained_part import has_batch_norm
from fastlt.models.weight_files import first_few
from fastlt.optim import check_layer_decay, check_lr_factors
from fastlt.recipe import Recipe, StageRecipe
from fastlt.steps import STEPS
from fastlt.steps.meta import MetaStep, meta_cross_entropy


def check_network(recipe: Recipe, model: Classifier, processes: int = 1) -> None:
    """ValueError for images, options and batches of a recipe that its network cannot take. Leaves `model` as it was.

    processes: among which batches are divided.
    """
    _check_image_size(recipe, model)
    for name, stage in recipe.stages.items():
        try:
            STEPS[stage.method].check_model(model, stage.options)
        except ValueError as error:
            raise ValueError(f"stages.{name}.options: {error}") from None
        try:
            if stage.layer_decay is not None:
                check_layer_decay(model, recipe.model.name)
            if stage.lr_factors:
                check_lr_factors(_prepared(recipe, stage, model), stage.lr_factors)
        except ValueError as error:
            raise ValueError(f"stages.{name}.{error}") from None
        _check_single_images(recipe, name, stage, model, processes)


def advice_on_network(recipe: Recipe, model: Classifier) -> list[str]:
    """What the user is told about a network of which a part is trained: keys that change nothing, or bring little."""
    asked, lines = recipe.model, []
    if asked.norm == "frozen" and not has_batch_norm(model.backbone):
        lines.append(f"model.norm: frozen changes nothing, {asked.name} has no BatchNorm")
    if model.frozen and not asked.pretrained and asked.checkpoint is None:
        lines.append(
            f"model.train: a part of {asked.name} stays as it is, with random weights; give model.pretrained=true or "
            "model.checkpoint=FILE"
        )
    return lines


def meta_steps(recipe: Recipe, model: Classifier) -> list[str]:
    """How each stage with a meta-gradient takes it, and why: a line a stage. Tries the network; leaves it as it was."""
    lines = []
    for name, stage in recipe.stages.items():
        kind = STEPS[stage.method]
        if not issubclass(kind, MetaStep):
            continue
        if not kind.takes_meta_batches(stage.options):
            lines.append(f"stages.{name}: meta-gradient: none is taken, options.meta_weight is 0")
            continue
        float32_tangent = recipe.precision != "fp32" and getattr(stage.options, "tangent", None) == "fp32"
        reason = kind.why_general(recipe.compile == "inductor", float32_tangent)
        if stage.accumulate > 1:
            reason = f"micro-batches (accumulate {stage.accumulate}) keep nothing for later"
        reason = reason or _trial(recipe, stage, model).refused
        way = "one backward pass keeps the gradients of all samples"
        if reason is not None:
            way = f"lookahead, tangent and update take passes of their own, since {reason}"
        lines.append(f"stages.{name}: meta-gradient: {way}")
    return lines


def _trial(recipe: Recipe, stage: StageRecipe, model: Classifier) -> Trial:
    tried = _prepared(recipe, stage, model)
    like = next(tried.parameters())
    size, memory_format = recipe.data.image_size, recipe.memory_format
    image = torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device).contiguous(memory_format=memory_format)
    return try_network(tried.to(memory_format=memory_format), meta_cross_entropy, image, tried.head.out_features)


def _prepared(recipe: Recipe, stage: StageRecipe, model: Classifier) -> Classifier:
    """A copy of `model` as a stage trains it."""
    copied = copy.deepcopy(model)
    for before in recipe.lineage(stage):
        STEPS[before.method].prepare_model(copied, before.options, seed=recipe.seed)
    STEPS[stage.method].set_train_mode(copied, stage.options)
    return copied


def _check_image_size(recipe: Recipe, model: Classifier) -> None:
    """One pass of a blank image in eval mode, which changes nothing in the network."""
    try:
        idle = idle_adapters(model, lambda: _pass(model, model.training, recipe.data.image_size))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"data.image_size: is {recipe.data.image_size}, which {recipe.model.name} cannot take ({reason}); "
            "give the size that it is made for, or another model.name"
        ) from None
    if idle:
        raise ValueError(
            f"model.adapt: {recipe.model.name} takes the weights of {first_few(idle)} by hand, so an adapter there "
            "does nothing; give other targets"
        )


def _pass(model: Classifier, back_to: bool, size: int) -> None:
    like = next(model.parameters())
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device))
    finally:
        model.train(back_to)


def _check_single_images(recipe: Recipe, name: str, stage: StageRecipe, model: Classifier, processes: int) -> None:
    """ValueError for batches of one image a process where BatchNorm would have to take the variance of one value."""
    sizes = {"batch_size": stage.batch_size}
    if STEPS[stage.method].takes_meta_batches(stage.options):
        sizes["meta_batch_size"] = stage.meta_batch_size or stage.batch_size
    single = [key for key, size in sizes.items() if size // processes // stage.accumulate == 1]
    if not single or (recipe.sync_batch_norm and processes > 1):
        return
    tried = _prepared(recipe, stage, model).to("meta")  # shapes without values: as fast for a large network
    try:
        image = torch.empty(1, 3, recipe.data.image_size, recipe.data.image_size, device="meta")
        features = tried.features(image)
        if isinstance(getattr(tried, "auxiliary", None), nn.Module) and _normalises(tried.auxiliary):
            tried.auxiliary(features)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            return  # no matter of BatchNorm: whatever it is, the first iteration says so
        share = "one image" if processes == 1 else "one image a process"
        raise ValueError(
            f"stages.{name}.{single[0]}: is {sizes[single[0]]}, {share}, of which BatchNorm cannot take the variance "
            f"in {recipe.model.name} with data.image_size {recipe.data.image_size}; give {2 * processes} or more"
        ) from None
    except (RuntimeError, NotImplementedError):
        return  # an operation that needs values


def _normalises(module: nn.Module) -> bool:
    return any(isinstance(part, nn.BatchNorm1d) for part in module.modules())
