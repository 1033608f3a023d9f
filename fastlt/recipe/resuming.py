"""Which keys of a recipe a run that goes on may change, and what becomes of the run then.

A key has its rule in its definition in `fastlt.recipe.schema`; RULES says what each means. docs/reliability.md has the
same table, made by `table`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from fastlt.markdown_table import markdown_table
from fastlt.recipe.schema import ON_RESUME, Recipe, StageRecipe, Values, difference, value_of, values


@dataclass(frozen=True)
class Rule:
    """change: which other value is allowed. effect: on the run."""

    change: str
    effect: str


RULES = {
    "harmless": Rule("any value", "none on the result"),
    "rounding": Rule("any value", "sums may be rounded otherwise: last bits differ, and `result.json` says so"),
    "same_content": Rule("another path of the same content, or null", "none; content is compared, not the path"),
    "longer": Rule(
        "a larger number, in the stage that is being trained or was the last",
        "`cosine` is computed anew over the new length, from the iteration on that is reached; `result.json` says so",
    ),
    "lower": Rule(
        "a smaller number, in the stage whose numbers became infinite or NaN",
        "the run goes on from its last checkpoint; `result.json` says so",
    ),
    "not_begun": Rule("any value; stages may be added or left out", "that of a run which had them from the start"),
    "fixed": Rule("no other value", "refused: set the old value again, or choose another `name`"),
}


@dataclass(frozen=True)
class Standing:
    """How far a run is.

    stage: the number of the stage that is being trained, or was the last.
    diverged: the stage in which a number became infinite or NaN after the last checkpoint; None when all are finite.
    """

    stage: int
    diverged: str | None = None


@dataclass(frozen=True)
class Change:
    """A key in which two recipes differ: the line that says so with both values, and the rule that allows it or not."""

    key: str
    line: str
    rule: str

    @property
    def refused(self) -> bool:
        return self.rule == "fixed"

    @property
    def trains_more(self) -> bool:
        """Whether a finished run goes on by it."""
        return self.rule in ("longer", "lower", "not_begun")

    @property
    def told(self) -> bool:
        """Whether the result has to tell of it: it is not that of a run which had the value from the start."""
        return self.rule in ("longer", "lower")


def changes(before: Recipe, now: Recipe, standing: Standing) -> list[Change]:
    """In what a run that goes on has another recipe than before; refused are those of the rule "fixed"."""
    begun = list(before.stages)[: standing.stage + 1]
    if list(now.stages)[: len(begun)] != begun:
        return [Change("stages", f"stages: {list(before.stages)} and {list(now.stages)}", "fixed")]
    old, new = values(before), values(now)
    return [
        Change(".".join(path), difference(path, old, new), _rule(path, old, new, begun, standing))
        for path in dict.fromkeys([*old, *new])
        if value_of(old, path) != value_of(new, path)
    ]


def _rule(path: tuple[str, ...], old: Values, new: Values, begun: list[str], standing: Standing) -> str:
    """The rule that a change of the key at `path` falls under."""
    definition = (old.get(path) or new[path]).field
    rule = "fixed" if definition is None else definition.metadata.get(ON_RESUME, "fixed")
    if path[0] != "stages":
        return rule
    if path[1] not in begun:
        return "not_begun"
    before, now = value_of(old, path), value_of(new, path)
    if rule not in ("longer", "lower") or path[1] != begun[-1] or before is None or now is None:
        return "fixed"
    return rule if (now > before if rule == "longer" else now < before and standing.diverged == path[1]) else "fixed"


def table() -> str:
    """The rules as a table in Markdown: keys, the change that is allowed, and its effect."""
    keys: dict[str, list[str]] = {rule: [] for rule in RULES}
    for key, rule in _ruled(Recipe):
        keys[rule].append(f"`{key}`")
    keys["not_begun"], keys["fixed"] = ["all keys of stages that have not begun"], ["all other keys"]
    rows = [(", ".join(keys[name]), rule.change, rule.effect) for name, rule in RULES.items()]
    return markdown_table(("key", "may become", "effect"), rows) + "\n"


def _ruled(cls: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys with a rule, and its name."""
    hints = get_type_hints(cls)
    for key in fields(cls):
        name = f"{prefix}{key.name}"
        if ON_RESUME in key.metadata:
            yield name, key.metadata[ON_RESUME]
        kind = StageRecipe if key.name == "stages" else hints[key.name]
        if is_dataclass(kind):
            yield from _ruled(kind, f"{name}.NAME." if kind is StageRecipe else f"{name}.")
