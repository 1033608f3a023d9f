"""Tables of images in CSV, TSV or Parquet: columns of paths, of labels by name or number, and perhaps of splits."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loaders.sources.classes import number_classes
from loaders.sources.columns import IMAGE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS, as_classes, called, choose_column
from loaders.sources.cut import Cut
from loaders.sources.listing import Listing, listed_files, named_lists, read_bytes, text_of
from loaders.sources.messages import printable, shortened, some
from loaders.sources.source import Source
from loaders.sources.split import SPLIT_WORDS

WANTED = "a CSV, TSV or Parquet file with a column of paths and one of labels"
DELIMITERS = ",;\t|"
PARQUET_START = b"PAR1"


def open_table(
    root: Path,
    *,
    train_list: str | Path | None,
    meta_list: str | Path | None,
    test_list: str | Path | None,
    image_column: str | None,
    label_column: str | None,
    split_column: str | None,
    cut: Cut | None,
    allow_duplicates: bool = False,
) -> Source:
    """Read one table a split, or one of all images, where a column may say which image is in which split.

    The class names are the labels: whole numbers sorted by value, others by name. Columns are found by their usual
    names unless they are given. A split without images comes from the others by the rules of `Cut`.
    Raises ValueError for columns that cannot be found, malformed rows, and as `list_file`.
    """
    given = named_lists("table", WANTED, train_list=train_list, meta_list=meta_list, test_list=test_list)
    tables = {name: _read(path) for name, path in given.items()}
    lists = {name: table.listing(image_column, label_column) for name, table in tables.items()}
    if len(given) == 1:
        lists = _by_split(tables["train"], lists["train"], split_column)
        if cut is not None and "train" not in lists:
            raise ValueError(f"{printable(given['train'])} has no row of split train")
    elif split_column is not None:
        raise ValueError("split_column is for one table of all images, and there are several: leave it out")
    else:
        for name, table in tables.items():
            _check_own_split(name, table)
    where = {name: part.where for name, part in lists.items()}
    labels, names = number_classes(as_classes({name: part.classes for name, part in lists.items()}), where, cut=cut)
    pools, _ = listed_files(root, lists, labels, allow_duplicates=allow_duplicates)
    return Source.of_pools("table", pools, names, cut)


@dataclass(frozen=True)
class _Table:
    """The content of a table, by column; lines and unit as of Listing."""

    path: Path
    columns: Mapping[str, list[Any]]
    lines: np.ndarray
    unit: str

    def listing(self, image_column: str | None, label_column: str | None) -> Listing:
        """The images and their labels; ValueError for columns that cannot be found, and for rows without one."""
        names, where = list(self.columns), printable(self.path)
        image = choose_column(names, image_column, called(names, IMAGE_COLUMNS), "image", where)
        label = choose_column(names, label_column, called(names, LABEL_COLUMNS), "label", where)
        if not len(self.lines):
            raise ValueError(f"{where} lists no images: give {WANTED}")
        paths = self.columns[image]
        if not all(isinstance(path, str) or path is None for path in paths):
            raise ValueError(f"{where}: column {image!r} holds no paths of files; name theirs with --image-column")
        for column in (image, label):
            self._refuse([i for i, value in enumerate(self.columns[column]) if value in (None, "")], f"{column!r}")
        return Listing(self.path, paths, self.columns[label], self.lines, self.unit)

    def splits(self, column: str) -> list[str]:
        """The split of each row; ValueError for words that are none."""
        words = self.columns[column]
        known = [SPLIT_WORDS.get(str(word).strip().lower()) for word in words]
        wrong = sorted({str(word) for word, split in zip(words, known, strict=True) if split is None})
        if wrong:
            listed = some([repr(shortened(word)) for word in wrong], ", ")
            raise ValueError(
                f"{printable(self.path)}: column {column!r} has {listed}, which are no splits; these are called "
                f"{', '.join(SPLIT_WORDS)}"
            )
        return [split for split in known if split is not None]

    def _refuse(self, rows: list[int], what: str) -> None:
        if rows:
            listed = some([f"{self.unit} {self.lines[i]}" for i in rows[:10]], ", ")
            raise ValueError(f"{printable(self.path)}: {len(rows):,} rows have no {what}: {listed}")


def _check_own_split(name: str, table: _Table) -> None:
    """ValueError for a table of one split that has a column of splits with another one in it.

    A table of validation may be the test set, as that of ImageNet-LT is.
    """
    for column in called(list(table.columns), SPLIT_COLUMNS):
        splits = {str(word): SPLIT_WORDS.get(str(word).strip().lower(), name) for word in table.columns[column]}
        others = sorted(word for word, split in splits.items() if split != name and "train" in (split, name))
        if others:
            raise ValueError(
                f"{printable(table.path)} is the table of split {name!r}, and its column {column!r} says "
                f"{some([repr(shortened(word)) for word in others], ', ')}: give it alone, or take the column out"
            )


def _by_split(table: _Table, images: Listing, asked: str | None) -> dict[str, Listing]:
    """The images of one table by its column of splits; all are train where it has none."""
    names = list(table.columns)
    usual = called(names, SPLIT_COLUMNS)
    if asked is None and not usual:
        return {"train": images}
    of_rows = np.array(table.splits(choose_column(names, asked, usual, "split", images.where)))
    return {split: images.subset(np.flatnonzero(of_rows == split)) for split in dict.fromkeys(of_rows.tolist())}


def _read(path: Path) -> _Table:
    data = read_bytes(path, WANTED)
    return _read_parquet(path) if data.startswith(PARQUET_START) else _read_text(path, text_of(data, path, WANTED))


def _read_text(path: Path, text: str) -> _Table:
    """A table with a header, its fields apart by the one of DELIMITERS that the header has most of.

    Spaces behind a delimiter count behind tabs alone, as `write_images` writes them.
    """
    header = text.split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=header.count)
    where = printable(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=delimiter != "\t")
    rows, lines, malformed = [], [], []
    try:
        names = next(reader, [])
        for row in reader:
            if len(row) == len(names):
                rows.append(row)
                lines.append(reader.line_num)
            elif any(field.strip() for field in row):
                malformed.append(f"line {reader.line_num} has {len(row)}")
    except csv.Error as error:
        raise ValueError(f"{where}: line {reader.line_num} cannot be read ({error}): give {WANTED}") from None
    if malformed:
        raise ValueError(
            f"{where}: {len(malformed):,} lines have another number of fields than the header, {len(names)}: "
            f"{some(malformed)}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: two columns have one name ({some(names, ', ')}); line 1 has to name the columns")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return _Table(path, columns, np.array(lines, dtype=np.int64), "line")


def _read_parquet(path: Path) -> _Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{printable(path)} is Parquet, which needs pyarrow: pip install 'fastlt[parquet]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        # What is no column of its own, pictures say, cannot be a path, a label or a split.
        names = [field.name for field in file.schema_arrow if not pyarrow.types.is_nested(field.type)]
        table = file.read(columns=names)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{printable(path)} cannot be read as Parquet: {error}") from None
    lines = np.arange(1, table.num_rows + 1)
    return _Table(path, {name: table.column(name).to_pylist() for name in names}, lines, "row")
