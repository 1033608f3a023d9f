"""The recipe: everything a run is made from, typed, composed and checked before any data is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fastlt.recipe.typed_yaml import RecipeError, apply_override, build, merge, read_yaml, to_tree, typed_by
from fastlt.steps import STEPS, Step
from loaders.order.crop import CropSpec
from loaders.readers.dali_augment import build_dali_augment

LIST_KEYS = ("train_list", "meta_list", "test_list")
SMALL_SOURCES = ("digits", "cifar10", "cifar100")
# Metadata of a key that changes neither the meaning of a run nor its result. A run that goes on may have another value
# than before, and a finished run answers for every value.
HARMLESS = {"harmless": True}


@dataclass(frozen=True)
class StorageRecipe:
    """How images are stored in the converted data set (see `loaders.stored.ffcv_format.FfcvOptions`)."""

    mode: Literal["raw", "jpg", "proportion"] = "raw"
    max_resolution: int | None = None
    jpeg_quality: int = 90


@dataclass(frozen=True)
class DataRecipe:
    """Which images, how they are stored, cropped and augmented.

    root: folder of the source's files; train_list, meta_list, test_list: list files of source `list_file`.
    converted: folder of the converted data set; by default one below `data/`, named after what is asked for.
    convert: false reads the source's own files, with loader auto, resident, torch or dali; nothing is written, and
        every image is decoded once before the run begins.
    imbalance_factor, convention: long-tailed subsampling, see `loaders.order.longtail`.
    shots: more training images than the first number make a class many-shot, fewer than the second few-shot.
    image_size: pixels a side that the network sees.
    train_crop, eval_crop: how a stored image becomes that size; eval_ratio is the side of the central square over the
        shorter side of the image. crop_scale, crop_aspect: range of area and aspect ratio of `random_resized` crops.
    augment: what is done to a training batch on the device; meta_augment: to a meta batch (default: the same).
    second_augment: to the second view of each training image, for methods that have two (default: the same).
    dali_augment: an automatic augmentation by DALI before it, with loader dali or resident_jpeg; see
        `loaders.readers.dali_augment`. Both views of an image get one; meta batches do not where meta_augment is given.
    mean, std: of the pixels in [0, 1], per RGB channel.
    """

    source: Literal["digits", "cifar10", "cifar100", "image_folder", "list_file"]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    root: str | None = field(default=None, metadata=HARMLESS)
    converted: str | None = None
    convert: bool = True
    download: bool = field(default=True, metadata=HARMLESS)
    train_list: str | None = None
    meta_list: str | None = None
    test_list: str | None = None
    num_classes: int | None = None
    imbalance_factor: float | None = None
    convention: Literal["paper", "ldam"] = "paper"
    meta_per_class: int = 10
    shots: tuple[int, int] = (100, 20)
    storage: StorageRecipe = field(default_factory=StorageRecipe)
    loader: Literal["auto", "resident", "resident_jpeg", "ffcv", "torch", "dali"] = "auto"
    num_workers: int | None = field(default=None, metadata=HARMLESS)
    train_crop: Literal["none", "random_resized"] = "none"
    eval_crop: Literal["none", "center"] = "none"
    eval_ratio: float = 224 / 256
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    augment: list[str | dict[str, Any]] = field(default_factory=list)
    meta_augment: list[str | dict[str, Any]] | None = None
    second_augment: list[str | dict[str, Any]] | None = None
    dali_augment: str | dict[str, Any] | None = None


@dataclass(frozen=True)
class ModelRecipe:
    """A timm backbone (ours included) and a head.

    head_scale: what a cosine head multiplies its cosines by, default 30. checkpoint: local file of pretrained weights.
    experts: so many branches for the last two stages of a ResNet, each with a head and of `expert_width` times the
        width; their logits are averaged. None is the plain network. For the methods plain, ride and ride_router.
    """

    name: str
    head: Literal["linear", "cosine"] = "linear"
    head_scale: float | None = None
    pretrained: bool = False
    checkpoint: str | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    experts: int | None = None
    expert_width: float = 0.75


@dataclass(frozen=True)
class AccuracyRecipe:
    """How A_t is kept up to date, see `fastlt.meta.class_accuracy.ClassAccuracy`.

    precision: of the passes that score the meta set; default: the recipe's.
    """

    refresh: Literal["exact", "rolling", "epoch"] = "exact"
    window: int = 10
    batch_size: int = 1024
    precision: Literal["fp32", "bf16"] | None = None


@dataclass(frozen=True)
class StageRecipe:
    """One stage of training. Lengths (`warmup`, `milestones`, `evaluate_every`) are in the unit of the stage's length.

    iterations | epochs: the length; exactly one of them.
    batch_size: over all processes. meta_batch_size: likewise, default `batch_size`.
    method, options: a name of `fastlt.steps.STEPS` and its options. loss, loss_options: of `fastlt.losses.LOSSES`.
    start: the model it starts from: the best of the stage before, or a fresh one as the first stage gets.
    classes: the classes whose images it trains on, by their shots; a part of them only with method expert.
    """

    method: str
    lr: float
    batch_size: int = 128
    iterations: int | None = None
    epochs: int | None = None
    options: Step.Options = field(
        default_factory=Step.Options, metadata=typed_by("method", {name: step.Options for name, step in STEPS.items()})
    )
    start: Literal["previous", "fresh"] = "previous"
    classes: Literal["all", "many", "medium", "few"] = "all"
    loss: str = "cross_entropy"
    loss_options: dict[str, Any] = field(default_factory=dict)
    meta_batch_size: int | None = None
    sampling: Literal["instance", "class_balanced", "effective_number", "class_aware_4"] = "instance"
    accuracy: AccuracyRecipe = field(default_factory=AccuracyRecipe)
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    warmup: float = 0.0
    warmup_from: float = 0.0
    milestones: list[float] = field(default_factory=list)
    gamma: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    evaluate_every: int = 1

    @property
    def length(self) -> int:
        """In the stage's own unit."""
        return self.iterations if self.iterations is not None else self.epochs


@dataclass(frozen=True)
class Recipe:
    """One run. `stages` are trained in the order they are written; a stage set to null is left out.

    resume: auto goes on from the last checkpoint of the run folder, if any; never refuses a folder that holds a run.
    checkpoint_every_s: seconds between checkpoints, besides the one at every evaluation.
    compile: inductor takes the passes of a step through torch.compile, cudagraph captures whole iterations on a CUDA
        device; where the method or the machine does not allow it, the stage says why and goes on without. auto is
        cudagraph on a CUDA device that one process trains on, and none elsewhere.
    sync_batch_norm: with several processes, BatchNorm normalises with the batches of all of them instead of its own.
    num_threads: CPU threads of torch; default: the cores this process may use, shared among processes.
    """

    name: str
    data: DataRecipe
    model: ModelRecipe
    stages: dict[str, StageRecipe]
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: Literal["auto", "none", "inductor", "cudagraph"] = "auto"
    channels_last: bool = True
    sync_batch_norm: bool = False
    runs: str = field(default="runs", metadata=HARMLESS)
    resume: Literal["auto", "never"] = field(default="auto", metadata=HARMLESS)
    log_every: int = field(default=20, metadata=HARMLESS)
    checkpoint_every_s: float = field(default=300.0, metadata=HARMLESS)
    num_threads: int | None = field(default=None, metadata=HARMLESS)
    trackers: list[str] = field(default_factory=list, metadata=HARMLESS)

    @property
    def folder(self) -> Path:
        """Where the run keeps its files."""
        return Path(self.runs) / self.name

    def lineage(self, stage: StageRecipe) -> list[StageRecipe]:
        """The stages that the model of `stage` goes through: from the last that starts afresh up to `stage` itself."""
        line: list[StageRecipe] = []
        for one in self.stages.values():
            line = [one] if one.start == "fresh" else [*line, one]
            if one is stage:
                break
        return line

    def to_yaml(self) -> str:
        """The recipe with every default filled in; read back, it is the same recipe."""
        return yaml.safe_dump(to_tree(self), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, its base files and the override words, and check all of it.

    RecipeError with one line a mistake: the key, its value, what is allowed, and the nearest valid key.
    """
    path = Path(path)
    tree = _compose(path)
    for word in overrides:
        apply_override(tree, word)
    tree.setdefault("name", path.stem)
    if isinstance(tree.get("stages"), dict):
        tree["stages"] = {name: stage for name, stage in tree["stages"].items() if stage is not None}
    if tree.get("precision") == "fp16":
        raise RecipeError(
            "precision: is 'fp16'; allowed: fp32 or bf16. float16 gradients underflow without loss scaling, and those "
            "of the meta-step first, which are products of two of them; set precision=bf16, which has float32's range"
        )
    recipe = build(Recipe, tree)
    mistakes = check(recipe)
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return recipe


def _compose(path: Path) -> dict[str, Any]:
    """The file's own keys on top of those of its `base` files, later bases on top of earlier ones; one level deep."""
    own = read_yaml(path)
    bases = own.pop("base", [])
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise RecipeError(f"base: is {bases!r}; allowed: a list of recipe files, relative to {path.parent}")
    tree: dict[str, Any] = {}
    for base in bases:
        part = read_yaml(path.parent / base)
        if "base" in part:
            raise RecipeError(
                f"{path.parent / base}: has a base of its own; bases go one level deep, name both in {path}"
            )
        tree = merge(tree, part)
    return merge(tree, own)


def check(recipe: Recipe) -> list[str]:
    """What is impossible about a recipe whose types are right: one line a mistake, nothing touched on disk."""
    mistakes = _check_data(recipe.data)
    if not recipe.name or "/" in recipe.name or recipe.name in (".", ".."):
        mistakes.append(f"name: is {recipe.name!r}; it names a folder below {recipe.runs}: no slash, not empty")
    if not recipe.stages:
        mistakes.append("stages: there is none; give at least one stage with method, lr and iterations or epochs")
    for key in ("log_every", "checkpoint_every_s"):
        if getattr(recipe, key) <= 0:
            mistakes.append(f"{key}: is {getattr(recipe, key)}; allowed: a number > 0")
    if recipe.sync_batch_norm and recipe.compile in ("inductor", "cudagraph"):
        mistakes.append(f"compile: is {recipe.compile!r} with sync_batch_norm, whose exchange cannot be; choose one")
    if recipe.num_threads is not None and recipe.num_threads < 1:
        mistakes.append(f"num_threads: is {recipe.num_threads}; allowed: an integer >= 1")
    if recipe.model.checkpoint and not Path(recipe.model.checkpoint).is_file():
        mistakes.append(f"model.checkpoint: {recipe.model.checkpoint} is not a file")
    if recipe.model.checkpoint and recipe.model.pretrained:
        mistakes.append("model.pretrained: is true and model.checkpoint is set; give one source of pretrained weights")
    if recipe.model.head_scale is not None and (recipe.model.head != "cosine" or recipe.model.head_scale <= 0):
        mistakes.append(
            f"model.head_scale: is {recipe.model.head_scale}; allowed: a number > 0, with model.head=cosine"
        )
    if recipe.model.experts is not None and recipe.model.experts < 1:
        mistakes.append(f"model.experts: is {recipe.model.experts}; allowed: an integer >= 1, or null")
    if not 0.5 <= recipe.model.expert_width <= 1:
        mistakes.append(f"model.expert_width: is {recipe.model.expert_width}; allowed: a number from 0.5 to 1")
    mistakes += _check_names(recipe)
    for name, stage in recipe.stages.items():
        mistakes += _check_stage(f"stages.{name}", stage)
        if stage.loss == "ldam":
            mistakes += _check_ldam(f"stages.{name}", stage, recipe.model)
    return mistakes


def _check_ldam(where: str, stage: StageRecipe, model: ModelRecipe) -> list[str]:
    """Its margins are of cosines times a scale: head and loss have to agree on both."""
    if model.head != "cosine":
        return [f"{where}.loss: is 'ldam', whose margins are between cosines; set model.head=cosine"]
    scale, head_scale = stage.loss_options.get("scale", 30.0), model.head_scale or 30.0
    if scale != head_scale:
        return [
            f"{where}.loss_options.scale: is {scale}, but the head multiplies cosines by {head_scale}; "
            f"give both the same: model.head_scale={scale}"
        ]
    return []


def _check_data(data: DataRecipe) -> list[str]:
    mistakes = []
    for key in ("image_size", "meta_per_class"):
        if getattr(data, key) < 1:
            mistakes.append(f"data.{key}: is {getattr(data, key)}; allowed: an integer >= 1")
    if data.imbalance_factor is not None and data.imbalance_factor < 1:
        mistakes.append(
            f"data.imbalance_factor: is {data.imbalance_factor}; allowed: a number >= 1, largest over smallest"
        )
    if data.shots[0] < data.shots[1]:
        mistakes.append(f"data.shots: is {list(data.shots)}; allowed: the upper threshold first, for example [100, 20]")
    if not data.convert and data.converted is not None:
        mistakes.append("data.convert: is false, but data.converted names a folder; leave one of the two out")
    if not data.convert and data.loader in ("ffcv", "resident_jpeg"):
        mistakes.append(
            f"data.convert: is false, but data.loader {data.loader!r} reads converted data sets; allowed with it: "
            "auto, resident, torch, dali"
        )
    if data.dali_augment is not None:
        mistakes += _check_dali_augment(data)
    mistakes += _check_crops(data)
    if data.num_workers is not None and data.num_workers < (0 if data.loader == "torch" else 1):
        mistakes.append(
            f"data.num_workers: is {data.num_workers}; allowed: an integer >= 1, null for all cores, or 0 with "
            "data.loader torch, which then reads in the main process"
        )
    lists = [key for key in LIST_KEYS if getattr(data, key)]
    if data.source != "list_file" and lists:
        mistakes.append(f"data.{lists[0]}: is set, but data.source is {data.source!r}; list files go with list_file")
    if data.convention == "ldam" and data.source not in ("cifar10", "cifar100"):
        mistakes.append(f"data.convention: is 'ldam', which is defined for cifar10 and cifar100, not for {data.source}")
    for key in lists:
        if not Path(getattr(data, key)).is_file():
            mistakes.append(f"data.{key}: {getattr(data, key)} is not a file")
    if data.root is not None and not Path(data.root).is_dir() and data.source not in SMALL_SOURCES:
        mistakes.append(f"data.root: {data.root} is not a folder")
    return mistakes


def _check_crops(data: DataRecipe) -> list[str]:
    size = max(data.image_size, 1)  # reported by itself
    crops = {
        "eval_ratio": lambda: CropSpec("center", size, ratio=data.eval_ratio),
        "crop_scale": lambda: CropSpec("random_resized", size, scale=data.crop_scale),
        "crop_aspect": lambda: CropSpec("random_resized", size, aspect=data.crop_aspect),
    }
    mistakes = []
    for key, make in crops.items():
        try:
            make()
        except ValueError as error:
            mistakes.append(f"data.{key}: {error}")
    return mistakes


def _check_dali_augment(data: DataRecipe) -> list[str]:
    try:
        build_dali_augment(data.dali_augment)
    except ValueError as error:
        return [f"data.dali_augment: {error}"]
    if data.loader not in ("dali", "resident_jpeg"):
        return [f"data.dali_augment: is set, but data.loader is {data.loader!r}; it needs dali or resident_jpeg"]
    names = [spec if isinstance(spec, str) else next(iter(spec), "") for spec in data.augment]
    twice = [name for name in names if name in ("auto_augment", "rand_augment")]
    if twice:
        return [f"data.dali_augment: is set and data.augment has {twice[0]}; leave one of the two out"]
    return []


def _check_names(recipe: Recipe) -> list[str]:
    """Names and options that live in the tables of other modules, imported late: reading a recipe stays light."""
    from fastlt.augment import check_augment, check_mean, check_std
    from fastlt.losses import LOSSES, check_loss
    from fastlt.models import check_model

    checks = [("model.name", lambda: check_model(recipe.model.name, recipe.model.pretrained, recipe.model.experts))]
    checks.append(("data.mean", lambda: check_mean(recipe.data.mean)))
    checks.append(("data.std", lambda: check_std(recipe.data.std)))
    for key in ("augment", "meta_augment", "second_augment"):
        specs = getattr(recipe.data, key) or []
        checks.append((f"data.{key}", lambda specs=specs: check_augment(specs, recipe.data.image_size)))
    for name, stage in recipe.stages.items():
        where = f"stages.{name}"
        checks.append((f"{where}.loss", lambda s=stage: check_loss(s.loss, s.loss_options)))
    mistakes = []
    for where, run in checks:
        try:
            run()
        except ValueError as error:
            mistakes.append(f"{where}: {error}")
    methods = [STEPS[s.method] for s in recipe.stages.values()]
    if recipe.data.second_augment is not None and not any(m.needs.second_view for m in methods):
        able = ", ".join(name for name, step in STEPS.items() if step.needs.second_view)
        mistakes.append(
            "data.second_augment: is set, but no stage looks at an image twice; leave it out, or take a method that "
            f"does: {able}"
        )
    for name, stage in recipe.stages.items():
        if stage.sampling != "instance" and stage.loss in LOSSES and LOSSES[stage.loss].corrects_prior:
            mistakes.append(
                f"stages.{name}.loss: is {stage.loss!r} with sampling {stage.sampling!r}: the loss makes up for class "
                "frequencies that such batches do not have. Set sampling: instance, or loss: cross_entropy"
            )
        mistakes += [f"stages.{name}.{m}" for m in STEPS[stage.method].check_stage(stage, recipe)]
        if recipe.model.experts is not None and not STEPS[stage.method].allows.experts:
            able = ", ".join(method for method, step in STEPS.items() if step.allows.experts)
            mistakes.append(
                f"stages.{name}.method: is {stage.method!r}, which trains one network with one head, but model.experts "
                f"is {recipe.model.experts}; leave model.experts out, or take a method of {able}"
            )
        if stage.classes != "all" and not STEPS[stage.method].allows.some_classes:
            mistakes.append(
                f"stages.{name}.classes: is {stage.classes!r}, but method {stage.method!r} is for all classes at once; "
                "leave it out, or take method expert"
            )
        first = len(recipe.lineage(stage)) == 1
        if first and STEPS[stage.method].needs.trained_model and not recipe.model.checkpoint:
            mistakes.append(
                f"stages.{name}.method: is {stage.method!r} without a stage before it; it continues a trained model. "
                "Put the stage that trains one first and start from it (start: previous), or give its weights as "
                "model.checkpoint=FILE"
            )
    return mistakes


def _check_stage(where: str, stage: StageRecipe) -> list[str]:
    mistakes = []
    if (stage.iterations is None) == (stage.epochs is None):
        both = "neither is" if stage.iterations is None else "both are"
        return [f"{where}: {both} given of iterations and epochs; give exactly one, it is the length of the stage"]
    for key in ("length", "batch_size", "evaluate_every", "lr", "gamma"):
        if getattr(stage, key) <= 0:
            mistakes.append(f"{where}.{key}: is {getattr(stage, key)}; allowed: a number > 0")
    for key in ("weight_decay", "warmup", "warmup_from"):
        if getattr(stage, key) < 0:
            mistakes.append(f"{where}.{key}: is {getattr(stage, key)}; allowed: a number >= 0")
    if not 0 <= stage.momentum < 1:
        mistakes.append(f"{where}.momentum: is {stage.momentum}; allowed: a number in [0, 1)")
    if stage.nesterov and stage.momentum == 0:
        mistakes.append(f"{where}.nesterov: is true, but momentum is 0; Nesterov's step needs momentum > 0")
    if stage.sampling == "class_aware_4" and stage.batch_size % 4:
        mistakes.append(
            f"{where}.batch_size: is {stage.batch_size} with sampling class_aware_4, which fills batches with groups "
            "of 4 images of a class; allowed: a multiple of 4 for each process"
        )
    if stage.meta_batch_size is not None and stage.meta_batch_size < 1:
        mistakes.append(f"{where}.meta_batch_size: is {stage.meta_batch_size}; allowed: an integer >= 1")
    for key in ("window", "batch_size"):
        if getattr(stage.accuracy, key) < 1:
            mistakes.append(f"{where}.accuracy.{key}: is {getattr(stage.accuracy, key)}; allowed: an integer >= 1")
    if stage.warmup >= stage.length:
        mistakes.append(
            f"{where}.warmup: is {stage.warmup}; allowed: less than the length of the stage, {stage.length}"
        )
    if (stage.schedule == "multistep") != bool(stage.milestones):
        mistakes.append(
            f"{where}.milestones: is {stage.milestones} with schedule {stage.schedule!r}; "
            "multistep needs milestones, and no other schedule takes them"
        )
    elif stage.milestones != sorted(stage.milestones) or any(not 0 < m < stage.length for m in stage.milestones):
        mistakes.append(f"{where}.milestones: is {stage.milestones}; allowed: ascending, between 0 and {stage.length}")
    return mistakes


def differences(one: Recipe, other: Recipe) -> list[str]:
    """The keys in which two recipes differ, each with both values; harmless keys are left out."""
    a, b = _values(one), _values(other)
    return [f"{k}: {a.get(k)!r} and {b.get(k)!r}" for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]


def is_harmless(key: Field[Any]) -> bool:
    """Whether the key of a recipe changes neither the meaning of a run nor its result."""
    return key.metadata.get("harmless", False)


def _values(part: Any, prefix: str = "") -> dict[str, Any]:
    """The value of every key below a part of a recipe, by the dotted name of the key, without the harmless ones."""
    if is_dataclass(part):
        below = {f.name: getattr(part, f.name) for f in fields(part) if not is_harmless(f)}
    elif isinstance(part, dict) and part:
        below = part
    else:
        return {prefix: to_tree(part)}
    return {
        k: v for name, sub in below.items() for k, v in _values(sub, f"{prefix}.{name}" if prefix else name).items()
    }
