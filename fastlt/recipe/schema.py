"""The keys of a recipe: their types, their defaults, and the values that follow from them.

Every key has its sentence in the docstring of its class, one key a line: docs/recipes.md is made of these sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastlt.arguments import MOST_WORKERS
from fastlt.optim import Clip, Ema
from fastlt.paths import PATH
from fastlt.ranges import above, at_least, within
from fastlt.recipe.yaml_text import dump
from fastlt.state import ShotRanks
from fastlt.steps import STEPS, StepOptions
from fastlt.steps.settings import StageSettings
from fastlt.typed_yaml import build, one_of, to_tree, typed_by
from loaders.readers import AUTO, BACKENDS
from loaders.sources import SOURCES

FILE_KEYS = ("train_list", "meta_list", "test_list", "class_names")
# Which images a data set has, beside its source and where that lies.
CHOICE_KEYS = (
    *FILE_KEYS,
    *("image_column", "label_column", "split_column", "split", "split_seed"),
    *("imbalance_factor", "convention", "meta_per_class"),
)
SIDE = within(1, 65535)  # pixels; JPEG has no larger images
LARGEST_SEED = 2**32 - 1  # of NumPy
# Metadata of a key whose value a run that goes on may change: the name of its rule in `fastlt.recipe.resuming`. A key
# without it keeps its value. Harmless keys change neither the meaning of a run nor its result, and a finished run
# answers for every value; with another number of threads sums are only rounded otherwise.
ON_RESUME = "on_resume"
HARMLESS, ROUNDING = {ON_RESUME: "harmless"}, {ON_RESUME: "rounding"}
SAME_CONTENT, LONGER, LOWER = {ON_RESUME: "same_content"}, {ON_RESUME: "longer"}, {ON_RESUME: "lower"}

# What other libraries call our keys: by these names users look for them.
ALIASES = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "bs": "batch_size",
    "optim": "optimizer",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "sampler": "sampling",
    "criterion": "loss",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "steps": "iterations",
    "max_steps": "iterations",
    "backbone": "model.name",
    "arch": "model.name",
    "architecture": "model.name",
    "weights": "checkpoint",
    "resume_from": "checkpoint",
    "dataset": "source",
    "data_dir": "root",
    "img_size": "image_size",
    "imgsz": "image_size",
    "input_size": "image_size",
    "workers": "num_workers",
    "transforms": "augment",
    "augmentation": "augment",
    "augmentations": "augment",
    "amp": "precision",
    "mixed_precision": "precision",
    "dtype": "precision",
    "output": "runs",
    "output_dir": "runs",
    "save_dir": "runs",
    "project": "runs",
    "log_interval": "log_every",
    "logger": "trackers",
    "log_with": "trackers",
    "lambda": "driver_weight",
}


@dataclass(frozen=True)
class StorageRecipe:
    """How images are stored in the converted data set.

    mode: raw pixels, jpg files, or proportion, which stores half of the images as JPEG and the others raw.
    max_resolution: longer sides are scaled down to this many pixels; null keeps the size.
    jpeg_quality: of the JPEG files that the conversion writes, from 1 to 100.
    """

    mode: Literal["raw", "jpg", "proportion"] = "raw"
    max_resolution: int | None = field(default=None, metadata=SIDE)
    jpeg_quality: int = field(default=90, metadata=within(1, 100))


@dataclass(frozen=True)
class StreamRecipe:
    """How training images are ordered by shards, and where the shards of a remote data set are kept.

    parts: the number of segments of an epoch that are read side by side. Where it is a multiple of the number of
        processes, each process reads its own.
    block: shards of a part whose images are shuffled together.
    cache: local folder for the files of remote data sets; null is one below XDG_CACHE_HOME, or below ~/.cache.
    cache_gb: how large the cache may become, in GB; the least recently used files make room.
    """

    parts: int = field(default=8, metadata=at_least(1))
    block: int = field(default=4, metadata=at_least(1))
    cache: str | None = field(default=None, metadata=HARMLESS | PATH)
    cache_gb: float = field(default=100.0, metadata=HARMLESS | above(0))


@dataclass(frozen=True)
class DataRecipe:
    """Which images, and how they are stored, cropped and augmented.

    source: where the images come from.
    image_size: pixels a side that the network sees.
    mean: of the pixels in [0, 1], per RGB channel; model, the default with pretrained weights, takes what timm's
        configuration of the network says.
    std: standard deviation of the pixels in [0, 1], per RGB channel; model as in mean.
    root: folder of the source's files.
    converted: folder of the converted data set, or its URL, such as https://, s3:// or gs://; null is a folder below
        data/ that is named after its content.
    order: the order of an epoch's training images. images shuffles all of them; shards shuffles the shards, and the
        images of neighbouring shards, so that few shards are read at a time; it is taken where converted is a URL.
    stream: how training images are ordered by shards, and where the shards of a remote data set are kept.
    convert: false reads the source's own files, with a loader that can; nothing is written, and every image is decoded
        once before the run begins.
    download: whether missing files of CIFAR may be fetched into root.
    train_list: file that lists the training images: lines for source list_file, a table, or JSON for coco. A table may
        list all images, with a column of splits.
    meta_list: file that lists the meta set, which is the validation set too; null holds out training images.
    test_list: file that lists the test images; null takes the meta list, or draws them as split says.
    image_column: of a table, the column of paths or images; null finds it by its usual names.
    label_column: of a table, the column of labels; null finds it by its usual names.
    split_column: of a table of all images, the column of splits; null finds it by its usual names.
    class_names: file with other names for the classes, of a source that reads files: lines of a class, as its folder or
        the list calls it, and its name; or a name a line, in the order of the labels.
    split: shares of train, validation and test in the images of each class that are in no split yet, with 0 for a split
        that the data bring; null draws [0.8, 0.1, 0.1] where there is no test set.
    split_seed: of the images that are drawn.
    num_classes: the number of classes that the data set must have; null takes the number that is found.
    imbalance_factor: largest over smallest class of the long tail that is cut out; null takes the data as they are.
    convention: how the long tail of CIFAR is cut: paper holds the meta set out first, ldam is the subset of the LDAM
        release; the meta images of its largest class are training images as well.
    meta_per_class: images of each class in a meta set that is held out; the most of them in one that is drawn.
    shots: more training images than the first number make a class many-shot, fewer than the second few-shot; or
        {ranks: [M, N, K]} for groups of so many classes by rank, the largest first.
    storage: how images are stored in the converted data set.
    loader: the reader of the images; auto takes one that the machine has memory for.
    num_workers: threads or processes that decode; null takes all cores, 0 reads in the main process, with a
        loader that can.
    train_crop: none trains on whole stored images, random_resized on a random rectangle of each.
    eval_crop: none evaluates on whole stored images, center on their central square.
    eval_ratio: side of the central square over the shorter side of the image; model takes what timm's configuration of
        the pretrained network says.
    test_crops: 5 cuts test images test_expand pixels larger than image_size, and takes the mean of the logits of their
        four corners and their centre; with eval_ratio 1 these are LIFT's, for square images. Validation has one crop.
    test_expand: pixels, with test_crops 5.
    crop_scale: range of the area of random_resized crops, as a share of the image.
    crop_aspect: range of the width over the height of random_resized crops.
    augment: augmentations of a training batch, which are made on the device in this order.
    meta_augment: augmentations of a meta batch; null is the same as augment.
    second_augment: augmentations of the second view of an image, for methods with two views; null is the same as
        augment.
    dali_augment: automatic augmentation by DALI before augment, as a name or a mapping of the name to its options, with
        a loader that takes it. Both views of an image get one; meta batches get none where meta_augment is given.
    cached_views: where the backbone is frozen, its features of so many augmented views of each image are computed once
        and trained on; null shows it the images in every iteration.
    """

    source: str = field(metadata=one_of(SOURCES))
    image_size: int = field(metadata=SIDE)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    root: str | None = field(default=None, metadata=HARMLESS | PATH)
    converted: str | None = field(default=None, metadata=SAME_CONTENT | PATH)
    order: Literal["images", "shards"] = "images"
    stream: StreamRecipe = field(default_factory=StreamRecipe)
    convert: bool = True
    download: bool = field(default=True, metadata=HARMLESS)
    train_list: str | None = field(default=None, metadata=SAME_CONTENT | PATH)
    meta_list: str | None = field(default=None, metadata=SAME_CONTENT | PATH)
    test_list: str | None = field(default=None, metadata=SAME_CONTENT | PATH)
    image_column: str | None = field(default=None, metadata=SAME_CONTENT)
    label_column: str | None = field(default=None, metadata=SAME_CONTENT)
    split_column: str | None = field(default=None, metadata=SAME_CONTENT)
    class_names: str | None = field(default=None, metadata=SAME_CONTENT | PATH)
    split: tuple[float, float, float] | None = field(default=None, metadata=within(0, 1))
    split_seed: int = field(default=0, metadata=within(0, LARGEST_SEED))
    num_classes: int | None = field(default=None, metadata=SAME_CONTENT | at_least(1))
    imbalance_factor: float | None = field(default=None, metadata=at_least(1))
    convention: Literal["paper", "ldam"] = "paper"
    meta_per_class: int = field(default=10, metadata=at_least(1))
    shots: tuple[int, int] | ShotRanks = field(default=(100, 20), metadata=at_least(0))
    storage: StorageRecipe = field(default_factory=StorageRecipe)
    loader: str = field(default=AUTO, metadata=one_of((AUTO, *BACKENDS)))
    num_workers: int | None = field(default=None, metadata=HARMLESS | within(0, MOST_WORKERS))
    train_crop: Literal["none", "random_resized"] = "none"
    eval_crop: Literal["none", "center"] = "none"
    eval_ratio: float = field(default=224 / 256, metadata=within(0, 1, above=True))
    test_crops: Literal[1, 5] = 1
    test_expand: int = field(default=24, metadata=within(1, 4096))
    crop_scale: tuple[float, float] = field(default=(0.08, 1.0), metadata=within(0, 1, above=True))
    crop_aspect: tuple[float, float] = field(default=(3 / 4, 4 / 3), metadata=above(0))
    augment: list[str | dict[str, Any]] = field(default_factory=list)
    meta_augment: list[str | dict[str, Any]] | None = None
    second_augment: list[str | dict[str, Any]] | None = None
    dali_augment: str | dict[str, Any] | None = None
    cached_views: int | None = field(default=None, metadata=within(1, 1000))


@dataclass(frozen=True)
class ModelRecipe:
    """A timm backbone, or one of ours, and a head.

    name: of the backbone, as timm.list_models() has it, with or without a tag of pretrained weights; or local-dir:PATH
        or hf-hub:NAME for a network in timm's form, which becomes its name and the file of its weights.
    head: linear, or cosine, whose logits are cosines times head_scale.
    head_scale: the factor of a cosine head's cosines; null is 30.
    pretrained: whether the backbone starts from the weights that timm knows for its name.
    checkpoint: local file of pretrained weights.
    drop_rate: dropout before the head.
    drop_path_rate: stochastic depth, for backbones that have it.
    experts: the number of branches for the last two stages of a ResNet, each with a head; their logits are averaged.
        null is the plain network. Some methods need experts, and most take none.
    expert_width: width of an expert over that of the plain network.
    train: what of the backbone is trained beside the head: all; head for nothing of it; norms for its normalisation
        layers; or a list of names of modules and parameters, such as [blocks.11, "*.bias"], where * stands for any
        characters. The rest is frozen.
    norm: train normalises in BatchNorm with the batch and moves its statistics; frozen normalises with the statistics
        as they are; null is train in layers that are trained, and frozen in layers that are frozen.
    adapt: adapters that are put into the backbone, as a name or a mapping of the name to its options. The backbone is
        frozen: with adapt, train: all is nothing of it, and norms or a list are trained beside the adapters.
    head_init: how the head of a new network begins: class_mean, as the nearest mean feature of a class in the training
        set; zeros; uniform_prior, at random with a bias of -log(C - 1), for losses of sigmoids; or with the rows of a
        .npy, .safetensors or .pt file, one a class, such as text features. A cosine head takes directions. null is at
        random.
    """

    name: str
    head: Literal["linear", "cosine"] = "linear"
    head_scale: float | None = field(default=None, metadata=above(0))
    pretrained: bool = False
    checkpoint: str | None = field(default=None, metadata=SAME_CONTENT | PATH)
    drop_rate: float = field(default=0.0, metadata=within(0, 1, below=True))
    drop_path_rate: float = field(default=0.0, metadata=within(0, 1, below=True))
    experts: int | None = field(default=None, metadata=within(1, 64))
    expert_width: float = field(default=0.75, metadata=within(0.5, 1))
    train: Literal["all", "head", "norms"] | list[str] = "all"
    norm: Literal["train", "frozen"] | None = None
    adapt: str | dict[str, Any] | None = None
    head_init: str | None = field(default=None, metadata=PATH)

    @property
    def trains_all(self) -> bool:
        """Whether the whole network is trained, and BatchNorm's statistics with it."""
        return self.train == "all" and self.norm != "frozen" and self.adapt is None

    @property
    def freezes_norms(self) -> bool:
        """Whether BatchNorm may keep its statistics in some layers."""
        return self.norm == "frozen" or (self.norm is None and (self.train != "all" or self.adapt is not None))


@dataclass(frozen=True)
class AccuracyRecipe:
    """How the accuracy of every class on the meta set is kept up to date, for methods that need it.

    refresh: exact scores all of the meta set in every iteration, rolling scores one slice of it, and epoch scores all
        of it once an epoch.
    window: the number of slices of refresh rolling; no result is older than that many iterations.
    images_per_step: with refresh rolling, the most images that an iteration scores, over all processes; the slices are
        as many as that takes, and at least window. No full scoring comes first: a class that has not been scored yet
        has the mean accuracy of the others. null is no bound.
    batch_size: images that are scored at once.
    precision: of the passes that score the meta set; null is the recipe's precision.
    """

    refresh: Literal["exact", "rolling", "epoch"] = "exact"
    window: int = field(default=10, metadata=at_least(1))
    images_per_step: int | None = field(default=None, metadata=at_least(1))
    batch_size: int = field(default=1024, metadata=at_least(1))
    precision: Literal["fp32", "bf16"] | None = None


@dataclass(frozen=True)
class StageRecipe:
    """One stage of training; warmup, milestones and evaluate_every are in the unit of its length.

    method: the training method.
    lr: the learning rate of the optimizer, at its highest.
    batch_size: images of a training batch over all processes.
    iterations: the length in iterations; exactly one of iterations and epochs is given.
    epochs: the length in epochs.
    options: of the method; each method has its own.
    start: previous goes on from the model of the stage before, fresh from a new one as the first stage gets it.
    classes: the classes whose images it trains on, by their shots; a part of them only with method expert.
    loss: the loss of each image.
    loss_options: of the loss; each loss has its own.
    meta_batch_size: images of a meta batch over all processes; null is batch_size.
    sampling: how often each image comes: instance, each once an epoch; class_balanced, each class as often as every
        other; effective_number, by the effective number of its class; class_aware_4, classes equally often with four of
        their images in a row.
    accuracy: how the accuracy of every class on the meta set is kept up to date.
    schedule: of the learning rate after the warmup: constant, cosine to min_lr, or multistep at the milestones.
    warmup: the length over which the learning rate rises linearly to lr.
    warmup_from: the learning rate at which the warmup starts.
    milestones: where schedule multistep multiplies the learning rate by gamma.
    gamma: the factor at each milestone.
    min_lr: the learning rate at which schedule cosine ends.
    optimizer: by its name in timm's factory, such as sgd, adamw, lamb or lion; sgd is torch's own.
    optimizer_options: of the optimizer, such as betas and eps; each optimizer has its own.
    momentum: of SGD and other optimizers with one, in [0, 1).
    nesterov: whether the momentum of SGD is Nesterov's.
    weight_decay: of the optimizer.
    decay: all parameters have the weight decay, or weights alone: norms, biases and what the network itself excludes
        (position embeddings, for example) have none.
    layer_decay: the learning rate of a layer over that of the layer after it, the head being the last; null is 1.
    lr_factors: patterns of names of modules and parameters, such as {backbone: 0.1, layer4: 1}, and the factor of the
        learning rate for these parameters; of several patterns that match, the one with the fewest matches counts.
    clip: of the gradients before the optimizer's step; null is not at all. A preconditioned lookahead is clipped
        likewise; the lookahead `sgd` is not.
    accumulate: the number of micro-batches that a batch, and a meta batch, is divided into; the step is that of the
        whole batch, but BatchNorm normalises with each micro-batch.
    ema: a moving average of the weights, evaluated and saved beside them; null is none.
    eval_adjustment: tau of post-hoc logit adjustment: evaluations are made of z - tau log pi too, pi the shares of the
        classes in the training set, as adjusted_top1 and so on; null is none. The model is selected without it.
    evaluate_every: the length between two evaluations on the meta set.
    select: which model is the stage's: last, after its last iteration; best, of the evaluation with the highest top-1
        accuracy; smoothed, of the one at which the mean of three evaluations in a row is highest.
    """

    method: str
    lr: float = field(metadata=LOWER | above(0))
    batch_size: int = field(default=128, metadata=at_least(1))
    iterations: int | None = field(default=None, metadata=LONGER | at_least(1))
    epochs: int | None = field(default=None, metadata=LONGER | at_least(1))
    options: StepOptions = field(
        default_factory=StepOptions, metadata=typed_by("method", {name: step.Options for name, step in STEPS.items()})
    )
    start: Literal["previous", "fresh"] = "previous"
    classes: Literal["all", "many", "medium", "few"] = "all"
    loss: str = "cross_entropy"
    loss_options: dict[str, Any] = field(default_factory=dict)
    meta_batch_size: int | None = field(default=None, metadata=at_least(1))
    sampling: Literal["instance", "class_balanced", "effective_number", "class_aware_4"] = "instance"
    accuracy: AccuracyRecipe = field(default_factory=AccuracyRecipe)
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    warmup: float = field(default=0.0, metadata=at_least(0))
    warmup_from: float = field(default=0.0, metadata=at_least(0))
    milestones: list[float] = field(default_factory=list, metadata=above(0))
    gamma: float = field(default=0.1, metadata=above(0))
    min_lr: float = field(default=0.0, metadata=at_least(0))
    optimizer: str = "sgd"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    momentum: float = field(default=0.9, metadata=within(0, 1, below=True))
    nesterov: bool = False
    weight_decay: float = field(default=1e-4, metadata=at_least(0))
    decay: Literal["all", "weights"] = "all"
    layer_decay: float | None = field(default=None, metadata=within(0, 1, above=True))
    lr_factors: dict[str, float] = field(default_factory=dict, metadata=above(0))
    clip: Clip | None = None
    accumulate: int = field(default=1, metadata=at_least(1))
    ema: Ema | None = None
    eval_adjustment: float | None = field(default=None, metadata=above(0))
    evaluate_every: int = field(default=1, metadata=at_least(1))
    select: Literal["last", "best", "smoothed"] = "last"

    @property
    def has_length(self) -> bool:
        """Whether exactly one of iterations and epochs is given, as the checks ask for."""
        return (self.iterations is None) != (self.epochs is None)

    @property
    def length(self) -> int:
        """The length in the stage's own unit."""
        length = self.epochs if self.iterations is None else self.iterations
        assert length is not None, self
        return length


@dataclass(frozen=True)
class Recipe:
    """One run.

    data: which images, and how they are stored, cropped and augmented.
    model: the network.
    stages: trained in the order in which they are written, each under a name of its own; null leaves a stage out.
    name: of the run, and of its folder.
    seed: of everything that is drawn at random.
    precision: fp32, or bf16, which runs the network in bfloat16 where that is safe.
    compile: inductor takes the passes of a step through torch.compile. cudagraph captures whole iterations on a CUDA
        device; replay lists the operations of an iteration on a CPU, and repeats them without the Python around them.
        Where the method or the machine does not allow that, the stage says why and is not compiled. With one process
        auto is cudagraph on a CUDA device, and replay for a head on features; it is none elsewhere.
    channels_last: whether images and weights are in channels_last memory.
    sync_batch_norm: with several processes, BatchNorm normalises with the batches of all of them instead of its own.
    reduce_precision: of the gradients that several processes send each other; bf16 halves what is sent, and rounds each
        gradient to two or three digits on the way.
    runs: folder of all runs.
    resume: auto goes on from the last checkpoint of the run folder, if any; never refuses a folder that holds a run.
    log_every: iterations between two lines of the log.
    checkpoint_every_s: seconds between checkpoints, besides the one at every evaluation.
    checkpoints_kept: how many checkpoints of each kind are kept, the newest and those before it; an earlier one serves
        when the newest is found damaged.
    num_threads: CPU threads of torch; null shares the usable cores among processes.
    trackers: experiment trackers of Accelerate, such as [tensorboard]. They get the recipe, the log, the metrics of the
        test split, and histograms of the weights and accuracies of the classes.
    """

    name: str = field(metadata=HARMLESS)
    data: DataRecipe
    model: ModelRecipe
    stages: dict[str, StageRecipe]
    seed: int = field(default=0, metadata=within(0, LARGEST_SEED))
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: Literal["auto", "none", "inductor", "cudagraph", "replay"] = "auto"
    channels_last: bool = True
    sync_batch_norm: bool = False
    reduce_precision: Literal["fp32", "bf16"] = "fp32"
    runs: str = field(default="runs", metadata=HARMLESS | PATH)
    resume: Literal["auto", "never"] = field(default="auto", metadata=HARMLESS)
    log_every: int = field(default=20, metadata=HARMLESS | at_least(1))
    checkpoint_every_s: float = field(default=300.0, metadata=HARMLESS | above(0))
    checkpoints_kept: int = field(default=2, metadata=HARMLESS | at_least(1))
    num_threads: int | None = field(default=None, metadata=ROUNDING | within(1, MOST_WORKERS))
    trackers: list[str] = field(default_factory=list, metadata=HARMLESS)

    @property
    def folder(self) -> Path:
        """Where the run keeps its files."""
        return Path(self.runs) / self.name

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and weights on the device."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def lineage(self, stage: StageSettings) -> list[StageRecipe]:
        """The stages that the model of `stage` goes through: from the last that starts afresh up to `stage` itself."""
        line: list[StageRecipe] = []
        for one in self.stages.values():
            line = [one] if one.start == "fresh" else [*line, one]
            if one is stage:
                break
        return line

    def follows(self) -> list[str]:
        """What methods take where the recipe leaves the choice open, a line each with the name of its stage."""
        return [
            f"stages.{name}.{line}"
            for name, stage in self.stages.items()
            for line in STEPS[stage.method].follows(stage.options, stage)
        ]

    def to_tree(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain containers."""
        return to_tree(self)

    def to_yaml(self) -> str:
        """The recipe with every default filled in; read back, it is the same recipe."""
        return dump(self.to_tree())


def recipe_from_tree(tree: Mapping[str, Any]) -> Recipe:
    """The recipe whose `to_tree` this is; RecipeError when this version of fastlt does not know a key."""
    return build(Recipe, tree)


def is_harmless(key: Field[Any] | None) -> bool:
    """Whether the key of a recipe changes neither the meaning of a run nor its result."""
    return key is not None and key.metadata.get(ON_RESUME) in ("harmless", "rounding")


@dataclass(frozen=True)
class Value:
    """The value of a key, as plain containers; field: where the key is defined, None in a mapping of free names."""

    value: Any
    field: Field[Any] | None


Values = Mapping[tuple[str, ...], Value]


def values(part: Any, path: tuple[str, ...] = (), own: Field[Any] | None = None) -> dict[tuple[str, ...], Value]:
    """The values of a recipe, or of a part of it that is at `path`, by the names that lead to them."""
    below: dict[str, tuple[Any, Field[Any] | None]]
    if is_dataclass(part):
        below = {f.name: (getattr(part, f.name), f) for f in fields(part)}
    elif isinstance(part, dict) and part:
        below = {name: (value, None) for name, value in part.items()}
    else:
        return {path: Value(to_tree(part), own)}
    found: dict[tuple[str, ...], Value] = {}
    for name, (value, definition) in below.items():
        found |= values(value, (*path, name), definition)
    return found


def value_of(all_values: Values, path: tuple[str, ...]) -> Any:
    """The value at a path of `values`; None where there is none."""
    return all_values[path].value if path in all_values else None


def difference(path: tuple[str, ...], one: Values, other: Values) -> str:
    """The line of a key in which two recipes differ, with both values."""
    return f"{'.'.join(path)}: {value_of(one, path)!r} and {value_of(other, path)!r}"
