"""The run: stages, iterations, when to evaluate, save, log and stop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fastlt.device.compiled import ready
from fastlt.device.openmp import why_neighbours_slow
from fastlt.models.head_init import init_head, read_rows
from fastlt.models.trained_state import check_frozen_part
from fastlt.recipe import unlike_model
from fastlt.run.atomic_file import write_atomically, write_json
from fastlt.run.class_history import ClassHistory
from fastlt.run.context import RunContext
from fastlt.run.divergence import Divergence
from fastlt.run.evaluation import Evaluation, prefixed
from fastlt.run.feature_cache import compute_features
from fastlt.run.finite import not_finite
from fastlt.run.folder import class_history_file, inputs_file, log_file, predictions_file, recipe_file, result_file
from fastlt.run.loading import endless
from fastlt.run.lock import unlock_folder
from fastlt.run.log import RunLog, StageBar, percent, weight_means
from fastlt.run.main_process import from_main, on_main
from fastlt.run.model_folder import save_run_model
from fastlt.run.network_checks import advice_on_network
from fastlt.run.predictions import Predictions, write_predictions
from fastlt.run.preflight import check_model
from fastlt.run.progress import Progress, Stopwatch, TimeLeft
from fastlt.run.result import circumstances, make_result, set_aside_result
from fastlt.run.saving import Checkpoints
from fastlt.run.stage import Stage, build_stage, new_model, planned, prepare_model
from fastlt.run.stopping import Interrupted, Stopping, WaitedInVain
from fastlt.run.trackers import Trackers
from fastlt.state import Batch, StepOutput
from loaders.stored.damage import ReaderError


class Trainer:
    """Trains what a recipe describes.

    context: of `prepare`. stopping: how it stops before its end; by default as a process of its own does.
    Mistakes that only the network and the last checkpoint can show are refused while the trainer is made, by a
    ValueError for the user; afterwards `fit` trains.
    """

    def __init__(self, context: RunContext, stopping: Stopping | None = None) -> None:
        self.context = context
        self.model = new_model(context)
        check_model(context, self.model)
        for line in [*unlike_model(context.recipe), *advice_on_network(context.recipe, self.model)]:
            context.say(line)
        self.log, self.trackers = RunLog(log_file(context.folder), enabled=context.main), Trackers(context)
        self.class_history = ClassHistory(class_history_file(context.folder), enabled=context.main)
        if context.recipe.data.cached_views is not None:
            context = self.context = replace(context, features=compute_features(context, self.model))
        self.stopping = stopping or Stopping(context)
        self.evaluation = Evaluation(context, self.stopping.waited)
        self.checkpoints = Checkpoints(context)
        self.saved = self.checkpoints.load_last()
        if self.saved is not None:
            check_frozen_part(self.model, self.saved.shared)
        self.progress = Progress() if self.saved is None else self.saved.progress
        others = self.progress.begin_part(circumstances(context), [] if self.saved is None else self.saved.changes)
        if others:
            context.say(f"last bits may differ from a run without a stop (before and now): {'; '.join(others)}")
        self.stopwatch = Stopwatch(self.progress)
        tested, validated = (len(context.dataset.labels(split)) for split in ("test", "meta"))
        # The test split is measured twice, with the last model and the best one, and then the validation split once.
        self.time_left = TimeLeft(self.progress, planned(context), 2 * tested / validated + 1)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.context.folder

    def fit(self) -> dict[str, Any]:
        """Train all stages, resuming where the run folder says, then measure the test split once.

        Returns the content of `result.json`. Raises Interrupted after SIGINT or SIGTERM, with a checkpoint saved;
        FloatingPointError when the loss or the state is no longer finite; RunFileError, with all that was saved before
        whole. Afterwards the run folder has no owner.
        """
        try:
            return self._fit()
        finally:
            self.checkpoints.close()
            self.log.close()
            self.class_history.close()
            self.trackers.finish()
            unlock_folder(self.folder)

    def _fit(self) -> dict[str, Any]:
        context, recipe = self.context, self.context.recipe
        names = list(recipe.stages)
        advice = why_neighbours_slow() if context.device.type == "cpu" else None
        if advice is not None and context.main:
            tqdm.write(advice, file=sys.stderr)
        on_main(context.accelerator, self._write_begin)
        on_main(context.accelerator, self._open_logs)
        self.trackers.start(self.progress.done)
        for done in recipe.lineage(recipe.stages[names[self.progress.stage]])[:-1]:
            self.model = prepare_model(context, self.model, done)
        with self.stopping.on_signals():
            for index in range(self.progress.stage, len(names)):
                goes_on = index > 0 and recipe.stages[names[index]].start == "previous"
                if goes_on and self.progress.iteration == 0:
                    self.load_selected(names[index - 1])
                self._run_stage(names[index])
                self.progress.next_stage()
        with self.stopwatch.aside("testing"):
            measured = self._test(names[-1])
        self.evaluation.close()
        result = make_result(context, self.progress, measured)
        self.trackers.log("test", list(measured.values())[-1]["test"], self.progress.done)
        on_main(context.accelerator, lambda: write_json(result_file(context.folder), result))
        on_main(context.accelerator, lambda: save_run_model(context))
        context.processes.close()
        context.accelerator.end_training()
        return result

    def load_selected(self, stage: str) -> None:
        """Give the model the weights that a stage ended with, by its `select`."""
        self.checkpoints.load_model(self.context.recipe.stages[stage].select, stage, self.model)

    def _test(self, stage: str) -> dict[str, dict[str, Any]]:
        """The test split measured with the last, the best and the selected model of a stage, which the model is then.

        Returns of each, by its `select`, "top1" and "iteration" of its validation, and "test", the metrics. Writes what
        the selected model predicts.
        """
        selected = self.context.recipe.stages[stage].select
        measured: dict[str, dict[str, Any]] = {}
        predicted: dict[str, Predictions] = {}
        for select in sorted(("last", "best", selected), key=selected.__eq__):  # the selected one at the end
            if select in measured:
                continue
            model = self.checkpoints.load_model(select, stage, self.model)
            same = next((s for s, m in measured.items() if m["iteration"] == model["iteration"]), None)
            if same is None:
                metrics, predicted[select] = self._predict_test(select, stage)
            else:
                metrics, predicted[select] = measured[same]["test"], predicted[same]
            measured[select] = {**model, "test": metrics}
        _, validation = self.evaluation.predict(self.model, "meta")
        splits = {"test": predicted[selected], "meta": validation}
        on_main(self.context.accelerator, lambda: write_predictions(predictions_file(self.folder), splits))
        return measured

    def _predict_test(self, select: str, stage: str) -> tuple[dict[str, Any], Predictions]:
        """The test split measured with the loaded model of a stage, and what it predicts.

        The metrics of the weights that were kept beside it are among those of the model, see `prefixed`.
        """
        recipe = self.context.recipe.stages[stage]
        metrics, predictions = self.evaluation.predict(self.model, "test", recipe.eval_adjustment)
        if recipe.ema is None:
            return metrics, predictions
        self.checkpoints.load_model(select, stage, self.model, recipe.ema.beside)
        others = self.evaluation.evaluate(self.model, "test", adjustment=recipe.eval_adjustment)
        self.checkpoints.load_model(select, stage, self.model)
        return metrics | prefixed(recipe.ema.beside, others), predictions

    def _write_begin(self) -> None:
        """What a run folder says before the first iteration, and whenever the run goes on."""
        context = self.context
        set_aside_result(context)
        write_atomically(recipe_file(context.folder), context.recipe.to_yaml().encode())
        write_json(inputs_file(context.folder), context.inputs.to_tree())

    def _open_logs(self) -> None:
        self.log.open(self.progress.done)
        self.class_history.open(self.progress.done)

    def build_stage(self, name: str, backends: Mapping[str, str] | None = None, *, new_head: bool = False) -> Stage:
        """Give the model the form that a stage trains, and make what trains it. The caller closes the loaders.

        backends: see `StageLoaders`. new_head: whether the head begins as `model.head_init` says.
        """
        self.model = prepare_model(self.context, self.model, self.context.recipe.stages[name])
        init = self.context.recipe.model.head_init
        if new_head and init is not None:
            self.stopwatch.start()
            init_head(self.model.head, init, lambda: self.evaluation.class_means(self.model), self._read_rows)
            self.stopwatch.lap()
        return build_stage(
            self.context,
            name,
            self.model,
            training_images=self.evaluation.training_images,
            backends=backends,
        )

    def _read_rows(self, path: str) -> Tensor:
        return from_main(self.context.accelerator, lambda: read_rows(path))

    def _run_stage(self, name: str) -> None:
        try:
            stage = self._start_stage(name)
            bar = StageBar(
                stage.iterations, self.progress.iteration, name, self.time_left.__str__, enabled=self.context.main
            )
            try:
                self._iterate(stage, bar)
                # Also by a run that resumes here: it may have been stopped before this.
                self.checkpoints.save_model("last", name, stage.models, self.progress)
                self.checkpoints.finish()
                stop, _ = self.stopping.agreed(False, log_now=True)
                if stop:  # while the end was validated or saved
                    raise Interrupted(stop, self.progress.iteration, name)
            finally:
                bar.close()
                self.time_left.end()
                stage.loaders.close()
        except (WaitedInVain, ReaderError):
            if not self.stopping.received:
                raise
            raise Interrupted(self.stopping.received, self.progress.iteration, name) from None

    def _start_stage(self, name: str) -> Stage:
        """A stage before its first iteration, or where it was saved."""
        saved, self.saved = self.saved, None  # its tensors are let go of with this function
        recipe = self.context.recipe
        new = saved is None and len(recipe.lineage(recipe.stages[name])) == 1
        with self.stopping.waiting():  # a loader may read a whole split into memory
            stage = self.build_stage(name, None if saved is None else saved.backends, new_head=new)
        if saved is not None:
            saved.restore(stage.step, stage.average)
        elif stage.step.needs.first_pass:
            self.stopwatch.start()
            self.evaluation.first_pass(stage.step)
            self.stopwatch.lap()
        stage.step.train_mode()
        about = f"{stage.recipe.method}, {stage.recipe.loss}, {stage.iterations} iterations"
        self.context.say(f"stage {name}: {about}; loader {stage.loaders.train.reason}")
        for advice in stage.step.advice():
            self.context.say(f"stage {name}: {advice}")
        return stage

    def _iterate(self, stage: Stage, bar: StageBar) -> None:
        """The iterations of a stage that are left."""
        progress, stopwatch, train, meta = self.progress, self.stopwatch, stage.loaders.train, stage.loaders.meta
        batches = self.stopping.waited(stopwatch.timed(endless(train, progress.iteration)))
        meta_batches = None if meta is None else self.stopping.waited(endless(meta, progress.iteration))
        iterate = output = None
        stopwatch.start()
        while progress.iteration < stage.iterations:
            try:
                batch = next(batches)
                meta_batch = None if meta_batches is None else next(meta_batches)
            except (WaitedInVain, ReaderError):
                # Several processes would have to agree first.
                if self.stopping.received and output is not None and self.context.reducer.world_size == 1:
                    self._check_finite(stage, output)
                    self._save_last(stage)
                    self.checkpoints.finish()
                raise
            stage.begin(progress.iteration)
            if iterate is None:
                iterate = self.compiled(stage, batch, meta_batch)
            output = iterate(batch, meta_batch)
            progress.count(len(batch) * self.context.reducer.world_size)
            stage.end(progress.iteration)
            at_end = progress.iteration == stage.iterations
            log_now = at_end or progress.iteration % self.context.recipe.log_every == 0
            if log_now:
                self._log_training(stage, output, bar)
            stopwatch.lap()
            if self.time_left.began is None:
                self.time_left.begin()
            bar.update()
            # Asked once: between two questions a signal could come that ends the run without a checkpoint.
            stop, save_is_due = self.stopping.agreed(self.checkpoints.due(), log_now=log_now)
            evaluate = at_end or progress.iteration % stage.evaluate_every == 0
            if evaluate or stop or save_is_due:
                self._check_finite(stage, output)
            if evaluate:
                with self.time_left.evaluating(), stopwatch.aside("validating"):
                    self._validate(stage, output)
            if evaluate or stop or save_is_due:
                with stopwatch.aside("saving"):
                    self._save_last(stage)
            if stop:
                self.checkpoints.finish()
                raise Interrupted(stop, progress.iteration, stage.name)
            stopwatch.start()

    def compiled(self, stage: Stage, batch: Batch, meta_batch: Batch | None) -> Callable[..., StepOutput]:
        """The function that runs an iteration: the step, or the step compiled on its first batches.

        Compiling leaves no trace: these batches are trained on afterwards.
        """
        if self.context.compile == "none":
            return stage.step
        self.stopwatch.lap()
        with self.stopwatch.aside("compiling"):
            started = time.perf_counter()
            iterate, reason = ready(stage.step, batch, meta_batch)
            took = f"compiled in {time.perf_counter() - started:.0f} s"
            self.context.say(f"stage {stage.name}: {took if reason is None else f'not compiled: {reason}'}")
        return iterate

    def _log_training(self, stage: Stage, output: StepOutput, bar: StageBar) -> None:
        """The one place in the loop that waits for the device."""
        loss, lr = self._finite_loss(stage, output), float(stage.step.lr)
        self.stopwatch.lap()
        progress = self.progress
        metrics = {k: v.item() for k, v in output.metrics.items()}
        if "weight" in output.per_class:
            progress.class_weights = output.per_class["weight"].detach().clone()
            metrics |= weight_means(progress.class_weights, self.context.counts)
        wait, iteration_s = progress.data_wait_share, self.time_left.iteration_s()
        shown = {"loss": f"{loss:.3f}", "lr": f"{lr:.3g}", "wait": f"{100 * wait:.1f}%"}
        if iteration_s is not None:
            shown["img_s"] = f"{stage.recipe.batch_size / iteration_s:.0f}"
        bar.set_postfix(shown, refresh=False)
        values = {"loss": loss, "lr": lr, "img_s": progress.img_s, "data_wait_share": wait, **metrics}
        self.log.write("train", progress.done, stage=stage.name, **values)
        self.trackers.log("train", values, progress.done)

    def _validate(self, stage: Stage, output: StepOutput) -> None:
        """Measure the validation split, and keep the model where it may be the stage's."""
        progress, values, adjustment = self.progress, {}, stage.recipe.eval_adjustment
        for name, model in stage.models.items():
            metrics = self.evaluation.evaluate(model, "meta", adjustment=adjustment)
            values |= prefixed(name, metrics) if values else metrics
        accuracy = values.pop("per_class_accuracy")
        per_class = {name: value.tolist() for name, value in output.per_class.items()}
        if values["ece"] is None:
            raise self._diverged(stage, ["outputs of the network for the validation split"])
        self.log.write("evaluation", progress.done, stage=stage.name, split="meta", **values)
        self.class_history.write(progress.done, stage.name, {"accuracy": accuracy, **per_class})
        self.trackers.log("validation", values, progress.done)
        self.trackers.log_per_class(per_class, progress.done)
        at_end = progress.iteration == stage.iterations
        for select in progress.validated(values["top1"], at_end=at_end):
            if select in ("best", stage.recipe.select):
                self.checkpoints.save_model(select, stage.name, stage.models, progress)
        groups = "  ".join(f"{k} {percent(values[k])}" for k in ("top1", "many", "medium", "few"))
        self.context.say(f"{stage.name} {progress.iteration}: validation {groups}")

    def _save_last(self, stage: Stage) -> None:
        self.checkpoints.save_last(stage.name, stage.step, self.progress, stage.loaders.backends, stage.average)

    def _check_finite(self, stage: Stage, output: StepOutput) -> None:
        """FloatingPointError, on every process, unless the loss and all that a checkpoint would hold are finite."""
        self._finite_loss(stage, output)
        places = not_finite(stage.step.state_dict(), self.context.reducer, self.context.device)
        if places:
            raise self._diverged(stage, places)

    def _finite_loss(self, stage: Stage, output: StepOutput) -> float:
        """The loss as a number; FloatingPointError when it is not finite.

        It is the mean over processes: if one of them gave up alone, the others would wait for it.
        """
        mean = output.loss.detach().clone()
        self.context.reducer.mean_([mean])
        loss = mean.item()
        if not math.isfinite(loss):
            raise self._diverged(stage, [f"loss ({loss})"])
        return loss

    def _diverged(self, stage: Stage, places: list[str]) -> FloatingPointError:
        """The error for a run whose numbers are not finite any more; recorded for whoever goes on with it."""
        self.checkpoints.finish()  # a checkpoint that is written removes the record
        divergence = Divergence(stage.name, self.progress.iteration, places[:3])
        on_main(self.context.accelerator, lambda: divergence.write(self.folder))
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        lower = f"stages.{stage.name}.lr={stage.recipe.lr / 4:g}"
        return FloatingPointError(
            f"not finite after iteration {divergence.iteration} of stage {stage.name}: "
            f"{', '.join(divergence.places)}{more}. {self.checkpoints.standing()}. "
            f"Go on by the same command with a lower learning rate, such as {lower}"
        )
