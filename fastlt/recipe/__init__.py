"""The recipe: all settings of a run, typed, composed and checked before any data is touched."""

from fastlt.recipe.checks import check
from fastlt.recipe.compose import load_recipe
from fastlt.recipe.schema import (
    LIST_KEYS,
    AccuracyRecipe,
    DataRecipe,
    ModelRecipe,
    Recipe,
    StageRecipe,
    StorageRecipe,
    differences,
    is_harmless,
)
from fastlt.recipe.yaml_text import RecipeError

__all__ = [
    "LIST_KEYS",
    "AccuracyRecipe",
    "DataRecipe",
    "ModelRecipe",
    "Recipe",
    "RecipeError",
    "StageRecipe",
    "StorageRecipe",
    "check",
    "differences",
    "is_harmless",
    "load_recipe",
]
