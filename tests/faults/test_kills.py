"""Runs and conversions that are killed at random moments, again and again, end as if nothing had happened.

After each kill no process, no shared memory and no temporary file may be left, and the same command goes on by itself.
At the end metrics, weights, checkpoints and log lines are those of a run that was left alone, bit for bit.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, Sandbox, sandbox

from fastlt.recipe import load_recipe
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer
from loaders.readers import BACKENDS
from loaders.stored.atomic_folder import kept_images
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.verify import verify

RECIPE = ROOT / "recipes" / "digits_lt.yaml"
LENGTHS = [60, 40]  # iterations of the two stages
ITERATIONS = sum(LENGTHS)
EVERY = 10
TRAINED = {"batch_size": 64, "lr": 0.1, "evaluate_every": EVERY}
FIRST, SECOND = ({**TRAINED, "iterations": length} for length in LENGTHS)
HEAD = {"sampling": "class_balanced", **SECOND}
META = {"meta_batch_size": 100, "warmup": 5, "accuracy": {"refresh": "exact"}}
TAUGHT = {"options": {"experts": ["expert"], "curriculum_epochs": 2}, "accuracy": {"refresh": "epoch"}}
RECIPES = {
    "difficulty, crt": {"features": {"method": "difficulty", **META, **FIRST}, "head": {"method": "crt", **HEAD}},
    "expert, lfme": {
        "expert": {"method": "expert", "classes": "many", **FIRST},
        "student": {"method": "lfme", "start": "fresh", **TAUGHT, **HEAD},
    },
}
SAVED_S = 60.0  # for a training to end its iteration and save
PATIENCE_S = 180.0  # for a moment to come, and for a process to end
SLOW_DISK_S = 0.2
SIGNALS = [signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGINT]
LATEST_S = {"start": 10.0, "opening": 1.0, "iteration": 0.1, "validation": 0.1, "saving": 2 * SLOW_DISK_S}
MOMENTS = ["start"] * 2 + ["opening"] * 3 + ["iteration"] * 7 + ["validation"] * 4 + ["saving"] * 4
ABSENT = "nothing"
OF_ITS_OWN = {"train_s", "wait_s", "img_s", "data_wait_share", "aside_s", "runs"}  # what a run shares with no other


@dataclass(frozen=True)
class Kill:
    """A signal at a moment.

    when: "start" (of the process), "opening" (it has found a checkpoint), "iteration", "validation" (the iteration
        before it is logged), "saving" (a file is half written) or "end" (the last validation is logged).
    at: the iteration, over all stages, that has to be logged first. after_s: waited then.
    """

    when: str
    at: int
    after_s: float
    signal: signal.Signals


@dataclass
class Campaign:
    """What happened to one run or conversion."""

    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def count(self, kill: Kill) -> None:
        self.kills.update([kill.when, kill.signal.name, "kills"])


def planned(number: int, draw: random.Random) -> list[Kill]:
    """Kills that are spread over the whole run, each in another part of it; the last one comes at its end."""
    kills = []
    for i in range(number - 1):
        at = 1 + int((i + draw.random()) * (ITERATIONS - 2) / (number - 1))
        when = draw.choice(MOMENTS) if i else "start"
        if when == "validation":
            at = -(-at // EVERY) * EVERY
        kills.append(Kill(when, at, draw.uniform(0, LATEST_S[when]), draw.choice(SIGNALS)))
    return [*kills, Kill("end", ITERATIONS, draw.uniform(0, 0.5), draw.choice(SIGNALS))]


def words_of(loader: str, recipe: str, data: Path, runs: Path) -> list[str]:
    stages, mode = {"end_to_end": None, **RECIPES[recipe]}, "jpg" if loader == "resident_jpeg" else "raw"
    return [
        *("train", str(RECIPE), f"stages={json.dumps(stages)}", f"data.converted={data}", f"data.loader={loader}"),
        *(f"data.storage.mode={mode}", "data.num_workers=1", "num_threads=1"),
        *(f"runs={runs}", "name=run", "log_every=1", "checkpoint_every_s=0.2"),
    ]


# What a run has left on the disk


def last_logged(folder: Path) -> tuple[int, str]:
    """Iteration and kind of the last whole line of the log."""
    try:
        text = (folder / "log.jsonl").read_text()
    except OSError:
        return 0, ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return (line["iteration"], line["kind"]) if whole and (line := json.loads(whole[-1])) else (0, "")


def flattened(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers, words and tensors in nested containers with their names."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        yield name, value
        return
    for key, part in items:
        if key not in OF_ITS_OWN:
            yield from flattened(part, f"{name}.{key}")


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same, to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and (one == other or (one != one and other != other))


def recorded(folder: Path) -> dict[str, Any]:
    """All that a finished run has recorded, but for OF_ITS_OWN."""
    found = {"result": json.loads((folder / "result.json").read_text())}
    found["log"] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for name in ("class_history.npy", "predictions.npz"):
        found[name] = (folder / name).read_bytes()
    for path in [folder / "checkpoints" / "last.pt", *sorted((folder / "checkpoints").glob("*_*.pt"))]:
        found[path.name] = torch.load(path, weights_only=True)
    return dict(flattened(found))


def differences(folder: Path, reference: Path) -> list[str]:
    """What a run has recorded otherwise than the reference, and the half-written files that are left in it."""
    mine, other = recorded(folder), recorded(reference)
    names = [
        n for n in dict.fromkeys([*mine, *other]) if n not in mine or n not in other or not same(mine[n], other[n])
    ]
    return [f"{n}: {mine.get(n)} and {other.get(n)}" for n in names] + [str(p) for p in folder.rglob("*.part*")]


# Killing


def reached(kill: Kill, folder: Path, box: Sandbox, printed: int) -> bool:
    """Whether the moment of a kill has come. printed: bytes that earlier commands have written to the output."""
    if kill.when == "start":
        return True
    if kill.when == "opening":
        return b"resuming" in box.output_file.read_bytes()[printed:]
    iteration, kind = last_logged(folder)
    if iteration < kill.at:
        return False
    if kill.when == "end":
        return kind == "evaluation"
    return kill.when != "saving" or any(folder.rglob("*.part*"))


def end_at(kill: Kill, box: Sandbox, words: list[str], come: Callable[[int], bool]) -> int | None:
    """Run a command and kill it when its moment has come; its exit code, None when it did not end.

    come: told the bytes of output before this command, whether the moment has come.
    """
    printed = box.output_file.stat().st_size if box.output_file.exists() else 0
    process = box.start(*words, slow_disk_s=SLOW_DISK_S if kill.when == "saving" else 0.0)
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and not come(printed) and time.monotonic() < deadline:
        time.sleep(0.005)
    wake = time.monotonic() + kill.after_s
    while process.poll() is None and time.monotonic() < wake:
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(kill.signal)
    try:
        return process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        return None


def judged(code: int | None, kill: Kill, box: Sandbox, campaign: Campaign) -> None:
    """Count a kill, and note what should not be after it."""
    stopped = [-kill.signal] if kill.signal == signal.SIGKILL else [-kill.signal, 128 + kill.signal]
    if code in stopped:
        campaign.count(kill)
    elif code != 0:  # 0: finished before the signal came
        campaign.problems.append(f"{kill}: exit code {code}: {box.output[-400:]}")
    campaign.problems += [f"{kill}: left {left}" for left in box.leftovers()]
    for path in box.tmp.iterdir():  # told once
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    box.end()


def kill_again_and_again(box: Sandbox, words: list[str], folder: Path, kills: list[Kill]) -> Campaign:
    """Kill a run as planned, then let it finish."""
    campaign = Campaign()
    for kill in kills:
        done, _ = last_logged(folder)
        if kill.when not in ("start", "opening"):
            if done == ITERATIONS:
                kill = Kill("opening", kill.at, kill.after_s, kill.signal)
            elif kill.at <= done:  # the log still has lines from after the checkpoint
                kill = Kill(kill.when, done + 1, kill.after_s, kill.signal)
        code = end_at(kill, box, words, lambda printed, kill=kill: reached(kill, folder, box, printed))
        judged(code, kill, box, campaign)
    code = box.run(*words)
    if code != 0:
        campaign.problems.append(f"the last start: exit code {code}: {box.output[-400:]}")
    campaign.problems += [f"the finished run: left {left}" for left in box.leftovers()]
    return campaign


def test_a_run_that_is_killed_and_stopped_once_ends_as_if_it_had_been_left_alone(digits, tmp_path):
    """The short one: the last start and the reference are trained in this process."""
    words = words_of("resident", "difficulty, crt", digits, tmp_path / "runs")
    folder = tmp_path / "runs" / "run"
    kills = [Kill("iteration", 15, 0.0, signal.SIGKILL), Kill("iteration", 65, 0.0, signal.SIGTERM)]
    with sandbox(tmp_path / "sandbox") as box:
        for kill in kills:
            code = end_at(kill, box, words, lambda printed, kill=kill: reached(kill, folder, box, printed))
            assert code == (-kill.signal if kill.signal == signal.SIGKILL else 128 + kill.signal), box.output
            assert box.leftovers() == []
            assert ITERATIONS > last_logged(folder)[0] >= kill.at
        assert "the same command goes on from there" in box.output
    for runs in (tmp_path / "runs", tmp_path / "reference"):
        train = words_of("resident", "difficulty, crt", digits, runs)
        Trainer(prepare(load_recipe(RECIPE, train[2:]))).fit()
    assert differences(folder, tmp_path / "reference" / "run") == []


@pytest.mark.faults
@pytest.mark.parametrize("loader", BACKENDS)
def test_killed_runs_end_as_if_they_had_been_left_alone(loader, tmp_path, rounds, fault_seed, report_figure):
    """Both recipes at once, each killed every few iterations; the first start converts the digits."""
    each, began = -(-rounds(22) // len(RECIPES)), time.monotonic()

    def work(recipe: str) -> Campaign:
        folder = tmp_path / recipe.replace(", ", "_")
        words = {runs: words_of(loader, recipe, folder / "data", folder / runs) for runs in ("runs", "reference")}
        with sandbox(folder / "sandbox") as box:
            kills = planned(each, random.Random(f"{fault_seed} {loader} {recipe}"))
            campaign = kill_again_and_again(box, words["runs"], folder / "runs" / "run", kills)
            assert box.run(*words["reference"]) == 0, box.output
        if (folder / "runs" / "run" / "result.json").exists():
            campaign.problems += differences(folder / "runs" / "run", folder / "reference" / "run")
        campaign.problems = [f"{recipe}: {problem}" for problem in campaign.problems]
        return campaign

    with ThreadPoolExecutor(len(RECIPES)) as pool:
        campaigns = list(pool.map(work, RECIPES))
    tell(campaigns, began, report_figure)


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
def test_training_does_not_outlive_a_killed_launcher(processes, digits, tmp_path, monkeypatch):
    """Nor do the workers of its loader. It saves a checkpoint first, and the same command goes on from there."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    devices = ["--num_processes", "1"] if processes == 1 else ["--multi_gpu", "--num_processes", "2"]
    words = ["launch", *devices, *words_of("torch", "difficulty, crt", digits, tmp_path / "runs")[1:]]
    folder = tmp_path / "runs" / "run"
    kill = Kill("iteration", 15, 0.0, signal.SIGKILL)
    with sandbox(tmp_path / "sandbox") as box:
        code = end_at(kill, box, words, lambda printed: reached(kill, folder, box, printed))
        assert code == -signal.SIGKILL, box.output
        # Torch's launcher keeps a folder for logs, which nothing removes when it is killed.
        assert [left for left in box.leftovers(SAVED_S) if "/torchelastic_" not in left] == []
        assert "stopped by signal 15" in box.output
        assert box.run(*words) == 0, box.output
    assert (folder / "result.json").exists()


def tell(campaigns: list[Campaign], began: float, report_figure: Callable[[str], None]) -> None:
    """Report the counts; fail when there is any problem."""
    kills, problems = sum((c.kills for c in campaigns), Counter()), [p for c in campaigns for p in c.problems]
    counts = ", ".join(f"{count} {name}" for name, count in sorted(kills.items(), key=lambda item: -item[1]))
    report_figure(f"{counts}; {len(problems)} problems; {(time.monotonic() - began) / 60:.1f} minutes")
    assert not problems, "\n".join(problems)


def same_images(one: ConvertedDataset, other: ConvertedDataset) -> bool:
    """Whether two data sets hold the same files under the same labels, in whatever place of a .beton file."""
    return one.identity(progress=False) == other.identity(progress=False) and verify(one, progress=False) == []


def taken_over(output: str) -> int:
    """How many images the last conversion said that it has taken over; 0 when it said nothing."""
    said = [line for line in output.splitlines() if "are taken over" in line]
    return int(said[-1].split(" of ")[0].replace(",", "")) if said else 0


@pytest.mark.faults
def test_killed_conversions_go_on_where_they_were(tmp_path, rounds, fault_seed, report_figure):
    """Of an image folder, as raw pixels in both formats and as JPEG files in a .beton; killed until each is whole."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 400), ("test", 50)):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (240, 320, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    each = max(1, -(-rounds(60) // 2))
    began = time.monotonic()

    def work(mode: str, kind: str) -> Campaign:
        folder = tmp_path / mode
        moments = random.Random(f"{fault_seed} {mode}")
        words = ["convert", "image_folder", "--root", tmp_path / "images", "--mode", mode, "--format", kind]
        words += ["--max-resolution", "200", "--meta-per-class", "5", "--workers", "2", "--quiet", "--out"]
        campaign, finished = Campaign(), 0
        with sandbox(folder / "sandbox") as box:
            box.run(*words, folder / "reference")
            reference = ConvertedDataset.open(folder / "reference")
            out, partial = folder / "out", folder / "out.partial"
            # One more until it ends by itself, so that the last one is compared, too.
            for number in range(each + 1):
                kept, printed = kept_images(out), box.output_file.stat().st_size
                kill = Kill("converting", 0, moments.uniform(0, 0.8), moments.choice(SIGNALS))
                if number < each:
                    code = end_at(kill, box, [*map(str, words), str(out)], lambda _: any(partial.glob("*")))
                    judged(code, kill, box, campaign)
                elif (code := box.run(*words, out)) != 0 or box.leftovers():
                    campaign.problems.append(
                        f"the last start: exit code {code}, {box.leftovers()}: {box.output[-400:]}"
                    )
                said = taken_over(box.output_file.read_bytes()[printed:].decode())
                # While shards are put together, an image may be in the pieces twice.
                wrong = said > kept if kind == "both" else said not in (0, kept)
                if wrong or (kept and out.exists() and not said):
                    campaign.problems.append(f"{kill}: {kept} images were finished, and {said} are taken over")
                if kept and not kept_images(out) and not out.exists():
                    campaign.problems.append(f"{kill}: of {kept} finished images none is left")
                if out.exists():
                    finished += 1
                    if not same_images(ConvertedDataset.open(out), reference):
                        campaign.problems.append(f"{kill}: the data set does not hold the images that were asked for")
                    shutil.rmtree(out)
                    shutil.rmtree(partial, ignore_errors=True)  # killed after it was renamed
        campaign.kills[f"data sets that were whole in the end, {mode}"] += finished
        return campaign

    with ThreadPoolExecutor(2) as pool:
        campaigns = list(pool.map(work, ("raw", "jpg"), ("both", "ffcv")))
    tell(campaigns, began, report_figure)
