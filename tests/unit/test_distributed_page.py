"""The commands of the page on several machines: their options exist, and the script for Slurm trains."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
SRUN = """#!/bin/bash
# Runs a command once on each "node", a folder beside the others, as srun does with one task a node.
while [[ $1 == --* ]]; do shift; done
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    (cd "node$node" && SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 \\
        SLURM_STEP_NUM_TASKS=$SLURM_JOB_NUM_NODES exec "$@") &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
"""
SCONTROL = """#!/bin/bash
[[ "$1 $2 $3" == "show hostnames node[0-1]" ]] && printf 'localhost\\nlocalhost\\n'
"""


def script() -> str:
    (found,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    return found


def commands(program: str) -> list[list[str]]:
    """The words of the commands of the page that begin with a program, lines put together."""
    lines = re.sub(r"\\\n\s*", "", PAGE)
    return [line.split()[1:] for line in re.findall(rf"^    (?:\w+=\w+ )?({program} .*)$", lines, flags=re.MULTILINE)]


def test_the_options_of_the_commands_exist():
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    launched = [words[1:] for words in (*commands("fastlt"), *commands("accelerate")) if words[0] == "launch"]
    assert len(launched) == 4
    for words in launched:
        launch_command_parser().parse_args(words)
    assert len(commands("torchrun")) == 3
    for words in commands("torchrun"):
        given = get_args_parser().parse_args(words)
        assert (given.module, given.training_script) == (True, "fastlt")


def test_the_script_for_slurm_is_one(tmp_path):
    (tmp_path / "train.sbatch").write_text(script())
    assert subprocess.run(["bash", "-n", tmp_path / "train.sbatch"], check=False).returncode == 0
    assert "#SBATCH --ntasks-per-node=1\n" in script()


@pytest.mark.slow
def test_the_script_for_slurm_trains_on_two_nodes(digits, tmp_path):
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "train.sbatch": script()}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    for node in range(2):
        shutil.copytree(digits, tmp_path / f"node{node}" / "digits")
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
        **{"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PROCESSES": "1"},
        **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1"},
        "SLURM_JOB_NODELIST": "node[0-1]",
    }
    stage = "stages.end_to_end"
    words = ["digits_lt", "data.converted=digits", "data.loader=resident", f"{stage}.iterations=8", f"{stage}.warmup=2"]
    command = [tmp_path / "train.sbatch", *words, f"{stage}.evaluate_every=4"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("node*/runs/digits_lt/result.json")  # on the node of process 0
    assert json.loads(result.read_text())["processes"] == 2
