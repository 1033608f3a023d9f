"""Recipes with one mistake each: every one is valid, or refused in a message that names the key or the line.

A mutation takes a shipped recipe and changes one thing: the value of a key by a word or in the file, a key that is left
out, misspelt or given twice, or the text itself. What is valid must also be read back as it was written.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastlt.recipe import RecipeError, load_recipe
from fastlt.recipe.compose import compose
from fastlt.recipe.locations import shipped_names, shipped_recipes

LONGEST_MESSAGE = 3000
# As texts of YAML: other types, extremes, odd syntax.
VALUES = [
    *("", "~", "true", "no", "0", "-1", "1", "3", "0.5", "-0.0", "1e-320", "1e308", "1e999", ".inf", "-.inf", ".nan"),
    *("9" * 19, "9" * 401, "9" * 5000, "1_000", "010", "0x1F", "1:30", "2001-01-01", "2001-01-01T00:00:00Z", "=", "<<"),
    *(
        "[]",
        "{}",
        "[1]",
        "[0, 0]",
        "[1, 2, 3]",
        "[.nan, .nan, .nan]",
        "[[1]]",
        "[{}]",
        "{a: 1}",
        "{1: 2}",
        "[~]",
        "[a, a]",
    ),
    *("word", "'1'", "'nan'", "a/b", "../x", "~nobody_here/x", "é\u2028", "x" * 5000, "'\udcff'", "'\ud800'", '"\\0"'),
    *(
        "!!int ''",
        "!!float x",
        "!!binary aGk=",
        "!!set {a}",
        "!!timestamp 2001-01-01",
        "!!str 1",
        "!own 1",
        "!!null ''",
    ),
    *(
        "!!python/object/apply:os.system [x]",
        "[" * 100 + "]" * 100,
        "[" * 3000,
        "&a [*a]",
        "*a",
        "{a: 1, a: 2}",
        "{? [a] : 1}",
    ),
    *(
        "{<<: {a: 1}}",
        "{<<: 1}",
        "[1",
        "a: b: c",
        "- 1",
        "%YAML 9.9",
        "\x07",
        "\t- x",
        "@x",
        "`x`",
        "a #b",
        "| x",
        "---",
    ),
]
TEXTS = [
    "\t",
    "\x00",
    "\ufeff",
    "\x07",
    "[",
    "}",
    ": ",
    "- ",
    "'",
    '"',
    "&a ",
    "*a ",
    "!x ",
    "? ",
    "%x\n",
    "---\n",
    "\r",
    "\u2028",
    "{" * 99,
]


def keys_of(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys in a recipe; below lists there are none."""
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")


def mutations(random_: random.Random, folder: Path) -> Iterator[tuple[str, str | None, Path, list[str]]]:
    """Endless: what was done, the key or None where it is the text, the recipe's file and the override words."""
    names = shipped_names()
    everything = reference_keys()
    while True:
        name = random_.choice(names)
        tree = compose(shipped_recipes()[name])
        keys = [*keys_of(tree)] if random_.random() < 0.6 else everything
        key, value = random_.choice(keys), random_.choice(VALUES)
        kind = random_.choice(["word", "word", "value", "left out", "misspelt", "twice", "text", "bytes"])
        what = f"{name} {kind} {key} {value[:80]!a}"
        if kind == "word":
            yield what, key, shipped_recipes()[name], [f"{key}={value}"]
            continue
        text = yaml.safe_dump(tree, sort_keys=False)
        data = changed_text(text, kind, key.split(".")[-1], value, random_)
        if data is not None:
            (folder / "mine.yaml").write_bytes(data)
            told = None if kind in ("text", "bytes") else f"{key}x" if kind == "misspelt" else key
            yield what, told, folder / "mine.yaml", []


def changed_text(text: str, kind: str, key: str, value: str, random_: random.Random) -> bytes | None:
    """The recipe `text` with one change; None where it has no such key."""
    below = r"(?:\n\1[ -].*)*" if kind == "left out" else ""
    line = re.compile(rf"^( *)({re.escape(key)}):(.*){below}$", re.MULTILINE)
    new = {
        "value": lambda m: f"{m[1]}{m[2]}: {value}",
        "left out": lambda m: "",
        "misspelt": lambda m: f"{m[1]}{m[2]}x:{m[3]}",
        "twice": lambda m: f"{m[1]}{m[2]}: 1\n{m[0]}",
    }
    if kind in new:
        changed, found = line.subn(new[kind], text, count=1)
        return changed.encode("utf-8", "surrogatepass") if found else None
    place = random_.randrange(len(text))
    if kind == "text":
        return (text[:place] + random_.choice(TEXTS) + text[place:]).encode()
    data = text.encode()
    return data[:place] + bytes([random_.randrange(256)]) + data[place + 1 :]


def reference_keys() -> list[str]:
    """The keys of the whole schema, from a recipe with every default filled in."""
    return list(keys_of(yaml.safe_load(load_recipe("digits_lt").to_yaml())))


def present(name: str, folder: Path) -> list[str]:
    """Words by which the files that a shipped recipe names are there."""
    source = compose(shipped_recipes()[name])["data"]["source"]
    for file in ("train.txt", "test.txt"):
        (folder / file).touch()
    lists = [f"data.{split}_list={folder / f'{split}.txt'}" for split in ("train", "test")]
    return [f"data.root={folder}", *(lists if source == "list_file" else [])]


def answer(file: Path, words: list[str]) -> str | None:
    """The message that refuses a recipe; None for a valid one, which is then read back as it was written."""
    try:
        recipe = load_recipe(file, words)
    except RecipeError as error:
        return str(error)
    written = file.parent / "written.yaml" if file.name == "mine.yaml" else Path("written.yaml")
    written.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(written) == recipe
    return None


def wrong(message: str | None, key: str | None, before: set[str]) -> str | None:
    """Why a refusal is no good one; before: the lines by which the recipe was refused as it is shipped."""
    new = "\n".join(line for line in (message or "").split("\n") if line not in before)
    if len(new) > LONGEST_MESSAGE:
        return f"{len(new)} characters"
    if not new or key is None or re.search(r"is not valid YAML: line \d|line \d+ is not UTF-8", new):
        return None
    *above, last = key.split(".")
    # A word for a stage that the recipe has not makes one, which is not whole.
    of_stage = ".".join(above[:2]) if above[:1] == ["stages"] else None
    told = last in new or (".".join(above) or last) + ":" in new or (of_stage is not None and f"{of_stage}." in new)
    return None if told else "the key is not named"


def campaign(seed: int, count: int, folder: Path) -> tuple[Counter, list[str]]:
    """How many of `count` mutations were valid and refused, and what was wrong with the rest."""
    before: dict[str, set[str]] = {}
    counts, failures = Counter(), []
    for _, (what, key, file, words) in zip(range(count), mutations(random.Random(seed), folder), strict=False):
        name = what.split()[0]
        if name not in before:
            before[name] = set((answer(shipped_recipes()[name], present(name, folder)) or "").split("\n"))
        try:
            message = answer(file, [*present(name, folder), *words])
        except Exception as error:
            failures.append(f"{what}: {type(error).__name__} {str(error)[:200]}")
            continue
        counts["valid" if message is None else "refused"] += 1
        reason = wrong(message, key, before[name])
        if reason is not None:
            failures.append(f"{what}: {reason}: {message[:300]!a}")
    return counts, failures


def test_some_mutations_are_valid_or_refused_by_key(tmp_path, monkeypatch, fault_seed):
    monkeypatch.chdir(tmp_path)
    counts, failures = campaign(fault_seed, 40, tmp_path)
    assert not failures, "\n".join(failures)
    assert counts["refused"] > 20


@pytest.mark.faults
def test_every_mutation_is_valid_or_refused_by_key(tmp_path, monkeypatch, rounds, fault_seed, report_figure):
    monkeypatch.chdir(tmp_path)
    count = rounds(4000)
    counts, failures = campaign(fault_seed, count, tmp_path)
    report_figure(
        f"{count} mutations of {len(shipped_names())} recipes: {counts['valid']} valid, {counts['refused']} refused by "
        f"key or line, {len(failures)} otherwise"
    )
    assert not failures, "\n".join(failures)
