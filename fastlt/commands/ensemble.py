"""Evaluate finished runs together: the mean of their predictions.

    fastlt ensemble runs/imagenet_lt_ours_las runs/imagenet_lt_ours_las_cosine
    fastlt ensemble RUN RUN ... --out runs/both           # also writes runs/both/result.json

The mean is of probabilities, the softmax of each run's logits, and every run counts the same. Logits of different heads
have no common scale (a cosine head's are bounded by its scale, a linear head's by nothing): in a mean of logits the
head with the larger ones would decide alone.
Each run is evaluated as it was: with the selected model of its last stage, with its own crop and precision.
Exit code: 0 done, 2 for runs that cannot be put together.
"""

from __future__ import annotations

from fastlt.arguments import make_parser, path

NAME = "fastlt ensemble"


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code. ValueError for runs that cannot be put together."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("--out", type=path, metavar="DIR", help="a folder for result.json; by default none is written")
    given = parser.parse_args(words)

    import torch

    from fastlt.ensemble import ensemble, open_member
    from fastlt.run.atomic_file import write_json
    from fastlt.run.folder import recipe_file, result_file
    from fastlt.run.log import result_table

    if given.out is not None and recipe_file(given.out).exists():
        raise ValueError(f"--out {given.out} holds a run, whose result would be lost; give another folder")
    members = [open_member(folder) for folder in given.runs]
    name = "+".join(m.run.recipe.name for m in members) if given.out is None else given.out.resolve().name
    result = ensemble(members, name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if given.out is not None:
        write_json(result_file(given.out), result)
    alone = "   ".join(f"{m['run']} {100 * m['top1']:.2f}" for m in result["members"])
    print(f"top-1 % alone: {alone}\ntop-1 % of their mean probability: {100 * result['top1']:.2f}\n")
    print(result_table(result, members[0].run.counts))
    return 0
