"""The paper's numbers are all there, the listing says what can run, and a run of a row ends in the three files."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import math
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import fastlt.train
from fastlt import cli, file_lock
from fastlt.recipe import load_recipe
from fastlt.reproduce import availability, execution, output, shared_results, tables
from fastlt.reproduce.plan import plan_run
from fastlt.reproduce.shared_results import SharedResults, read_results
from fastlt.run import checkpoint
from fastlt.run.folder import last_checkpoint
from fastlt.run.stopping import Stopping
from fastlt.state import ShotRanks
from loaders.stored.manifest import sealed

ROOT = Path(__file__).resolve().parents[2]

TABLES = yaml.safe_load(tables.PAPER.read_text())
# Numbers printed in each table of the supplement; dashes do not count.
PRINTED = {"table6": 10, "table8": 102, "table9": 88, "table10": 3, "table11": 6, "table12": 16}
PUBLISHED = {
    **PRINTED,
    "cifar10_lt": 20,
    "cifar10_lt_ablation": 0,
    "tiny100_lt": 0,
    "finetune": 8,
    "lite0_cifar10_lt": 0,
}


def test_every_printed_number_is_there():
    numbers = {name: sum(c.paper is not None for c in tables.load_table(name)[1]) for name in TABLES}
    assert numbers == PUBLISHED


def test_a_dash_is_left_out_of_the_papers_tables_and_run_where_the_table_says_so():
    assert all(c.paper is not None for name in PRINTED for c in tables.load_table(name)[1])
    for name in PUBLISHED.keys() - PRINTED:
        table = TABLES[name]
        assert len(tables.load_table(name)[1]) == len(table["rows"]) * len(table["columns"])


@pytest.mark.parametrize(
    ("table", "row", "column", "value"),
    [
        ("table6", "256", "CIFAR100-LT", 48.06),
        ("table6", "1024", "ImageNet-LT", 41.4),
        ("table8", "LDAM", "10", 56.91),
        ("table8", "Ours", "100", 43.82),
        ("table8", "Ours + LAS", "200", 42.19),
        ("table8", "MWN + LAS", "10", 59.24),
        ("table9", "Ours + Bal. Softmax", "ResNet-10 Few", 27.8),
        ("table9", "PaCo + Bal. Softmax", "ResNet-50 Few", 36.1),
        ("table9", "MiSLAS", "ResNet-50 Overall", 52.7),
        ("table10", "Ours + LAS", "ResNet-50", 57.4),
        ("table11", "Ours (2 experts)", "ResNet-10", 47.5),
        ("table12", "Sample-level", "100 Few", 18.99),
        ("table12", "Class-level (ours)", "10 All", 63.52),
        ("cifar10_lt", "Bal. Softmax", "100", 77.5),
        ("cifar10_lt", "MiSLAS", "50", 85.7),
        ("cifar10_lt", "Ours", "50", None),
    ],
)
def test_spot_checks(table, row, column, value):
    (cell,) = tables.chosen(tables.load_table(table)[1], [row], [column])
    assert cell.paper == value


@pytest.mark.parametrize("name", PRINTED)
def test_the_numbers_are_percentages_in_the_order_that_long_tails_give_them(name):
    for row in TABLES[name]["rows"]:
        printed = [v for v in row["values"] if v is not None]
        assert all(0 < v < 100 for v in printed)
        if name == "table8":
            assert printed == sorted(printed)
        if name in ("table9", "table12"):
            # Overall lies between the best and the worst group.
            for many, medium, few, overall in (row["values"][:4], row["values"][4:]):
                if None not in (many, medium, few, overall):
                    assert min(many, medium, few) < overall < max(many, medium, few)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("scale", ["short", "paper"])
def test_every_cell_with_a_recipe_resolves(name, scale):
    cells = [part for whole in tables.load_table(name)[1] for part in whole.members or [whole]]
    # One column a row: that every cell loads is tested with the recipes.
    for cell in {(c.row, c.recipe): c for c in cells}.values():
        availability.resolve(cell, [], scale, [])
        if not cell.path.is_file():
            assert cell.problem.startswith("no recipe yet")
            continue
        assert cell.problem is None or cell.problem.startswith("data not found"), cell.problem
        recipe = load_recipe(cell.path, cell.overrides)
        if scale == "short":
            lengths = [s.iterations for s in recipe.stages.values()]
            full = {"cifar10_lt": 500, "tiny100_lt": 400}.get(name, availability.SHORT_ITERATIONS)
            for n, stage in enumerate(recipe.stages.values()):
                afresh = n == 0 or stage.start == "fresh"
                # tau_norm descends nothing and keeps its length.
                assert lengths[n] == (21 if stage.method == "tau_norm" else full if afresh else 100)


SECOND = ("cRT", "LWS", "LAS")
CAMPAIGN = {
    **{row: {"100": 5, "10": 1, "200": 1} for row in ("CE", "Bal. Softmax", "Ours", "Ours + Bal. Softmax")},
    "Ours, absolute driver target": {"100": 5},
    **{row: {"100": 3} for row in ("Focal Loss", "Class-Balanced Focal", "LDAM-DRW", "MWN", "mixup", *SECOND)},
    **{row: {"100": 3} for row in ("CDB-CE", "CDB-CE, A in every iteration")},
    **{f"{first} + {row}": {"100": 3} for first in ("mixup", "Bal. Softmax", "Ours + Bal. Softmax") for row in SECOND},
}


def test_the_campaign_on_cifar_10_has_its_rows_columns_and_seeds():
    planned: dict[str, dict[str, int]] = {}
    for cell in tables.chosen(tables.load_table("cifar10_lt")[1], None, None):
        planned.setdefault(cell.row, {})[cell.column] = cell.seeds
    assert planned == CAMPAIGN
    asked = tables.chosen(tables.load_table("cifar10_lt")[1], ["MiSLAS"], ["50"])
    assert [cell.seeds for cell in asked] == [0], "what has no seeds is run when it is asked for"


def test_the_quick_budget_is_one_for_all_rows_of_cifar_10():
    for cell in tables.load_table("cifar10_lt")[1]:
        availability.resolve(cell, [], "quick", [])
        recipe = load_recipe(cell.path, cell.overrides)
        assert (recipe.model.name, recipe.data.convention) == ("cifar_resnet32", "ldam")
        assert recipe.data.imbalance_factor == float(cell.column)
        assert recipe.data.augment == ["flip", {"random_crop": {"padding": 4}}]
        first, *second = recipe.stages.values()
        assert (first.iterations, first.batch_size, first.select) == (2900, 128, "last")
        assert (first.lr, first.warmup, first.warmup_from, first.weight_decay) == (0.2, 200, 0, 5e-4)
        assert (first.schedule, first.milestones, first.min_lr) == ("cosine", [], 0)
        assert [stage.iterations for stage in second] == ([21] if cell.row == "τ-norm" else [700] * len(second))
        if cell.row == "LDAM-DRW":
            images = {"100": 12406, "50": 13996, "10": 20431, "200": 11203}[cell.column]
            epochs = first.iterations / (images // first.batch_size)
            assert first.loss_options["reweight_from_epoch"] == pytest.approx(0.8 * epochs, abs=1)


@pytest.mark.parametrize("scale", ["quick", "paper"])
def test_second_stages_share_the_run_of_their_first(scale, tmp_path):
    def plan(row, table="cifar10_lt"):
        (cell,) = tables.chosen(tables.load_table(table)[1], [row], ["100"])
        availability.resolve(cell, [], scale, [])
        return plan_run(cell, tmp_path, 1)

    for first, before in (("CE", ""), ("mixup", "mixup + "), ("Ours + Bal. Softmax", "Ours + Bal. Softmax + ")):
        alone = plan(first)
        for second in SECOND:
            run = plan(before + second)
            assert run.needs == (run.first,)
            assert run.first.identity == alone.identity
            assert run.cost < alone.cost / 5
    assert plan("MiSLAS").first.identity == plan("mixup").identity
    assert plan("Ours").cost > 3 * plan("CE").cost
    assert plan("Absolute driver alone", "cifar10_lt_ablation").cost < 1.5 * plan("CE").cost


def test_processes_that_share_a_machine_share_its_threads(tmp_path):
    (cell,) = tables.chosen(tables.load_table("cifar10_lt")[1], ["CE"], ["100"])
    run = plan_run(cell, tmp_path, 0)
    assert not [word for word in run.command(None) if "num_threads" in word or "num_workers" in word]
    assert {"num_threads=3", "data.num_workers=3"} <= set(run.command(3))
    cell.overrides = [*cell.overrides, "num_threads=1"]
    words = plan_run(cell, tmp_path, 0).command(3)
    assert ("num_threads=1" in words, "num_threads=3" in words, "data.num_workers=3" in words) == (True, False, True)


def test_a_tables_short_words_hold_at_the_short_scale_only():
    for scale, network, batch in (("short", "cifar_resnet8", 32), ("paper", "cifar_resnet32", 128)):
        (cell,) = tables.chosen(tables.load_table("cifar10_lt")[1], ["LDAM-DRW"], ["100"])
        availability.resolve(cell, [], scale, [])
        recipe = load_recipe(cell.path, cell.overrides)
        stage = recipe.stages["end_to_end"]
        assert (recipe.model.name, stage.batch_size) == (network, batch)
        assert stage.loss_options["reweight_from_epoch"] == (1 if scale == "short" else 160)


def test_las_takes_its_smoothing_from_the_column():
    cells = tables.chosen(tables.load_table("table8")[1], ["LAS", "Ours + LAS"], None)
    by_column = {"200": (0.4, 0), "100": (0.4, 0.1), "50": (0.3, 0), "20": (0.2, 0), "10": (0.2, 0)}
    assert len(cells) == 10
    for cell in cells:
        recipe = load_recipe(cell.path, cell.overrides)
        assert recipe.data.imbalance_factor == float(cell.column)
        options = recipe.stages["classifier"].loss_options
        assert (options["head"], options["tail"]) == by_column[cell.column]
        assert recipe.data.augment == ["flip", {"random_crop": {"padding": 4}}]


def test_cells_that_differ_share_no_run_and_metrics_of_one_run_do():
    cells = [c for c in tables.load_table("table9")[1] if c.path.is_file()]
    names = {}
    for cell in cells:
        run = plan_run(cell, Path("runs"), 0)
        names.setdefault(run.name, set()).add((cell.row, cell.column.split()[0]))
    assert all(len(users) == 1 for users in names.values())


def test_a_runs_name_follows_from_what_changes_its_result(tmp_path):
    (cell,) = tables.chosen(tables.load_table("table8")[1], ["Ours"], ["100"])
    before = plan_run(cell, tmp_path, 0).name
    cell.overrides = [*cell.overrides, "data.root=/elsewhere", "num_threads=1", "log_every=3"]
    assert plan_run(cell, tmp_path, 0).name == before
    assert plan_run(cell, tmp_path, 1).name != before
    # A default that is spelled out, as one that a later version may add, is no other recipe.
    cell.overrides = [*cell.overrides, "stages.end_to_end.accuracy.window=10", "model.drop_rate=0"]
    assert plan_run(cell, tmp_path, 0).name == before
    cell.overrides = [*cell.overrides, "stages.end_to_end.options.driver_weight=0.2"]
    assert plan_run(cell, tmp_path, 0).name != before


def test_rows_with_a_stage_in_common_plan_one_run_for_it(tmp_path):
    table = tables.load_table("cifar10_lt")[1]

    def plan(row):
        (cell,) = tables.chosen(table, [row], ["100"])
        return plan_run(cell, tmp_path, 0)

    for alone, rows in (("CE", ("τ-norm", "cRT", "LWS", "LAS")), ("Ours", ("Ours + cRT", "Ours + LWS", "Ours + LAS"))):
        run = plan(alone)
        assert run.first is None
        assert {plan(row).first.identity for row in rows} == {run.identity}
        # Whatever file a run was first made by: its folder is found and kept.
        (tmp_path / f"another-{run.identity}").mkdir()
        assert {plan(row).first.name for row in rows} == {plan(alone).name} == {f"another-{run.identity}"}


def test_the_listing_names_every_row_its_recipe_and_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", "table11", "--list"]) == 0
    told = capsys.readouterr().out
    assert "RIDE (4 experts)" in told
    assert "imagenet_lt_ours_las+imagenet_lt_ours_las_cosine data not found: list_file" in told
    with monkeypatch.context() as patch:
        patch.setattr(tables, "shipped_recipes", dict)
        patch.setattr(tables, "SHIPPED", tmp_path)
        assert cli.main(["reproduce", "table11", "--list"]) == 0
    told = capsys.readouterr().out
    for recipe in ("imagenet_lt_ride_4", "imagenet_lt_ours_las"):
        assert f"no recipe yet: recipes/{recipe}.yaml" in told
    assert cli.main(["reproduce", "table8", "--list", "--data", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert all(row["name"] in told for row in TABLES["table8"]["rows"])
    assert "data not found: cifar100" in told
    assert "46.42" in told
    (tmp_path / "cifar-100-python").mkdir()
    assert cli.main(["reproduce", "table8", "--list", "--rows", "Ours", "--data", str(tmp_path)]) == 0
    assert "can run" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [tmp_path / "cifar-100-python"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["table88"], "did you mean 'table8'"),
        (["table8", "--rows", "Our"], "did you mean 'Ours'"),
        (["cifar10_lt_ablation", "--rows", "XX"], "'Absolute driver alone', 'Absolute driver alone, LAS', "),
        (["table8", "--columns", "500"], "unknown column"),
        (["table8", "--seeds", "0"], "'0' is not a whole number from 1 on"),
        (["table8", "--jobs", "none"], "'none' is not a whole number from 1 on"),
        (["table8", "--nice", "20"], "'20' is not a whole number from 0 to 19"),
        (["table8", "--scale", "quick"], "table8 has no such budget; take short or paper"),
        (["table8", "--rows", "LDAM", "--columns", "50"], "table8 has no number there"),
        (["table8", "--rates", "0.1"], "unknown row 'CE'"),
        (["cifar10_lt", "--rates", "0.1", "--into", "x.md"], "leave one of them out"),
        (["cifar10_lt", "--into", "x.md"], "--into x.md: cannot be read"),
    ],
)
def test_a_mistake_is_one_message(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(["reproduce", *words]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def exit_code(words: list[str]) -> int:
    try:
        return cli.main(words)
    except SystemExit as ended:  # of argparse
        return int(ended.code)


SMALL = [
    *("data.source=digits", "data.num_classes=10", "data.image_size=8", "data.imbalance_factor=20"),
    *("model.name=cifar_resnet8", "num_threads=1"),
]


def few_iterations(*stages: str) -> list[str]:
    keys = ("iterations=2", "evaluate_every=1", "warmup=0", "batch_size=8")
    return [f"stages.{stage}.{key}" for stage in stages for key in keys]


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


@pytest.fixture
def in_process(monkeypatch):
    """The trainer without a process of its own: its imports take longer than these runs. Names what was trained."""
    trained = []

    def start(words, output, nice):
        trained.append(next(w for w in words if w.startswith("name=")).removeprefix("name="))
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return Ended(fastlt.train.main(words[2:]))

    monkeypatch.setattr(execution, "start", start)
    return trained


def test_a_row_runs_is_not_run_again_and_leaves_three_files(digits, tmp_path, capsys):
    """The row's own recipe on the digits, a few iterations long, by the command it says."""
    words = ["table8", "--rows", "cRT", "--columns", "100", "--scale", "short"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--set", *SMALL]
    words += [f"data.converted={digits}", *few_iterations("end_to_end", "classifier")]
    assert cli.main(["reproduce", *words]) == 0
    told = capsys.readouterr()
    assert told.err.count("running cifar100_lt_crt-") == 2
    assert "cRT, 100, seed 0, for cifar100_lt_crt-" in told.err
    rows = json.loads((tmp_path / "out" / "table8_short.json").read_text())
    (crt,) = rows
    assert crt["seeds"] == 1
    result = json.loads((tmp_path / "runs" / crt["runs"] / "result.json").read_text())
    assert result["iterations"] == 4
    assert crt["ours"] == pytest.approx(100 * result["top1"])
    assert crt["difference"] == pytest.approx(crt["ours"] - 44.04)
    assert crt["train_s"] == result["train_s"]
    table = (tmp_path / "out" / "table8_short.md").read_text()
    assert table.strip() in told.out
    groups = " | ".join(f"{100 * result[key]:.2f}" for key in ("many", "medium", "few", "ece"))
    wall = result["train_s"] + sum(result["aside_s"].values())
    line = f"| cRT | 100 | 44.04 | {crt['ours']:.2f} | {crt['difference']:+.2f} | 1 | {groups} | last | {wall:.0f} |"
    assert line in table
    assert f"{result['processor']} (1 thread)" in table
    with (tmp_path / "out" / "table8_short.csv").open() as file:
        assert [r["row"] for r in csv.DictReader(file)] == [r["row"] for r in rows]

    again = (tmp_path / "out" / "table8_short.json").read_text()
    assert cli.main(["reproduce", *words]) == 0
    assert "running" not in capsys.readouterr().err
    assert (tmp_path / "out" / "table8_short.json").read_text() == again


def comparable(folder: Path) -> tuple[dict, list, dict]:
    """Everything of a finished run but the clock and the name: result, log, and the last checkpoint."""
    clock = ("name", "train_s", "img_s", "wait_s", "data_wait_share", "aside_s")
    result = {k: v for k, v in json.loads((folder / "result.json").read_text()).items() if k not in clock}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = checkpoint.load(last_checkpoint(folder))
    last["progress"] = {k: v for k, v in last["progress"].items() if k not in clock}
    last["recipe"] = {k: v for k, v in last["recipe"].items() if k not in clock}
    return result, [{k: v for k, v in line.items() if k not in clock} for line in lines], last


def leaves(state, where: str = "") -> dict[str, object]:
    """Every value of a checkpoint by its place, tensors as their bytes."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in leaves(value, f"{where}.{key}").items()}
    return {where: state.numpy().tobytes() if isinstance(state, torch.Tensor) else state}


def test_a_row_and_second_stages_on_it_run_in_one_campaign(digits, tmp_path, in_process):
    """What they share is made by the first row's recipe file, after the runs of all of them were planned."""
    words = ["--rows", "LWS", "cRT", "CE", "--columns", "100", "--scale", "short", "--seeds", "1"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--set", *SMALL]
    words += [f"data.converted={digits}", "data.convention=paper", *few_iterations("end_to_end")]
    assert cli.main(["reproduce", "cifar10_lt", *words]) == 0
    rows = json.loads((tmp_path / "out" / "cifar10_lt_short.json").read_text())
    assert {row["row"]: row["seeds"] for row in rows} == {"CE": 1, "cRT": 1, "LWS": 1}
    assert sorted(row["runs"] for row in rows) == sorted(in_process), "what they share is trained once"
    assert in_process[0].startswith("cifar10_lt_ce-")


@pytest.mark.parametrize(
    ("alone", "row", "extra"),
    [
        ("CE", "LWS", []),
        # Dropout draws from the one global generator: its state, too, is that of a run that was never shared.
        ("Ours", "Ours + LAS", ["model.drop_rate=0.5"]),
    ],
)
def test_a_shared_first_stage_changes_nothing(alone, row, extra, digits, tmp_path, in_process):
    """Bit for bit the result, log and resume state of the run that trains both stages itself."""
    common = ["--columns", "100", "--scale", "short", "--seeds", "1", "--runs", str(tmp_path)]
    common += ["--out", str(tmp_path / "out"), "--set"]
    common += [*SMALL, "data.convention=paper", f"data.converted={digits}", "log_every=1", *extra]
    common += few_iterations("end_to_end")
    if alone == "Ours":
        common += ["stages.end_to_end.meta_batch_size=4"]
    folders = {}
    for name, words in ((alone, []), (row, few_iterations("classifier"))):
        assert cli.main(["reproduce", "cifar10_lt", "--rows", name, *common, *words]) == 0
        (cell,) = json.loads((tmp_path / "out" / "cifar10_lt_short.json").read_text())
        folders[name] = tmp_path / cell["runs"]
    assert in_process == [folders[alone].name, folders[row].name]
    shared = folders[row]

    recipe = tmp_path / "whole.yaml"
    recipe.write_text((shared / "recipe.yaml").read_text())
    assert fastlt.train.main([str(recipe), "name=whole"]) == 0
    (result, log, last), (result_whole, log_whole, last_whole) = comparable(shared), comparable(tmp_path / "whole")
    assert result == result_whole
    assert log == log_whole
    assert (shared / "class_history.npy").read_bytes() == (tmp_path / "whole" / "class_history.npy").read_bytes()
    assert leaves(last) == leaves(last_whole)


def test_a_result_on_other_data_is_not_taken(digits, tmp_path, capsys, in_process):
    """Folders of data are no part of a run's name: the data in them are compared, and the trainer says what differs."""
    other = Path(shutil.copytree(digits, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["contents"]["ffcv"]["train"] = "0" * 64
    (other / "manifest.json").write_text(sealed(manifest))
    words = ["cifar10_lt", "--rows", "CE", "--columns", "100", "--scale", "short", "--seeds", "1"]
    words += ["--runs", str(tmp_path), "--out", str(tmp_path / "out"), "--set", *SMALL, "data.convention=paper"]
    words += few_iterations("end_to_end")
    assert cli.main(["reproduce", *words, f"data.converted={digits}"]) == 0
    assert cli.main(["reproduce", *words, f"data.converted={digits}"]) == 0
    assert len(in_process) == 1
    assert cli.main(["reproduce", *words, f"data.converted={other}"]) == 1
    assert len(in_process) == 2
    assert "failed with code" in capsys.readouterr().err


def test_a_stopped_run_goes_on_and_a_running_one_is_waited_for(digits, tmp_path, capsys, monkeypatch, in_process):
    words = ["cifar10_lt", "--rows", "CE", "--columns", "100", "--scale", "short", "--runs", str(tmp_path)]
    words += ["--out", str(tmp_path), "--seeds", "1"]
    words += ["--set", *SMALL, "data.convention=paper", f"data.converted={digits}", *few_iterations("end_to_end")]
    with monkeypatch.context() as patched:
        patched.setattr(Stopping, "agreed", lambda *_, log_now: (signal.SIGTERM, False))
        assert cli.main(["reproduce", *words]) == 1
    told = capsys.readouterr()
    assert "was stopped; the same command goes on with it" in told.err
    assert "- CE: was stopped; the same command goes on with it" in told.out

    # Stands for a trainer that outlived its parent: the log, and with it the lock, is its output.
    (log,) = tmp_path.glob("cifar10_lt_ce-*.log")
    with log.open("a") as output:
        fcntl.flock(output, fcntl.LOCK_EX)
        orphan = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output)
    waits = []

    def end_the_orphan(seconds):
        waits.append(seconds)
        orphan.stdin.close()
        assert orphan.wait(timeout=60) == 0

    monkeypatch.setattr(execution, "time", SimpleNamespace(sleep=end_the_orphan, monotonic=time.monotonic))
    assert cli.main(["reproduce", *words]) == 0
    assert capsys.readouterr().err.count("waiting for cifar10_lt_ce-") == 1
    assert len(waits) == 1
    assert "resuming" in log.read_text()
    assert len(in_process) == 2


def test_a_run_that_fails_is_told_and_the_others_go_on(digits, tmp_path, capsys, in_process, monkeypatch):
    """What CE and LWS have in common fails, is tried once a seed, and Focal Loss still runs."""
    start = execution.start

    def fail_ce(words, output, nice):
        if words[2].endswith("_ce.yaml"):
            in_process.append("CE")
            output.write("fastlt: the disk is full\n")
            output.flush()
            return Ended(2)
        return start(words, output, nice)

    monkeypatch.setattr(execution, "start", fail_ce)
    words = ["cifar10_lt", "--columns", "100", "--rows", "CE", "LWS", "Focal Loss", "--scale", "short", "--seeds", "2"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--set", *SMALL]
    words += [*few_iterations("end_to_end"), "data.convention=paper", f"data.converted={digits}"]
    assert cli.main(["reproduce", *words]) == 1
    told = capsys.readouterr()
    assert [name.split("-")[0] for name in in_process] == ["CE", "cifar10_lt_focal", "CE", "cifar10_lt_focal"]
    assert "- CE: failed with code 2: fastlt: the disk is full" in told.out
    assert "- LWS: failed with code 2: fastlt: the disk is full" in told.out
    rows = {r["row"]: r for r in json.loads((tmp_path / "out" / "cifar10_lt_short.json").read_text())}
    assert {row: r["seeds"] for row, r in rows.items()} == {"CE": 0, "LWS": 0, "Focal Loss": 2}
    assert "| Focal Loss | 100 | 71.60 | " in told.out
    assert rows["Focal Loss"]["std"] is not None

    # What a broken disk has left of a result is measured again.
    result = tmp_path / "runs" / rows["Focal Loss"]["runs"].split()[1] / "result.json"
    before = json.loads(result.read_text())
    result.write_text("{")
    assert cli.main(["reproduce", *words]) == 1
    assert {**json.loads(result.read_text()), "aside_s": before["aside_s"]} == before
    assert "| Focal Loss | 100 | 71.60 | " in capsys.readouterr().out


def test_results_that_were_brought_here_are_collected_and_put_into_a_document(
    digits, tmp_path, capsys, monkeypatch, in_process
):
    """Runs that another machine has trained need no data here; what stands around the table in a document stays."""
    common = ["cifar10_lt", "--scale", "quick", "--columns", "100", "--runs", str(tmp_path / "runs")]
    common += ["--out", str(tmp_path / "out"), "--seeds", "1"]
    words = ["--set", *SMALL[1:], "data.convention=paper", "data.image_size=8", *few_iterations("end_to_end")]
    trained = [*words, "data.source=digits", f"data.converted={digits}"]
    assert cli.main(["reproduce", *common, "--rows", "CE", *trained]) == 0
    page = tmp_path / "page.md"
    page.write_text("before\n\n" + output.place("cifar10_lt", "quick") + "\nold\n" + output.END + "\n\nafter\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(availability, "find_data", lambda *_: None)
    here = ["data.source=digits", "data.converted=data/absent"]
    capsys.readouterr()
    assert (
        cli.main(["reproduce", *common, "--rows", "CE", "mixup", "--collect", "--into", "page.md", *words, *here]) == 0
    )
    told = capsys.readouterr()
    assert "running" not in told.err
    assert "- mixup: data not found: digits, 10 classes, in data/ (100)" in told.out
    (result,) = (json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/result.json"))
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1], "old" in lines) == ("before", "after", False)
    (ce,) = [line for line in lines if line.startswith("| CE |")]
    assert f"| CE | 100 | 71.90 | {100 * result['top1']:.2f} | " in ce
    assert "| mixup | 100 | 74.10 |  |  |  |" in page.read_text(), "an empty cell has not been run"
    before = page.read_text()
    assert (
        cli.main(["reproduce", *common, "--rows", "CE", "mixup", "--collect", "--into", "page.md", *words, *here]) == 0
    )
    assert page.read_text() == before
    page.write_text("nothing\n")
    assert cli.main(["reproduce", *common, "--rows", "CE", "--collect", "--into", "page.md", *words, *here]) == 2
    assert "page.md: has no place for the table" in capsys.readouterr().err
    assert page.read_text() == "nothing\n"


def test_results_of_another_machine_are_taken_where_their_recipe_is_the_same(digits, tmp_path, capsys, in_process):
    def words(machine, *more):
        folders = ["--runs", str(tmp_path / machine), "--out", str(tmp_path / f"{machine}_out"), *more]
        small = [*SMALL[1:], "data.convention=paper", "data.image_size=8", *few_iterations("end_to_end")]
        small += ["data.source=digits", f"data.converted={digits}", "stages.end_to_end.options.driver_target=absolute"]
        return ["reproduce", "cifar10_lt", "--scale", "quick", "--columns", "100", *folders, "--set", *small]

    assert cli.main(words("first", "--rows", "Ours", "--seeds", "1")) == 0
    file = tmp_path / "first_out" / "cifar10_lt_quick_runs.json"
    assert str(tmp_path) not in file.read_text(), "it says nothing of the machine"
    (first,) = in_process
    again = ["--rows", "Ours", "--seeds", "2", "--results", str(file)]
    assert cli.main(words("second", *again)) == 0
    assert [name.endswith("-1") for name in in_process] == [False, True], "seed 0 is not run again"
    (row,) = json.loads((tmp_path / "second_out" / "cifar10_lt_quick.json").read_text())
    assert row["seeds"] == 2
    assert row["runs"].split() == in_process
    theirs = tmp_path / "second_out" / "cifar10_lt_quick_runs.json"
    both = json.loads(theirs.read_text())
    assert sorted(entry["result"]["name"] for entry in both) == sorted(in_process)
    # A call that asks for other rows leaves them there.
    assert cli.main(words("second", "--rows", "CE", "--seeds", "1", "--collect")) == 0
    assert json.loads(theirs.read_text()) == both

    # Of another recipe.
    (entry,) = json.loads(file.read_text())
    entry["recipe"]["stages"]["end_to_end"]["options"]["driver_target"] = "relative"
    file.write_text(json.dumps([entry]))
    assert cli.main(words("third", "--rows", "Ours", "--seeds", "1", "--results", str(file))) == 0
    assert in_process[2:] == [first]
    capsys.readouterr()
    no_json = "; copy it again from where it was written"
    no_results = " has no results of runs; give a TABLE_runs.json of fastlt reproduce"
    no_result = ": entry 0 is no result of a run"
    for content, reason in ((b"{}", no_results), (b'[{"result": {}}]', no_result), (b"[", no_json), (b"\xff", no_json)):
        file.write_bytes(content)
        assert cli.main(words("fourth", *again)) == 2
        told = capsys.readouterr().err
        assert str(file) in told
        assert reason in told
    assert not (tmp_path / "fourth").exists()


def test_shared_results_tell_files_apart_by_their_contents(tmp_path):
    """The same file lies elsewhere on another machine; a recipe without one, or with another one, is another recipe."""
    for folder, content in (("here", b"1"), ("there", b"1"), ("other", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "weights.pt").write_bytes(content)

    def recipe(*words):
        return load_recipe("digits_lt", [f"runs={tmp_path}", *words])

    def with_weights(folder):
        return recipe(f"model.checkpoint={tmp_path / folder / 'weights.pt'}")

    results = SharedResults()
    results.add(with_weights("here"), {"top1": 0.5})
    results.add(recipe("model.head_init=class_mean"), {"top1": 0.6})
    results.write(tmp_path / "runs.json")
    assert "weights.pt (sha256 6b86b273ff34fce1)" in (tmp_path / "runs.json").read_text()
    assert str(tmp_path) not in (tmp_path / "runs.json").read_text()
    for found in (results, read_results([tmp_path / "runs.json"])):
        assert found.get(with_weights("there")) == {"top1": 0.5}
        assert found.get(with_weights("other")) is None
        assert found.get(recipe("model.head_init=class_mean")) == {"top1": 0.6}
        assert found.get(recipe()) is None
    (tmp_path / "there" / "weights.pt").write_bytes(b"changed")
    assert results.get(with_weights("there")) is None


def test_two_calls_that_write_their_results_at_once_lose_none(tmp_path, monkeypatch):
    """Each reads the file, adds its own and writes it: the second has to read what the first one wrote."""
    read = shared_results.read_results

    def reads_slowly(files):
        found = read(files)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(shared_results, "read_results", reads_slowly)
    file = tmp_path / "runs.json"

    def add(seed):
        results = SharedResults()
        results.add(load_recipe("digits_lt", [f"seed={seed}"]), {"top1": seed / 10})
        results.add_to(file)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    found = read([file])
    for seed in range(4):
        assert found.get(load_recipe("digits_lt", [f"seed={seed}"])) == {"top1": seed / 10}
    assert [path.name for path in tmp_path.iterdir()] == ["runs.json"]
    monkeypatch.setattr(shared_results, "PATIENCE_S", 0)
    with file_lock.locked(tmp_path / "runs.json.lock", 0), pytest.raises(ValueError, match="written by another"):
        add(0)


def test_rates_are_compared_on_validation_alone(digits, tmp_path, capsys, in_process):
    words = [
        "cifar10_lt",
        "--scale",
        "quick",
        "--rates",
        "0.3",
        "0.001",
        "--seeds",
        "2",
        "--runs",
        str(tmp_path / "runs"),
    ]
    words += ["--out", str(tmp_path / "out"), "--set", *SMALL, "data.convention=paper", f"data.converted={digits}"]
    words += few_iterations("end_to_end")
    assert cli.main(["reproduce", *words]) == 0
    told = capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/result.json")]
    rates = {}
    for name in in_process:
        recipe = load_recipe(tmp_path / "runs" / name / "recipe.yaml")
        (result,) = [r for r in results if r["name"] == name]
        rates.setdefault(recipe.stages["end_to_end"].lr, []).append(100 * result["validation_top1"])
    assert {rate: len(values) for rate, values in rates.items()} == {0.3: 2, 0.001: 2}
    best = max(rates, key=lambda rate: sum(rates[rate]))
    for rate, values in rates.items():
        mean = f"| CE | 100 | {rate:g} | {sum(values) / 2:.2f} ± {abs(values[0] - values[1]) / 2**0.5:.2f} | "
        (line,) = [line for line in told.splitlines() if line.startswith(mean)]
        assert line.endswith("| 2 | best |" if rate == best else "| 2 |  |")
    assert (tmp_path / "out" / "cifar10_lt_quick_rates.md").read_text() in told
    assert not list((tmp_path / "out").glob("*.json")), "no test number is told"


def test_the_results_page_has_the_place_of_the_campaign():
    output.check_place(ROOT / "docs" / "results.md", "cifar10_lt", "quick")


def test_groups_by_rank_are_measured_from_the_accuracies_of_a_run():
    counts, accuracy = [9, 9, 9, 5, 5, 1], [0.9, 0.8, 0.7, 0.5, None, 0.1]
    result = {"many": 0.8, "class_counts": counts, "class_names": list("abcdef"), "per_class_accuracy": accuracy}
    result |= {"train_s": 1.0, "device": "cpu", "name": "x"}
    cell = tables.Cell("row", "column", 84.0, "imagenet_lt", [], "many", shots=ShotRanks((2, 2, 2)))
    cell.results[0] = result
    assert cell.as_row()["ours"] == pytest.approx(85)  # of the tied largest, the first two
    assert cell.as_row()["ours_by_recipe_shots"] == pytest.approx(80)
    assert "85.00 (80.00 by the recipe's groups)" in output.markdown("title", [cell], "paper")
    assert tables.group_accuracy(result, "few", ShotRanks((2, 2, 2))) == pytest.approx(0.1), (
        "a class without images is left out"
    )


def test_a_row_is_compared_with_its_reference_seed_by_seed():
    title, cells = tables.load_table("lite0_cifar10_lt")
    values = {"Probe, CE": {0: 0.6, 1: 0.7, 2: 0.1}, "Probe, Ours": {0: 0.62, 1: 0.74}, "All weights, Ours": {0: 0.5}}
    weights = {"Probe, Ours": {0: [0.5, 1.5], 1: [0.7, 1.1]}}
    for cell in cells:
        cell.results = {
            seed: {
                "top1": value,
                "class_weights": weights.get(cell.row, {}).get(seed),
                **{"train_s": 1.0, "device": "cpu", "name": "x"},
            }
            for seed, value in values.get(cell.row, {}).items()
        }
    rows = {row["row"]: row for row in (cell.as_row() for cell in cells)}
    ours = rows["Probe, Ours"]
    half = 12.706 * math.sqrt(2) / math.sqrt(2)  # Student's t of one degree of freedom, differences of 2 and 4 points
    assert (ours["reference"], ours["paired"], ours["paired_95"]) == (
        "Probe, CE",
        pytest.approx(3),
        pytest.approx(half, rel=1e-4),
    )
    assert (ours["least_weight"], ours["largest_weight"]) == (pytest.approx(0.6), pytest.approx(1.3))
    assert rows["All weights, Ours"]["paired"] is None, "its reference has no result"
    text = output.markdown(title, cells, "paper")
    assert "| row | column | ours | paired difference | seeds |" in text
    assert f"| Probe, Ours | 100 | 68.00 ± 8.49 | +3.00 ± {half:.2f} to Probe, CE | 2 |" in text
    assert "| 0.60 to 1.30 |" in text
    assert "paired" not in output.markdown("title", tables.load_table("table8")[1], "paper")


def test_the_published_groups_of_table_9_add_up_to_its_overall_numbers():
    """390, 445 and 165 classes by rank for the rows that say so, and not the thresholds of the recipes."""
    cells = tables.load_table("table9")[1]
    for row in {c.row for c in cells if c.shots is not None}:
        for network in ("ResNet-10", "ResNet-50"):
            value = {c.column.split()[1]: c.paper for c in cells if c.row == row and c.column.startswith(network)}
            if len(value) == 4:
                total = sum(
                    n * value[group] for n, group in zip((390, 445, 165), ("Many", "Medium", "Few"), strict=True)
                )
                assert total / 1000 == pytest.approx(value["Overall"], abs=0.13), (row, network)
