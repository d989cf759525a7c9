"""One script a claim: each measures pydiff beside its rivals in one run, see README.md."""
