"""Per-lane comparison, the sum over lanes, and the tie rule of the top-k unit."""

from amaranth import Array, Const, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out


def reduce_tree(m: Module, values: list, *, radix: int = 4) -> tuple[Value, int]:
    """Sum of `values` through registered `radix`-input adders; returns the sum and its latency in cycles."""
    latency = 0
    while len(values) > 1:
        level = []
        for n in range(0, len(values), radix):
            total = values[n]
            for value in values[n + 1 : n + radix]:
                total = total + value
            register = Signal(total.shape(), name=f"sum_{latency}_{n}")
            m.d.sync += register.eq(total)
            level.append(register)
        values = level
        latency += 1
    return values[0], latency


class LaneCompare(wiring.Component):
    """Compare the leading `known` digits of a key with those of the threshold; results one cycle later.

    `above`: the key's leading digits are greater. `equal`: they agree. `digit`: the key's digit number `known`,
    counted from the most significant one, so that it is the next to be counted; any while all are known.
    """

    latency = 1

    def __init__(self, digits: int, digit_bits: int):
        self._digits, self._digit_bits = digits, digit_bits
        super().__init__(
            {
                "key": In(digits * digit_bits),
                "threshold": In(data.ArrayLayout(digit_bits, digits)),
                "known": In(range(digits + 1)),
                "above": Out(1),
                "equal": Out(1),
                "digit": Out(digit_bits),
            }
        )

    def elaborate(self, platform):
        m = Module()
        digits = self._digits
        fields = [self.key.word_select(digits - 1 - n, self._digit_bits) for n in range(digits)]
        above, equal = Signal(digits), Signal(digits)
        next_digit = Signal(self._digit_bits)
        m.d.sync += next_digit.eq(Array(fields)[self.known])
        for n, field in enumerate(fields):
            use = n < self.known
            m.d.sync += [
                above[n].eq(use & (field > self.threshold[n])),
                equal[n].eq(~use | (field == self.threshold[n])),
            ]
        result: Value = Const(0, 1)
        for n in reversed(range(digits)):
            result = above[n] | (equal[n] & result)
        m.d.comb += [self.above.eq(result), self.equal.eq(equal.all()), self.digit.eq(next_digit)]
        return m


class TieBreak(wiring.Component):
    """Mark all lanes above the threshold and, in index order over all rows, the first `need` lanes equal to it.

    Takes a row per cycle with `valid`; `mask` and `done` follow `latency` cycles later. `start`, before the first
    row, restarts the count; `need` holds until the last row is done.
    """

    latency = 4

    def __init__(self, lanes: int, most: int):
        self._lanes, self._most = lanes, most
        super().__init__(
            {
                "start": In(1),
                "need": In(range(most + 1)),
                "above": In(lanes),
                "equal": In(lanes),
                "valid": In(1),
                "mask": Out(lanes),
                "done": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        lanes, most = self._lanes, self._most
        above, equal, valid = self.above, self.equal, self.valid
        # Equal lanes up to and including each lane: inside a quad, then of the quads before it.
        before: list[Value] = [equal[n] for n in range(lanes)]
        for stage, width in enumerate((1, 4, 16)):
            stage_above, stage_equal, stage_valid = Signal(lanes), Signal(lanes), Signal()
            m.d.sync += [stage_above.eq(above), stage_equal.eq(equal), stage_valid.eq(valid)]
            above, equal, valid = stage_above, stage_equal, stage_valid
            counts = [Signal(range(lanes + 1), name=f"before_{stage}_{n}") for n in range(lanes)]
            for n in range(lanes):
                whole = range(n // width * width, n, max(width // 4, 1)) if width > 1 else ()
                ends = [before[j + max(width // 4, 1) - 1] for j in whole if j + max(width // 4, 1) - 1 < n]
                m.d.sync += counts[n].eq(sum(ends, before[n]))
            before = list(counts)
        left = Signal(range(most + 1))
        used = Mux(valid, before[-1], 0)
        rest = Signal(range(-lanes, most + 1))
        m.d.comb += rest.eq(left - used)
        with m.If(self.start):
            m.d.sync += left.eq(self.need)
        with m.Else():
            m.d.sync += left.eq(Mux(rest < 0, 0, rest))
        plenty = left >= lanes
        m.d.sync += self.done.eq(valid)
        for n in range(lanes):
            fits = plenty | (before[n] <= left[: lanes.bit_length()])
            m.d.sync += self.mask[n].eq(above[n] | (equal[n] & fits))
        return m
