"""The scheduler of `fastlt reproduce`, on runs that train nothing: order, several at once, kills, failures, table."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from fake_runs import FakeRun, campaign, cell, events, plan

from fastlt.reproduce import execution
from fastlt.reproduce.output import markdown

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def of_this_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(execution, "POLL_S", 0.01)


def make(folder, monkeypatch, cells, runs, **options):
    monkeypatch.setattr(execution, "plan_run", plan(runs))
    return execution.Campaign(cells, folder, **options)


def begun(folder) -> list[str]:
    return [name for _, name, what in events(folder) if what.startswith("began")]


def most_at_once(folder) -> int:
    running, most = 0, 0
    for _, _, what in sorted(events(folder)):
        running += 1 if what.startswith("began") else -1
        most = max(most, running)
    return most


def of_cells(text) -> list[str]:
    """The lines of a table that belong to a cell."""
    return [line for line in text.splitlines() if "| column |" in line and "published" not in line]


def test_one_after_the_other_seeds_come_first_then_the_shortest_then_the_order_of_the_table(tmp_path, monkeypatch):
    costs = {"a": 3, "b": 1, "c": 1, "d": 2}
    runs = [
        FakeRun(f"{row}-{seed}", tmp_path / f"{row}-{seed}", 1, cost) for row, cost in costs.items() for seed in (0, 1)
    ]
    assert make(tmp_path, monkeypatch, [cell("a", 2), cell("b", 2), cell("c"), cell("d", 2)], runs).run() == 0
    assert begun(tmp_path) == ["b-0", "c-0", "d-0", "a-0", "b-1", "d-1", "a-1"]
    assert most_at_once(tmp_path) == 1


def test_several_at_once_keep_every_place_taken_and_wait_for_what_they_need(tmp_path, monkeypatch):
    cells, runs = campaign(tmp_path)
    tables = []
    made = make(
        tmp_path, monkeypatch, cells, runs, jobs=3, changed=lambda: tables.append(markdown("t", cells, "paper"))
    )
    assert made.run() == 0
    assert most_at_once(tmp_path) == 3
    assert sorted(begun(tmp_path)) == sorted(run.name for run in runs), "each run once"
    assert {c.row: sorted(c.results) for c in cells} == {row: [0, 1] for row in ("first", "long", "head", "tail")}
    # After every run the table has one number more.
    assert len(tables) == len(runs)
    assert [sum(int(line.split(" | ")[5] or 0) for line in of_cells(text)) for text in tables] == [*range(1, 9)]
    assert "| head | column | 50.00 | 50.00 ± 0.00 | +0.00 | 2 | 60.00 | 40.00 |  | 10.00 | last | 3 |" in tables[-1]


def test_a_finished_campaign_runs_nothing_again(tmp_path, monkeypatch):
    cells, runs = campaign(tmp_path)
    assert make(tmp_path, monkeypatch, cells, runs, jobs=4).run() == 0
    before = begun(tmp_path)
    cells, _ = campaign(tmp_path)
    made = make(tmp_path, monkeypatch, cells, runs, jobs=4)
    assert not made.tasks
    assert all(len(c.results) == 2 for c in cells), "they are there before anything is run"
    assert made.run() == 0
    assert begun(tmp_path) == before


def run_as_the_command_does(folder, runs, cells):
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    execution.plan_run = plan(runs)
    execution.Campaign(cells, folder, jobs=2).run()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_after_a_kill_in_the_middle_finished_runs_stay_and_the_others_resume(number, tmp_path, monkeypatch):
    cells, runs = campaign(tmp_path)
    # Forked, so that torch need not be imported again.
    process = multiprocessing.get_context("fork").Process(target=run_as_the_command_does, args=(tmp_path, runs, cells))
    process.start()
    deadline = time.monotonic() + 60
    state = tmp_path / "long-0" / "state"
    while "first-0 ended" not in {f"{name} {what}" for _, name, what in events(tmp_path)} or not state.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(timeout=60)
    assert process.exitcode not in (0, None)
    while sum(what.startswith("began") for *_, what in events(tmp_path)) > sum(
        not what.startswith("began") for *_, what in events(tmp_path)
    ):
        assert time.monotonic() < deadline, "no process outlives the campaign"
        time.sleep(0.01)
    stopped = {name for _, name, what in events(tmp_path) if what == "stopped"}
    finished = {name for _, name, what in events(tmp_path) if what == "ended"}
    assert "long-0" in stopped
    assert "first-0" in finished
    reached = int(state.read_text())
    assert 0 < reached < 120

    assert make(tmp_path, monkeypatch, cells, runs, jobs=2).run() == 0
    assert all(begun(tmp_path).count(name) == 1 for name in finished)
    assert [what for _, name, what in events(tmp_path) if name == "long-0" and "began" in what][1].startswith(
        f"began at {reached} "
    )
    assert all(len(c.results) == 2 for c in cells)


def test_a_failure_is_told_and_takes_only_those_with_it_that_need_it(tmp_path, monkeypatch, capsys):
    bad = FakeRun("bad-0", tmp_path / "bad-0", 1, 1, fails=True)
    runs = [bad, FakeRun("head-0", tmp_path / "head-0", 1, 1, (bad,)), FakeRun("good-0", tmp_path / "good-0", 1, 9)]
    cells = [cell("bad"), cell("head"), cell("good")]
    changes = []
    made = make(tmp_path, monkeypatch, cells, runs, jobs=2, changed=lambda: changes.append(1))
    assert made.run() == 2
    assert sorted(begun(tmp_path)) == ["bad-0", "good-0"]
    for failed in cells[:2]:
        assert failed.problem == f"failed with code 1: the disk is full (see {tmp_path / 'bad-0.log'})"
    assert (cells[2].problem, list(cells[2].results)) == (None, [0])
    assert "not finished bad-0: failed with code 1: the disk is full" in capsys.readouterr().err
    assert len(changes) == 3


def test_a_run_that_cannot_be_prepared_fails_alone(tmp_path, monkeypatch):
    class Unprepared(FakeRun):
        def prepare(self):
            raise ValueError("the images\nare not there")

    runs = [Unprepared("bad-0", tmp_path / "bad-0", 1, 1), FakeRun("good-0", tmp_path / "good-0", 1, 2)]
    cells = [cell("bad"), cell("good")]
    assert make(tmp_path, monkeypatch, cells, runs).run() == 1
    assert cells[0].problem == "the images are not there"
    assert begun(tmp_path) == ["good-0"]


def test_a_signal_stops_every_process_and_waits_for_their_checkpoints(tmp_path, monkeypatch):
    runs = [FakeRun(f"{row}-0", tmp_path / f"{row}-0", 3000, 1) for row in "abc"]
    made = make(tmp_path, monkeypatch, [cell(row) for row in "abc"], runs, jobs=2)

    def interrupt():
        while len(begun(tmp_path)) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert sorted(what for *_, what in events(tmp_path) if not what.startswith("began")) == ["stopped", "stopped"]
    assert sorted(begun(tmp_path)) == ["a-0", "b-0"]


def test_a_run_of_another_process_is_waited_for_while_others_go_on(tmp_path, monkeypatch, capsys):
    runs = [FakeRun("theirs-0", tmp_path / "theirs-0", 1, 1), FakeRun("ours-0", tmp_path / "ours-0", 1, 2)]
    with (tmp_path / "theirs-0.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        theirs = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
    cells = [cell("theirs"), cell("ours")]

    def end_theirs():
        """Once ours is done: theirs has its result by then."""
        if cells[1].results and theirs.poll() is None:
            (tmp_path / "theirs-0").mkdir()
            (tmp_path / "theirs-0" / "result.json").write_text((tmp_path / "ours-0" / "result.json").read_text())
            theirs.stdin.close()
            theirs.wait(timeout=60)

    assert make(tmp_path, monkeypatch, cells, runs, changed=end_theirs).run() == 0
    assert begun(tmp_path) == ["ours-0"]
    assert list(cells[0].results) == [0]
    assert capsys.readouterr().err.count("waiting for theirs-0, which another process trains") == 1


def test_a_low_priority_is_that_of_the_runs(tmp_path, monkeypatch):
    own = os.getpriority(os.PRIO_PROCESS, 0)
    run = FakeRun("a-0", tmp_path / "a-0", 1, 1)
    assert make(tmp_path, monkeypatch, [cell("a")], [run], nice=3).run() == 0
    assert events(tmp_path)[0][2] == f"began at 0 nice {min(19, own + 3)}"
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_cores_are_divided_among_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "available_cores", lambda: 7)
    threads = [make(tmp_path, monkeypatch, [], [], jobs=jobs).threads for jobs in (1, 2, 3, 8)]
    assert threads == [None, 3, 2, 1]
