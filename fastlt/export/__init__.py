"""A trained model in the files of other programs, each checked against the model before it is left there."""
