"""The version of fastlt: of the code that runs, where the metadata of an installation can be older."""

__version__ = "0.2.0.dev0"
