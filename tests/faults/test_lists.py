"""Damaged and mistaken lists of images: each is read, or refused with its name, the line and a reason."""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from loaders.sources import open_source

SPLITS = {"train": 4, "meta": 2, "test": 2}  # images of each of the three classes
WHOLE_LIST = (
    "has no image of",
    "has label",
    "lists no images",
    "is no text",
    "is UTF-16",
    "more than 1 images, so holding",
)


@pytest.fixture
def images(tmp_path) -> Path:
    """Images of three classes and their lists; the colours differ."""
    colours = itertools.product(range(0, 250, 50), repeat=3)
    for split, count in SPLITS.items():
        lines = []
        for label, name in enumerate(("ant", "bee", "caf\u00e9 au lait")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                path = f"{split}/{name}/{i}.png"
                Image.new("RGB", (3, 3), next(colours)).save(tmp_path / "images" / path)
                lines.append(f"{path} {label}\n")
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    return tmp_path


WORDS = (
    *(
        "",
        " ",
        "\t",
        "0",
        "-1",
        "1.0",
        "99999999",
        "9" * 5000,
        "\u0663",
        "nan",
        "'",
        '"',
        ",",
        ";",
        "#",
        "//",
        "\\",
        "~",
    ),
    *("..", "/", "./", "x" * 300, "y" * 5000, "z/" * 2500, "\0", "\r", "\x0b", "\u2028", "\ufeff", "\U0001f600", "*?"),
    *(
        "/etc/passwd",
        "/dev/zero",
        "train",
        "\u202eabc",
        "caf\u0065\u0301",
        "%s",
        "{0}",
        "$HOME",
        "C:\\",
        "http://a/b.png",
    ),
)


def mutated_line(draw: random.Random, line: str) -> str:
    path, _, label = line.rpartition(" ")
    word = draw.choice(WORDS)
    place = draw.randrange(len(line) + 1)
    return draw.choice(
        [
            lambda: line[:place] + word + line[place:],
            lambda: line[:place],
            lambda: line[place:],
            lambda: path + word + label,
            lambda: f"{path} {word}",
            lambda: f"{word} {label}",
            lambda: f"{path} {draw.randrange(-1, 6)}",
            lambda: f"{label} {path}",
            lambda: f"./{line}",
            lambda: f"/{line}",
            lambda: line.replace("/", draw.choice(["//", "\\", "/../", "/./"])),
            lambda: line.swapcase(),
            lambda: line.replace(".png", draw.choice([".PNG", ".jpg", "", ".png.png"])),
            lambda: line.replace("train", "test"),
        ]
    )()


def mutated(draw: random.Random, data: bytes) -> bytes:
    """The bytes of a list, changed in one to four places or as a whole."""
    lines = data.decode().splitlines()
    whole: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: data[: draw.randrange(len(data))],
        lambda: data.replace(b"\n", draw.choice([b"\r\n", b"\r", b"\n\n", b" \n", b"\0"])),
        lambda: data.decode().encode(draw.choice(["utf-16", "utf-16-le", "utf-8-sig", "latin1", "utf-32"])),
        lambda: data + data,
        lambda: data.replace(b" ", draw.choice([b",", b";", b"\t", b"  ", b", ", b"|"])),
        lambda: b"path,label\n" + data,
        lambda: draw.randbytes(300),
        lambda: "\n".join(mutated_line(draw, line) for line in lines).encode(errors="surrogateescape"),
    ]
    if draw.random() < 0.25:
        return draw.choice(whole)()
    for _ in range(draw.randint(1, 4)):
        if draw.random() < 0.2:
            place = draw.randrange(len(data))
            data = data[:place] + draw.randbytes(draw.randint(0, 3)) + data[place + draw.randint(0, 3) :]
            continue
        lines = os.fsdecode(data).split("\n")
        place = draw.randrange(len(lines))
        lines[place : place + 1] = draw.choice(
            [[mutated_line(draw, lines[place])], [], [lines[place]] * 2, [draw.choice(WORDS), lines[place]]]
        )
        data = os.fsencode("\n".join(lines))
        if not data:
            break
    return data


def problem(images: Path, draw: random.Random, outcomes: Counter) -> str | None:
    """What is wrong with the answer to one mutation; None when it is as it should be."""
    lists = {split: images / f"{split}.txt" for split in SPLITS if split != "meta" or draw.random() < 0.7}
    root = draw.choice([images / "images"] * 8 + [images, images / "images" / "train", images / "train.txt"])
    try:
        source = open_source(
            "list_file", root=root, meta_per_class=1, **{f"{split}_list": path for split, path in lists.items()}
        )
    except ValueError as error:
        outcomes["refused"] += 1
        text = str(error)
        if not any(path.name in text for path in lists.values()):
            return f"names no list: {text}"
        if "line" not in text and not any(words in text for words in WHOLE_LIST):
            return f"names no line: {text}"
        return f"has {len(text):,} letters: {text[:200]}" if len(text) > 3000 else None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    outcomes["accepted"] += 1
    found = [path for split in source.splits.values() for path in map(split.name, range(len(split)))]
    files = {os.path.realpath(path) for path in found}
    if len(files) < len(found):
        return "an image is there twice"
    return None if all(os.path.isfile(path) for path in found) else "an image does not exist"


def run(images: Path, count: int, seed: int) -> tuple[Counter, list[str]]:
    draw, outcomes, problems = random.Random(seed), Counter(), []
    whole = {split: (images / f"{split}.txt").read_bytes() for split in SPLITS}
    for number in range(count):
        for split, data in whole.items():
            (images / f"{split}.txt").write_bytes(data)
        split = draw.choice([*SPLITS])
        (images / f"{split}.txt").write_bytes(mutated(draw, whole[split]))
        found = problem(images, draw, outcomes)
        if found:
            problems.append(f"mutation {number} of {split}.txt: {found}")
    return outcomes, problems


def test_some_mutations_of_lists_are_read_or_refused_by_line(images):
    assert run(images, 60, seed=1)[1] == []


@pytest.mark.faults
def test_every_mutation_of_a_list_is_read_or_refused_by_line(images, rounds, fault_seed, report_figure):
    count = rounds(2000)
    outcomes, problems = run(images, count, fault_seed)
    report_figure(
        f"{count:,} mutations of lists: {outcomes['refused']:,} refused with list and line or the whole list named, "
        f"{outcomes['accepted']:,} read, {len(problems)} otherwise"
    )
    assert problems == []
