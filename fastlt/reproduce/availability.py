"""Whether a cell can run here: its recipe loads, and its data are found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastlt.recipe import Recipe, load_recipe
from fastlt.reproduce.tables import Cell
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.remote_folder import is_url

CIFAR_FILES = {"cifar10": "cifar-10-", "cifar100": "cifar-100-"}

# `--scale short`: one budget for every row, so that rows can be compared with each other, not with the paper. A stage
# that starts from fresh weights is what differs; one that goes on from it gets a quarter of it. Stages that descend
# nothing (tau_norm) stay as they are. A table's or a row's own `short` words come after these. The other scales have
# nothing but such words.
SHORT_ITERATIONS = 400


def resolve(cell: Cell, data: Sequence[Path], scale: str, extra: Sequence[str]) -> None:
    """Complete the overrides with budget, `extra` and where the data are, or say in `problem` why it cannot run."""
    if cell.members:
        for member in cell.members:
            resolve(member, data, scale, extra)
        cell.overrides = list(dict.fromkeys(word for member in cell.members for word in member.overrides))
        cell.problem = next((m.problem for m in cell.members if m.problem is not None), None)
        return
    if not cell.path.is_file():
        cell.problem = f"no recipe yet: recipes/{cell.recipe}.yaml"
        return
    try:
        budget = short_budget(load_recipe(cell.path, cell.overrides)) if scale == "short" else []
        cell.overrides = [*cell.overrides, *budget, *cell.scaled.get(scale, []), *extra]
        recipe = load_recipe(cell.path, cell.overrides)
    except ValueError as error:
        cell.problem = " ".join(str(error).split())
        return
    found = find_data(recipe, data)
    if found is None:
        where = ", ".join(map(str, data)) or "data/"
        cell.problem = f"data not found: {recipe.data.source}, {recipe.data.num_classes} classes, in {where}"
    else:
        cell.overrides = [*cell.overrides, *found]


def find_data(recipe: Recipe, folders: Sequence[Path]) -> list[str] | None:
    """Override words that lead to the recipe's data, [] when it finds them by itself, None when they are not here."""
    data = recipe.data
    if data.source == "digits" or is_url(data.converted):
        return []
    if data.converted and _is_converted(Path(data.converted), data.num_classes):
        return []
    if data.source in CIFAR_FILES:
        for folder in (*folders, Path(data.root or "data/raw")):
            if any(folder.glob(CIFAR_FILES[data.source] + "*")):
                return [f"data.root={folder}", "data.download=false"]
        return None
    for folder in folders:
        for candidate in (folder, folder / Path(data.converted or recipe.name).name):
            if _is_converted(candidate, data.num_classes):
                return [f"data.converted={candidate}"]
    return None


def _is_converted(folder: Path, num_classes: int | None) -> bool:
    """Whether the folder is a converted data set of so many classes: no two of the tables' have the same number."""
    try:
        return num_classes in (None, len(ConvertedDataset.open(folder).class_names))
    except ValueError:
        return False


def short_budget(recipe: Recipe) -> list[str]:
    """The override words that cut each stage of a recipe to the short budget, under a cosine schedule."""
    words = []
    for position, (name, stage) in enumerate(recipe.stages.items()):
        if stage.method == "tau_norm":
            continue
        length = SHORT_ITERATIONS if position == 0 or stage.start == "fresh" else SHORT_ITERATIONS // 4
        settings = {
            "epochs": "null",
            "iterations": length,
            "warmup": length // 10,
            "warmup_from": 0,
            "schedule": "cosine",
            "milestones": "[]",
            "evaluate_every": length // 4,
        }
        words += [f"stages.{name}.{key}={value}" for key, value in settings.items()]
    return words
