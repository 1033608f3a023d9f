"""YAML mappings into typed dataclasses, and back, with every mistake named by its key.

Knows nothing about training: `fastlt.recipe.schema` has the keys, this module reads them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar, Union, cast

from fastlt.names import nearest, shortened, unknown
from fastlt.paths import PATH, expand
from fastlt.ranges import out_of_range

T = TypeVar("T")
MISSING = dataclasses.MISSING
TYPED_BY, ONE_OF = "typed_by", "one_of"
MOST_PLACES = 3  # at which a message says that a key can be


class RecipeError(ValueError):
    """What is wrong with a recipe, or with the options of a step: one line a mistake."""


def typed_by(key: str, types: Mapping[str, type]) -> dict[str, Any]:
    """The metadata of a dataclass field whose type is the one that the mapping's `key` names in `types`."""
    return {TYPED_BY: (key, types)}


def one_of(names: Iterable[str]) -> dict[str, Any]:
    """The metadata of a dataclass field of type str whose value is one of `names`, such as the names of a table."""
    return {ONE_OF: tuple(names)}


class _Mistakes(list[str]):
    """Lines of a message. places: the full names of all keys, by their last part and by what else they are called."""

    def __init__(self, places: Mapping[str, list[str]]) -> None:
        super().__init__()
        self.places = places

    def apart(self) -> _Mistakes:
        """Others, to be added or dropped."""
        return _Mistakes(self.places)


def build(cls: type[T], tree: Any, aliases: Mapping[str, str] = MappingProxyType({})) -> T:
    """An instance of the dataclass `cls` from a mapping; RecipeError that lists every mistake.

    aliases: words that users may write for a key, and the key, its last part alone or with more of them.
    """
    mistakes = _Mistakes(_places(cls, tree, aliases))
    value = _convert(cls, tree, "", mistakes)
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return value


def _places(cls: type, tree: Any, aliases: Mapping[str, str]) -> dict[str, list[str]]:
    """Where in `tree` each key can be, with the real names of a mapping of names."""
    found: dict[str, list[str]] = {}
    for place in _keys_below(cls, tree, ""):
        found.setdefault(place.rpartition(".")[2], []).append(place)
    for alias, key in aliases.items():
        places = found.get(key.rpartition(".")[2], [])
        found.setdefault(alias, [place for place in places if f".{place}".endswith(f".{key}")])
    return found


def _keys_below(kind: Any, tree: Any, prefix: str) -> Iterator[str]:
    """The full names of the keys that a mapping of this type can have."""
    tree = tree if isinstance(tree, Mapping) else {}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and dataclasses.is_dataclass(arguments[1]):
        for name, part in tree.items():
            yield from _keys_below(arguments[1], part, f"{prefix}{name}.")
    elif dataclasses.is_dataclass(kind):
        hints = types_of(cast("type", kind))
        for field in dataclasses.fields(kind):
            below = hints[field.name]
            if TYPED_BY in field.metadata:
                key, types = field.metadata[TYPED_BY]
                below = types.get(tree.get(key)) if isinstance(tree.get(key), str) else None
            yield f"{prefix}{field.name}"
            yield from _keys_below(below, tree.get(field.name), f"{prefix}{field.name}.")


def _meant(key: str, prefix: str, known: list[str], places: Mapping[str, list[str]]) -> str:
    """The end of a message about a key that is unknown here: where it is known, or the nearest one that is."""
    guess = nearest(key, known)
    found = places.get(key, [])
    if not found and guess is None:
        found = places.get(nearest(key, places) or "", [])
    if prefix:  # of the same stage, if there are such
        parts = prefix.split(".")[:2]
        found = [place for place in found if place.split(".")[:2] == parts] or found
    # A key of a stage before one of its options that has the same name.
    found = [place for place in found if place.count(".") == min(other.count(".") for other in found)]
    meant = found[:MOST_PLACES] or ([] if guess is None else [prefix + guess])
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def to_tree(value: Any) -> Any:
    """Dataclasses to plain mappings and lists that `yaml.safe_dump` and JSON take."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_tree(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_tree(v) for v in value]
    return value


def describe(value: Any) -> str:
    """A value and its kind in the words of a message."""
    kinds = {
        dict: "a mapping",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
    }
    if value is None:
        return "nothing"
    if isinstance(value, float) and not math.isfinite(value):
        return f"no finite number ({value!r})"
    return f"{kinds.get(type(value), type(value).__name__)} ({shortened(value)})"


def _convert(kind: Any, value: Any, where: str, mistakes: _Mistakes) -> Any:
    """`value` as `kind`; a mistake is noted and None returned."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where, mistakes)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool) != any(
            value is a for a in arguments if isinstance(a, bool)
        ):
            guess = nearest(str(value), map(str, arguments))
            hint = f"; did you mean {guess!r}?" if guess else ""
            return _wrong(mistakes, where, value, " or ".join(map(str, arguments)) + hint)
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, where, mistakes)
    if origin is dict:
        if not isinstance(value, Mapping):
            return _wrong(mistakes, where, value, "a mapping")
        return {str(k): _convert(arguments[1], v, f"{where}.{k}", mistakes) for k, v in value.items()}
    if origin in (list, tuple):
        return _convert_sequence(origin, arguments, value, where, mistakes)
    return _convert_scalar(kind, value, where, mistakes)


def _convert_union(options: tuple, value: Any, where: str, mistakes: _Mistakes) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(o for o in options if o is not type(None))
    attempts: list[_Mistakes] = []
    for option in options:
        tried = mistakes.apart()
        converted = _convert(option, value, where, tried)
        if not tried:
            return converted
        attempts.append(tried)
    # Where one option alone has the value's form, its mistakes say more than the list of options.
    alike = [tried for option, tried in zip(options, attempts, strict=True) if _has_form(option, value)]
    if len(options) == 1 or len(alike) == 1:
        mistakes.extend(alike[0] if alike else attempts[0])
        return None
    return _wrong(mistakes, where, value, " or ".join(_name(o) for o in options))


def _has_form(kind: Any, value: Any) -> bool:
    """Whether a list is given for a list, or a mapping for a mapping."""
    if isinstance(value, Mapping):
        return dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict
    return isinstance(value, (list, tuple)) and typing.get_origin(kind) in (list, tuple)


def _convert_dataclass(cls: type, value: Any, where: str, mistakes: _Mistakes) -> Any:
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        return _wrong(mistakes, where, value, f"a mapping with the keys {', '.join(_keys(cls))}")
    hints, known, before = types_of(cls), _keys(cls), len(mistakes)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in known:
            hint = _meant(str(key), prefix, known, mistakes.places)
            allowed = ", ".join(known) if known else "none"
            mistakes.append(
                f"{prefix}{key}: unknown key (value {shortened(value[key])}); allowed keys here: {allowed}{hint}"
            )
    given: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if TYPED_BY in f.metadata:
            given[f.name] = _convert_typed_by(f, value, prefix, mistakes)
        elif f.name in value:
            given[f.name] = _convert_field(f, hints[f.name], value[f.name], prefix + f.name, mistakes)
        elif f.default is MISSING and f.default_factory is MISSING:
            mistakes.append(f"{prefix}{f.name}: is missing; give {_name(hints[f.name])}")
    if len(mistakes) > before:
        return None
    try:
        return cls(**given)
    except ValueError as error:
        # A message that begins with the name of a field goes on from the name of the dataclass.
        begins = re.match(r"\w+", str(error))
        joint = prefix if begins and begins[0] in known else f"{where or 'recipe'}: "
        mistakes.append(f"{joint}{error}")
        return None


def _convert_field(field: dataclasses.Field, kind: Any, value: Any, where: str, mistakes: _Mistakes) -> Any:
    """A value by the type of its field, in the range and with the path that the metadata of the field state."""
    before = len(mistakes)
    converted = _convert(kind, value, where, mistakes)
    if len(mistakes) > before:
        return None
    allowed = out_of_range(field.metadata, converted)
    if allowed is not None:
        number = "numbers" if isinstance(converted, (list, tuple, dict)) else _name(kind)
        mistakes.append(f"{where}: is {shortened(value)}; allowed: {number} {allowed}")
        return None
    if converted is not None and PATH.items() <= field.metadata.items():
        try:
            return expand(converted)
        except ValueError as error:
            mistakes.append(f"{where}: {error}")
    return converted


def _convert_typed_by(field: dataclasses.Field, value: Mapping, prefix: str, mistakes: _Mistakes) -> Any:
    """The field whose type another key names, see `typed_by`; an absent one is read as an empty mapping."""
    key, types = field.metadata[TYPED_BY]
    name = value.get(key)
    if not isinstance(name, str):
        return None  # noted where `key` itself is read
    if name not in types:
        mistakes.append(f"{prefix}{key}: {unknown(key, name, types)}")
        return None
    own = mistakes.apart()
    converted = _convert(types[name], value.get(field.name), prefix + field.name, own)
    mistakes.extend(f"{mistake} ({field.name} of {key} {name!r})" for mistake in own)
    return converted


def _convert_sequence(origin: type, arguments: tuple, value: Any, where: str, mistakes: _Mistakes) -> Any:
    fixed = origin is tuple and Ellipsis not in arguments
    if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(arguments)):
        parts = [] if isinstance(value, (list, tuple, Mapping)) or value is None else re.split(r"[\s,;/]+", str(value))
        like = f", such as [{', '.join(parts)}]" if parts and len(parts) == (len(arguments) if fixed else 1) else ""
        allowed = f"a list of {len(arguments)} values" if fixed else "a list"
        return _wrong(mistakes, where, value, allowed + like)
    kinds = arguments if fixed else (arguments[0],) * len(value)
    return origin(
        [_convert(k, v, f"{where}[{i}]", mistakes) for i, (k, v) in enumerate(zip(kinds, value, strict=True))]
    )


def _convert_scalar(kind: type, value: Any, where: str, mistakes: _Mistakes) -> Any:
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a string; whoever writes it means a number.
        try:
            value = float(value)
        except ValueError:
            comma = re.fullmatch(r"[-+]?\d+,\d+", value)
            return _wrong(mistakes, where, value, f"a number, as {value.replace(',', '.')}" if comma else "a number")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        # No key means one; nan would pass every check of a range, which asks whether the value lies outside.
        return _wrong(mistakes, where, value, "a number")
    if isinstance(value, kind) and not (kind is not bool and isinstance(value, bool)):
        return value
    return _wrong(mistakes, where, value, _name(kind))


def _wrong(mistakes: _Mistakes, where: str, value: Any, allowed: str) -> None:
    mistakes.append(f"{where}: is {describe(value)}; allowed: {allowed}")


def types_of(cls: type) -> dict[str, Any]:
    """The type of each field; a field with `one_of` is a Literal of these."""
    named = {f.name: Literal[f.metadata[ONE_OF]] for f in dataclasses.fields(cls) if ONE_OF in f.metadata}
    return typing.get_type_hints(cls) | named


def _keys(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _name(kind: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    if kind in names:
        return names[kind]
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_name(a) for a in typing.get_args(kind) if a is not type(None))
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    return "a list" if typing.get_origin(kind) in (list, tuple) else "a mapping"
