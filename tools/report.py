"""`fastlt report`, as a script."""

import sys

from fastlt.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]], prog="report.py"))
