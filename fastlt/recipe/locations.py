"""Where recipe files are: those of users, and those that fastlt ships."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# Installed, the recipes are in the package; in a checkout they are beside it.
SHIPPED = next((folder for folder in (_PACKAGE / "recipes",) if folder.is_dir()), _PACKAGE.parent / "recipes")
