"""`fastlt ensemble`, as a script."""

import sys

from fastlt.cli import main

if __name__ == "__main__":
    sys.exit(main(["ensemble", *sys.argv[1:]], prog="ensemble.py"))
