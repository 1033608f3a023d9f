"""The time left over all stages: rates of stages that were trained, evaluations, the tests at the end."""

from __future__ import annotations

import itertools

import pytest

from fastlt.recipe import load_recipe
from fastlt.run.preflight import prepare
from fastlt.run.progress import PlannedStage, Progress, Stopwatch, TimeLeft, clock_time
from fastlt.run.trainer import Trainer


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


STAGES = [
    PlannedStage("first", "plain", batch_size=10, iterations=100, evaluate_every=30),
    PlannedStage("second", "difficulty", batch_size=20, iterations=50, evaluate_every=50),
    PlannedStage("third", "plain", batch_size=5, iterations=40, evaluate_every=10),
]


def train(left, clock, iterations, seconds):
    """Iterations of so many seconds each; the first one of a stage is not to count."""
    for _ in range(iterations):
        clock.now += seconds if left.began else 1000.0
        left.progress.count(1)
        if left.began is None:
            left.begin()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def left(clock):
    return TimeLeft(Progress(), STAGES, tested=3.0, clock=clock)


def test_evaluations_that_are_left():
    first = STAGES[0]  # after 30, 60, 90 and 100 iterations
    assert [first.evaluations_after(done) for done in (0, 29, 30, 89, 90, 99, 100)] == [4, 4, 3, 2, 1, 1, 0]
    assert STAGES[1].evaluations_after(0) == 1


def test_before_the_second_iteration_nothing_is_known(left, clock):
    assert str(left) == "time left not known yet"
    train(left, clock, 1, 1.0)
    assert left.seconds() is None


def test_every_stage_goes_by_its_own_rate_and_evaluations_count(left, clock):
    train(left, clock, 21, 2.0)
    # 79 iterations here; the others go image for image by this rate, and no evaluation has been measured.
    seconds, measured = left.seconds()
    assert not measured
    assert seconds == pytest.approx(79 * 2.0 + 50 * 2.0 * 20 / 10 + 40 * 2.0 * 5 / 10)
    train(left, clock, 9, 2.0)
    with left.evaluating():
        clock.now += 7.0
    # Its 7 s are in no iteration; 3 + 1 + 4 evaluations are left, and tests as long as 3.
    seconds, _ = left.seconds()
    assert seconds == pytest.approx(70 * 2.0 + 50 * 4.0 + 40 * 1.0 + 7.0 * (3 + 1 + 4 + 3))
    train(left, clock, 70, 2.0)
    left.end()
    left.progress.next_stage()
    train(left, clock, 11, 9.0)
    # The third goes by the first, which has its method, and not by the second.
    seconds, measured = left.seconds()
    assert measured
    assert seconds == pytest.approx(39 * 9.0 + 40 * 1.0 + 7.0 * (1 + 4 + 3))
    assert left.iteration_s() == pytest.approx(9.0)


def test_it_is_told_in_minutes_or_hours(left, clock):
    assert [clock_time(s) for s in (0, 59.6, 61, 3600, 90061)] == ["0:00", "1:00", "1:01", "1:00:00", "25:01:01"]
    train(left, clock, 2, 2.0)
    assert str(left).startswith("about ")
    assert str(left).endswith(" left")


def test_the_first_batch_is_no_wait_and_no_training(monkeypatch):
    """Loaders compile and start their workers in it."""
    clock = Clock()
    monkeypatch.setattr("fastlt.run.progress.time.perf_counter", clock)

    def slow():
        for number in itertools.count():
            clock.now += 500.0 if number == 0 else 3.0
            yield number

    progress = Progress()
    watch = Stopwatch(progress)
    batches = watch.timed(slow())
    watch.start()
    for _ in range(3):
        next(batches)
        clock.now += 1.0
        watch.lap()
    assert progress.wait_s == pytest.approx(2 * 3.0)
    assert progress.train_s == pytest.approx(2 * 3.0 + 3 * 1.0)


def test_a_plan_has_the_lengths_of_the_stages_and_the_bar_tells_what_is_left(digits_words, capsys):
    words = [*digits_words, "stages.head={method: crt, lr: 0.1, epochs: 3, batch_size: 16, sampling: class_balanced}"]
    trainer = Trainer(prepare(load_recipe("digits_lt", words)))
    trainer.fit()
    built = {name: trainer.build_stage(name) for name in ("head",)}
    for plan in trainer.time_left.stages[1:]:
        stage = built[plan.name]
        assert (plan.iterations, plan.evaluate_every) == (stage.iterations, stage.evaluate_every)
        stage.loaders.close()
    told = capsys.readouterr().err
    assert "end_to_end: 100%" in told
    assert "head: 100%" in told
    assert " left, loss=" in told
