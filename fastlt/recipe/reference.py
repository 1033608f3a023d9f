"""The page of all keys of a recipe, made from the types, the defaults and the docstrings of the code.

A key is described in the docstring of its class, one key a line: `key: sentence`, further lines indented. A method, a
loss or an augmentation is described by the first line of its class.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, Union

from fastlt.augment import AUGMENTATIONS
from fastlt.losses import LOSSES
from fastlt.markdown_table import markdown_table
from fastlt.models.adapters import ADAPTERS
from fastlt.optim import Clip, Ema
from fastlt.ranges import RANGE
from fastlt.recipe.schema import (
    AccuracyRecipe,
    DataRecipe,
    ModelRecipe,
    Recipe,
    StageRecipe,
    StorageRecipe,
    is_harmless,
)
from fastlt.steps import STEPS
from fastlt.steps.needs import Allows, Needs
from fastlt.typed_yaml import types_of
from loaders.readers import AUTO, BACKENDS
from loaders.readers.dali_augment import DALI_AUGMENTATIONS
from loaders.sources import SOURCES
from loaders.stored import FORMATS, SOURCE_FILES

COMMAND = "fastlt recipe-reference > docs/recipes.md"
TOP = f"""\
# Recipes: every key

<!-- Made from the code; do not edit. Renew it with: {COMMAND} -->

A recipe is a YAML file with the keys below. Words `key.sub=value` after the file on the command line override keys,
as in `fastlt train recipes/cifar10_lt.yaml data.root=data/raw stages.end_to_end.lr=0.1`. `base: [FILE, ...]` puts the
file's own keys on top of other files; mappings merge key by key, and lists replace. `epochs` of a stage replaces the
`iterations` of a base, and the other way round. `warmup`, `milestones` and `evaluate_every` of the base then keep their
share of the length, unless they are given too. Unknown keys, wrong types and impossible combinations are refused before
any data is read. The run folder keeps the recipe with every default filled in.

A key with an asterisk changes no result: a run that goes on may have another value than before. The rules of the other
keys are in [reliability](reliability.md#resuming).
"""
SECTIONS: tuple[tuple[str, type], ...] = (
    ("The run", Recipe),
    ("`data`", DataRecipe),
    ("`data.storage`", StorageRecipe),
    ("`model`", ModelRecipe),
    ("`stages.NAME`", StageRecipe),
    ("`stages.NAME.accuracy`", AccuracyRecipe),
    ("`stages.NAME.clip`", Clip),
    ("`stages.NAME.ema`", Ema),
)
# Keys whose values are names of a table that has a section of its own.
LINKS: dict[tuple[type, str], str] = {
    (ModelRecipe, "adapt"): "an [adapter](#adapters), or null",
    (StageRecipe, "method"): "a [method](#methods)",
    (StageRecipe, "options"): "those of the [method](#methods)",
    (StageRecipe, "optimizer"): "a name of `timm.optim.list_optimizers()`",
    (StageRecipe, "loss"): "a [loss](#losses)",
    (StageRecipe, "loss_options"): "those of the [loss](#losses)",
    (DataRecipe, "mean"): "list of 3 numbers, or `model`",
    (DataRecipe, "std"): "list of 3 numbers, or `model`",
    (DataRecipe, "eval_ratio"): "number in (0, 1], or `model`",
    (DataRecipe, "augment"): "list of [augmentations](#augmentations)",
    (DataRecipe, "meta_augment"): "list of [augmentations](#augmentations), or null",
    (DataRecipe, "second_augment"): "list of [augmentations](#augmentations), or null",
    (DataRecipe, "dali_augment"): f"one of {', '.join(f'`{name}`' for name in DALI_AUGMENTATIONS)}, or null",
}
# Defaults that come from the composition of a recipe, and not from its type.
DEFAULTS: dict[tuple[type, str], str] = {
    (Recipe, "name"): "the name of the file",
    (DataRecipe, "mean"): "`model` with pretrained weights, else required",
    (DataRecipe, "std"): "`model` with pretrained weights, else required",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One row of a table of keys, as Markdown."""

    name: str
    allowed: str
    default: str
    sentence: str


def reference() -> str:
    """The whole page as Markdown; AssertionError for a key that no docstring describes."""
    parts = [TOP]
    for title, cls in SECTIONS:
        parts.append(_section(f"## {title}", summary(cls), _keys_of(cls)))
    parts.append(_methods())
    for name, step in STEPS.items():
        parts.append(_section(f"### `{name}`", summary(step), _keys_of(step.Options)))
    parts.append(
        "## Adapters\n\n`model.adapt`: a name alone, or a mapping of the name to its options: "
        "`adapt: {lora: {rank: 4, targets: [qkv, fc1]}}`. lora, dora, lokr and ia3 need "
        "`pip install 'fastlt[adapt]'`.\n"
    )
    for name, adapter in ADAPTERS.items():
        parts.append(_section(f"### `{name}`", summary(adapter), _keys_of(adapter)))
    parts.append("## Losses\n\n`stages.NAME.loss`, and its options in `stages.NAME.loss_options`.\n")
    for name, loss in LOSSES.items():
        parts.append(_section(f"### `{name}`", summary(loss), _keys_of_parameters(loss)))
    parts.append(
        "## Augmentations\n\nEach is its name alone, or a mapping of its name to its options: "
        "`augment: [flip, random_crop: {padding: 4}]`.\n"
    )
    rows = [(f"`{name}`", _options(operation), summary(operation)) for name, operation in AUGMENTATIONS.items()]
    parts.append(_table(("augmentation", "options", "meaning"), rows))
    parts.append(_loaders())
    parts.append(_sources())
    return "\n".join(parts)


def summary(cls: type) -> str:
    """The first line of the docstring of a class, which is a sentence."""
    assert cls.__doc__, f"{cls} has no docstring"
    return cls.__doc__.split("\n")[0].strip().removesuffix(":")


def described(cls: type) -> dict[str, str]:
    """What the docstrings of a class and of its bases say of each key: the text behind `key: `."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        name = None
        for line in inspect.cleandoc(base.__doc__ or "").split("\n"):
            entry = re.match(r"([a-z][a-z0-9_]*): (.*)", line)
            if entry:
                name = entry[1]
                found[name] = entry[2]
            elif name is not None and line.startswith("    "):
                found[name] += f" {line.strip()}"
            else:
                name = None
    return found


def _loaders() -> str:
    """The section of loaders: what each reads, and with which keys it goes."""
    rows = [
        (
            f"`{name}`",
            ", ".join(backend.reads),
            "yes" if backend.needs_conversion else "no",
            "yes" if backend.can_augment else "no",
            f"{backend.fewest_workers}",
        )
        for name, backend in BACKENDS.items()
    ]
    head = ("loader", "reads", "needs `convert: true`", "takes `dali_augment`", "fewest `num_workers`")
    intro = (
        f"`data.loader`; `{AUTO}` takes one of them by the machine and the data set. {' and '.join(FORMATS)} are "
        f"formats of converted data sets; {SOURCE_FILES} are the source's own files."
    )
    return f"## Loaders\n\n{intro}\n\n{_table(head, rows)}"


def _sources() -> str:
    """The section of sources: the keys of `data` that each takes, and who converts it."""
    keys = [field.name for field in dataclasses.fields(DataRecipe)]
    rows = [
        (
            f"`{name}`",
            ", ".join(f"`{key}`" for key in keys if key in kind.takes),
            "the run" if kind.small else "`fastlt convert`",
        )
        for name, kind in SOURCES.items()
    ]
    return f"## Sources\n\n`data.source`.\n\n{_table(('source', 'keys of `data` that it takes', 'converted by'), rows)}"


def _methods() -> str:
    """The head of the section of methods: which needs what of the run, and what a recipe may combine it with."""
    rows = [(f"`{name}`", _marked(step.needs), _marked(step.allows)) for name, step in STEPS.items()]
    words = [f"- `{key}`: {sentence}\n" for cls in (Needs, Allows) for key, sentence in described(cls).items()]
    return (
        "## Methods\n\n`stages.NAME.method`, and its options in `stages.NAME.options`. "
        "Formulas, papers and recipes are in [methods.md](methods.md).\n\n"
        + _table(("method", "needs", "allows"), rows)
        + "\n"
        + "".join(words)
    )


def _marked(flags: Needs | Allows) -> str:
    return ", ".join(f"`{name}`" for name, value in vars(flags).items() if value)


def _section(title: str, sentence: str, keys: Iterable[Key]) -> str:
    rows = [(key.name, key.allowed, key.default, key.sentence) for key in keys]
    table = _table(("key", "allowed", "default", "meaning"), rows) if rows else ""
    return f"{title}\n\n{sentence}\n" + (f"\n{table}" if table else "")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return markdown_table(head, rows) + "\n"


def _keys_of(cls: type, prefix: str = "") -> Iterator[Key]:
    """The keys of a dataclass. Those of a dataclass below it follow as `key.sub`, unless it has its own section."""
    hints, sentences = types_of(cls), described(cls)
    for field in dataclasses.fields(cls):
        assert field.name in sentences, f"the docstring of {cls.__name__} does not describe {field.name}"
        kind = hints[field.name]
        apart = kind in [section for _, section in SECTIONS] or (cls, field.name) in LINKS
        nested = isinstance(kind, type) and dataclasses.is_dataclass(kind) and not apart
        allowed = LINKS.get((cls, field.name)) or ("mapping" if nested else allowed_values(kind, field.metadata))
        default = DEFAULTS.get((cls, field.name)) or _default(field)
        if dataclasses.is_dataclass(kind) and default != "required":
            default = ""  # the defaults of its keys
        name = f"`{prefix}{field.name}`" + ("*" if is_harmless(field) else "")
        yield Key(name, allowed, default, sentences[field.name])
        if isinstance(kind, type) and nested:
            yield from _keys_of(kind, f"{prefix}{field.name}.")


def _keys_of_parameters(cls: type) -> Iterator[Key]:
    """The options of a loss: what its constructor takes besides the class counts."""
    hints, sentences = typing.get_type_hints(cls.__init__), described(cls)
    for parameter in list(inspect.signature(cls).parameters.values())[1:]:
        assert parameter.name in sentences, f"the docstring of {cls.__name__} does not describe {parameter.name}"
        allowed = allowed_values(hints[parameter.name])
        yield Key(f"`{parameter.name}`", allowed, shown(parameter.default), sentences[parameter.name])


def _options(operation: Any) -> str:
    """The options of an augmentation with their defaults; `image_size` is the recipe's."""
    given = []
    for field in dataclasses.fields(operation):
        if field.name == "image_size":
            continue
        default = _default(field)
        given.append(f"`{field.name}`" if default == "required" else f"`{field.name}: {default.strip('`')}`")
    return ", ".join(given)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return shown(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else shown(field.default_factory())


def shown(value: Any) -> str:
    """A default as one writes it in YAML."""
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def allowed_values(kind: Any, metadata: Mapping[str, Any] = MappingProxyType({})) -> str:
    """What a key of this type takes, in words; metadata: of its field, which may state a range."""
    words = _words(kind)
    number = metadata.get(RANGE)
    return words if number is None else re.sub(r"integers?|numbers?", lambda kind: f"{kind[0]} {number}", words)


def _words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin in (Union, types.UnionType):
        parts = [_words(one) for one in arguments if one is not type(None)]
        return " or ".join(parts) + (", or null" if type(None) in arguments else "")
    if origin is tuple:
        return f"list of {len(arguments)} {_plural(arguments[0])}"
    if origin is list:
        return f"list of {_plural(arguments[0])}"
    if dataclasses.is_dataclass(kind):
        title = next((title for title, cls in SECTIONS if cls is kind), None)
        keys = ", ".join(f"`{field.name}`" for field in dataclasses.fields(kind))
        return f"mapping with {keys}" if title is None else f"mapping, [below](#{_anchor(title)})"
    if origin is dict and dataclasses.is_dataclass(arguments[1]):
        return "mapping of names to [stages](#stagesname)"
    if origin is dict and arguments[1] is float:
        return "mapping of names to numbers"
    return {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}.get(kind, "mapping")


def _plural(kind: Any) -> str:
    return {int: "integers", float: "numbers", str: "names"}.get(kind, "values")


def _anchor(title: str) -> str:
    """Where the heading of a section is linked to, by GitHub's rule."""
    return re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-")
