"""The captured loop: a sampler's stages in CUDA graphs, and the check that nothing in a model prevents it."""

from __future__ import annotations
