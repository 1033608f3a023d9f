"""Two commands that train one run at once: one trains, the other is refused, and nothing of the two is mixed."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import time
from pathlib import Path

import pytest
from processes import ROOT, sandbox

RECIPE = ROOT / "recipes" / "digits_lt.yaml"
STAGE = "stages.end_to_end"


def words_of(data: Path, runs: Path, seed: int) -> list[str]:
    return [
        *("train", str(RECIPE), f"data.converted={data}", f"runs={runs}", "name=run", f"seed={seed}"),
        *("data.loader=resident", "num_threads=1", "log_every=1", f"{STAGE}.iterations=60", f"{STAGE}.warmup=2"),
    ]


@pytest.mark.faults
def test_one_of_two_commands_trains_and_the_other_is_refused(digits, tmp_path, rounds, fault_seed, report_figure):
    """The two have different seeds, so that a mixture would show; they start up to two seconds apart."""
    draw, trials, problems = random.Random(fault_seed), rounds(20), []
    for trial in range(trials):
        runs = tmp_path / f"{trial}"
        apart = draw.choice([0.0, draw.uniform(0, 0.3), draw.uniform(0, 2.0)])
        with sandbox(tmp_path / f"sandbox_{trial}") as first, sandbox(tmp_path / f"sandbox_{trial}_b") as second:
            processes = []
            for seed, box in enumerate((first, second)):
                processes.append(box.start(*words_of(digits, runs, seed)))
                time.sleep(apart)
            try:
                codes = [process.wait(180) for process in processes]
            except subprocess.TimeoutExpired:
                problems.append(f"trial {trial}: does not end")
                continue
            outputs = [first.output, second.output]
        if sorted(codes) != [0, 2]:
            problems.append(f"trial {trial}: exit codes {codes}: {outputs}")
            continue
        owner, refused = codes.index(0), codes.index(2)
        problems += [
            f"trial {trial}: the refusal does not name {part}: {outputs[refused]}"
            for part in (str(runs / "run"), f"{processes[owner].pid}", socket.gethostname())
            if part not in outputs[refused]
        ]
        result = json.loads((runs / "run" / "result.json").read_text())
        if result["seed"] != owner or f"seed: {owner}\n" not in (runs / "run" / "recipe.yaml").read_text():
            problems.append(f"trial {trial}: the folder of seed {owner} holds the result of seed {result['seed']}")
        iterations = [
            line["iteration"]
            for line in map(json.loads, (runs / "run" / "log.jsonl").read_text().splitlines())
            if line["kind"] == "train"
        ]
        if iterations != list(range(1, 61)):
            problems.append(f"trial {trial}: the log has the iterations {iterations}")
    report_figure(f"{trials} trials, {len(problems)} problems")
    assert not problems, "\n".join(problems)
