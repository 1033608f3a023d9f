"""The recipe: everything a run is made from, typed, composed and checked before any data is touched."""

from fastlt.recipe.schema import (
    LIST_KEYS,
    SMALL_SOURCES,
    AccuracyRecipe,
    DataRecipe,
    ModelRecipe,
    Recipe,
    StageRecipe,
    StorageRecipe,
    check,
    differences,
    is_harmless,
    load_recipe,
)

__all__ = [
    "LIST_KEYS",
    "SMALL_SOURCES",
    "AccuracyRecipe",
    "DataRecipe",
    "ModelRecipe",
    "Recipe",
    "StageRecipe",
    "StorageRecipe",
    "check",
    "differences",
    "is_harmless",
    "load_recipe",
]
