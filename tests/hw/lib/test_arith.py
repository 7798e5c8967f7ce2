"""hw.lib.arith, exhaustively at small widths, against Python integers."""

import math
import random

import pytest
from amaranth import Module, Signal, signed, unsigned
from amaranth.sim import Simulator

from hw.lib import arith
from hw.lib.testing import pauses, through


def tabulate(build, inputs: list[tuple], shapes: list) -> list[int]:
    """Evaluate a combinational function of signals of `shapes` on each tuple of `inputs`."""
    m = Module()
    args = [Signal(shape, name=f"arg{index}") for index, shape in enumerate(shapes)]
    result = build(*args)
    out = Signal(result.shape())
    m.d.comb += out.eq(result)
    seen = []

    async def bench(ctx):
        for values in inputs:
            for arg, value in zip(args, values):
                ctx.set(arg, value)
            await ctx.delay(1e-9)
            seen.append(ctx.get(out))

    simulator = Simulator(m)
    simulator.add_testbench(bench)
    simulator.run()
    return seen


def signed_range(bits: int) -> range:
    return range(-(1 << (bits - 1)), 1 << (bits - 1))


def py_rnd_shift(x: int, n: int) -> int:
    return math.floor(x / 2**n + 0.5)


def test_rnd_shift_by_a_value_is_the_formats_page():
    inputs = [(x, n) for x in signed_range(7) for n in range(12)]
    got = tabulate(arith.rnd_shift, inputs, [signed(7), unsigned(4)])
    assert got == [py_rnd_shift(x, n) for x, n in inputs]


@pytest.mark.parametrize("n", range(9))
def test_rnd_shift_by_a_constant_is_the_formats_page(n):
    inputs = [(x,) for x in signed_range(8)]
    assert tabulate(lambda x: arith.rnd_shift(x, n), inputs, [signed(8)]) == [
        py_rnd_shift(x, n) for (x,) in inputs
    ]


@pytest.mark.parametrize("bits", range(1, 10))
def test_saturate_clamps_every_value(bits):
    inputs = [(x,) for x in signed_range(8)]
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    assert tabulate(lambda x: arith.saturate(x, bits), inputs, [signed(8)]) == [
        min(max(x, low), high) for (x,) in inputs
    ]


def test_absolute_holds_the_least_value():
    inputs = [(x,) for x in signed_range(8)]
    assert tabulate(arith.absolute, inputs, [signed(8)]) == [abs(x) for (x,) in inputs]


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 11])
def test_bit_length_and_normalise_of_every_value(bits):
    inputs = [(x,) for x in range(1 << bits)]
    assert tabulate(arith.bit_length, inputs, [unsigned(bits)]) == [x.bit_length() for (x,) in inputs]
    expected = [x << (bits - x.bit_length()) if x else 0 for (x,) in inputs]
    got = tabulate(lambda x: arith.normalise(x, arith.bit_length(x)), inputs, [unsigned(bits)])
    assert got == expected


def test_resize_and_shift_left_keep_the_sign():
    inputs = [(x,) for x in signed_range(5)]
    assert tabulate(lambda x: arith.resize(x, 9), inputs, [signed(5)]) == [x for (x,) in inputs]
    assert tabulate(lambda x: arith.shift_left(x, 3), inputs, [signed(5)]) == [x * 8 for (x,) in inputs]


@pytest.mark.parametrize("digits", [1, 2])
def test_divider_every_small_operand(digits):
    requests = [{"n": n, "d": d} for d in range(1, 16) for n in range(64) if n // d < 16]
    got = through(arith.Divider(6, 4, 4, digits=digits), requests).taken
    assert got == [r["n"] // r["d"] for r in requests]


@pytest.mark.parametrize("seed", range(3))
def test_divider_at_the_engine_width_under_stalls(seed):
    rng = random.Random(seed)
    divisors = [1 << 15, (1 << 16) - 1, 1 << 16] + [rng.randint(1 << 15, 1 << 16) for _ in range(40)]
    requests = [{"n": n, "d": d} for d in divisors for n in (127 << 24, (1 << 31) - 1) if n // d < 1 << 16]
    got = through(arith.Divider(31, 17, 16), requests, pauses(seed, 0.4), pauses(seed + 9, 0.4)).taken
    assert got == [r["n"] // r["d"] for r in requests]


@pytest.mark.parametrize("digits", [1, 2])
def test_isqrt_every_small_operand_and_random_wide_ones(digits):
    assert through(arith.ISqrt(8, digits=digits), list(range(256))).taken == [
        math.isqrt(x) for x in range(256)
    ]
    rng = random.Random(digits)
    roots = [rng.randint(1, (1 << 16) - 1) for _ in range(30)]
    wide = [0, 1, (1 << 32) - 1] + [r * r + delta for r in roots for delta in (-1, 0, 1)]
    got = through(arith.ISqrt(32, digits=digits), wide, pauses(digits, 0.3), pauses(digits + 5, 0.3)).taken
    assert got == [math.isqrt(x) for x in wide]


@pytest.mark.parametrize(
    ("make", "requests"),
    [
        (lambda: arith.Divider(31, 17, 16), [{"n": 127 << 24, "d": 40000 + k} for k in range(5)]),
        (lambda: arith.ISqrt(32), [9, 16, 4]),
    ],
    ids=["divider", "isqrt"],
)
def test_latency_and_rate_are_the_stated_cycles(make, requests):
    unit = make()
    _, accepted, ready = through(unit, requests)
    assert [r - a for a, r in zip(accepted, ready)] == [unit.latency] * len(requests)
    assert [b - a for a, b in zip(accepted, accepted[1:])] == [unit.latency] * (len(requests) - 1)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: arith.Divider(31, 17, 15), "multiple of the digits per cycle, not 15 by 2"),
        (lambda: arith.Divider(8, 4, 10), "at most the numerator's 8 bits, not 10"),
        (lambda: arith.ISqrt(30), "multiple of twice the digits per cycle, not 30 by 2"),
        (
            lambda: arith.Divider(0, 4, 4),
            "Numerator bits of a divider must be an integer of at least 1, not 0",
        ),
    ],
)
@pytest.mark.usefixtures("unfinished_blocks")
def test_illegal_widths_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_mutation_truncation_instead_of_rounding_turns_the_table_red(monkeypatch):
    monkeypatch.setattr(arith, "round_half", lambda y: y >> 1)
    with pytest.raises(AssertionError):
        test_rnd_shift_by_a_value_is_the_formats_page()
