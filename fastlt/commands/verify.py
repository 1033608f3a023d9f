"""Read a converted data set back and check all of it: checksums, and that every image decodes.

    fastlt verify data/cifar100-if100
    fastlt verify https://server/shards      # or s3://, gs://: the checksums, without a copy

Exit codes: 0 all is well, 1 damage was found, 2 there is no converted data set, or its server is not reached.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastlt.arguments import as_path, make_parser, worker_count

NAME = "fastlt verify"


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("folder", metavar="DIR", help="a converted data set, or its URL")
    parser.add_argument(
        "--workers", type=worker_count, metavar="N", help="processes (default: all cores); of a URL files at a time (4)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(words)
    from loaders.stored.remote_folder import is_url

    if is_url(arguments.folder):
        return check_remote(arguments.folder, arguments.workers, not arguments.quiet, prog)
    return check(as_path(arguments.folder), arguments.workers, not arguments.quiet, prog)


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
    if problems:
        return tell(problems, prog)
    images = sum(split["count"] for split in dataset.manifest["splits"].values())
    print(f"{dataset.root}: every checksum holds, and all {images:,} images decode")
    return 0


def check_remote(url: str, connections: int | None, progress: bool, prog: str) -> int:
    """Check the files of a data set at a URL and say what was found; 1 when they are damaged.

    ValueError when there is none, or its server cannot be reached.
    """
    from loaders.stored.damage import DamageError
    from loaders.stored.remote_folder import RemoteFolder, check_url
    from loaders.stored.streamed import remote_manifest
    from loaders.stored.verify_remote import verify_remote

    check_url(url)
    remote = RemoteFolder(url)
    try:
        _, manifest = remote_manifest(remote)
    except DamageError as error:
        return tell([str(error)], prog)
    problems = verify_remote(remote, manifest, connections=connections, progress=progress)
    if problems:
        return tell(problems, prog)
    print(f"{url}: every checksum of {len(manifest['files']):,} files holds; images were not decoded")
    return 0


def tell(problems: list[str], prog: str) -> int:
    """Say what is wrong with a data set; the exit code of damage."""
    for problem in problems:
        print(f"{prog}: {problem}", file=sys.stderr)
    return 1
