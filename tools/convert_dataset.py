"""`fastlt convert`, as a script."""

import sys

from fastlt.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]], prog="convert_dataset.py"))
