"""The run: stages, epochs, when to evaluate, save and log. Accelerate lives here, and nowhere below."""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

from fastlt.augment import build_augment, check_augment, normalise, output_size
from fastlt.device.compiled import Compiler, make_sgd, mode_for, ready
from fastlt.device.distributed import Reducer
from fastlt.device.host_memory import keep_freed_memory
from fastlt.device.random_states import random_states, restore_random_states
from fastlt.losses import build_loss
from fastlt.meta.class_accuracy import ClassAccuracy, evaluation_mode
from fastlt.models import Classifier, build_model, check_padded_pooling
from fastlt.models.sync_batch_norm import synchronise_batch_norm
from fastlt.recipe import Recipe, StageRecipe, differences, load_recipe
from fastlt.run import checkpoint
from fastlt.run.dataset import prepare_dataset
from fastlt.run.log import RunLog, percent, progress_bar
from fastlt.run.metrics import Metrics
from fastlt.run.schedule import learning_rate
from fastlt.state import Batch, StepOutput
from fastlt.steps import STEPS, StageModel, Step, StepParts
from loaders.factory import check_loader, make_loader
from loaders.order.crop import CropSpec
from loaders.protocol import BatchLoader
from loaders.readers.two_views import TwoViewLoader

EVALUATION_BATCH = 512
# What a step holds that differs between processes: each has its own stream of augmentations and share of the meta set.
PER_PROCESS = ("augment", "meta_augment", "class_accuracy", "second_augment")
# The streams of random augmentations of one process.
TRAIN_STREAM, META_STREAM, SECOND_STREAM = range(3)


class Interrupted(Exception):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop, has saved a checkpoint, and can be resumed."""


@dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint."""

    stage: int = 0
    iteration: int = 0  # within the stage
    done: int = 0  # over all stages
    train_s: float = 0.0
    wait_s: float = 0.0
    images: int = 0
    best: float = -1.0  # validation top-1 of the stage's best checkpoint


class Trainer:
    """Trains what a recipe describes.

    Everything that can be refused is refused while the trainer is made, by a ValueError for the user; afterwards
    `fit` does the work and returns the content of `result.json`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = recipe.folder
        finished = self._look_at_folder()
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no", "bf16": "bf16"}[recipe.precision],
            log_with=recipe.trackers or None,
            project_dir=str(self.folder),
        )
        # Accelerate numbers CPUs by process, and torch cannot read a checkpoint back to a device "cpu:1".
        device = self.accelerator.device
        self.device = torch.device("cpu") if device.type == "cpu" else device
        self.reducer = Reducer(self.accelerator.process_index, self.accelerator.num_processes)
        self.main = self.accelerator.is_main_process
        self.compile = mode_for(recipe.compile, self.device, self.reducer.world_size)
        self._set_threads()
        if self.device.type == "cpu":
            keep_freed_memory()
        else:
            torch.backends.cudnn.benchmark = True  # shapes stay the same: the fastest convolutions are found once
        set_seed(recipe.seed)
        self.dataset = prepare_dataset(recipe.data, self.accelerator)
        self.counts = self.dataset.class_counts(recipe.data.shots)
        self._check_against_dataset()
        self._check_loaders()
        self.result = checkpoint.read_json(self.folder / "result.json") if finished else None
        if self.result is not None:
            return
        self.model = self._new_model()
        self._check_against_model()
        self.evaluation_loaders: dict[str, BatchLoader] = {}
        # Of the stage's training and meta batches: random crops of one size of images are another backend's business.
        self.backends: dict[str, str] = {}
        self.log = RunLog(self.folder / "log.jsonl", enabled=self.main, track=self._tracker())
        self.progress = Progress()
        self.class_weights: Tensor | None = None
        self.stop_signal: int | None = None
        self.clock = time.perf_counter()
        self.last_saved = time.monotonic()
        self.resumed = self._load_last()

    # Before the work

    def _look_at_folder(self) -> bool:
        """Whether the run folder holds a finished run of this recipe; ValueError when it holds another run."""
        recorded = self.folder / "recipe.yaml"
        if not recorded.exists():
            return False
        if self.recipe.resume == "never":
            raise ValueError(
                f"{self.folder} holds a run already and resume is never; "
                "choose another name=..., delete the folder, or set resume=auto to go on with it"
            )
        changed = differences(load_recipe(recorded), self.recipe)
        if changed:
            raise ValueError(
                f"{self.folder} holds a run of another recipe; it differs in (there and here)\n  "
                + "\n  ".join(changed)
                + "\nchoose another name=..., or delete the folder"
            )
        return (self.folder / "result.json").exists()

    def _set_threads(self) -> None:
        """All usable cores for the arithmetic on a CPU; `accelerate launch` would leave one."""
        if self.recipe.num_threads is not None:
            torch.set_num_threads(self.recipe.num_threads)
        elif self.device.type == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.reducer.world_size))

    def _check_against_dataset(self) -> None:
        """What only the data set can tell: class count, and batches that are larger than their split."""
        data = self.recipe.data
        if data.num_classes is not None and data.num_classes != self.counts.num_classes:
            raise ValueError(
                f"data.num_classes is {data.num_classes}, but {self.dataset.root} has {self.counts.num_classes} "
                "classes; leave the key out to take what is there, or convert the data set that is meant"
            )
        for name, stage in self.recipe.stages.items():
            # Built again when its turn comes; here so that the last stage's mistake does not cost the first stage.
            build_loss(stage.loss, self.counts, **stage.loss_options)
            classes = self._classes(stage)
            if not classes.any():
                raise ValueError(
                    f"stages.{name}.classes is {stage.classes!r}, but {self.dataset.root} has no such class with "
                    f"data.shots {list(self.counts.shots)}; leave out the stage and what names it, or set other shots"
                )
            for key, split in (("batch_size", "train"), ("meta_batch_size", "meta")):
                size = self._batch_size(stage, split)
                labels = self.dataset.labels(split)
                if split == "meta" and not STEPS[stage.method].needs.meta_batch:
                    continue
                available = int(classes[labels].sum()) if split == "train" else len(labels)
                if size > available:
                    of = "" if stage.classes == "all" else f" of {stage.classes}-shot classes"
                    raise ValueError(
                        f"stages.{name}.{key} is {size}, but the {split} split has {available} images{of}; "
                        f"give {available} or fewer"
                    )
                if size % self.reducer.world_size:
                    raise ValueError(
                        f"stages.{name}.{key} is {size}, which does not divide into {self.reducer.world_size} processes"
                    )
            if stage.sampling == "class_aware_4" and stage.batch_size // self.reducer.world_size % 4:
                raise ValueError(
                    f"stages.{name}.batch_size is {stage.batch_size} with sampling class_aware_4, which gives each "
                    f"process whole groups of 4 images of a class; give a multiple of {4 * self.reducer.world_size}"
                )

    def _check_loaders(self) -> None:
        """What only the stored images can tell: a loader that cannot have them, and sizes that the recipe misses."""
        data = self.recipe.data
        kinds = [STEPS[stage.method] for stage in self.recipe.stages.values()]
        wanted = {"data.augment": ("train", data.augment)}
        if any(kind.needs.meta_batch for kind in kinds):
            wanted["data.meta_augment"] = ("meta", data.augment if data.meta_augment is None else data.meta_augment)
        if data.second_augment is not None:
            wanted["data.second_augment"] = ("train", data.second_augment)
        for key, (split, specs) in wanted.items():
            shape = self._check_loader(split, train=True)
            try:
                shape = output_size(check_augment(specs, data.image_size), *shape)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
            self._check_image_size(split, shape, "data.train_crop=random_resized, or a random_crop in data.augment")
        for split in ("meta", "test"):
            self._check_image_size(split, self._check_loader(split, train=False), "data.eval_crop=center")

    def _check_loader(self, split: str, *, train: bool) -> tuple[int, int]:
        return check_loader(
            self.dataset,
            split,
            backend=self.recipe.data.loader,
            device=self.device,
            train=train,
            crop=self._crop(train=train),
            world_size=self.reducer.world_size,
        )

    def _check_image_size(self, split: str, shape: tuple[int, int], advice: str) -> None:
        size = self.recipe.data.image_size
        if shape != (size, size):
            raise ValueError(
                f"data.image_size is {size}, but the images of the {split} split come to the network as "
                f"{shape[0]}x{shape[1]}; set it to what they are, or cut them: {advice}"
            )

    def _check_against_model(self) -> None:
        """What only the network can tell: options that name parts of it, and a trained head that is not there."""
        if self.recipe.channels_last:
            check_padded_pooling(self.model, self.device)
        for name, stage in self.recipe.stages.items():
            kind = STEPS[stage.method]
            try:
                kind.check_model(self.model, stage.options)
            except ValueError as error:
                raise ValueError(f"stages.{name}.options: {error}") from None
            first = len(self.recipe.lineage(stage)) == 1
            if first and kind.needs.trained_head and not self.model.head_is_trained:
                raise ValueError(
                    f"stages.{name}.method is {stage.method!r}, which goes on from a trained head, but "
                    f"{self.recipe.model.checkpoint} has none for {self.counts.num_classes} classes and "
                    f"model.head={self.recipe.model.head}; use method crt for a new one, or another checkpoint"
                )

    def _classes(self, stage: StageRecipe) -> np.ndarray:
        """The classes whose images a stage trains on: bool (C,)."""
        if stage.classes == "all":
            return np.ones(self.counts.num_classes, dtype=bool)
        return self.counts.shot_masks()[stage.classes]

    def _batch_size(self, stage: StageRecipe, split: str) -> int:
        """Over all processes."""
        return stage.meta_batch_size or stage.batch_size if split == "meta" else stage.batch_size

    def _tracker(self):
        if not self.recipe.trackers:
            return None
        # Accelerate passes over a tracker whose package is absent.
        absent = set(self.recipe.trackers) - {str(getattr(t, "value", t)) for t in self.accelerator.log_with}
        if absent:
            raise ValueError(
                f"trackers: the packages of {sorted(absent)} are not installed; pip install them, or leave them out"
            )
        self.accelerator.init_trackers("fastlt", init_kwargs={})
        return lambda values, iteration: self.accelerator.log(values, step=iteration)

    # The work

    def fit(self) -> dict[str, Any]:
        """Train all stages, resuming where the run folder says, then measure the test split once.

        Raises Interrupted after SIGINT or SIGTERM, with a checkpoint saved; FloatingPointError when the loss is no
        longer finite.
        """
        if self.result is not None:
            self.say(f"{self.folder} is finished; nothing is left to do")
            return self.result
        if self.main:
            checkpoint.write_atomically(self.folder / "recipe.yaml", self.recipe.to_yaml().encode())
        self.log.open(self.progress.done)
        stages = list(self.recipe.stages.items())
        for done in self.recipe.lineage(stages[self.progress.stage][1])[:-1]:
            self._prepare_model(done)
        with self._stop_on_signals():
            for index in range(self.progress.stage, len(stages)):
                name, stage = stages[index]
                if index > 0 and self.progress.iteration == 0 and stage.start == "previous":
                    self._load_best(stages[index - 1][0])
                self._run_stage(name, stage)
                self.progress.stage, self.progress.iteration, self.progress.best = index + 1, 0, -1.0
        self._load_best(stages[-1][0])
        result = self._result(stages[-1][0])
        for loader in self.evaluation_loaders.values():
            loader.close()
        if self.main:
            checkpoint.write_json(self.folder / "result.json", result)
        self.log.close()
        self.accelerator.end_training()
        return result

    def _run_stage(self, name: str, stage: StageRecipe) -> None:
        self.backends = {} if self.resumed is None else self._backends_before()
        step, train, meta = self._build_stage(stage)
        if self.resumed is not None:
            mine = self.resumed["processes"][self.reducer.rank]
            step.load_state_dict({**self.resumed["step"], **mine["step"]})
            restore_random_states(mine["random"])
            for buffer_name, buffer in self.model.named_buffers():
                buffer.copy_(mine["buffers"][buffer_name])
            self.resumed = None
        elif step.needs.first_pass:
            self._first_pass(step)
        per_epoch = len(train)
        unit = per_epoch if stage.epochs is not None else 1
        total, every = stage.length * unit, stage.evaluate_every * unit
        step.train_mode()
        self.say(f"stage {name}: {stage.method}, {stage.loss}, {total} iterations; loader {train.reason}")
        for advice in step.advice():
            self.say(f"stage {name}: {advice}")
        progress = self.progress
        bar = progress_bar(total, progress.iteration, name, enabled=self.main)
        batches = self._timed(endless(train, progress.iteration))
        meta_batches = endless(meta, progress.iteration) if meta is not None else None
        iterate = None
        self.clock = time.perf_counter()
        try:
            while progress.iteration < total:
                if progress.iteration % per_epoch == 0:
                    step.start_epoch(progress.iteration // per_epoch)
                self._set_lr(step, stage, progress.iteration / unit)
                batch = next(batches)
                meta_batch = next(meta_batches) if meta_batches is not None else None
                if iterate is None:
                    iterate = self._ready(name, step, batch, meta_batch)
                output = iterate(batch, meta_batch)
                progress.iteration += 1
                progress.done += 1
                progress.images += len(batch) * self.reducer.world_size
                log_now = progress.iteration % self.recipe.log_every == 0 or progress.iteration == total
                if log_now:
                    self._log_training(name, output, step, bar)
                self._tick()
                bar.update()
                # Asked once: between two questions a signal could come that ends the run without a checkpoint.
                stop, save_is_due = self._agreed(log_now)
                if progress.iteration % every == 0 or progress.iteration == total:
                    self._validate(name, output)
                    self._save(name, step, output)
                elif stop or save_is_due:
                    self._save(name, step, output)
                if stop:
                    self.stop_signal = stop
                    raise Interrupted(f"stopped by signal {stop} at iteration {progress.iteration} of {name}")
                self.clock = time.perf_counter()
        finally:
            bar.close()
            train.close()
            if meta is not None:
                meta.close()

    def _ready(self, name: str, step: Step, batch: Batch, meta_batch: Batch | None) -> Callable[..., StepOutput]:
        """What takes the iterations: the step, compiled on its first batches, which are trained on afterwards."""
        if self.compile == "none":
            return step
        self._tick()
        iterate, reason = ready(step, batch, meta_batch)
        took = time.perf_counter() - self.clock
        self.say(f"stage {name}: {f'compiled in {took:.0f} s' if reason is None else f'not compiled: {reason}'}")
        self.clock = time.perf_counter()
        return iterate

    def _build_stage(self, stage: StageRecipe) -> tuple[Step, BatchLoader, BatchLoader | None]:
        """The step of a stage and its training and meta loaders."""
        data, kind = self.recipe.data, STEPS[stage.method]
        self._prepare_model(stage)
        optimizer = make_sgd(
            kind.parameter_groups(self.model, stage.options),
            self.compile,
            stage.lr,
            self.device,
            momentum=stage.momentum,
            nesterov=stage.nesterov,
            weight_decay=stage.weight_decay,
        )
        processes = self.reducer.world_size
        classes = self._classes(stage)
        train = self._training_loader(stage, classes, second_view=kind.needs.second_view)
        meta = None
        if kind.needs.meta_batch:
            meta = self._loader("meta", self._batch_size(stage, "meta") // processes, train=True)
        meta_specs = data.augment if data.meta_augment is None else data.meta_augment
        second_specs = data.augment if data.second_augment is None else data.second_augment
        accuracy = None
        if kind.needs.class_accuracy:
            everything = self._whole_split("meta")
            accuracy = ClassAccuracy(
                everything.images,
                everything.labels,
                self.counts.num_classes,
                prepare=self._normalise,
                refresh=stage.accuracy.refresh,
                window=stage.accuracy.window,
                batch_size=stage.accuracy.batch_size,
                reducer=self.reducer,
                autocast=self._accuracy_autocast(stage),
            )
        parts = StepParts(
            model=self.model,
            loss=build_loss(stage.loss, self.counts, **stage.loss_options).to(self.device),
            optimizer=optimizer,
            augment=self._augment(data.augment, train, TRAIN_STREAM),
            meta_augment=self._augment(meta_specs, meta, META_STREAM) if meta is not None else None,
            second_augment=self._augment(second_specs, train, SECOND_STREAM) if kind.needs.second_view else None,
            training_images=self._training_images if kind.needs.training_images else None,
            class_counts=self.counts,
            class_accuracy=accuracy,
            autocast=self.accelerator.autocast,
            reducer=self.reducer,
            compiler=Compiler(self.compile),
            trained_classes=classes,
            stage_models={name: self._stage_model(name) for name in kind.models_of_stages(stage.options)},
        )
        return kind(parts, stage.options), train, meta

    def _new_model(self, *, weights: bool = True) -> Classifier:
        """The recipe's model as a first stage gets it; without `weights`, at random also where a file holds some."""
        asked = (
            vars(self.recipe.model) if weights else {**vars(self.recipe.model), "pretrained": False, "checkpoint": None}
        )
        model = build_model(**asked, num_classes=self.counts.num_classes, image_size=self.recipe.data.image_size)
        memory_format = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        return model.to(self.device, memory_format=memory_format)

    def _prepare_model(self, stage: StageRecipe) -> None:
        """Give the model the form that a stage trains."""
        position = next(i for i, one in enumerate(self.recipe.stages.values()) if one is stage)
        if stage.start == "fresh" and position > 0:
            # Weights of its own, the same on every process, and the default generator stays where it is: a run that
            # resumes comes through here too.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1_000_003 * self.recipe.seed + position)
                self.model = self._new_model()
        STEPS[stage.method].prepare_model(self.model, stage.options, seed=self.recipe.seed)
        if self.recipe.sync_batch_norm and self.reducer.world_size > 1:
            synchronise_batch_norm(self.model, self.reducer)

    def _accuracy_autocast(self, stage: StageRecipe) -> Callable[[], Any]:
        """Makes the context in which the meta set is scored: in the recipe's precision unless the stage has another."""
        precision = stage.accuracy.precision
        if precision is None:
            return self.accelerator.autocast
        return partial(torch.autocast, self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def _stage_model(self, name: str) -> StageModel:
        """What an earlier stage left, read from its best checkpoint."""
        path, stage = self._best(name), self.recipe.stages[name]
        if not path.is_file():
            raise ValueError(f"{path} is not there, the best of stages.{name}, which is trained first: run all stages")
        with torch.random.fork_rng(devices=[]):
            model = self._new_model(weights=False)
        for before in self.recipe.lineage(stage):
            STEPS[before.method].prepare_model(model, before.options, seed=self.recipe.seed)
        model.load_state_dict(checkpoint.load(path, self.device)["model"])
        return StageModel(model.requires_grad_(False).eval(), self._classes(stage))

    def _first_pass(self, step: Step) -> None:
        """Show a step the training images, before the first iteration of its stage."""
        self.clock = time.perf_counter()
        with evaluation_mode(self.model), self.accelerator.autocast():
            step.first_pass(self._evaluation_loader("train").epoch(0), self._normalise)
        self.evaluation_loaders.pop("train").close()
        self._tick()

    def _augment(self, specs: list, loader: BatchLoader, stream: int):
        """The device part of the augmentation: with crops, where the loader delivers whole stored images."""
        data = self.recipe.data
        if data.train_crop == "random_resized" and not loader.crops:
            specs = [{"random_resized_crop": {"scale": list(data.crop_scale), "ratio": list(data.crop_aspect)}}, *specs]
        # Every process and each kind of batch draws from a stream of its own.
        seed = 1_000_003 * self.recipe.seed + 3 * self.reducer.rank + stream
        return build_augment(
            specs, image_size=data.image_size, mean=data.mean, std=data.std, seed=seed, device=self.device
        )

    def _training_loader(self, stage: StageRecipe, classes: np.ndarray, *, second_view: bool) -> BatchLoader:
        """The training batches of this process; for two views with two crops of each image, if the loader crops."""
        size = stage.batch_size // self.reducer.world_size
        order = {"train": True, "sampling": stage.sampling, "classes": classes}
        first = self._loader("train", size, **order)
        if not (second_view and self.recipe.data.train_crop == "random_resized" and first.crops):
            return first
        return TwoViewLoader(first, self._loader("train", size, **order, view=1))

    def _training_images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the training set, see `StepParts`."""
        for batch in self._evaluation_loader("train").epoch(0):
            yield self._normalise(batch.images), batch.labels

    def _loader(
        self,
        split: str,
        batch_size: int,
        *,
        train: bool,
        sampling: str = "instance",
        whole: bool = False,
        view: int = 0,
        classes: np.ndarray | None = None,
    ) -> BatchLoader:
        """A loader of this process's share of a split, or of the `whole` of it; batch_size: per process."""
        data = self.recipe.data
        before = self.backends.get(split) if train else None
        loader = make_loader(
            self.dataset,
            split,
            backend=before or data.loader,
            batch_size=batch_size,
            device=self.device,
            train=train,
            crop=self._crop(train=train),
            sampling=sampling,
            seed=self.recipe.seed,
            rank=0 if whole else self.reducer.rank,
            world_size=1 if whole else self.reducer.world_size,
            view=view,
            num_workers=data.num_workers,
            classes=classes,
            dali_augment=data.dali_augment if train and (split == "train" or data.meta_augment is None) else None,
        )
        if train and data.loader == "auto":
            self.backends[split] = loader.backend
            if before is not None:
                loader.reason = f"{before}: chosen when the stage began"
        return loader

    def _crop(self, *, train: bool) -> CropSpec:
        data = self.recipe.data
        if train:
            return CropSpec(data.train_crop, data.image_size, scale=data.crop_scale, aspect=data.crop_aspect)
        return CropSpec(data.eval_crop, data.image_size, ratio=data.eval_ratio)

    def _whole_split(self, split: str) -> Batch:
        """All images of a split on every process, in order, cropped as for evaluation."""
        size = min(EVALUATION_BATCH, len(self.dataset.labels(split)))
        loader = self._loader(split, size, train=False, whole=True)
        try:
            parts = list(loader.epoch(0))
        finally:
            loader.close()
        return Batch(*(torch.cat([getattr(p, key) for p in parts]) for key in ("images", "labels", "index")))

    def _set_lr(self, step: Step, stage: StageRecipe, position: float) -> None:
        lr = learning_rate(
            position,
            length=stage.length,
            lr=stage.lr,
            schedule=stage.schedule,
            warmup=stage.warmup,
            warmup_from=stage.warmup_from,
            milestones=stage.milestones,
            gamma=stage.gamma,
        )
        for group in step.optimizer.param_groups:
            value = lr * group.get("lr_factor", 1.0)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)  # a captured iteration reads it there
            else:
                group["lr"] = value

    def _normalise(self, images: Tensor) -> Tensor:
        return normalise(images, self.recipe.data.mean, self.recipe.data.std, torch.float32)

    # Evaluation

    def evaluate(self, split: str) -> dict[str, Any]:
        """Metrics of the current model on "meta" (validation) or "test", over all processes."""
        self._average_buffers()
        metrics = Metrics(self.counts.num_classes, device=self.device)
        counters = self.model.counters()
        for counter in counters.values():
            counter.zero_()
        with evaluation_mode(self.model), self.accelerator.autocast():
            for batch in self._evaluation_loader(split).epoch(0):
                metrics.update(self.model(self._normalise(batch.images)), batch.labels)
        counted = [counter.double() for counter in counters.values()]
        self.reducer.sum_([metrics.state, *counted])
        means = {name: (total / images).item() for name, (total, images) in zip(counters, counted, strict=True)}
        return {**metrics.summary(self.counts), **means}

    def _evaluation_loader(self, split: str) -> BatchLoader:
        """This process's share of a split in order, cropped as for evaluation."""
        if split not in self.evaluation_loaders:
            # Kept for the whole run: opening one again at every evaluation would cost more than the images do.
            size = min(EVALUATION_BATCH, max(1, len(self.dataset.labels(split)) // self.reducer.world_size))
            self.evaluation_loaders[split] = self._loader(split, size, train=False)
        return self.evaluation_loaders[split]

    def _average_buffers(self) -> None:
        """Give every process the mean of the floating-point buffers: each has seen its own share of the batches."""
        self.reducer.mean_([b for b in self.model.buffers() if b.is_floating_point()])

    def _validate(self, name: str, output: StepOutput) -> None:
        values = self.evaluate("meta")
        progress = self.progress
        per_class = {k: v.tolist() for k, v in output.per_class.items()}
        self.log.write("evaluation", progress.done, stage=name, split="meta", **values, **per_class)
        # Small validation sets tie often; of equals the later is kept, it has trained longer.
        if values["top1"] >= progress.best:
            progress.best = values["top1"]
            if self.main:
                state = {"model": self.model.state_dict(), "top1": values["top1"], "iteration": progress.iteration}
                checkpoint.save(self._best(name), state)
        if self.main:
            groups = "  ".join(f"{k} {percent(values[k])}" for k in ("top1", "many", "medium", "few"))
            self.say(f"{name} {progress.iteration}: validation {groups}")

    def _result(self, last_stage: str) -> dict[str, Any]:
        """Measure the test split with the loaded model and put everything a reader needs beside it."""
        progress = self.progress
        best = checkpoint.load(self._best(last_stage))
        return {
            "name": self.recipe.name,
            **self.evaluate("test"),
            "validation_top1": best["top1"],
            "best_iteration": best["iteration"],
            "class_names": list(self.counts.names),
            "class_counts": self.counts.counts.tolist(),
            "class_weights": None if self.class_weights is None else self.class_weights.tolist(),
            "shots": list(self.counts.shots),
            "imbalance_factor": self.counts.imbalance_factor,
            "seed": self.recipe.seed,
            "precision": self.recipe.precision,
            "device": str(self.device) if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            "processes": self.reducer.world_size,
            "threads": torch.get_num_threads(),
            "iterations": progress.done,
            "train_s": progress.train_s,
            "img_s": progress.images / progress.train_s,
            "data_wait_share": progress.wait_s / progress.train_s,
            "versions": versions(),
        }

    # Logging, saving, stopping

    def say(self, text: str) -> None:
        """One line for the person who watches, above the progress bar."""
        if self.main:
            tqdm.write(text)

    def _log_training(self, name: str, output: StepOutput, step: Step, bar) -> None:
        """The one place in the loop that waits for the device."""
        loss, lr = self._finite(output), float(step.lr)
        self._tick()
        progress = self.progress
        metrics = {k: v.item() for k, v in output.metrics.items()}
        if "weight" in output.per_class:
            self.class_weights = output.per_class["weight"].detach().clone()
            for group, mask in self.counts.shot_masks().items():
                if mask.any():
                    chosen = torch.from_numpy(mask).to(self.class_weights.device)
                    metrics[f"weight_{group}"] = self.class_weights[chosen].mean().item()
        speed, wait = progress.images / progress.train_s, progress.wait_s / progress.train_s
        shown = {"loss": f"{loss:.3f}", "lr": f"{lr:.3g}", "img_s": f"{speed:.0f}", "wait": f"{100 * wait:.1f}%"}
        bar.set_postfix(shown, refresh=False)
        self.log.write(
            "train",
            progress.done,
            stage=name,
            loss=loss,
            lr=lr,
            img_s=speed,
            data_wait_share=wait,
            **metrics,
        )

    def _finite(self, output: StepOutput) -> float:
        """The loss as a number; FloatingPointError when it is not finite, so that no checkpoint holds such a state.

        It is the mean over processes: if one of them gave up alone, the others would wait for it.
        """
        mean = output.loss.detach().clone()
        self.reducer.mean_([mean])
        loss = mean.item()
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise FloatingPointError(
                f"the loss is {loss} at iteration {self.progress.iteration}; the last checkpoint in {self.folder} is "
                "from before. Lower the stage's lr or lengthen its warmup"
            )
        return loss

    def _save(self, name: str, step: Step, output: StepOutput) -> None:
        self._finite(output)
        state = step.state_dict()
        own = {"step": {k: state.pop(k) for k in PER_PROCESS}, "random": random_states()}
        own["backends"] = self.backends
        # BatchNorm's running statistics are those of each process's own batches.
        own["buffers"] = {k: b.cpu() for k, b in self.model.named_buffers()}
        processes = gather_object([own])
        if self.main:
            state = {
                "step": state,
                "processes": processes,
                "progress": vars(self.progress),
                "class_weights": self.class_weights,
                "stage_name": name,
            }
            checkpoint.save(self.folder / "checkpoints" / checkpoint.LAST, state)
        self.accelerator.wait_for_everyone()
        self.last_saved = time.monotonic()

    def _load_last(self) -> dict | None:
        path = self.folder / "checkpoints" / checkpoint.LAST
        if not path.exists():
            return None
        state = checkpoint.load(path, self.device)
        if len(state["processes"]) != self.reducer.world_size:
            raise ValueError(
                f"{path} was saved by {len(state['processes'])} processes, this run has {self.reducer.world_size}: "
                "launch as many as before, or choose another name=..."
            )
        self.progress = Progress(**state["progress"])
        self.class_weights = state["class_weights"]
        self.say(f"resuming {self.folder} at iteration {self.progress.iteration} of stage {state['stage_name']}")
        return state

    def _backends_before(self) -> dict[str, str]:
        """What `auto` chose before the run was stopped: with more or less memory free now, crops would be others."""
        return dict(self.resumed["processes"][self.reducer.rank].get("backends", {}))

    def _best(self, stage: str) -> Path:
        return self.folder / "checkpoints" / f"best_{stage}.pt"

    def _load_best(self, stage: str) -> None:
        self.accelerator.wait_for_everyone()
        self.model.load_state_dict(checkpoint.load(self._best(stage), self.device)["model"])

    def _tick(self) -> None:
        """Add the time since the last tick to the time of training."""
        now = time.perf_counter()
        self.progress.train_s += now - self.clock
        self.clock = now

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the time spent waiting for each added to the progress."""
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self.progress.wait_s += time.perf_counter() - started
            yield batch

    @contextmanager
    def _stop_on_signals(self):
        """SIGINT and SIGTERM let the iteration finish; a second one stops at once."""

        def stop(number, frame):
            if self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number
            self.say("stopping after this iteration; a checkpoint will be saved")

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _agreed(self, log_now: bool) -> tuple[int, bool]:
        """The signal that any process got (0: none), and whether one's clock says that a checkpoint is due.

        Signals reach processes at different moments, and their clocks differ; several of them agree, at log intervals
        only, so that all do the same in the same iteration.
        """
        due = time.monotonic() - self.last_saved > self.recipe.checkpoint_every_s
        if self.reducer.world_size == 1:
            return self.stop_signal or 0, due
        if not log_now:
            return 0, False
        answers = self.reducer.gather(torch.tensor([[self.stop_signal or 0, due]], device=self.device))
        stop, due = answers.amax(0).tolist()
        return stop, bool(due)


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    packages = ("fastlt", "torch", "torchvision", "timm", "accelerate", "ffcv", "numpy")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}


def endless(loader: BatchLoader, start: int) -> Iterator[Batch]:
    """Batch after batch over all epochs, from batch number `start` counted from the first epoch."""
    epoch, first = divmod(start, len(loader))
    while True:
        yield from loader.epoch(epoch, first)
        epoch, first = epoch + 1, 0
