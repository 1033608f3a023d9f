"""Read a converted data set back and check all of it: checksums, and that every image decodes.

    fastlt verify data/cifar100-if100

Exit codes: 0 all is well, 1 damage was found, 2 there is no converted data set.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastlt.arguments import make_parser, path, worker_count

NAME = "fastlt verify"


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("folder", type=path, metavar="DIR", help="a converted data set")
    parser.add_argument("--workers", type=worker_count, metavar="N", help="processes (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(words)
    return check(arguments.folder, arguments.workers, not arguments.quiet, prog)


def check(folder: Path, workers: int | None, progress: bool, prog: str) -> int:
    """Check a converted data set and say what was found; 1 when it is damaged, ValueError when there is none."""
    # torch and FFCV take seconds: a usage error does not wait for them.
    from loaders.stored.damage import DamageError
    from loaders.stored.dataset import ConvertedDataset
    from loaders.stored.verify import verify

    try:
        dataset = ConvertedDataset.open(folder)
        problems = verify(dataset, num_workers=workers, progress=progress)
    except DamageError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"{prog}: {problem}", file=sys.stderr)
    if problems:
        return 1
    images = sum(split["count"] for split in dataset.manifest["splits"].values())
    print(f"{dataset.root}: every checksum holds, and all {images:,} images decode")
    return 0
