"""A look at a data set before training: what it is, what is in it, and a recipe that fits."""
