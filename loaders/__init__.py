"""From files to batches: sources, converted data sets, orders of images, readers."""
