"""The command `fastlt`: what it answers, how fast, and under which name; recipes by name; the installed package."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from fastlt import __version__, cli
from fastlt.commands.benchmark import BENCHMARKS
from fastlt.parent_process import LAUNCHER
from fastlt.recipe import load_recipe
from fastlt.recipe.locations import SHIPPED, find_recipe, shipped_names
from fastlt.run.folder import last_checkpoint, log_file
from loaders.stored.damage import ReaderError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "convert": "convert_dataset.py",
    "report": "report.py",
    "ensemble": "ensemble.py",
    "reproduce": "reproduce.py",
    "benchmark": "benchmark.py",
}


def test_without_words_it_says_what_there_is(capsys):
    assert cli.main([]) == 2
    nothing = capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert told == nothing
    for name, command in cli.COMMANDS.items():
        assert f"{name} " in told
        assert command.summary in told
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastlt {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "x.yaml"], "fastlt: error: unknown command 'trian': allowed are "),
        (["benchmark", "stpe"], "fastlt benchmark: error: unknown benchmark 'stpe': allowed are "),
        (["reproduce", "table88"], "fastlt reproduce: error: unknown table 'table88': allowed are "),
        (["convert", "digit", "--out", "x"], "fastlt convert: error: unknown source 'digit': allowed are "),
    ],
)
def test_an_unknown_word_is_answered_with_the_nearest_and_code_2(words, message, capsys):
    try:
        code = cli.main(words)
    except SystemExit as stopped:  # argparse found it
        code = stopped.code
    told = capsys.readouterr().err
    assert code == 2
    assert message in told
    assert "; did you mean '" in told


def test_it_answers_before_anything_heavy_is_imported():
    code = "import sys; from fastlt import cli; cli.main(['--help']); cli.main(['trian'])\n"
    code += "print({'torch', 'numpy', 'yaml', 'ffcv', 'accelerate'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == "set()"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_help_that_shows_how_it_is_called(name, capsys):
    for prog, typed in ((None, f"fastlt {name}"), (SCRIPTS.get(name), f"python tools/{SCRIPTS.get(name)}")):
        if prog is None and typed.startswith("python"):
            continue
        try:
            code = cli.main([name, "--help"], prog)
        except SystemExit as stopped:
            code = stopped.code
        told = capsys.readouterr().out
        assert code == 0
        assert typed in told
        if prog is not None:
            assert f"    fastlt {name}" not in told


def test_the_help_of_the_benchmarks_names_all_of_them(capsys):
    assert cli.main(["benchmark", "-h"]) == 0
    told = capsys.readouterr().out
    assert all(f"fastlt benchmark {name} " in told for name in BENCHMARKS)


@pytest.mark.parametrize(("name", "script"), SCRIPTS.items())
def test_a_script_of_tools_is_the_command_under_its_own_name(name, script):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / script), "-h"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert f"python tools/{script}" in done.stdout


def test_a_recipe_is_found_by_name_from_anywhere_and_printed_in_full(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = []
    for word in ("cifar10_lt", "cifar10_lt.yaml", str(SHIPPED / "cifar10_lt.yaml")):
        assert cli.main(["check", word, "seed=3"]) == 0
        # The time of theta is measured anew by each.
        printed.append(re.sub(r"about [\d.,]+ ms", "about N ms", capsys.readouterr().out))
    assert len(set(printed)) == 1
    assert yaml.safe_load(printed[0])["seed"] == 3
    # A file of that name goes first.
    (tmp_path / "cifar10_lt.yaml").write_text(printed[0].replace("seed: 3", "seed: 4"))
    assert load_recipe("cifar10_lt.yaml").seed == 4


def test_a_console_without_the_characters_shows_their_escapes(tmp_path):
    """± is not in ASCII, and in the C locale a file name of other letters is bytes."""
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LC_ALL": "C",
    }
    recipe = tmp_path / "μ.yaml"
    recipe.write_bytes((SHIPPED / "digits_lt.yaml").read_bytes())
    for words, shown in ((["report", "--help"], "\\xb1"), (["check", str(recipe)], 'name: "\\uDCCE\\uDCBC"')):
        done = subprocess.run(
            [sys.executable, "-m", "fastlt", *words], env=environment, capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("wrong"), 2),
        (PermissionError(13, "may not", "file"), 2),
        (ReaderError("worker process 7 ended"), 1),
        (RuntimeError("ours"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_command_tells_of_what_is_not_its_own_mistake_in_one_line(error, code, monkeypatch, capsys):
    def fails(words, prog):
        raise error

    monkeypatch.setattr("fastlt.commands.verify.main", fails)
    if code is None:
        with pytest.raises(RuntimeError, match="ours"):
            cli.main(["verify", "x"])
        return
    assert cli.main(["verify", "x"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_tilde_in_an_argument_is_the_home_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["verify", "~/absent"]) == 2
    assert f"{tmp_path}/absent" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["report", "~no_such_user/run"])
    assert "there is no home folder ~no_such_user here" in capsys.readouterr().err


def test_an_unknown_recipe_is_answered_with_the_nearest_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for word in ("cifar10_tl", "recipes/cifar10_lt.yaml"):
        assert cli.main(["check", word]) == 2
        told = capsys.readouterr().err
        assert f"fastlt check: error: {word}: cannot be read (no such file)" in told
        assert "nearest: cifar10_lt, " in told


def test_a_base_is_next_to_the_file_or_else_a_shipped_one(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"base": ["base/cifar10.yaml", "cifar10_lt_ce.yaml"]}))
    with pytest.raises(ValueError, match="bases go one level deep"):
        load_recipe(mine)
    tree = yaml.safe_load((SHIPPED / "cifar10_lt_ce.yaml").read_text())
    mine.write_text(yaml.safe_dump(tree))
    shipped = load_recipe(SHIPPED / "cifar10_lt_ce.yaml", ["name=mine"])
    assert load_recipe(mine) == shipped
    (tmp_path / "base").mkdir()
    own = yaml.safe_load((SHIPPED / "base" / "cifar10.yaml").read_text())
    own["data"]["meta_per_class"] = 7
    (tmp_path / "base" / "cifar10.yaml").write_text(yaml.safe_dump(own))
    assert load_recipe(mine).data.meta_per_class == 7 != shipped.data.meta_per_class
    mine.write_text(yaml.safe_dump({**tree, "base": ["base/cifar1.yaml"]}))
    with pytest.raises(ValueError, match=r"base: base/cifar1\.yaml is neither next to .*nearest: base/cifar10\.yaml"):
        load_recipe(mine)


def test_every_shipped_recipe_has_a_name():
    assert "digits_lt" in shipped_names()
    assert all(find_recipe(name).is_file() for name in shipped_names())
    assert find_recipe("finetune/mine_finetune.yaml") == find_recipe("mine_finetune"), "as a base is named"
    with pytest.raises(ValueError, match="no such file"):
        find_recipe("base/cifar10.yaml")


@pytest.mark.slow
def test_the_wheel_holds_the_command_the_packages_and_the_recipes(tmp_path):
    """Built and unpacked elsewhere, it finds its recipes and tables without the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    wheels, installed = tmp_path / "wheels", tmp_path / "installed"
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True)
    (wheel,) = wheels.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("fastlt", "loaders"):
        modules = [n for n in tracked.splitlines() if n.startswith(f"{folder}/") and n.endswith((".py", ".typed"))]
        assert set(modules) <= names
    assert {f"fastlt/recipes/{p.relative_to(SHIPPED)}" for p in SHIPPED.rglob("*.yaml")} <= names
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)

    def fastlt(*words: str) -> str:
        command = [sys.executable, "-m", "fastlt", *words]
        done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "name: digits_lt" in fastlt("check", "digits_lt")
    assert "cifar100_lt_crt" in fastlt("reproduce", "table8", "--list")
    assert (installed / "bin" / "fastlt").is_file()


LAUNCH = [sys.executable, "-m", "fastlt", "launch", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def test_launched_training_refuses_a_recipe_in_one_line_and_with_code_2(tmp_path):
    done = subprocess.run(
        [*LAUNCH, "digits_lt", "seed=x", f"runs={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["fastlt: seed: is a string ('x'); allowed: an integer"]


def test_launched_processes_refuse_a_recipe_once(tmp_path):
    words = ["--cpu", *LAUNCH[4:], "--num_processes", "2", "digits_lt", "seed=x", f"runs={tmp_path}"]
    done = subprocess.run([*LAUNCH[:4], *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["fastlt: seed: is a string ('x'); allowed: an integer"]


@pytest.mark.parametrize("name", ["train", "check"])
def test_a_missing_recipe_is_all_that_is_asked_for(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([name])
    assert capsys.readouterr().err.endswith(f"fastlt {name}: error: the following arguments are required: recipe\n")


def test_what_cannot_be_launched_is_refused(capsys):
    for words, message in (([], "required: RECIPE"), (["--multi_gpu", "--tpu", "digits_lt"], "one of")):
        try:
            code = cli.main(["launch", "--num_processes", "1", *words])
        except SystemExit as stopped:
            code = stopped.code
        told = capsys.readouterr().err
        assert code == 2
        assert "fastlt launch: error: " in told
        assert message in told
        # A training in this process would end itself with its launcher, whose child it is not.
        assert LAUNCHER not in os.environ


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_stop_of_launched_training_leaves_a_checkpoint_to_go_on_from(number, digits_words, tmp_path):
    """To the launcher's whole group, as a terminal sends Ctrl-C: the training gets it once."""
    words = [*digits_words, "stages.end_to_end.iterations=100000"]
    process = subprocess.Popen(
        [*LAUNCH, "digits_lt", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = log_file(tmp_path / "runs" / "digits_lt")
    deadline = time.monotonic() + 200
    while not (log.is_file() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, number)
    told, mistakes = process.communicate(timeout=90)
    assert process.returncode == 128 + number
    assert "Traceback" not in mistakes
    assert "the same command goes on from there" in told
    assert last_checkpoint(log.parent).exists()
