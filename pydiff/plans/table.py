"""Layout of a compiled plan as the stage operation reads it: one row of numbers and one row of indices a stage.

The same numbers stand in `csrc/stage.h`; `tests/ops/test_stage.py` compares the two.
"""

from __future__ import annotations

OPERANDS = ("x", "s0", "s1", "s2", "s3", "s4", "d", "m", "constant", "extra", "z0", "z1")
"""Operands of a linear combination, in the order they are summed: the sample, five slots (the step's base and the
history), the converted output d, the guided model output m, two tensors given by the caller, two Gaussian draws."""

NUM_OPERANDS = len(OPERANDS)
NUM_SLOTS = 5
X, SLOT, D, M, CONSTANT, EXTRA, Z0, Z1 = 0, 1, 6, 7, 8, 9, 10, 11

# Columns of the coefficient row.
WEIGHTS = 0  # three combinations of NUM_OPERANDS weights: the new x, and the contents of two slots
OUTPUT = 36  # d = OUTPUT[0] * x + OUTPUT[1] * m
GUIDANCE = 38  # m = m_uncond + scale * (m_cond - m_uncond)
CLIP = 39  # lower and upper bound of d
KNOWN = 41  # weights of (known, z0, z1): what stands where the mask is 1 afterwards, known being the clean image there
INPUT_SCALE = 44  # the model input of this stage is INPUT_SCALE * x
TIME = 45  # the time the model is told
SECOND_TIME = 46  # the second time of a flow map
COEFFICIENT_COLUMNS = 48

# Columns of the index row; -1 means none.
WRITE_A, WRITE_B = 0, 1  # slots that the second and third combination are written to
DRAW0, DRAW1 = 2, 3  # draw numbers of z0 and z1
INDEX_COLUMNS = 4
