"""The run: what a recipe describes is trained, evaluated, saved and logged."""
