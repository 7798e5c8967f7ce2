"""Closed-form cycle counts of the top-k unit; tests hold them against the RTL.

Cycles are of the unit's clock, counted between transfers: the first key may enter 2 cycles after the command, and
a beat of keys every cycle from then on. All counts hold while the output is never refused.
"""

from collections.abc import Sequence

COMMAND_CYCLES = 2
"""From the command to the first beat of keys."""


def _tree_levels(lanes: int) -> int:
    levels = 0
    while lanes > 1:
        lanes, levels = -(-lanes // 4), levels + 1
    return levels


def first_row_cycles(count: int, digits: int, *, lanes: int = 16, digit_bits: int = 8) -> int:
    """From the last beat of keys to the first row of marks, when the threshold takes `digits` digits to find.

    Per digit one scan of the histogram; per digit after the first, one pass over the stored keys.
    """
    rows, levels = -(-count // lanes), _tree_levels(lanes)
    return digits * (1 << digit_bits) + (digits - 1) * (rows + 9 + levels) + 15 + levels


def select_cycles(count: int, digits: int, *, lanes: int = 16, digit_bits: int = 8) -> int:
    """From the last beat of keys to the last row of marks: the rows leave in consecutive cycles."""
    return first_row_cycles(count, digits, lanes=lanes, digit_bits=digit_bits) - 1 + -(-count // lanes)


def digits_used(
    keys: Sequence[int], k: int, *, window: int = 0, key_bits: int = 32, digit_bits: int = 8
) -> int:
    """Digits of the threshold that the unit finds for these unsigned keys before it starts to emit.

    Refinement stops at the digit whose keys are all selected, which real scores reach early; the most is
    key_bits / digit_bits.
    """
    top = (1 << key_bits) - 1
    candidates = [*keys[: len(keys) - window], *([top] * window)]
    need, digits = min(k, len(keys)), key_bits // digit_bits
    for used in range(1, digits + 1):
        shift = key_bits - used * digit_bits
        ordered = sorted((key >> shift for key in candidates), reverse=True)
        if need == 0 or need == len(ordered):
            return used
        threshold = ordered[need - 1]
        above = sum(key > threshold for key in ordered)
        candidates = [key for key in candidates if key >> shift == threshold]
        need -= above
        if need == len(candidates):
            return used
    return digits
