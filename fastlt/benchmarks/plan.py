"""What planning an epoch takes, by the number of images: the order, and the rectangles of random crops.

    fastlt benchmark plan --records 100_000 2_700_000 --processes 8

Labels and sizes are drawn at random; no image is read. A row is the plan of one of so many processes, which is made
while the epoch before is trained on where there are 200,000 images or more.

seconds  the median over rounds of what planning takes on one core
peak     the most memory that planning takes, in bytes a record; labels and sizes, 24 bytes, were there before
kept     what is kept of a plan during its epoch and, where it is made ahead, the epoch before, in bytes a record
late_ms  for how many milliseconds 1,000 images of a process wait for their rectangles when they are read
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from dataclasses import dataclass

import numpy as np

from fastlt.arguments import make_parser, positive
from fastlt.benchmarks.rounds import report
from loaders.order.crop import CropSpec
from loaders.order.plan import EpochPlan
from loaders.order.sampling import SAMPLINGS

NAME = "fastlt benchmark plan"
SIDES = (300, 600)  # of the images, in pixels
BATCH = 128  # over all processes, or one image each


@dataclass(frozen=True)
class Row:
    """Planning an epoch of so many records. Bytes are those a record of the whole split."""

    records: int
    sampling: str
    seconds: float
    peak: float
    kept: float
    late_ms: float


def main(arguments: list[str], prog: str = NAME) -> int:
    """Measure and print; returns the exit code."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("--records", type=positive, nargs="+", default=[100_000], metavar="N", help="default: 100000")
    parser.add_argument("--classes", type=positive, default=1000, metavar="C", help="default: 1000")
    parser.add_argument("--sampling", nargs="+", choices=list(SAMPLINGS), default=["instance", "class_balanced"])
    parser.add_argument("--processes", type=positive, default=1, metavar="N", help="that share an epoch (default: 1)")
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    words = parser.parse_args(arguments)
    rows = [
        measure(records, sampling, words.classes, words.processes, words.rounds)
        for records in words.records
        for sampling in words.sampling
    ]
    settings = {"classes": words.classes, "processes": words.processes, "numpy": np.__version__}
    report(rows, settings, as_json=words.json, table=print_table)
    return 0


def print_table(rows: list[Row]) -> None:
    """The rows for people."""
    print(f"{'records':>12}  {'sampling':16} {'seconds':>8} {'peak':>6} {'kept':>6} {'late_ms':>8}")
    for row in rows:
        print(
            f"{row.records:12,}  {row.sampling:16} {row.seconds:8.2f} "
            f"{row.peak:6.1f} {row.kept:6.1f} {row.late_ms:8.2f}"
        )


def measure(records: int, sampling: str, classes: int, processes: int, rounds: int) -> Row:
    """Plan the epochs 0, 1, … of the first process."""
    draw = np.random.default_rng(0)
    labels, heights, widths = draw.integers(classes, size=records), *draw.integers(*SIDES, size=(2, records))
    batch = max(1, min(BATCH, records) // processes)
    crop = CropSpec("random_resized", 224)
    plan = EpochPlan(labels, heights, widths, crop, batch, True, sampling, world_size=processes)
    times = []
    for epoch in range(rounds):
        started = time.perf_counter()
        plan.plan_epoch(epoch)
        times.append(time.perf_counter() - started)
    tracemalloc.start()
    made = plan.plan_epoch(0)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    boxes = plan.rectangles(made)
    asked = range(0, min(len(boxes), 100 * batch), batch)
    started = time.perf_counter()
    for start in asked:
        boxes[start : start + batch]
    late_ms = 1e6 * (time.perf_counter() - started) / (len(asked) * batch)
    return Row(records, sampling, statistics.median(times), peak / records, kept / records, late_ms)
