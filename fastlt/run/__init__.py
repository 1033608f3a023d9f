"""The run: training, evaluation, checkpoints and the log of a recipe."""
