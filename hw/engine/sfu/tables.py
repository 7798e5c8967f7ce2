"""Constant tables of the integer exp2 and sigmoid (docs/formats.md section 9)."""

import math

from golden.spec import formats

EXP2_SEGMENTS = 1 << formats.EXP2_SEGMENTS_LOG2
SIGMOID_SEGMENTS = 1 << formats.SIGMOID_SEGMENTS_LOG2
SIGMOID_ONE = 1 << 16
SIGMOID_LIMIT = 1 << (formats.VEC_FRAC + formats.SIGMOID_RANGE_LOG2)
"""Magnitude (Q16) from which on sigmoid is its largest value."""


def exp2_table() -> list[int]:
    """`T[k] = round(2**15 * 2**(-k/64))`, k = 0..64."""
    return [round(2.0 ** (formats.P_FRAC - k / EXP2_SEGMENTS)) for k in range(EXP2_SEGMENTS + 1)]


def sigmoid_table() -> list[int]:
    """`S[k] = min(65535, round(2**16 / (1 + e**(-k/16))))`, k = 0..256."""
    step = (1 << formats.SIGMOID_RANGE_LOG2) / SIGMOID_SEGMENTS
    values = (round(SIGMOID_ONE / (1 + math.exp(-k * step))) for k in range(SIGMOID_SEGMENTS + 1))
    return [min(SIGMOID_ONE - 1, value) for value in values]
