"""From recipe files and override words to one checked recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlt.recipe.checks import check
from fastlt.recipe.from_model import take_from_model
from fastlt.recipe.locations import find_base, find_recipe
from fastlt.recipe.schema import Recipe, recipe_from_tree
from fastlt.recipe.typed_yaml import build, describe
from fastlt.recipe.yaml_text import RecipeError, parse

LARGEST = 1 << 20  # bytes of a recipe file


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, its base files and the override words, and check all of it; path: see `find_recipe`.

    RecipeError with one line a mistake: the key, its value, what is allowed, and the nearest valid key.
    """
    path = find_recipe(path)
    tree = compose(path)
    for word in overrides:
        apply_override(tree, word)
    tree.setdefault("name", path.stem)
    if isinstance(tree.get("stages"), dict):
        tree["stages"] = {name: stage for name, stage in tree["stages"].items() if stage is not None}
    if tree.get("precision") == "fp16":
        raise RecipeError(
            "precision: is 'fp16'; allowed: fp32 or bf16. float16 gradients underflow without loss scaling, and those "
            "of the meta-step first, which are products of two of them; set precision=bf16, which has float32's range"
        )
    take_from_model(tree)
    recipe = build(Recipe, tree)
    mistakes = check(recipe)
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return recipe


def read_resolved(path: Path) -> Recipe:
    """The recipe of a run that is over: every key stands in the file, and no file that it names need be there any more.

    RecipeError where it cannot be read, or has a key that this version does not know.
    """
    return recipe_from_tree(read_yaml(path))


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
        tree = merge(tree, part)
    return merge(tree, own)


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


def apply_override(tree: dict[str, Any], word: str) -> None:
    """Set one `key.sub=value` word in `tree`; the value is read as YAML. RecipeError when the word has another form."""
    key, sep, text = word.partition("=")
    if not sep or not key or any(not part for part in key.split(".")):
        raise RecipeError(f"{word!r} is not an override: write key.sub=value, for example data.root=/images seed=1")
    value = parse(text, f"the word {key}=…", key)
    *parents, last = key.split(".")
    node = tree
    for depth, part in enumerate(parents):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            where = ".".join(parents[: depth + 1])
            raise RecipeError(f"{word!r}: {where} is {describe(child)}, it has no keys to override; set {where} itself")
        node = child
    node[last] = value
