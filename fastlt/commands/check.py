"""Check a recipe and print it with every default filled in; nothing is trained and no data are read.
Comments behind it say what follows from the network and the number of classes.

    fastlt check recipes/cifar10_lt.yaml data.root=DIR seed=1

Exit codes: 0 the recipe can be trained as far as can be told without its data, 2 it cannot.
"""

from __future__ import annotations

from fastlt.arguments import add_recipe, make_parser

NAME = "fastlt check"


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code."""
    parser = make_parser(__doc__, NAME, prog)
    add_recipe(parser)
    arguments = parser.parse_intermixed_args(words)

    # Imported late: a mistake on the command line answers before torch has loaded.
    from fastlt.recipe import load_recipe
    from fastlt.run.preflight import checked_text

    print(checked_text(load_recipe(arguments.recipe, arguments.overrides)), end="")
    return 0
