"""`fastlt reproduce`, as a script."""

import sys

from fastlt.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", *sys.argv[1:]], prog="reproduce.py"))
