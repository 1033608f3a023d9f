"""A run from the recipe to the result: what it leaves, how it resumes, and how it refuses."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from short_runs import RECIPE, STAGE, assert_same, comparable, log_lines, make, stop_after

from fastlt.recipe import load_recipe
from fastlt.run import dataset
from fastlt.run.class_history import read_class_history
from fastlt.run.folder import stage_checkpoint
from fastlt.run.loading import endless
from fastlt.run.log import RunLog, result_table
from fastlt.run.preflight import prepare
from fastlt.run.result import recorded_result
from fastlt.run.saving import Checkpoints
from fastlt.run.stopping import Interrupted, Stopping
from fastlt.run.trainer import Trainer
from fastlt.steps import learned_weights
from fastlt.train import main
from loaders.stored.beton import Beton

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("backend", ["resident", "ffcv", "torch"])
def test_a_run_leaves_all_that_a_reader_needs(digits_words, backend):
    trainer = make(digits_words, f"data.loader={backend}")
    result = trainer.fit()
    folder = trainer.folder
    assert json.loads((folder / "result.json").read_text()) == result
    for key in ("top1", "top5", "many", "medium", "few", "macro_f1", "ece", "per_class_accuracy"):
        assert key in result, key
    for key in ("class_counts", "shots", "seed", "versions", "img_s", "class_weights", "validation_top1"):
        assert key in result, key
    assert math.isclose(sum(result["class_weights"]), 10, rel_tol=1e-4)
    assert load_recipe(folder / "recipe.yaml") == trainer.context.recipe
    lines = log_lines(folder)
    assert [line["iteration"] for line in lines if line["kind"] == "train"] == list(range(1, 13))
    assert [line["iteration"] for line in lines if line["kind"] == "evaluation"] == [6, 12]
    table = result_table(result, trainer.context.counts)
    assert "many-shot" in table
    assert all(name in table for name in trainer.context.counts.names)


@pytest.mark.parametrize(
    "more",
    [
        ["data.loader=resident"],
        ["data.loader=ffcv"],
        [f"{STAGE}.accuracy.refresh=rolling", f"{STAGE}.accuracy.window=5"],
        [f"{STAGE}.accuracy.refresh=epoch", "model.drop_rate=0.3"],
        [f"{STAGE}.method=cdb", f"{STAGE}.accuracy.refresh=epoch"],
        [f"{STAGE}.method=plain", f"{STAGE}.loss=balanced_softmax", "data.augment=[{random_crop: {padding: 1}}, flip]"],
        [f"{STAGE}.method=cutmix", f"{STAGE}.loss=balanced_softmax"],
        # What starts with the second of the two epochs: the run is stopped in the middle of it.
        [
            f"{STAGE}.method=plain",
            f"{STAGE}.loss=ldam",
            f"{STAGE}.loss_options.reweight_from_epoch=1",
            "model.head=cosine",
        ],
        [f"{STAGE}.loss=class_balanced", f"{STAGE}.loss_options.from_epoch=1"],
        [f"{STAGE}.method=plain", f"{STAGE}.loss=equalization", f"{STAGE}.loss_options.threshold=0.1"],
    ],
    ids=["resident", "ffcv", "rolling", "epoch-dropout", "cdb", "plain", "cutmix", "drw", "difficulty-drw", "eql"],
)
def test_resumed_and_uninterrupted_runs_agree_bit_for_bit(digits_words, more):
    whole = make(digits_words, *more, "name=whole")
    whole.fit()
    stopped = stop_after(make(digits_words, *more, "name=stopped"), 8)
    with pytest.raises(Interrupted):
        stopped.fit()
    assert not (stopped.folder / "result.json").exists()
    resumed = make(digits_words, *more, "name=stopped")
    resumed.fit()
    assert_same(comparable(whole.folder), comparable(resumed.folder))
    kept = [[line["loss"] for line in log_lines(f) if line["kind"] == "train"] for f in (whole.folder, resumed.folder)]
    assert kept[0] == kept[1]


def test_a_resumed_run_keeps_the_loader_that_auto_chose(digits_words, monkeypatch, capsys):
    """Random crops of images of one size are `resident`'s augmentation's, and the others' own: other random numbers."""
    words = [*digits_words, "data.loader=auto", "data.train_crop=random_resized", "data.augment=[flip]"]
    whole = make(words, "name=whole")
    whole.fit()
    stopped = stop_after(make(words, "name=stopped"), 8)
    with pytest.raises(Interrupted):
        stopped.fit()
    capsys.readouterr()
    monkeypatch.setattr("loaders.factory.free_share", lambda device, processes: 1000)
    resumed = make(words, "name=stopped")
    resumed.fit()
    assert "loader resident: chosen when the stage began" in capsys.readouterr().out
    assert_same(comparable(whole.folder), comparable(resumed.folder))


def test_cdb_weights_are_uniform_until_an_epoch_has_been_trained(digits_words):
    trainer = make(
        digits_words,
        *(f"{STAGE}.method=cdb", f"{STAGE}.accuracy.refresh=epoch", f"{STAGE}.options={{}}", f"{STAGE}.batch_size=128"),
        *(f"{STAGE}.iterations=6", f"{STAGE}.evaluate_every=3"),
    )
    trainer.fit()
    records, _ = read_class_history(trainer.folder / "class_history.npy")
    first, second = (record.values["weight"] for record in records)
    assert first.tolist() == [1.0] * 10
    assert len(set(second.tolist())) > 1


def test_a_killed_run_forgets_what_it_logged_after_its_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, enabled=True)
    log.open(0)
    for iteration in range(1, 6):
        log.write("train", iteration, loss=1.0)
    log.close()
    path.write_text(path.read_text() + '{"kind": "train", "iter')
    log.open(3)
    log.write("train", 4, loss=2.0)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["iteration"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_a_lean_run_says_once_what_keeps_it_from_saving_memory(digits_words, capsys, monkeypatch):
    for malloc, said in (("glibc 2.36", 1), ("tcmalloc", 0)):
        monkeypatch.setattr("fastlt.device.host_memory.allocator", lambda malloc=malloc: malloc)
        make(digits_words, f"{STAGE}.options.lean=true", f"name={malloc.split()[0]}").fit()
        out = capsys.readouterr().out
        assert out.count("options.lean: memory comes from glibc 2.36") == said
        assert out.count("LD_PRELOAD=") == said


def test_a_lean_step_on_a_gpu_has_nothing_to_say_about_malloc(monkeypatch):
    monkeypatch.setattr(learned_weights, "why_holes_stay", lambda: "memory comes from glibc 2.36")
    for device, advice in (("cpu", 1), ("meta", 0)):
        step = object.__new__(learned_weights.LearnedWeightStep)
        step.lean, step.parameters = True, [torch.empty(1, device=device)]
        step.parts = SimpleNamespace(class_accuracy=None)
        assert len(step.advice()) == advice


def test_a_finished_run_is_not_run_again(digits_words, capsys):
    first = make(digits_words).fit()
    assert recorded_result(prepare(load_recipe(RECIPE, digits_words))) == first
    assert "finished" in capsys.readouterr().out
    assert main([str(RECIPE), *digits_words]) == 0
    out = capsys.readouterr().out
    assert "finished" in out
    assert "many-shot" in out
    assert "iterations" not in out, "nothing is trained"


def test_two_stages_keep_their_models(digits_words):
    second = "{method: plain, loss: balanced_softmax, iterations: 4, batch_size: 32, lr: 0.01, evaluate_every: 2}"
    trainer = make(digits_words, f"stages.second={second}")
    result = trainer.fit()
    assert result["iterations"] == 16
    assert {line["stage"] for line in log_lines(trainer.folder)} == {"end_to_end", "second"}
    names = sorted(p.name for p in (trainer.folder / "checkpoints").iterdir())
    kept = {f"{kind}_{stage}.pt" for kind in ("best", "final") for stage in ("end_to_end", "second")}
    assert {name.removesuffix(".1") for name in names} == {*kept, "last.pt"}


def run_with_scores(words, scores):
    """A run whose validations give `scores`; returns it, its result, and the splits that were measured."""
    trainer, seen = make(words, f"{STAGE}.iterations={len(scores)}", f"{STAGE}.evaluate_every=1"), []
    evaluate, left = trainer.evaluation.evaluate, list(scores)

    def scored(model, split, *recorder, **adjustment):
        seen.append(split)
        return {
            **evaluate(model, split, *recorder, **adjustment),
            **({"top1": left.pop(0)} if split == "meta" and left else {}),
        }

    trainer.evaluation.evaluate = scored
    return trainer, trainer.fit(), seen


@pytest.mark.parametrize(("select", "iteration", "top1"), [("last", 6, 0.4), ("best", 2, 0.9), ("smoothed", 4, 0.7)])
def test_the_selected_model_is_the_result_and_is_tested_beside_last_and_best(digits_words, select, iteration, top1):
    scores = [0.1, 0.9, 0.2, 0.7, 0.6, 0.4]  # means of three: 0.40, 0.60, 0.50, 0.57 at iterations 3 to 6
    trainer, result, seen = run_with_scores([*digits_words, f"{STAGE}.select={select}"], scores)
    assert seen == ["meta"] * 6 + ["test"] * len({"last", "best", select}) + ["meta"]  # for its predictions
    assert (result["select"], result["selected_iteration"], result["validation_top1"]) == (select, iteration, top1)
    assert set(result["selection"]) == {"last", "best", select}
    chosen = result["selection"][select]
    assert chosen["validation_top1_se"] == pytest.approx((top1 * (1 - top1) / 100) ** 0.5)
    assert (result["top1"], result["many"]) == (chosen["top1"], chosen["many"])
    assert result["selection"]["best"]["iteration"] == 2
    # What was tested is what is kept, and what a later stage would begin with.
    file = stage_checkpoint(trainer.folder, select, "end_to_end")
    saved = torch.load(file, weights_only=True)
    assert saved["iteration"] == iteration
    assert all(torch.equal(saved["model"][k], v) for k, v in trainer.model.state_dict().items())


def test_one_model_that_is_last_and_best_is_tested_once(digits_words):
    _, result, seen = run_with_scores(digits_words, [0.5, 0.6, 0.6])  # of equals, the later
    assert seen == ["meta", "meta", "meta", "test", "meta"]
    assert result["selection"]["last"] == result["selection"]["best"]


LARGER = ["data.image_size=12", "data.eval_crop=center"]
REFUSED = [
    (["data.num_classes=11"], "num_classes is 11"),
    ([f"{STAGE}.batch_size=100000"], "batch_size is 100000, but the train split has"),
    (["trackers=[comet_ml]"], "not installed"),
    (["trackers=[nonsense]"], "nonsense"),
    ([f"{STAGE}.meta_batch_size=101"], "meta_batch_size is 101, but the meta split has 100"),
    (
        ["data.image_size=12"],
        r"data\.augment: random_crop: images of 8x8 with padding 1 are smaller than image",
    ),
    (
        ["data.meta_augment=[{random_crop: {padding: 1}}]", "data.augment=[{random_crop: {padding: 3}}]", *LARGER],
        r"data\.meta_augment: random_crop: images of 8x8 with padding 1",
    ),
    (["data.augment=[flip]", "data.image_size=12"], r"image_size is 12, but the images of the train split .* 8x8"),
    (["data.image_size=7"], r"image_size is 7, but the images of the meta split .* 8x8; .* data\.eval_crop=center"),
    (["data.loader=resident_jpeg"], "train.beton holds raw pixels"),
]


@pytest.mark.parametrize(("words", "expected"), REFUSED)
def test_what_only_the_data_set_can_tell_is_refused_before_work(digits_words, words, expected):
    with pytest.raises(ValueError, match=expected):
        make(digits_words, *words)


def test_a_loader_that_has_no_room_is_refused_before_work(digits_words, monkeypatch):
    monkeypatch.setattr("loaders.readers.free_memory.free_bytes", lambda device: 431 * 8 * 8 * 3 - 1)
    with pytest.raises(ValueError, match=r"train.beton: its pixels take 0\.1 MiB, and .* free on cpu: .* 'auto'"):
        make(digits_words)


def test_an_absent_dali_is_refused_before_work(digits_words, tmp_path, monkeypatch):
    # As `import` finds a package that is not installed.
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.delitem(sys.modules, "loaders.readers.dali_loader", raising=False)
    words = [*digits_words, f"data.converted={tmp_path / 'both'}", "data.loader=dali"]
    with pytest.raises(ValueError, match="need NVIDIA DALI, which cannot be imported"):
        make(words)


def test_a_crop_that_is_too_large_gets_one_message_and_code_2(digits_words, capsys):
    assert main([str(RECIPE), *digits_words, "data.image_size=12"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastlt: data.augment: random_crop: images of 8x8")
    assert len(error.splitlines()) == 1


def test_a_folder_with_another_run_is_refused(digits_words):
    make(digits_words).fit()
    with pytest.raises(ValueError, match=r"end_to_end\.lr: 0\.1 and 0\.05"):
        make(digits_words, f"{STAGE}.lr=0.05")
    with pytest.raises(ValueError, match="resume is never"):
        make(digits_words, "resume=never")


def test_a_large_source_without_its_conversion_is_refused_with_the_command(tmp_path, capsys):
    words = [f"data.converted={tmp_path / 'none'}", f"data.root={tmp_path}", f"runs={tmp_path}"]
    assert main([str(ROOT / "recipes" / "imagenet_lt.yaml"), *words]) == 2
    assert "fastlt convert list_file" in capsys.readouterr().err


class ReducerOfTwo:
    """Stands in for two processes of which the other one got signal 15 and finds a checkpoint due."""

    world_size = 2
    asked = 0

    def gather(self, own):
        self.asked += 1
        return torch.cat([own, torch.tensor([[15, 1]])])


def test_processes_agree_on_stopping_and_saving_at_log_intervals_only(digits_words):
    context = prepare(load_recipe(RECIPE, digits_words))
    stopping, checkpoints = Stopping(context), Checkpoints(context)
    assert stopping.agreed(checkpoints.due(), log_now=False) == (0, False)
    checkpoints.last_saved = -math.inf
    assert stopping.agreed(checkpoints.due(), log_now=False) == (0, True), "alone, there is nobody to ask"
    checkpoints.last_saved, reducer = math.inf, ReducerOfTwo()
    stopping = Stopping(replace(context, reducer=reducer))
    assert stopping.agreed(checkpoints.due(), log_now=False) == (0, False)
    assert reducer.asked == 0
    assert stopping.agreed(checkpoints.due(), log_now=True) == (15, True)


def test_a_signal_ends_the_wait_for_a_loader_that_does_not_open(digits_words, monkeypatch):
    """As of one that reads a whole split into memory, from a disk that does not answer."""
    monkeypatch.setattr("fastlt.run.stopping.WAIT_S", 0.5)

    def stuck(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError("the wait was not ended")

    monkeypatch.setattr("fastlt.run.trainer.build_stage", stuck)
    with pytest.raises(Interrupted) as stopped:
        make(digits_words).fit()
    assert stopped.value.signal == signal.SIGTERM


def test_a_signal_while_the_end_is_validated_stops_before_the_test(digits_words, monkeypatch):
    validate = Trainer._validate

    def signalled(self, stage, output):
        validate(self, stage, output)
        if self.progress.iteration == stage.iterations:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", signalled)
        with pytest.raises(Interrupted) as stopped:
            make(digits_words, "name=ended").fit()
    assert stopped.value.signal == signal.SIGTERM
    resumed = make(digits_words, "name=ended")
    assert not (resumed.folder / "result.json").exists()
    result = resumed.fit()
    whole = make(digits_words, "name=whole")
    assert result["per_class_accuracy"] == whole.fit()["per_class_accuracy"]
    assert_same(comparable(resumed.folder), comparable(whole.folder))


def test_a_signal_ends_the_wait_for_a_batch_that_never_comes_and_nothing_is_lost(digits_words, monkeypatch):
    """The source of images stops to answer in the eighth iteration; later the same run goes on to the same result."""
    monkeypatch.setattr("fastlt.run.stopping.WAIT_S", 0.5)

    def stuck(loader, start):
        yield from itertools.islice(endless(loader, start), 7)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError("the wait was not ended")

    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr("fastlt.run.trainer.endless", stuck)
        with pytest.raises(Interrupted) as stopped:
            make(digits_words, "name=stuck").fit()
    assert stopped.value.signal == signal.SIGTERM
    assert time.monotonic() - start < 30
    resumed = make(digits_words, "name=stuck")
    assert resumed.progress.iteration == 7, "saved where it waited"
    resumed.fit()
    whole = make(digits_words, "name=whole")
    whole.fit()
    assert_same(comparable(resumed.folder), comparable(whole.folder))


@pytest.mark.parametrize(
    ("recipe", "stage", "low"),
    [("fp32", None, False), ("bf16", None, True), ("fp32", "bf16", True), ("bf16", "fp32", False)],
)
def test_the_meta_set_is_scored_in_the_precision_that_the_stage_says(digits_words, recipe, stage, low):
    trainer = make(digits_words, f"precision={recipe}", f"{STAGE}.accuracy.precision={stage or 'null'}")
    stage = trainer.build_stage("end_to_end")
    with trainer.context.autocast(), stage.step.parts.class_accuracy.autocast():
        assert torch.is_autocast_enabled("cpu") == low
    stage.loaders.close()


def test_bfloat16_trains(digits_words):
    result = make(digits_words, "precision=bf16").fit()
    assert result["precision"] == "bf16"
    assert 0 <= result["top1"] <= 1


class Counting:
    """A loader of three batches an epoch, each its own name."""

    def __len__(self):
        return 3

    def epoch(self, epoch, first_batch=0):
        return ((epoch, b) for b in range(first_batch, 3))


def test_endless_goes_on_from_any_batch():
    stream = endless(Counting(), 0)
    whole = [next(stream) for _ in range(10)]
    for start in range(7):
        stream = endless(Counting(), start)
        assert [next(stream) for _ in range(3)] == whole[start : start + 3]


def command(*words):
    return [sys.executable, str(ROOT / "fastlt" / "train.py"), *map(str, words)]


def test_the_command_answers_a_mistake_with_one_message_and_code_2(tmp_path):
    done = subprocess.run(command(RECIPE, "sede=1"), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean seed" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_check_may_stand_anywhere_among_the_words(capsys, tmp_path):
    words = [str(RECIPE), "seed=5", f"{STAGE}.lr=0.2", f"runs={tmp_path}"]
    for position in range(len(words) + 1):
        assert main([*words[:position], "--check", *words[position:]]) == 0
        printed = capsys.readouterr().out
        assert "seed: 5" in printed
        assert "lr: 0.2" in printed


def test_data_that_may_not_be_read_are_a_message(tmp_path, capsys, monkeypatch):
    def denied(data, folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(dataset, "ensure_converted", denied)
    assert main([str(RECIPE), f"runs={tmp_path}", f"data.converted={tmp_path / 'data'}"]) == 2
    assert capsys.readouterr().err == f"fastlt: {tmp_path / 'data'}: Permission denied\n"


@pytest.mark.parametrize(
    ("name", "loader"),
    [("labels.npz", "ffcv"), ("train.beton", "ffcv"), ("train.beton", "torch"), ("train.beton", "resident")],
)
def test_a_damaged_data_set_is_one_message_and_exit_code_2(tmp_path, capsys, monkeypatch, name, loader):
    """Whether the damage is seen before the work begins or by the loader in the middle of it."""
    monkeypatch.setattr("loaders.stored.dataset.SMALL_BYTES", 0)  # a large one is not read before
    folder = tmp_path / "data"
    words = [f"runs={tmp_path}", f"data.converted={folder}", "data.storage.mode=jpg", f"data.loader={loader}"]
    words += [f"{STAGE}.iterations=30", f"{STAGE}.warmup=1", f"{STAGE}.evaluate_every=30", "num_threads=1"]
    make(words)
    data = bytearray((folder / name).read_bytes())
    if name == "train.beton":
        beton = Beton(folder / name)
        data[beton.offsets[7] : beton.offsets[7] + 200] = bytes(200)
        reason = f"fastlt: {folder / name}, image 7: damaged JPEG data"
    else:
        data[len(data) // 3] ^= 1
        reason = f"fastlt: {folder} is damaged: {name} cannot be read"
    status = (folder / name).stat()
    (folder / name).write_bytes(data)
    os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns))  # the disk rots without a time of change
    assert main([str(RECIPE), *words]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastlt: ")]
    assert len(error) == 1
    assert error[0].startswith(reason)


@pytest.mark.parametrize(("from_epoch", "told"), [(1, False), (2, True)])
def test_weights_that_never_begin_are_told(digits_words, capsys, from_epoch, told):
    """The stage has 12 iterations of 6 an epoch."""
    loss = [f"{STAGE}.method=plain", f"{STAGE}.loss=ldam", "model.head=cosine"]
    make(digits_words, *loss, f"{STAGE}.loss_options={{reweight_from_epoch: {from_epoch}}}")
    warning = f"{STAGE}.loss_options.reweight_from_epoch is {from_epoch}, and the stage has 2 epochs"
    assert (warning in capsys.readouterr().out) == told
