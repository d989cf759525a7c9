"""The eager loop and what it needs: the state of a run, noise sources, conditions."""
