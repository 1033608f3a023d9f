"""Look at a data set before it is trained on: classes, sizes, copies, memory, time, and a recipe that fits.

    fastlt inspect photos                        # CLASS/IMAGE, or train/CLASS/IMAGE with val and test
    fastlt inspect train.txt --root images --test-list test.txt   # a list, a table, or COCO's JSON
    fastlt inspect shards                        # tar files; a folder of Hugging Face datasets
    fastlt inspect data/photos                   # a converted data set
    fastlt inspect photos --picture classes.png --recipe mine.yaml --backbone resnet50
    fastlt inspect photos --json > photos.json

What DATA is, is found from what is there; --source says it. The other options are those of `fastlt convert`. Headers
are read and copies compared, and a sample is decoded: `fastlt convert` decodes every image. A recipe is checked as by
`fastlt check` before it is written, and no file is replaced by it.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from fastlt.arguments import check_files_to_write, make_parser, path, worker_count
from fastlt.commands.data_options import add_data_options, choices, open_chosen, refuse_foreign_options
from fastlt.names import unknown
from loaders.sources import SOURCES, sources_taking
from loaders.sources.messages import printable
from loaders.stored.remote_folder import is_url

NAME = "fastlt inspect"
PICTURES = (".png", ".svg")


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code."""
    parser = make_parser(__doc__, NAME, prog)
    url = next((word for word in words if is_url(word)), None)
    if url is not None:
        parser.error(
            f"{url} is a URL, and headers and copies of images are looked for in files of this machine: inspect the "
            "folder that was uploaded, or check the remote one with `fastlt verify URL`"
        )
    arguments = parse(parser, words)
    from fastlt.inspection.recognition import CONVERTED, recognise

    found = recognise(arguments.data, source=arguments.source, root=arguments.root, train_list=arguments.train_list)
    if found.source == CONVERTED:
        refuse_data_options(parser, arguments)
    else:
        arguments.source, arguments.root, arguments.train_list = found.source, found.root, found.train_list
        if found.train_list is not None and found.source not in sources_taking("train_list"):
            parser.error(f"{found.source} reads a folder, and {found.train_list} is a file: give the folder")
        refuse_foreign_options(parser, arguments, found.source)
    if not arguments.json:
        print(f"{printable(arguments.data)}: {found.source}, for {found.why}")
    show(arguments, found.source == CONVERTED, f"{found.why}")
    return 0


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """The arguments; exits with code 2 and one message when they make no sense."""
    parser.add_argument("data", type=path, metavar="DATA", help="a folder, a list of images, or a converted data set")
    parser.add_argument("--source", metavar="NAME", help=f"one of {', '.join(SOURCES)}")
    add_data_options(parser)

    out = parser.add_argument_group("what is made")
    out.add_argument("--picture", type=path, metavar="FILE", help="draw the classes, as .png or .svg")
    out.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    out.add_argument("--recipe", type=path, metavar="FILE.yaml", help="write the suggested recipe")
    out.add_argument("--backbone", metavar="NAME", help="its network: of timm, local-dir:PATH or hf-hub:NAME")

    run = parser.add_argument_group("the run")
    run.add_argument("--workers", type=worker_count, metavar="N", help="threads that read (default: all cores)")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    # Copies are what is looked for.
    parser.set_defaults(allow_duplicates=True)

    arguments = parser.parse_args(words)
    if arguments.source is not None and arguments.source not in SOURCES:
        parser.error(unknown("source", arguments.source, SOURCES))
    if arguments.picture is not None and arguments.picture.suffix.lower() not in PICTURES:
        parser.error(f"--picture {arguments.picture} ends in neither {' nor '.join(PICTURES)}")
    if arguments.recipe is not None and arguments.recipe.suffix not in (".yaml", ".yml"):
        parser.error(f"--recipe {arguments.recipe} does not end in .yaml")
    check_files_to_write(parser, arguments, "picture", "recipe")
    return arguments


def refuse_data_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """A usage error for options that choose images: those of a converted data set are chosen."""
    for name in (*choices(arguments), "root", "num_classes", "no_download"):
        name = {"imbalance_factor": "imbalance"}.get(name, name)
        if getattr(arguments, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no meaning for a converted data set: leave it out")


def show(arguments: argparse.Namespace, converted: bool, why: str) -> None:
    """Measure, print, draw and write."""
    import torch

    from fastlt import strict_json
    from fastlt.inspection.loading import measure_loading
    from fastlt.inspection.profile import profile_converted, profile_source
    from fastlt.inspection.suggestion import pretrained_config, refuse_existing, suggest, write_recipe
    from fastlt.inspection.text import to_text, to_tree

    if arguments.recipe is not None:
        refuse_existing(arguments.recipe)
    if arguments.backbone is not None:
        pretrained_config(arguments.backbone)  # refuses unknown ones before the work
    data: dict[str, Any]
    if converted:
        from loaders.stored.dataset import ConvertedDataset

        dataset = ConvertedDataset.open(arguments.data)
        profile = profile_converted(dataset)
        data = data_of_manifest(arguments.data, dataset.manifest)
    else:
        source = open_chosen(arguments, choices(arguments))
        profile = profile_source(
            source, printable(arguments.data), workers=arguments.workers, progress=not arguments.quiet
        )
        data = data_of_options(arguments)
    command = None
    if arguments.recipe is not None:
        suggestion, command = write_recipe(arguments.recipe, profile, data, arguments.backbone)
    else:
        suggestion = suggest(profile, data, arguments.backbone)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loading = measure_loading(profile, suggestion.data, device)
    if arguments.json:
        print(strict_json.dumps(to_tree(profile, loading, suggestion, why), indent=1))
    else:
        width = shutil.get_terminal_size().columns
        written = arguments.recipe is not None
        print(to_text(profile, loading, suggestion, width=width, encoding=sys.stdout.encoding, written=written))
    if arguments.picture is not None:
        from fastlt.inspection.picture import draw

        draw(profile, arguments.picture)
    if arguments.json:
        return
    if arguments.picture is not None:
        print(arguments.picture)
    if arguments.recipe is not None:
        print(f"{arguments.recipe} is written. Now:")
        for words in (command, f"fastlt train {arguments.recipe}"):
            if words is not None:
                print(f"  {words}")


def data_of_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe's data for a converted data set: what it was made from."""
    from fastlt.recipe import CHOICE_KEYS, FILE_KEYS

    request = manifest["request"]
    given = {key: request[key] for key in CHOICE_KEYS if request.get(key) is not None and key not in FILE_KEYS}
    return {"source": manifest["source"], "converted": str(folder), **without_defaults(given)}


def data_of_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keys of a recipe's data for the images that the command line chooses."""
    from fastlt.inspection.suggestion import folder_for
    from fastlt.recipe import FILE_KEYS

    data: dict[str, Any] = {"source": arguments.source}
    if arguments.root is not None:
        data["root"] = str(arguments.root)
    if not SOURCES[arguments.source].small:
        data["converted"] = str(folder_for(arguments.data))
    given = {key: value for key, value in choices(arguments).items() if value is not None}
    for key in FILE_KEYS:
        if key in given:
            given[key] = str(given[key])
    if "split" in given:
        given["split"] = list(given["split"])
    return data | without_defaults(given)


def without_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Without the values that a recipe has anyway."""
    defaults = {"convention": "paper", "meta_per_class": 10, "split_seed": 0}
    return {key: value for key, value in given.items() if defaults.get(key) != value}
