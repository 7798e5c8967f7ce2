"""The array's parts in Amaranth's simulator, against plain integers."""

import itertools
import random

import pytest
from amaranth.sim import Simulator

from golden.spec.formats import SPARSE24_CODES, SPARSE24_PATTERNS
from hw.engine.array import BLOCK, QUADS, WHOLE, LanePair
from hw.engine.lane import Lane, Multipliers

LENGTH = 40


def run(dut, bench):
    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    simulator.add_testbench(bench)
    simulator.run()


def planes_of(rows):
    """Two-bit planes of stored fields, rows of 32, as words of a block of both rows."""
    return [
        [
            sum(
                (code >> 2 * p & 3) << 2 * (BLOCK * r + k)
                for r, row in enumerate(rows)
                for k, code in enumerate(row[at : at + BLOCK])
            )
            for at in range(0, len(rows[0]), BLOCK)
        ]
        for p in range(4)
    ]


def pack(values):
    return sum((v & 0xFF) << 8 * i for i, v in enumerate(values))


def shared(values):
    """The second operand that all pairs share (`shared_operand`), as a simulator's words."""
    return sum(v % (1 << WHOLE) << WHOLE * i for i, v in enumerate(values))


def dots_of(cases):
    """Feeds (sparse, rows, patterns, acts) back to back, one per cycle; the dot products of each."""
    dut, results = LanePair(), []

    async def bench(ctx):
        pipeline = []
        for sparse, rows, patterns, acts in [*cases, *[cases[-1]] * (LanePair.latency + 1)]:
            ctx.set(dut.load, 1)
            ctx.set(dut.valid, 1)
            ctx.set(dut.sparse, sparse)
            ctx.set(dut.wide, any(code > 15 for row in rows for code in row))
            for p, blocks in enumerate(planes_of(rows)):
                for h, plane in enumerate(blocks):
                    ctx.set(dut.planes[p][h], plane)
            for bit in range(3):
                ctx.set(
                    dut.patterns[bit], sum((code >> bit & 1) << i for i, code in enumerate(sum(patterns, [])))
                )
            pipeline.append(acts)
            if len(pipeline) > 1:  # activations come one cycle after their weights
                acts = pipeline[-2]
                ctx.set(dut.acts, pack(acts))
                ctx.set(dut.shared, shared(acts[:32]))
            await ctx.tick()
            results.append([ctx.get(dut.dots[r]) for r in range(2)])

    run(dut, bench)
    return results[LanePair.latency :][: len(cases)]


def dense_case(rng, bits, low, high):
    rows = [[rng.choice((0, (1 << bits) - 1, rng.randrange(1 << bits))) for _ in range(32)] for _ in range(2)]
    acts = [rng.choice((low, high, rng.randint(low, high))) for _ in range(64)]
    return 0, rows, [[0] * QUADS, [0] * QUADS], acts


def dense_dots(rows, acts):
    return [sum(code * a for code, a in zip(row, acts)) for row in rows]


def sparse_case(rng):
    rows = [[rng.randrange(4) for _ in range(32)] for _ in range(2)]
    patterns = [[rng.randrange(6) for _ in range(QUADS)] for _ in range(2)]
    acts = [rng.choice((-127, 127, rng.randint(-127, 127))) for _ in range(64)]
    return 1, rows, patterns, acts


def sparse_dots(rows, patterns, acts):
    totals = []
    for row, kept in zip(rows, patterns):
        total = 0
        for quad, pattern in enumerate(kept):
            for slot, position in enumerate(SPARSE24_PATTERNS[pattern]):
                total += SPARSE24_CODES[row[2 * quad + slot]] * acts[4 * quad + position]
        totals.append(total)
    return totals


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_dense_dots_are_exact_for_every_code_width(bits):
    rng = random.Random(bits)
    extremes = [(0, [[(1 << bits) - 1] * 32] * 2, [[0] * QUADS] * 2, [sign * 127] * 64) for sign in (1, -1)]
    cases = extremes + [dense_case(rng, bits, -127, 127) for _ in range(LENGTH)]
    for case, got in zip(cases, dots_of(cases)):
        assert got == dense_dots(case[1], case[3])


def test_sparse_dots_select_by_pattern_and_mix_with_dense_steps():
    """Steps of both kinds follow each other without a gap, so nothing of one may leak into the next."""
    rng = random.Random(3)
    cases = [
        sparse_case(rng) if rng.random() < 0.7 else dense_case(rng, 4, -127, 127) for _ in range(2 * LENGTH)
    ]
    for case, got in zip(cases, dots_of(cases)):
        sparse, rows, patterns, acts = case
        assert got == (sparse_dots(rows, patterns, acts) if sparse else dense_dots(rows, acts))


def test_every_pattern_and_code_pair_of_a_quad():
    cases = []
    for pattern, (one, two) in itertools.product(range(6), itertools.product(range(4), repeat=2)):
        rows = [[one, two] * 16, [two, one] * 16]
        cases.append((1, rows, [[pattern] * QUADS, [5 - pattern] * QUADS], [-127, 3, 127, -64] * 16))
    for case, got in zip(cases, dots_of(cases)):
        assert got == sparse_dots(*case[1:])


def half(sign, exponent, fraction):
    return sign << 15 | exponent << 10 | fraction


def int24(bits):
    exponent, fraction = bits >> 10 & 31, bits & 1023
    value = (fraction | (1024 if exponent else 0)) << max(exponent - 1, 0)
    return -value if bits >> 15 else value


def wrap(value, bits=56):
    return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


@pytest.mark.parametrize("multipliers", list(Multipliers))
def test_lane_scales_accumulates_and_rescales_exactly(multipliers):
    """Weights and values in one random stream, each on its own accumulators, a step every cycle."""
    rng = random.Random(5)
    steps = []
    for i in range(120):
        values = rng.random() < 0.5
        sum_ = rng.randint(-4064, 4064)
        steps.append(
            {
                "scale": half(rng.randrange(2), rng.choice((0, 1, rng.randrange(31))), rng.randrange(1024)),
                "minimum": half(rng.randrange(2), rng.randrange(31), rng.randrange(1024)),
                "dot": rng.randint(-(1 << 20), (1 << 20) - 1),
                "values": values,
                "addend": rng.randint(-(1 << 45), 1 << 45) if values else sum_,
                "shift": rng.randrange(36),
                "decay": rng.choice((0, 0, 1, 5, rng.randrange(64), 63)) if values else 0,
                "first": i < 8 or rng.random() < 0.1,
                "slot": (i % 4) + (16 if values else 0) if i >= 8 else (i % 4) + 16 * (i // 4),
            }
        )
    model, dut = {}, Lane(16, multipliers)
    for s in steps:
        old = 0 if s["first"] else model[s["slot"]] >> s["decay"]
        if s["values"]:
            change = (s["dot"] << s["shift"]) + s["addend"]
        else:
            change = s["dot"] * int24(s["scale"]) + s["addend"] * int24(s["minimum"])
        model[s["slot"]] = wrap(old + change)

    async def bench(ctx):
        latency = LanePair.latency
        for t in range(len(steps) + latency + Lane.latency + 1):
            at_time = {
                ago: steps[t - ago] if 0 <= t - ago < len(steps) else None for ago in range(6 + latency)
            }
            if now := at_time[0]:
                ctx.set(dut.load, 1)
                ctx.set(dut.scale, now["scale"])
                ctx.set(dut.minimum, now["minimum"])
            if early := at_time[latency - 1]:
                ctx.set(dut.record, {"values": early["values"], "shift": early["shift"]})
            if scaled := at_time[1 + latency]:
                ctx.set(dut.dot, scaled["dot"])
                sum_ = 0 if scaled["values"] else scaled["addend"]
                ctx.set(dut.control, {"sum": sum_, "thrice": 3 * sum_})
            if added := at_time[3 + latency]:
                ctx.set(dut.add, {"values": added["values"], "addend": added["addend"]})
            update = at_time[5 + latency]
            ctx.set(dut.update.valid, update is not None)
            if update:
                for name in ("first", "slot", "decay"):
                    ctx.set(dut.update[name], update[name])
                ctx.set(dut.update.reach, 3 if update["first"] else min(update["decay"] >> 4, 2))
            await ctx.tick()
        ctx.set(dut.update.valid, 0)
        for slot, value in model.items():
            ctx.set(dut.drain, slot)
            await ctx.delay(1e-9)
            assert ctx.get(dut.drained) == value, f"accumulator {slot}"

    run(dut, bench)
