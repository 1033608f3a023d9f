"""docs/using_a_model.md as written: each command and each piece of Python, on a small run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_inference import CLASSES, root, trainer  # noqa: F401  fixtures

import fastlt
from fastlt import cli
from fastlt.losses import LOSSES
from fastlt.steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "using_a_model.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in re.findall(r"^ {4}(fastlt .*)$", PAGE, re.M)]
PYTHON = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture
def here(root, trainer, tmp_path, monkeypatch):  # noqa: F811
    """A folder with what the page speaks of: the run, photographs, a list of them and a file of counts."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(trainer.folder)
    for number, name in enumerate(CLASSES, 1):
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.copy(root / "test" / name / "1.jpg", tmp_path / "photos" / f"{number}.jpg")
    shutil.copytree(root / "val", tmp_path / "labelled")
    rows = [f"{name}/{k}.jpg,{name},val\n" for name in CLASSES for k in range(4)]
    (tmp_path / "labels.csv").write_text("".join(["path,label,split\n", *rows]))
    (tmp_path / "list.txt").write_text("photos/3.jpg\nphotos/1.jpg\n")
    (tmp_path / "deployed.csv").write_text("".join(f"{name},{10 + k}\n" for k, name in enumerate(CLASSES)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_do_what_the_page_says(here, capsys):
    pytest.importorskip("onnxruntime", reason="fastlt export --to onnx needs the extra export")
    assert len(COMMANDS) >= 10
    printed = {}
    for command in COMMANDS:
        if "--push" in command:  # needs a network and an account
            continue
        assert cli.main(shlex.split(command, comments=True)[1:]) == 0, command
        printed[command] = capsys.readouterr()
    lines = (here / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 3
    assert lines[0].count("class_") == 3
    tree = json.loads((here / "predictions.json").read_text())
    assert [one["image"] for one in tree["predictions"]] == ["photos/3.jpg", "photos/1.jpg"]
    (first,) = (out for command, out in printed.items() if command.endswith("1.jpg"))
    assert first.out.startswith("photos/1.jpg: ")
    assert first.out.count("%") == len(CLASSES)
    assert any("fitted on" in out.err for command, out in printed.items() if command.endswith("validation"))
    assert json.loads((here / "measured.json").read_text())["images"] == 12
    for file in ("wrong.csv", "sure.csv", "runs/mine/mine.onnx", "model.pt2"):
        assert (here / file).is_file()


def test_the_python_runs_in_the_order_of_the_page(here, capsys):
    pytest.importorskip("onnxruntime", reason="the page reads an export")
    assert cli.main(["export", "runs/mine", "--to", "onnx", "--preprocess"]) == 0
    names: dict[str, object] = {}
    for block in PYTHON:
        exec(compile(block, "docs/using_a_model.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "photos/1.jpg" in printed
    assert "fitted on" in printed
    assert "\n0.9 " in printed
    predicted = fastlt.load("runs/mine", device="cpu").predict("photos/1.jpg")[0].name
    assert printed.splitlines()[-1] == f"ONNX: {predicted}"


@pytest.mark.parametrize("name", [*LOSSES, *STEPS])
def test_the_page_says_which_prior_logits_carry(name):
    assert re.search(rf"^\|.*`{name}`.*\|", PAGE, re.M), f"no table has {name}"
