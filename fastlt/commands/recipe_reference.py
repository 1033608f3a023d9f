"""Print the page of all recipe keys, docs/recipes.md.

    fastlt recipe-reference > docs/recipes.md

Exit code: 0.
"""

from __future__ import annotations

from fastlt.arguments import make_parser

NAME = "fastlt recipe-reference"


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code."""
    make_parser(__doc__, NAME, prog).parse_args(words)

    from fastlt.recipe.reference import reference

    print(reference(), end="")
    return 0
