"""A converted data set: its manifest, the formats of its images, what writes them, and checks of the images."""

FORMATS = ("ffcv", "dali")  # of a converted data set: .beton files and WebDataset shards
SOURCE_FILES = "source"  # beside them, the files of a source that is read without converting it
