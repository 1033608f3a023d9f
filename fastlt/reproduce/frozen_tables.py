"""What the runs on frozen features say: each method at its own best rate by validation, and at a common one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastlt.markdown_table import markdown_table
from fastlt.reproduce.frozen import Method
from fastlt.reproduce.paired import paired_difference

Results = Mapping[tuple[str, float, int], dict[str, Any]]  # by method, rate and seed
METRICS = ("top1", "many", "medium", "few", "ece")


@dataclass(frozen=True)
class Measured:
    """A method at one rate over its seeds.

    test: a list a metric, in the order of `seeds`, as fractions. weights: least and largest class weight, means over
    seeds; None without class weights. diverged: seeds without a result.
    """

    lr: float
    seeds: list[int]
    validation: float
    test: Mapping[str, list[float]]
    weights: tuple[float, float] | None
    train_s: float
    diverged: int

    def by_seed(self) -> dict[int, float]:
        """Top-1 on the test set by seed, a fraction."""
        return dict(zip(self.seeds, self.test["top1"], strict=True))


@dataclass(frozen=True)
class Row:
    """A method in the table of one data set. difference: of top-1 to the first row, (mean, half of the interval)."""

    method: str
    choice: str
    measured: Measured
    difference: tuple[float, float] | None


def rows(methods: Sequence[Method], results: Results, common: float, rate_seeds: int) -> list[Row]:
    """Two rows a method that has results: choice "own", its best rate by validation, and "common".

    rate_seeds: the rate is chosen on the seeds below this number.
    Differences are paired by seed, with 95 % intervals of Student's t. The first method is what others are compared to.
    """
    made = []
    for choice in ("own", "common"):
        reference: Measured | None = None
        for method in methods:
            lr = best_rate(method, results, rate_seeds) if choice == "own" else common
            measured = None if lr is None else _measure(method, lr, results)
            if measured is None:
                continue
            if method is methods[0]:
                reference = measured
            paired = None
            if reference is not None and measured is not reference:
                paired = paired_difference(measured.by_seed(), reference.by_seed())
            made.append(Row(method.name, choice, measured, paired))
    return made


def best_rate(method: Method, results: Results, rate_seeds: int) -> float | None:
    """The rate with the best mean validation accuracy on the seeds below `rate_seeds`; None without results."""
    first = {key: result for key, result in results.items() if key[2] < rate_seeds}
    rates = sorted({rate for of, rate, _ in first if of == method.runs})
    measured = [m for m in (_measure(method, rate, first) for rate in rates) if m is not None]
    # A rate at which a seed diverged is not chosen while there is another.
    best = max(measured, key=lambda m: (-m.diverged, m.validation), default=None)
    return None if best is None else best.lr


def _measure(method: Method, lr: float, results: Results) -> Measured | None:
    prefix = "adjusted_" if method.adjusted else ""
    of_rate = {seed: result for (of, rate, seed), result in sorted(results.items()) if (of, rate) == (method.runs, lr)}
    whole = {seed: result for seed, result in of_rate.items() if result["problem"] is None}
    if not whole:
        return None
    weights = [result["weights"] for result in whole.values() if result["weights"] is not None]
    return Measured(
        lr,
        list(whole),
        statistics.mean(result["validation"][f"{prefix}top1"] for result in whole.values()),
        {
            key: [r["test"][prefix + key] for r in whole.values() if r["test"][prefix + key] is not None]
            for key in METRICS
        },
        (statistics.mean(map(min, weights)), statistics.mean(map(max, weights))) if weights else None,
        statistics.mean(result["train_s"] for result in whole.values()),
        len(of_rate) - len(whole),
    )


def as_record(data: str, row: Row) -> dict[str, Any]:
    """What the CSV and JSON files say of a row; accuracies and their differences in %."""
    m = row.measured
    record: dict[str, Any] = {
        "data": data,
        "method": row.method,
        "choice": row.choice,
        "lr": m.lr,
        "seeds": len(m.seeds),
    }
    for key in METRICS:
        values = [100 * value for value in m.test[key]]
        record[key] = statistics.mean(values) if values else None
        record[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    mean, half = (None, None) if row.difference is None else (100 * value for value in row.difference)
    low, high = m.weights or (None, None)
    return {
        **record,
        **{"difference": mean, "difference_95": half, "validation": 100 * m.validation},
        **{"least_weight": low, "largest_weight": high, "train_s": m.train_s, "diverged": m.diverged},
    }


HEAD = ("method", "rate", "top-1", "difference", "many", "medium", "few", "ECE", "class weights", "seeds", "s")


def markdown(title: str, records: Sequence[Mapping[str, Any]], first: str) -> str:
    """Records as Markdown: a table a data set and choice."""
    lines = [f"# {title}", "", "In %, mean ± sample standard deviation over seeds; the classes of many, medium and few"]
    lines += [f"images count alike. Difference: to {first}, paired by seed, with its 95 % interval."]
    headings = {"own": "each method at its best rate by validation", "common": "all at one rate"}
    for data, choice in dict.fromkeys((r["data"], r["choice"]) for r in records):
        lines += ["", f"## {data}, {headings[choice]}", ""]
        lines += [markdown_table(HEAD, [_cells(r) for r in records if (r["data"], r["choice"]) == (data, choice)])]
    return "\n".join(lines) + "\n"


def _cells(r: Mapping[str, Any]) -> list[str]:
    spread = "" if r["top1_std"] is None else f" ± {r['top1_std']:.2f}"
    apart = "-" if r["difference"] is None else f"{r['difference']:+.2f} ± {r['difference_95']:.2f}"
    groups = ["-" if r[key] is None else f"{r[key]:.1f}" for key in ("many", "medium", "few", "ece")]
    weights = "-" if r["least_weight"] is None else f"{r['least_weight']:.2f} to {r['largest_weight']:.2f}"
    seeds = f"{r['seeds']}" + (f", {r['diverged']} diverged" if r["diverged"] else "")
    return [
        r["method"],
        f"{r['lr']:g}",
        f"{r['top1']:.2f}{spread}",
        apart,
        *groups,
        weights,
        seeds,
        f"{r['train_s']:.1f}",
    ]
