"""The softmax lane against the golden online softmax, group by group."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from golden.storage import attention, fp
from hw.storage import softmax


def test_every_exponential_table_entry_and_many_more():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [np.arange(0, 70) * 1024, rng.integers(0, 27 << 16, 3000), rng.integers(0, 1 << 30, 50)]
    )
    dut = softmax.Exp2()
    got = []

    async def bench(ctx):
        ctx.set(dut.live, 1)
        for cycle in range(len(x) + dut.latency):
            ctx.set(dut.x, int(x[min(cycle, len(x) - 1)]))
            if cycle >= dut.latency:
                got.append((ctx.get(dut.p), ctx.get(dut.integer)))
            await ctx.tick()

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(bench)
    sim.run()
    p = attention.exp2_fp16(x)
    expected = list(zip(p.view(np.uint16).tolist(), fp.p_integer(p).tolist()))
    for value, a, b in zip(x, got, expected):
        assert a == b, f"2**-({value} / 65536): got {a}, expected {b}"


@pytest.mark.parametrize("seed", range(4))
def test_groups_match_golden(seed):
    rng = np.random.default_rng(seed)
    groups = 12
    s = (rng.normal(size=(groups, 16)) * 10 ** rng.uniform(0, 3, (groups, 1))).astype(np.float32)
    s[rng.random(s.shape) < 0.1] = -np.inf
    s[3] = -np.inf
    if seed == 0:
        s[0] = -np.inf
    if seed == 3:
        s[5, 2] = np.inf
    present = rng.random((groups, 16)) < 0.7
    present[:, 0] |= ~present.any(1)
    present[1] = True
    c, frac = np.array([66856]), np.array([19])
    state = attention.Softmax(1)
    expected = []
    for row, marks in zip(s, present):
        z, p, d = state.step(row[None], c, frac, marks)
        expected.append(
            (p[0].view(np.uint16).tolist(), min(int(d[0]), softmax.SHIFT_MAX), int(state.maximum[0]))
        )
    z = fp.score(s, np.array(66856), np.array(19))
    dut = softmax.SoftmaxLane()
    got, first = [], []

    async def feed(ctx):
        await ctx.tick()
        for g in range(groups):
            slots = np.flatnonzero(present[g])
            for slot in slots:
                ctx.set(dut.valid, 1)
                ctx.set(dut.slot, int(slot))
                ctx.set(dut.last, int(slot == slots[-1]))
                value = {
                    "z": int(z[g, slot]),
                    "poison": int(fp.poison(s[g, slot])),
                    "dead": int(np.isneginf(s[g, slot])),
                }
                ctx.set(dut.score, value)
                await ctx.tick()
                ctx.set(dut.valid, 0)
                await ctx.tick().repeat(int(rng.integers(1, 8)))
            while g + 1 - len(got) >= softmax.RING:
                await ctx.tick()

    async def watch(ctx):
        row = []
        while len(got) < groups:
            await ctx.tick()
            if ctx.get(dut.p_valid):
                assert ctx.get(dut.p_slot) == len(row)
                row.append(ctx.get(dut.p))
                if ctx.get(dut.p_last):
                    got.append((row, ctx.get(dut.shift), ctx.get(dut.maximum)))
                    row = []
        await ctx.tick().repeat(dut.settle)
        first.append((ctx.get(dut.sum), ctx.get(dut.poisoned)))

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(feed)
    sim.add_testbench(watch)
    sim.run()
    for g, (a, b) in enumerate(zip(got, expected)):
        assert a == b, f"group {g}: got {a}, expected {b}"
    assert first[0] == (int(state.sum[0]), int(state.poisoned[0]))
    assert state.poisoned[0] == (seed == 3)
