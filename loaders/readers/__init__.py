"""From stored images to batches on the device: one file for each backend."""
