"""YAML text to plain values and back, stricter than YAML: every mistake is named by its key and line.

A key stands once in its mapping and is a name. A value is null, true or false, a number, text, a list or a mapping;
dates are text, and so are YAML 1.1's octal and sexagesimal numbers. Nothing in a text is executed.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from fastlt.typed_yaml import RecipeError

DEEPEST = 50
MOST_VALUES = 100_000  # after aliases: a short text can stand for a gigabyte
RAW_BYTES = "\udc80-\udcff"
INT64 = range(-(2**63), 2**63)
TAG = "tag:yaml.org,2002:"
NULL, BOOL, INT, FLOAT, STR, MERGE = (TAG + kind for kind in ("null", "bool", "int", "float", "str", "merge"))
MAPPING, SEQUENCE = TAG + "map", TAG + "seq"
TRUE = ("true", "yes", "on")
RESOLVERS = (
    (NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (BOOL, r"(?:[Yy]es|YES|[Nn]o|NO|[Tt]rue|TRUE|[Ff]alse|FALSE|[Oo]n|ON|[Oo]ff|OFF)", list("yYnNtTfFoO")),
    (INT, r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        FLOAT,
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    (MERGE, r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """Text to nodes; what a plain scalar is follows from RESOLVERS."""

    # YAML's own, and the bytes of file names that are not UTF-8, as Python hands them over in arguments.
    NON_PRINTABLE = re.compile(f"[^\t\n\r -~\x85\xa0-\ud7ff{RAW_BYTES}\ue000-\ufffd\U00010000-\U0010ffff]")
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEEPEST} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes all text that either `_Loader` or another reader of YAML would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


def parse(text: str, origin: str, key: str = "") -> Any:
    """The value that a YAML text stands for; RecipeError with every mistake in it.

    origin: where the text is from, for messages. key: of the value in the recipe, "" for a whole file.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise RecipeError(f"{origin}: is not valid YAML: {line}{error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = error.character if isinstance(error.character, str) else chr(error.character)
        raise RecipeError(f"{origin}: is not valid YAML: line {line}: text has no {character!a}") from None
    reading = _Reading(origin)
    value = None if node is None else reading.value(node, key, 0)
    if reading.mistakes:
        raise RecipeError("\n".join(reading.mistakes))
    return value


def dump(tree: Any) -> str:
    """The text from which `parse` makes `tree`, one key a line."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Reading:
    """Nodes to values. Mistakes are collected, so that all of them come in one message."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.mistakes: list[str] = []
        self.count = 0

    def value(self, node: yaml.Node, key: str, depth: int) -> Any:
        """The value of a node that stands at `key`."""
        self.count += 1
        if depth > DEEPEST or self.count > MOST_VALUES:
            limit = f"{DEEPEST} levels" if depth > DEEPEST else f"{MOST_VALUES:,} values"
            raise RecipeError(f"{self._place(node, key)}: holds more than {limit}, with its aliases; write less")
        if isinstance(node, yaml.MappingNode) and node.tag == MAPPING:
            return self.mapping(node, key, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == SEQUENCE:
            return [self.value(item, f"{key}[{i}]", depth + 1) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, key)
        return self._wrong(node, key, f"has the tag {node.tag}; allowed: values without a tag")

    def mapping(self, node: yaml.MappingNode, key: str, depth: int) -> dict[str, Any]:
        """A mapping with its own keys on top of those that `<<` merges into it."""
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, node_below in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                self._wrong(name_node, key, "has a key that is a list or a mapping; allowed: a name")
                continue
            name, line = name_node.value, name_node.start_mark.line + 1
            below = f"{key}.{name}" if key else name
            if name in lines:
                where = f"on lines {lines[name]} and {line} of {self.origin}"
                self.mistakes.append(f"{below}: is given twice, {where}; leave one of them out")
            lines[name] = line
            if name_node.tag == MERGE:
                merged = self.merged(node_below, below, depth)
            else:
                own[name] = self.value(node_below, below, depth + 1)
        return merged | own

    def merged(self, node: yaml.Node, key: str, depth: int) -> dict[str, Any]:
        """What `<<` merges: one mapping, or several that have no key in common."""
        together: dict[str, Any] = {}
        for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            found = self.value(part, key, depth + 1)
            if not isinstance(found, dict):
                self._wrong(part, key, "merges what is no mapping; allowed: a mapping, or a list of them")
                continue
            for name in sorted(found.keys() & together.keys()):
                self._wrong(node, key, f"merges two mappings that both have the key {name}; leave one of them out")
            together |= found
        return together

    def scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        """null, a boolean, a number or text."""
        text = node.value
        if re.search(f"\0|(?![{RAW_BYTES}])[\ud800-\udfff]", text):
            return self._wrong(node, key, f"holds a character that neither text nor names of files have: {text[:40]!a}")
        if node.tag == NULL:
            return None
        if node.tag == BOOL:
            return text.lower() in TRUE
        try:
            if node.tag == INT:
                return self.integer(node, key)
            if node.tag == FLOAT:
                return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:  # only a tag of its own makes a number of other text
            return self._wrong(
                node, key, f"is {text[:40]!r} with the tag of a number; allowed: a number, without a tag"
            )
        if node.tag == STR:
            return text
        return self._wrong(node, key, f"has the tag {node.tag}; allowed: values without a tag")

    def integer(self, node: yaml.ScalarNode, key: str) -> int | None:
        """An integer of 64 bits; ValueError for text that is none."""
        digits = node.value.replace("_", "")
        number = int(digits) if len(digits) <= 4000 else INT64.stop  # Python refuses to read longer ones
        if number in INT64:
            return number
        return self._wrong(node, key, f"is an integer of {len(digits)} digits; allowed: integers of 64 bits")

    def _place(self, node: yaml.Node, key: str) -> str:
        line = f"line {node.start_mark.line + 1} of {self.origin}"
        return f"{key}: {line}" if key else line

    def _wrong(self, node: yaml.Node, key: str, what: str) -> None:
        self.mistakes.append(f"{self._place(node, key)}: {what}")
