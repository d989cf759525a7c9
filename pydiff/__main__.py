"""`python -m pydiff`: the same as the `pydiff` command."""

import sys

from pydiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
