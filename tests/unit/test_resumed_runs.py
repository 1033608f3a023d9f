"""Runs that go on: on the same data and the same recipe, or by the rules; and what is made again of a run folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from short_runs import stop_after

from fastlt import cli, train
from fastlt.recipe import load_recipe
from fastlt.run.evaluation import Evaluation
from fastlt.run.folder import inputs_file, last_checkpoint, log_file, recipe_file, result_file
from fastlt.run.preflight import prepare
from fastlt.run.result import recorded_result
from fastlt.run.stopping import Interrupted
from fastlt.run.trainer import Trainer
from loaders.stored.beton import Beton
from loaders.stored.manifest import sealed

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "digits_lt.yaml"
STAGE = "stages.end_to_end"
SHORT = [
    *("data.loader=resident", "num_threads=1", "log_every=1", f"{STAGE}.method=plain", f"{STAGE}.schedule=constant"),
    *(f"{STAGE}.iterations=8", f"{STAGE}.warmup=0", f"{STAGE}.evaluate_every=4"),
]
TWO = (
    "stages.second={method: plain, loss: balanced_softmax, iterations: 4, batch_size: 32, lr: 0.01, evaluate_every: 2}"
)


@dataclass(frozen=True)
class Place:
    """A folder with a converted data set, a finished run and one that was stopped after 6 of 8 iterations."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def words(self, name: str, *more: str) -> list[str]:
        return [f"data.converted={self.data}", f"runs={self.root / 'runs'}", *SHORT, f"name={name}", *more]

    def prepare(self, name: str, *more: str):
        AcceleratorState._reset_state(reset_partial_state=True)
        return prepare(load_recipe(RECIPE, self.words(name, *more)))

    def trainer(self, name: str, *more: str) -> Trainer:
        return Trainer(self.prepare(name, *more))


@pytest.fixture(scope="module")
def original(digits, tmp_path_factory) -> Place:
    place = Place(tmp_path_factory.mktemp("resumed"))
    shutil.copytree(digits, place.data)
    place.trainer("finished").fit()
    stopped = place.trainer("stopped")
    with pytest.raises(Interrupted):
        stop_after(stopped, 6).fit()
    return place


@pytest.fixture
def place(original, tmp_path) -> Place:
    """A copy elsewhere: every run in it is one whose folder and data were moved."""
    shutil.copytree(original.root, tmp_path / "moved")
    return Place(tmp_path / "moved")


def step_state(folder: Path) -> list[torch.Tensor]:
    """All tensors of what the step saved last."""

    def tensors(part):
        if isinstance(part, torch.Tensor):
            return [part]
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else []
        return [tensor for one in parts for tensor in tensors(one)]

    return tensors(torch.load(last_checkpoint(folder), weights_only=True)["step"])


def assert_same_end(one: Path, other: Path) -> None:
    a, b = step_state(one), step_state(other)
    assert len(a) == len(b) > 0
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rename_class(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["class_names"][3] = "drei"
    (data / "manifest.json").write_text(sealed(manifest))


def change_pixel(data: Path) -> None:
    """As a conversion of other pixels would leave it: with a manifest that fits."""
    path = data / "train.beton"
    beton, content = Beton(path), bytearray(path.read_bytes())
    content[beton.offsets[5]] ^= 1
    path.write_bytes(content)
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["contents"]
    (data / "manifest.json").write_text(sealed(manifest))


def as_saved_by_an_earlier_version(folder: Path) -> None:
    inputs_file(folder).unlink()
    state = torch.load(last_checkpoint(folder), weights_only=True)
    for key in ("inputs", "recipe"):
        del state[key]
    del state["progress"]["parts"]
    for path in last_checkpoint(folder).parent.glob("last.pt*"):
        path.unlink()
    torch.save(state, last_checkpoint(folder))


@pytest.mark.parametrize("known_by", ["inputs.json", "the checkpoint"])
@pytest.mark.parametrize("name", ["finished", "stopped"])
@pytest.mark.parametrize(
    ("change", "what"), [(rename_class, "class 3 is 'drei', it was '3'"), (change_pixel, "they are other images")]
)
def test_other_data_are_refused_before_anything(place, name, change, what, known_by):
    change(place.data)
    if known_by != "inputs.json":
        inputs_file(place.run(name)).unlink()
    before = {path: path.stat().st_mtime_ns for path in place.run(name).rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"began with other data than .*data has now:\n  .*{what}.*\n.*another name="):
        place.prepare(name)
    after = {path: path.stat().st_mtime_ns for path in place.run(name).rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if path.name != ".lock"} == before


def test_a_moved_run_on_moved_data_goes_on_and_ends_as_if_it_had_not_been_stopped(original, place):
    result = place.trainer("stopped", "data.num_workers=1").fit()
    assert_same_end(place.run("stopped"), original.run("finished"))
    assert len(result["parts"]) == 1
    assert result["parts"][0]["from_iteration"] == 0
    assert recorded_result(place.prepare("finished")) is not None


def test_a_run_of_an_earlier_version_goes_on_with_a_line_and_gets_a_record(place, capsys):
    folder = place.run("stopped")
    as_saved_by_an_earlier_version(folder)
    place.trainer("stopped").fit()
    assert "kept no record of its data: they cannot be compared" in capsys.readouterr().out
    assert inputs_file(folder).exists()


def test_other_weights_to_start_from_are_refused(place, tmp_path):
    weights = tmp_path / "weights.pt"
    best = torch.load(place.run("finished") / "checkpoints" / "best_end_to_end.pt", weights_only=True)["model"]
    torch.save(best, weights)
    place.trainer("tuned", f"model.checkpoint={weights}").fit()
    moved = weights.rename(tmp_path / "moved.pt")
    assert recorded_result(place.prepare("tuned", f"model.checkpoint={moved}")) is not None
    torch.save({key: value + 1 for key, value in best.items()}, moved)
    with pytest.raises(ValueError, match=r"model\.checkpoint has another content"):
        place.prepare("tuned", f"model.checkpoint={moved}")


@pytest.mark.parametrize(
    "content", [None, "", "name: [", "name: stopped\nda"], ids=["absent", "empty", "no YAML", "cut"]
)
def test_the_recipe_is_taken_from_the_checkpoint(original, place, caplog, content):
    path = recipe_file(place.run("stopped"))
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"{STAGE}\.lr: 0\.1 and 0\.05"):
        place.prepare("stopped", f"{STAGE}.lr=0.05")
    trainer = place.trainer("stopped")
    assert "taking the recipe that last.pt has" in caplog.text
    trainer.fit()
    assert load_recipe(path) == trainer.context.recipe
    assert_same_end(place.run("stopped"), original.run("finished"))


def test_the_recipe_of_another_run_beside_a_checkpoint_is_refused(place):
    recipe = load_recipe(RECIPE, place.words("stopped", "seed=7"))
    recipe_file(place.run("stopped")).write_text(recipe.to_yaml())
    with pytest.raises(
        ValueError, match=r"last\.pt is of another run than recipe\.yaml beside it; .*\n  seed: 0 and 7"
    ):
        place.trainer("stopped", "seed=7")
    with pytest.raises(ValueError, match=r"seed: 7 and 0"):
        place.trainer("stopped")


def test_a_result_without_its_recipe_and_checkpoints_is_not_trained_over(place):
    folder = place.run("finished")
    recipe_file(folder).unlink()
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match=r"recipe\.yaml is not there, and no checkpoint has the recipe"):
        place.prepare("finished")
    assert result_file(folder).exists()


@pytest.mark.parametrize("content", ["{", '"a', "[]", ""])
def test_a_damaged_result_is_measured_again(place, content, caplog, capsys):
    folder = place.run("finished")
    before = json.loads(result_file(folder).read_text())
    result_file(folder).write_text(content)
    assert recorded_result(place.prepare("finished")) is None
    assert "result.json is damaged: the test split is measured again" in caplog.text
    again = place.trainer("finished").fit()
    assert json.loads(result_file(folder).read_text()) == again
    assert {**again, "aside_s": before["aside_s"]} == before
    assert (folder / "result-damaged.json").read_text() == content


def test_a_damaged_result_without_checkpoints_is_refused(place):
    result_file(place.run("finished")).write_text("{")
    shutil.rmtree(place.run("finished") / "checkpoints")
    with pytest.raises(ValueError, match=r"is damaged, and there is no checkpoint to measure it again from"):
        place.prepare("finished")


def test_lines_after_a_broken_one_are_kept(original, place, caplog):
    path = log_file(place.run("stopped"))
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"\xff\x00"
    path.write_bytes(b"\n".join(lines) + b'{"kind": "train", "iter')
    damaged = path.read_bytes()
    place.trainer("stopped").fit()
    assert "line 3 cannot be read" in caplog.text
    assert path.with_name("log-damaged.jsonl").read_bytes() == damaged

    def losses(run):
        return [line.get("loss") for line in map(json.loads, log_file(run).read_text().splitlines())]

    whole = losses(original.run("finished"))
    assert losses(place.run("stopped")) == whole[:2] + whole[3:]


def test_a_longer_run_goes_on_where_a_finished_one_ended(place):
    longer = [f"{STAGE}.iterations=12"]
    whole = place.trainer("whole", *longer).fit()
    first = json.loads(result_file(place.run("finished")).read_text())
    result = place.trainer("finished", *longer).fit()
    assert_same_end(place.run("finished"), place.run("whole"))
    assert (result["iterations"], result["top1"]) == (12, whole["top1"])
    assert json.loads((place.run("finished") / "result-8.json").read_text()) == first
    assert [part["changes"] for part in result["parts"]] == [[], [f"{STAGE}.iterations: 8 and 12"]]
    assert result["parts"][1]["from_iteration"] == 8
    with pytest.raises(ValueError, match=rf"{STAGE}\.iterations: 12 and 8\n.*another name="):
        place.prepare("finished")


def test_a_stage_at_the_end_goes_on_from_a_finished_run(place):
    place.trainer("whole", TWO).fit()
    result = place.trainer("finished", TWO).fit()
    assert_same_end(place.run("finished"), place.run("whole"))
    assert len(result["parts"]) == 1


def test_another_number_of_threads_is_said(place, capsys):
    threads = torch.get_num_threads()
    try:
        result = place.trainer("stopped", "num_threads=2").fit()
    finally:
        torch.set_num_threads(threads)
    assert (
        "last bits may differ from a run without a stop (before and now): threads: 1 and 2" in capsys.readouterr().out
    )
    assert [(part["from_iteration"], part["threads"]) for part in result["parts"]] == [(0, 1), (6, 2)]


def test_reports_name_what_they_cannot_read_and_other_data(place, capsys, caplog):
    shutil.copytree(place.run("finished"), place.run("other"))
    record = json.loads(inputs_file(place.run("other")).read_text())
    record["data"]["class_names"][0] = "zero"
    inputs_file(place.run("other")).write_text(json.dumps(record))
    shutil.copytree(place.run("finished"), place.run("damaged"))
    result_file(place.run("damaged")).write_text("{")
    assert cli.main(["report", *(str(place.run(name)) for name in ("finished", "damaged", "other"))]) == 2
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 4, "two rows: their data differ"
    assert f"{result_file(place.run('damaged'))} is damaged" in told.err
    assert "other was trained on other data than" in caplog.text
    assert cli.main(["ensemble", str(place.run("finished")), str(place.run("other"))]) == 2
    assert "other was trained on other data than" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_with_its_code(place, number, monkeypatch):
    def twice(*_, **__):
        for _ in range(2):
            os.kill(os.getpid(), number)

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(Evaluation, "evaluate", twice)
    monkeypatch.setattr("os._exit", end)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match=str(128 + number)):
        train.main([str(RECIPE), *place.words("held")])


def test_a_process_that_gets_a_second_signal_leaves_no_traceback(place):
    """It is held in its first validation, where the first signal waits for the end of the iteration."""
    script = (
        "import sys, time\n"
        "from fastlt.run.evaluation import Evaluation\n"
        "from fastlt.train import main\n"
        "Evaluation.evaluate = lambda *a, **k: (print('evaluating', flush=True), time.sleep(600))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = [sys.executable, "-c", script, str(RECIPE), *place.words("held")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    output = ""
    for wanted in ("evaluating", "stopping after this iteration"):
        while wanted not in output:
            output += process.stdout.readline()
            assert process.poll() is None, output
        process.terminate()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in output + rest
    assert f"fastlt: stopped at once by signal {signal.SIGTERM:d}; the same command goes on" in rest
