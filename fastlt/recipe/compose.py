"""From recipe files and override words to one checked recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlt.names import nearest
from fastlt.recipe.checks import check
from fastlt.recipe.from_model import take_from_model
from fastlt.recipe.locations import find_base, find_recipe
from fastlt.recipe.schema import ALIASES, Recipe, recipe_from_tree
from fastlt.recipe.yaml_text import parse
from fastlt.typed_yaml import RecipeError, build, describe
from loaders.stored.remote_folder import is_url

LARGEST = 1 << 20  # bytes of a recipe file
OTHER_LENGTH = {"iterations": "epochs", "epochs": "iterations"}  # of a stage, which has one of them


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, its base files and the override words, and check all of it; path: see `find_recipe`.

    RecipeError with one line a mistake: the key, its value, what is allowed, and the nearest valid key.
    """
    path = find_recipe(path)
    tree = compose(path)
    words = [Override.read(word) for word in overrides]
    of_files = list(stages_of(tree))
    for name, stage in stages_of(tree).items():
        given = {word.key[2]: word.value for word in words if word.key[:2] == ("stages", name) and len(word.key) == 3}
        for unit in OTHER_LENGTH.keys() & given:
            replace_length(stage, unit, given[unit], given.keys())
    for word in words:
        word.apply(tree)
    _refuse_stray_stages(tree, of_files, words)
    tree.setdefault("name", path.stem)
    if isinstance(tree.get("stages"), dict):
        tree["stages"] = {name: stage for name, stage in tree["stages"].items() if stage is not None}
    if tree.get("precision") == "fp16":
        raise RecipeError(
            "precision: is 'fp16'; allowed: fp32 or bf16. float16 gradients underflow without loss scaling, and those "
            "of the meta-step first, which are products of two of them; set precision=bf16, which has float32's range"
        )
    take_from_model(tree)
    _order_by_shards(tree)
    recipe = build(Recipe, tree, ALIASES)
    mistakes = check(recipe)
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return recipe


def _order_by_shards(tree: dict[str, Any]) -> None:
    """Let a data set at a URL be read in the order of its shards, where the recipe names no order, in place."""
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("converted"), str) and is_url(data["converted"]):
        data.setdefault("order", "shards")


def read_resolved(path: Path) -> Recipe:
    """The recipe of a run that is over: every key stands in the file, and no file that it names need be there any more.

    RecipeError where it cannot be read, or has a key that this version does not know.
    """
    return recipe_from_tree(as_recorded(read_yaml(path)))


def as_recorded(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of a run's recipe with the defaults of fastlt 0.1.0, which did not write them down.

    Later versions write every key. Changes `tree`.
    """
    for stage in stages_of(tree).values():
        options = stage.get("options") or {}
        if stage.get("method") == "difficulty" and "driver_target" not in options:
            options["driver_target"] = "relative"
        if stage.get("method") in ("difficulty", "sample_difficulty", "mwn") and tree.get("precision") == "bf16":
            options.setdefault("tangent", "fp32")
        stage["options"] = options
    return tree


def compose(path: Path) -> dict[str, Any]:
    """The file's own keys on top of those of its `base` files, later bases on top of earlier ones; one level deep."""
    own = read_yaml(path)
    bases = own.pop("base", [])
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise RecipeError(f"base: is {bases!r}; allowed: a list of recipe files, relative to {path.parent}")
    tree: dict[str, Any] = {}
    for base in bases:
        file = find_base(base, path)
        part = read_yaml(file)
        if "base" in part:
            raise RecipeError(f"{file}: has a base of its own; bases go one level deep, name both in {path}")
        tree = _on_top(tree, part)
    return _on_top(tree, own)


def _on_top(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`merge` of two files, where a length of a stage in one unit replaces that in the other."""
    stages = stages_of(base)
    for name, stage in stages_of(over).items():
        for unit in OTHER_LENGTH:
            if name in stages and unit in stage:
                replace_length(stages[name], unit, stage[unit], set(stage))
    return merge(base, over)


def stages_of(tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages of a tree that are mappings, by name; other values are refused later."""
    stages = tree.get("stages")
    return {k: v for k, v in stages.items() if isinstance(v, dict)} if isinstance(stages, dict) else {}


def replace_length(stage: dict[str, Any], unit: str, length: Any, given: Set[str]) -> None:
    """Let `unit`, iterations or epochs, be the unit of a stage that has its length in the other one. Changes `stage`.

    warmup, milestones and evaluate_every, which are in that unit too, keep their share of the length. given: the keys
    that are set anew with it and so stay.
    """
    other = OTHER_LENGTH[unit]
    before = stage.get(other)
    if length is None or before is None or other in given:
        return
    del stage[other]
    if not all(isinstance(one, int) and one > 0 for one in (before, length)):
        return  # refused later
    share = length / before
    scaled: dict[str, Callable[[Any], Any]] = {
        "warmup": lambda warmup: warmup * share,
        "milestones": lambda milestones: [one * share for one in milestones],
        "evaluate_every": lambda every: max(1, round(every * share)),
    }
    stage.setdefault("evaluate_every", 1)
    for key in scaled.keys() & stage.keys() - given:
        with contextlib.suppress(TypeError):  # no numbers: refused later
            stage[key] = scaled[key](stage[key])


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; RecipeError when it is absent, unreadable, or no mapping."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{path}: cannot be read ({why}); give the path of a recipe file") from None
    if len(data) > LARGEST:
        raise RecipeError(
            f"{path}: is larger than {LARGEST >> 20} MiB; give the path of a recipe, which is a text file"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}: line {line} is not UTF-8; save the recipe as text in UTF-8") from None
    loaded = parse(text, str(path))
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path}: holds {describe(loaded)}; a recipe is a mapping of keys to values")
    return loaded


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`: mappings merge key by key, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


@dataclass(frozen=True)
class Override:
    """A word `key.sub=value`. key: its parts. value: read as YAML. word: as it was written."""

    key: tuple[str, ...]
    value: Any
    word: str

    @classmethod
    def read(cls, word: str) -> Override:
        """RecipeError when the word has another form."""
        key, sep, text = word.partition("=")
        if not sep or not key or any(not part for part in key.split(".")):
            raise RecipeError(f"{word!r} is not an override: write key.sub=value, for example data.root=/images seed=1")
        return cls(tuple(key.split(".")), parse(text, f"the word {key}=…", key), word)

    def apply(self, tree: dict[str, Any]) -> None:
        """Set the value in `tree`; RecipeError when the key lies below one that has no keys."""
        *parents, last = self.key
        node = tree
        for depth, part in enumerate(parents):
            child = node.get(part)
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                where = ".".join(parents[: depth + 1])
                raise RecipeError(
                    f"{self.word!r}: {where} is {describe(child)}, it has no keys to override; set {where} itself"
                )
            node = child
        node[last] = self.value


def _refuse_stray_stages(tree: Mapping[str, Any], of_files: Sequence[str], words: Sequence[Override]) -> None:
    """RecipeError for words that set keys of a stage that is in no file, and do not make one: it has no method."""
    mistakes = []
    for name, stage in stages_of(tree).items():
        word = next((word for word in words if word.key[:2] == ("stages", name)), None)
        if name in of_files or "method" in stage or word is None:
            continue
        meant = of_files[0] if len(of_files) == 1 else nearest(name, of_files)
        hint = "" if meant is None else f"; did you mean {'.'.join(('stages', meant, *word.key[2:]))}?"
        there = f"the stages of the recipe are {', '.join(of_files)}" if of_files else "the recipe has no stages"
        mistakes.append(f"{'.'.join(word.key)}: there is no stage {name!r}, {there}{hint}")
    if mistakes:
        raise RecipeError("\n".join(mistakes))
