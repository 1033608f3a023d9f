"""A data set on disk: manifest, formats, writers, and checks of images."""
