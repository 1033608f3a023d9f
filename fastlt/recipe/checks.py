"""Every check of a recipe that needs no data: one small function a subject, all of them in two tables.

A check yields one line a mistake: the key, its value, what is allowed and what to do. It reads nothing but the recipe
and whether the files that the recipe names exist. Types and unknown keys are refused before, by `typed_yaml`; what only
the data, the network or the machine can tell is refused when the run begins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fastlt.augment import check_augment, check_mean, check_std
from fastlt.losses import LOSSES, check_loss
from fastlt.models import check_model
from fastlt.models.adapters import read_adapter
from fastlt.models.head_init import NAMES, UNIFORM_PRIOR, ZEROS
from fastlt.names import shortened
from fastlt.optim import check_optimizer
from fastlt.recipe.schema import FILE_KEYS, Recipe, StageRecipe
from fastlt.state import ShotRanks
from fastlt.steps import STEPS, Step
from fastlt.steps.decoupled import CrtStep
from loaders.order.crop import CropSpec
from loaders.readers import AUTO, backends_that
from loaders.readers.dali_augment import build_dali_augment
from loaders.sources import SOURCES, sources_taking
from loaders.sources.cut import check_split
from loaders.stored.remote_folder import check_url, is_url

LONGEST_NAME = 200  # bytes; file systems have room for 255, and files of a run add to the name
FILE_NAME = f"printable, no slash, not empty, at most {LONGEST_NAME} bytes"


def check(recipe: Recipe) -> list[str]:
    """Everything that is impossible about a recipe whose types are right: one line a mistake."""
    mistakes = [mistake for check_one in CHECKS for mistake in check_one(recipe)]
    for name, stage in recipe.stages.items():
        for check_one in STAGE_CHECKS:
            mistakes += [f"stages.{name}{_joint(mistake)}" for mistake in check_one(stage, recipe)]
    return mistakes


def _joint(mistake: str) -> str:
    """The line behind the name of its stage: after a dot where it begins with a key."""
    return mistake if mistake.startswith(":") else f".{mistake}"


def refused(key: str, call: Callable[[], object]) -> Iterator[str]:
    """The message of the ValueError by which `call` refuses the value of `key`, if it does."""
    try:
        call()
    except ValueError as error:
        yield f"{key}: {error}"


def methods_that(accept: Callable[[type[Step]], bool]) -> str:
    """The names of the methods that a property holds for."""
    return ", ".join(name for name, step in STEPS.items() if accept(step))


# The data


def long_tail(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if not isinstance(data.shots, ShotRanks) and data.shots[0] < data.shots[1]:
        yield f"data.shots: is {list(data.shots)}; allowed: the upper threshold first, for example [100, 20]"
    able = sources_taking("convention")
    if data.convention == "ldam" and data.source not in able:
        yield f"data.convention: is 'ldam', which is defined for {' and '.join(able)}, not for {data.source}"


def conversion(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data.convert:
        return
    if data.converted is not None:
        yield "data.convert: is false, but data.converted names a folder; leave one of the two out"
    able = [AUTO, *backends_that(lambda backend: not backend.needs_conversion)]
    if data.loader not in able:
        yield (
            f"data.convert: is false, but data.loader {data.loader!r} reads converted data sets; allowed with it: "
            f"{', '.join(able)}"
        )


def remote(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data.converted is None or not is_url(data.converted):
        return
    yield from refused("data.converted", lambda: check_url(str(data.converted)))
    able = [AUTO, *backends_that(lambda backend: backend.remote)]
    if data.loader not in able:
        yield (
            f"data.loader: is {data.loader!r}, which reads data sets that are on the disk as a whole, but "
            f"data.converted is a URL; allowed with it: {', '.join(able)}"
        )
    if data.order != "shards":
        yield (
            f"data.order: is {data.order!r}, which needs all images at any time, but data.converted is a URL; set "
            "data.order: shards, or copy the data set to this machine"
        )


def order(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data.order != "shards":
        return
    able = [AUTO, *backends_that(lambda backend: "dali" in backend.reads)]
    if not data.convert:
        yield "data.order: is 'shards', but data.convert is false, and a source has none; leave one of the two out"
    elif data.loader not in able:
        yield (
            f"data.order: is 'shards', which data.loader {data.loader!r} does not read; allowed with it: "
            f"{', '.join(able)}"
        )


def crops(recipe: Recipe) -> Iterator[str]:
    data, size = recipe.data, recipe.data.image_size
    yield from refused("data.crop_scale", lambda: CropSpec("random_resized", size, scale=data.crop_scale))
    yield from refused("data.crop_aspect", lambda: CropSpec("random_resized", size, aspect=data.crop_aspect))


def test_crops(recipe: Recipe) -> Iterator[str]:
    if recipe.data.test_crops > 1 and recipe.data.eval_crop != "center":
        yield (
            f"data.test_crops: is {recipe.data.test_crops} with data.eval_crop {recipe.data.eval_crop!r}, which leaves "
            "stored images as they are; set data.eval_crop: center"
        )


def augmentations(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    for key, specs in (
        ("augment", data.augment),
        ("meta_augment", data.meta_augment),
        ("second_augment", data.second_augment),
    ):
        yield from refused(f"data.{key}", lambda specs=specs: check_augment(specs or [], data.image_size))


def dali_augmentation(recipe: Recipe) -> Iterator[str]:
    data, spec = recipe.data, recipe.data.dali_augment
    if spec is None:
        return
    mistakes = list(refused("data.dali_augment", lambda: build_dali_augment(spec)))
    able = backends_that(lambda backend: backend.can_augment)
    names = [one if isinstance(one, str) else next(iter(one), "") for one in data.augment]
    twice = [name for name in names if name in ("auto_augment", "rand_augment")]
    if mistakes:
        yield from mistakes
    elif data.loader not in able:
        yield f"data.dali_augment: is set, but data.loader is {data.loader!r}; it needs {' or '.join(able)}"
    elif twice:
        yield f"data.dali_augment: is set and data.augment has {twice[0]}; leave one of the two out"


def second_view(recipe: Recipe) -> Iterator[str]:
    methods = [STEPS[stage.method] for stage in recipe.stages.values()]
    if recipe.data.second_augment is not None and not any(method.needs.second_view for method in methods):
        able = methods_that(lambda step: step.needs.second_view)
        yield (
            "data.second_augment: is set, but no stage looks at an image twice; leave it out, or take a method that "
            f"does: {able}"
        )


def normalisation(recipe: Recipe) -> Iterator[str]:
    yield from refused("data.mean", lambda: check_mean(recipe.data.mean))
    yield from refused("data.std", lambda: check_std(recipe.data.std))


def workers(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    without = backends_that(lambda backend: backend.fewest_workers == 0)
    if data.num_workers is not None and data.num_workers < (0 if data.loader in without else 1):
        yield (
            f"data.num_workers: is {data.num_workers}; allowed: an integer >= 1, null for all cores, or 0 with "
            f"data.loader {' or '.join(without)}, which then reads in the main process"
        )


def files(recipe: Recipe) -> Iterator[str]:
    data, takes = recipe.data, SOURCES[recipe.data.source].takes
    for key in (*FILE_KEYS, "image_column", "label_column", "split_column", "split", "split_seed"):
        if getattr(data, key) and key not in takes:
            able = " and ".join(sources_taking(key))
            yield f"data.{key}: is set, but data.source is {data.source!r}; it goes with {able}"
    split = data.split
    if split is not None:
        yield from refused("data.split", lambda: check_split(split))
    if not data.convert:
        for key in ("root", "train_list"):
            if key in takes and getattr(data, key) is None:
                yield f"data.{key}: is not set; data.source {data.source!r} without conversion reads the images by it"
    for key in FILE_KEYS:
        if key in takes and getattr(data, key) and not Path(getattr(data, key)).is_file():
            yield f"data.{key}: {getattr(data, key)} is not a file"
    if data.root is not None and not Path(data.root).is_dir() and not SOURCES[data.source].small:
        yield f"data.root: {data.root} is not a folder"


# The network


def weights(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model.checkpoint and not Path(model.checkpoint).is_file():
        yield f"model.checkpoint: {model.checkpoint} is not a file"
    if model.checkpoint and model.pretrained:
        yield "model.pretrained: is true and model.checkpoint is set; give one source of pretrained weights"


def backbone(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    yield from refused("model.name", lambda: check_model(model.name, model.pretrained, model.experts))


def head(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model.head_scale is not None and model.head != "cosine":
        yield f"model.head_scale: is {model.head_scale}, which belongs to model.head cosine; leave one of the two out"
    if model.head_init == ZEROS and model.head == "cosine":
        yield "model.head_init: is zeros with model.head cosine, and zero has no direction; take class_mean"
    elif model.head_init == UNIFORM_PRIOR and model.head == "cosine":
        yield "model.head_init: is uniform_prior with model.head cosine, which has no bias; take class_mean"
    elif model.head_init not in (None, *NAMES) and not Path(model.head_init).is_file():
        yield (
            f"model.head_init: {model.head_init} is not a file; give {', '.join(NAMES)}, or a file of one row a class"
        )
    if model.head_init is not None and model.experts is not None:
        yield "model.head_init: is set with model.experts, which have a head each; leave one of the two out"


def trained_part(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if isinstance(model.train, list) and not model.train:
        yield "model.train: is []; name modules or parameters of the backbone, or take head for none of them"
    if model.experts is not None and not model.trains_all:
        yield (
            "model.experts: is set, and a part of the network is to stay (model.train, model.norm, model.adapt); "
            "experts begin with random weights and are trained whole: leave one of the two out"
        )
    adapt = model.adapt
    if adapt is not None:
        yield from refused("model.adapt", lambda: read_adapter(adapt))


# The run


def names(recipe: Recipe) -> Iterator[str]:
    if not _names_a_file(recipe.name):
        yield f"name: is {shortened(recipe.name)}; it names a folder below {recipe.runs}: {FILE_NAME}"
    for name in recipe.stages:
        if not _names_a_file(name):
            yield f"stages: one is called {shortened(name)}; it names the files of its checkpoints: {FILE_NAME}"


def _names_a_file(name: str) -> bool:
    fits = 0 < len(os.fsencode(name)) <= LONGEST_NAME
    text = os.fsencode(name).decode(errors="replace")  # a name need not be text
    return fits and "/" not in name and name not in (".", "..") and text.isprintable()


def stages(recipe: Recipe) -> Iterator[str]:
    if not recipe.stages:
        yield "stages: there is none; give at least one stage with method, lr and iterations or epochs"


def machine(recipe: Recipe) -> Iterator[str]:
    if recipe.sync_batch_norm and recipe.compile in ("inductor", "cudagraph", "replay"):
        yield f"compile: is {recipe.compile!r} with sync_batch_norm, whose exchange cannot be; choose one"


# A stage: the key in a line is one of the stage's, and `check` puts the name of the stage before it.


def length(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    if not stage.has_length:
        both = "neither is" if stage.iterations is None else "both are"
        yield f": {both} given of iterations and epochs; give exactly one, it is the length of the stage"


def optimizer(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    if stage.nesterov and stage.momentum == 0:
        yield "nesterov: is true, but momentum is 0; Nesterov's step needs momentum > 0"
        return
    try:
        check_optimizer(
            stage.optimizer,
            stage.optimizer_options,
            momentum=stage.momentum,
            nesterov=stage.nesterov,
            weight_decay=stage.weight_decay,
        )
    except ValueError as error:
        yield str(error)


def schedule(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    if stage.min_lr and stage.schedule != "cosine":
        yield f"min_lr: is {stage.min_lr} with schedule {stage.schedule!r}; it is where schedule cosine ends"
    elif stage.min_lr > stage.lr:
        yield f"min_lr: is {stage.min_lr}; allowed: not above lr, {stage.lr}"
    if not stage.has_length:
        return
    if stage.warmup >= stage.length:
        yield f"warmup: is {stage.warmup}; allowed: less than the length of the stage, {stage.length}; set both"
    if (stage.schedule == "multistep") != bool(stage.milestones):
        yield (
            f"milestones: is {stage.milestones} with schedule {stage.schedule!r}; "
            "multistep needs milestones, and no other schedule takes them"
        )
    elif stage.milestones != sorted(stage.milestones) or any(not 0 < m < stage.length for m in stage.milestones):
        yield f"milestones: is {stage.milestones}; allowed: ascending, between 0 and {stage.length}"


def _makes_up_for_frequencies(stage: StageRecipe) -> bool:
    return stage.loss in LOSSES and LOSSES[stage.loss].makes_up_for_frequencies(stage.loss_options)


def sampling(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    if stage.sampling == "class_aware_4" and stage.batch_size % 4:
        yield (
            f"batch_size: is {stage.batch_size} with sampling class_aware_4, which fills batches with groups "
            "of 4 images of a class; allowed: a multiple of 4 for each process"
        )
    if stage.sampling != "instance" and _makes_up_for_frequencies(stage):
        yield (
            f"loss: is {stage.loss!r} with sampling {stage.sampling!r}: the loss makes up for class "
            "frequencies that such batches do not have. Set sampling: instance, or loss: cross_entropy"
        )


def sampling_by_shards(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data.order != "shards":
        return
    if stage.sampling != "instance" and data.cached_views is None:
        yield (
            f"sampling: is {stage.sampling!r}, which takes images of any class at any time, but data.order is 'shards' "
            "and has a few shards at hand; set sampling: instance, with a loss or method for the long tail, or train "
            "on a local copy with data.order: images"
        )
    if data.stream.parts > stage.batch_size:
        yield (
            f"batch_size: is {stage.batch_size}, but each of {data.stream.parts} data.stream.parts has a place in "
            f"every batch; set data.stream.parts to {stage.batch_size} or fewer"
        )


def loss(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    yield from refused("loss", lambda: check_loss(stage.loss, stage.loss_options))


def ldam(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    """Its margins are of cosines times a scale: head and loss have to agree on both."""
    if stage.loss != "ldam":
        return
    scale, head_scale = stage.loss_options.get("scale", 30.0), recipe.model.head_scale or 30.0
    if recipe.model.head != "cosine":
        yield "loss: is 'ldam', whose margins are between cosines; set model.head=cosine"
    elif scale != head_scale:
        yield (
            f"loss_options.scale: is {scale}, but the head multiplies cosines by {head_scale}; "
            f"give both the same: model.head_scale={scale}"
        )


def method(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    """The checks that the method itself has."""
    yield from STEPS[stage.method].check_stage(stage.options, stage, recipe)


def allowed_by_method(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    allows = STEPS[stage.method].allows
    if recipe.model.experts is not None and not allows.experts:
        yield (
            f"method: is {stage.method!r}, which trains one network with one head, but model.experts "
            f"is {recipe.model.experts}; leave model.experts out, or take a method of "
            f"{methods_that(lambda step: step.allows.experts)}"
        )
    if stage.classes != "all" and not allows.some_classes:
        yield (
            f"classes: is {stage.classes!r}, but method {stage.method!r} is for all classes at once; "
            f"leave it out, or take method {methods_that(lambda step: step.allows.some_classes)}"
        )


def accumulation(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    parts, kind = stage.accumulate, STEPS[stage.method]
    if parts == 1:
        return
    if not kind.allows.accumulation:
        yield (
            f"accumulate: is {parts}, but method {stage.method!r} takes a batch as a whole; leave it out, or take a "
            f"method of {methods_that(lambda step: step.allows.accumulation)}"
        )
        return
    sizes = {"batch_size": stage.batch_size}
    if kind.takes_meta_batches(stage.options) and stage.meta_batch_size is not None:
        sizes["meta_batch_size"] = stage.meta_batch_size
    for key, size in sizes.items():
        if size % parts:
            yield f"accumulate: is {parts}, but {key} {size} does not divide into so many; give a divisor of {size}"
    if stage.loss in LOSSES and LOSSES[stage.loss].draws:
        yield f"accumulate: is {parts} with loss {stage.loss!r}, which draws for a batch as a whole; set accumulate: 1"


def scoring(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    accuracy = stage.accuracy
    if accuracy.images_per_step is not None and accuracy.refresh != "rolling":
        yield (
            f"accuracy.images_per_step: is {accuracy.images_per_step} with refresh {accuracy.refresh!r}, which scores "
            "the whole meta set at once; set accuracy.refresh: rolling, or leave it out"
        )


def averaging(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    if stage.ema is not None and not STEPS[stage.method].allows.ema:
        yield (
            f"ema: is set, but method {stage.method!r} has no use for it: tau_norm takes no steps, and paco keeps a "
            "moving average of its own; leave it out"
        )


def adjustment(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    if stage.eval_adjustment is None:
        return
    if _makes_up_for_frequencies(stage):
        yield (
            f"eval_adjustment: is {stage.eval_adjustment} with loss {stage.loss!r}, which makes up for class "
            "frequencies in training: together they do it twice. Leave it out, or set loss: cross_entropy"
        )
    elif stage.sampling != "instance":
        yield (
            f"eval_adjustment: is {stage.eval_adjustment} with sampling {stage.sampling!r}, under which the network "
            "does not learn the class frequencies that it takes off; leave it out"
        )
    elif STEPS[stage.method].logits_prior.origin in ("weighted", "uniform"):
        yield (
            f"eval_adjustment: is {stage.eval_adjustment} with method {stage.method!r}, which moves the logits away "
            "from the class frequencies that it takes off; leave it out"
        )


def trained_part_of_method(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    if not recipe.model.trains_all and not STEPS[stage.method].allows.trained_part:
        yield (
            f"method: is {stage.method!r}, which trains the whole network, but model.train is {recipe.model.train!r}, "
            f"model.norm {recipe.model.norm!r} and model.adapt {recipe.model.adapt!r}; leave them out, or take another "
            "method"
        )


def cached_views(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if recipe.data.cached_views is None:
        return
    if model.train != "head" or model.norm == "train" or model.adapt is not None:
        yield (
            "data.cached_views: is set, but the backbone's features change while it is trained; set model.train: head "
            "and model.norm and model.adapt to null, or leave data.cached_views out"
        )
    if recipe.data.test_crops > 1:
        yield (
            f"data.test_crops: is {recipe.data.test_crops}; with data.cached_views features of one crop are tested: "
            "leave one of the two out"
        )
    if model.drop_path_rate > 0:
        yield "data.cached_views: is set, and features are computed once without model.drop_path_rate; leave it out"
    if not model.pretrained and model.checkpoint is None:
        yield (
            "data.cached_views: is set, but the backbone has random weights; give model.pretrained or model.checkpoint"
        )


def cached_views_of_method(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    if recipe.data.cached_views is not None and not STEPS[stage.method].allows.features:
        yield (
            f"method: is {stage.method!r}, which needs the images, but data.cached_views is "
            f"{recipe.data.cached_views}; leave it out, or take another method"
        )


def behind_an_expert(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    # A new head, which knows all classes, may have come in between.
    before = reversed(recipe.lineage(stage)[:-1])
    head = next((one for one in before if one.method == "expert" or issubclass(STEPS[one.method], CrtStep)), None)
    of_a_part = head is not None and head.method == "expert" and head.classes != "all"
    if of_a_part and not issubclass(STEPS[stage.method], CrtStep):
        yield (
            "start: is 'previous' behind an expert, whose head knows a part of the classes; set start: fresh, or take "
            f"method {methods_that(lambda step: issubclass(step, CrtStep))}, with a new head"
        )


def needed_by_method(stage: StageRecipe, recipe: Recipe) -> Iterator[str]:
    first = len(recipe.lineage(stage)) == 1
    if first and STEPS[stage.method].needs.trained_model and not recipe.model.checkpoint:
        yield (
            f"method: is {stage.method!r} without a stage before it; it continues a trained model. "
            "Put the stage that trains one first and start from it (start: previous), or give its weights as "
            "model.checkpoint=FILE"
        )
    if first and STEPS[stage.method].needs.trained_head and recipe.model.head_init is not None:
        yield (
            f"method: is {stage.method!r}, which goes on from a trained head, but model.head_init is "
            f"{recipe.model.head_init!r}; leave one of the two out"
        )


CHECKS: tuple[Callable[[Recipe], Iterator[str]], ...] = (
    long_tail,
    conversion,
    remote,
    order,
    dali_augmentation,
    crops,
    test_crops,
    workers,
    files,
    names,
    stages,
    machine,
    weights,
    head,
    backbone,
    trained_part,
    cached_views,
    normalisation,
    augmentations,
    second_view,
)
STAGE_CHECKS: tuple[Callable[[StageRecipe, Recipe], Iterator[str]], ...] = (
    loss,
    method,
    allowed_by_method,
    accumulation,
    scoring,
    averaging,
    adjustment,
    trained_part_of_method,
    cached_views_of_method,
    behind_an_expert,
    needed_by_method,
    length,
    optimizer,
    sampling,
    sampling_by_shards,
    schedule,
    ldam,
)
