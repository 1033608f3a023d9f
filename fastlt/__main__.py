"""`python -m fastlt`: the command `fastlt`."""

import sys

from fastlt.cli import main

if __name__ == "__main__":
    sys.exit(main())
