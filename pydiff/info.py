"""`python -m pydiff.info`: the same as `pydiff info`."""

from pydiff.cli.info import main

if __name__ == "__main__":
    main()
