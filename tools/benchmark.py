"""`fastlt benchmark`, as a script."""

import sys

from fastlt.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]], prog="benchmark.py"))
