"""One script a claim: each measures pydiff beside its rivals in one run and writes what it found, see README.md."""
