"""The top-k unit against the golden argtopk: adversarial keys, stalls, reset, closed-form cycles, mutations."""

import random

import pytest
import torch
from amaranth.hdl import ResetInserter, Signal

from golden.storage.topk import argtopk
from hw.lib.testing import assert_stable, get, no_pause, pauses, put, simulate
from hw.storage.topk import histogram, lanes, unit
from hw.storage.topk.timing import COMMAND_CYCLES, digits_used, first_row_cycles, select_cycles
from hw.storage.topk.unit import TopK
from tests.hw.mutants import mutant

SMALL = {"max_count": 256, "key_bits": 16, "lanes": 16, "in_lanes": 4, "digit_bits": 4}
NARROW = {"max_count": 128, "key_bits": 8, "lanes": 4, "in_lanes": 1, "digit_bits": 4}
SHAPES = [SMALL, {**SMALL, "in_lanes": 1}, {**SMALL, "in_lanes": 16, "digit_bits": 8}, NARROW]
LEAST, MOST = -(2**15), 2**15 - 2


def adversarial(n, rng, least=LEAST, most=MOST):
    """Key lists that have broken selection units before."""
    spread = [rng.randint(least, most) for _ in range(n)]
    return {
        "equal": [7] * n,
        "rising": sorted(spread),
        "falling": sorted(spread, reverse=True),
        "two values": [rng.choice((3, 4)) for _ in range(n)],
        "extremes": [rng.choice((least, most)) for _ in range(n)],
        "one low digit": [1024 % most + rng.randrange(3) for _ in range(n)],
        "spread": spread,
    }


def beats(keys, width):
    filled = [*keys, *([max(keys)] * (-len(keys) % width))]  # what lies past the count must not matter
    return [filled[n : n + width] for n in range(0, len(filled), width)]


def run(dut, cases, pause_in=no_pause, pause_out=no_pause):
    """Selected indices of every (keys, k, window)."""
    mask = (1 << dut.key_bits) - 1
    results = []

    async def send(ctx):
        for keys, k, window in cases:
            await put(ctx, dut.cmd, [{"count": len(keys), "k": k, "window": window}])
            await put(ctx, dut.i, beats([key & mask for key in keys], dut.in_lanes), pause_in)

    async def receive(ctx):
        for keys, _, _ in cases:
            rows = await get(ctx, dut.o, -(-len(keys) // dut.lanes), pause_out)
            assert [row.row for row in rows] == list(range(len(rows)))
            assert [row.last for row in rows] == [0] * (len(rows) - 1) + [1]
            marks = [
                (row.row * dut.lanes + lane)
                for row in rows
                for lane in range(dut.lanes)
                if row.mask >> lane & 1
            ]
            results.append(marks)

    async def stable(ctx):
        await assert_stable(ctx, dut.o)

    simulate(dut, send, receive, monitors=[stable])
    return results


def golden(keys, k, window):
    return argtopk(torch.tensor(keys), k, window=window).tolist()


def check(dut, cases, **stalls):
    for case, got in zip(cases, run(dut, cases, **stalls), strict=True):
        assert got == golden(*case), case


def problems(n, rng, limits):
    for keys in adversarial(n, rng, *limits).values():
        k = rng.choice([0, 1, max(1, n // 8), n // 2, n - 1, n])
        yield keys, k, rng.choice([0, min(k, 3), k])


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("shape", [SMALL, NARROW, *slow(*SHAPES[1:3])], ids=str)
@pytest.mark.parametrize("stalled", [*slow(False), True])
def test_equals_golden_on_adversarial_keys(shape, stalled):
    rng = random.Random(f"{shape}{stalled}")
    limits = (LEAST, MOST) if shape["key_bits"] == 16 else (-128, 126)
    sizes = [1, 15, 17, 33, shape["max_count"] - 1, shape["max_count"]]
    cases = [case for n in sizes for case in problems(n, rng, limits)]
    rng.shuffle(cases)
    stalls = {"pause_in": pauses(1, 0.3), "pause_out": pauses(2, 0.3, 30)} if stalled else {}
    check(TopK(**shape), cases[:: 3 if stalled else 2], **stalls)


def test_unsigned_keys_order_the_sign_bit_last():
    dut = TopK(**SMALL, signed_keys=False)
    (got,) = run(dut, [([0x8000, 1, 0xFFFF, 0x7FFF], 2, 0)])
    assert got == [0, 2]


def test_a_k_above_the_count_selects_everything():
    (got,) = run(TopK(**SMALL), [([5, -3, 8], 200, 0)])
    assert got == [0, 1, 2]


@pytest.mark.parametrize("state_cycles", [45, 100, *slow(3, 70, 150)])
def test_a_reset_in_mid_traffic_leaves_nothing_behind(state_cycles):
    dut = TopK(**SMALL)
    reset = Signal()
    rng = random.Random(state_cycles)
    first, second = (
        ([rng.randint(-9, 9) for _ in range(200)], 60, 5),
        ([rng.randint(-9, 9) for _ in range(77)], 30, 5),
    )
    got = []

    async def bench(ctx):
        ctx.set(dut.cmd.payload, {"count": 200, "k": 60, "window": 5})
        ctx.set(dut.cmd.valid, 1)
        ctx.set(dut.i.valid, 1)
        for n in range(state_cycles):
            ctx.set(dut.i.payload, [key & 0xFFFF for key in (first[0] * 2)[4 * n % 200 :][:4]])
            await ctx.tick()
        ctx.set(dut.cmd.valid, 0)
        ctx.set(dut.i.valid, 0)
        ctx.set(reset, 1)
        await ctx.tick()
        ctx.set(reset, 0)
        await put(ctx, dut.cmd, [{"count": 77, "k": 30, "window": 5}])
        await put(ctx, dut.i, beats([key & 0xFFFF for key in second[0]], 4))
        rows = await get(ctx, dut.o, 5)
        got.extend(row.row * 16 + lane for row in rows for lane in range(16) if row.mask >> lane & 1)

    simulate(ResetInserter(reset)(dut), bench)
    assert got == golden(*second)


def measure(dut, keys, k, window):
    """(command to first beat, last beat to first row, last beat to last row) in cycles."""
    events = {"cmd": [], "i": [], "o": []}

    async def send(ctx):
        await put(ctx, dut.cmd, [{"count": len(keys), "k": k, "window": window}])
        await put(ctx, dut.i, beats([key & 0xFFFF for key in keys], dut.in_lanes))

    async def receive(ctx):
        await get(ctx, dut.o, -(-len(keys) // dut.lanes))
        await ctx.tick().repeat(2)

    async def monitor(ctx):
        cycle = 0
        ports = [
            (name, port.valid, port.ready) for name, port in (("cmd", dut.cmd), ("i", dut.i), ("o", dut.o))
        ]
        async for _, _, *values in ctx.tick().sample(*(signal for _, v, r in ports for signal in (v, r))):
            cycle += 1
            for n, (name, _, _) in enumerate(ports):
                if values[2 * n] and values[2 * n + 1]:
                    events[name].append(cycle)

    simulate(dut, send, receive, monitors=[monitor])
    last = events["i"][-1]
    assert last - events["i"][0] + 1 == len(events["i"]), "keys were not accepted every cycle"
    return events["i"][0] - events["cmd"][0], events["o"][0] - last, events["o"][-1] - last


@pytest.mark.parametrize("shape", [*slow(*SHAPES[:2]), SHAPES[2]], ids=str)
@pytest.mark.parametrize("n", [*slow(1), 33])
def test_cycles_follow_the_closed_form(shape, n):
    rng = random.Random(n)
    for name in ("equal", "two values", "spread"):
        keys = adversarial(n, rng)[name]
        k, window = max(1, n // 3), n // 9
        unsigned = [key + 2**15 for key in keys]
        digits = digits_used(unsigned, k, window=window, key_bits=16, digit_bits=shape["digit_bits"])
        config = {"lanes": 16, "digit_bits": shape["digit_bits"]}
        expected = COMMAND_CYCLES, first_row_cycles(n, digits, **config), select_cycles(n, digits, **config)
        assert measure(TopK(**shape), keys, k, window) == expected


def test_the_default_unit_stays_below_a_tenth_of_a_step_at_32k():
    """dh 128, r = 16, k = S/8, m = 4: worst keys, against the fewest pages that both rounds can touch, no overlap."""
    channel_pages = 16 // 4 * (32768 // 512)
    token_pages = 2 * (32768 // 8 // 16)
    step = (channel_pages + token_pages) * 4096 * 285 / 11200
    assert first_row_cycles(32768, 4) < 0.1 * step


MUTATIONS = {
    "a repeated digit is counted once": (
        histogram,
        "repeated.eq(valid & (self.digit == digit))",
        "repeated.eq(0)",
    ),
    "bins are not cleared": (histogram, "Mux(self.scan, 0, new)", "Mux(self.scan, old, new)"),
    "ties go to all": (
        lanes,
        "fits = plenty | (before[n] <= left[: lanes.bit_length()])",
        "fits = plenty | 1",
    ),
    "ties count across one row only": (lanes, "left.eq(Mux(rest < 0, 0, rest))", "left.eq(left)"),
    "keys compare as greater or equal": (lanes, "field > self.threshold[n]", "field >= self.threshold[n]"),
    "the window is forgotten": (unit, "forced.replicate(self.key_bits)", "0"),
    "keys are unsigned": (unit, "1 << (self.key_bits - 1) if self.signed_keys else 0", "0"),
    "lanes past the count take part": (unit, "compares[lane].equal & row_mask[lane]", "compares[lane].equal"),
}


@pytest.mark.parametrize("name", [*slow(*list(MUTATIONS)[:5]), *list(MUTATIONS)[5:]])
def test_mutations_turn_the_comparison_red(name, monkeypatch):
    module, old, new = MUTATIONS[name]
    changed = mutant(module, old, new)
    for holder in (unit, changed):
        for item in ("HistogramBank", "LaneCompare", "TieBreak"):
            if (
                item in vars(changed)
                and vars(changed)[item].__module__ == changed.__name__
                and module is not unit
            ):
                monkeypatch.setattr(holder, item, vars(changed)[item], raising=False)
    top = changed.TopK if module is unit else TopK
    rng = random.Random(5)
    cases = [case for n in (33, 100) for case in problems(n, rng, (LEAST, MOST))]
    cases.append(([1026, 1026, *[1024] * 31], 4, 0))
    with pytest.raises(AssertionError):
        check(top(**SMALL), cases)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": 12}, "lanes of a top-k unit is a power of two, not 12"),
        ({"in_lanes": 32}, "at most 16 keys per beat .* not 32 per beat"),
        ({"max_count": 100}, "and 100 keys"),
        ({"digit_bits": 5}, "not 16 bits in digits of 5"),
    ],
)
@pytest.mark.usefixtures("unfinished_blocks")
def test_bad_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TopK(**{**SMALL, **change})
