"""`python -m pydiff`: the same as the `pydiff` command."""

import sys

from pydiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
