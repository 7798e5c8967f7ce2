"""Channel selection and scale of SparF in Amaranth's simulator, against golden."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from golden.storage import attention
from hw.storage.query import QueryUnit

LANES = 3


@pytest.mark.parametrize(("head_size", "queries", "r"), [(64, 3, 16), (128, 1, 16), (128, 2, 1), (64, 1, 64)])
def test_marks_and_scales(head_size, queries, r):
    rng = np.random.default_rng(head_size + r)
    dut = QueryUnit(LANES)
    heads = [
        (rng.normal(size=(queries, head_size)) * 10.0 ** rng.uniform(-7, 3)).astype(np.float16)
        for _ in range(2)
    ]
    heads[1][:, :: max(1, head_size // 32)] = 0
    if queries > 1:
        heads[1][1, :] = heads[1][1, :] * 0 + np.float16(1e-4) * (np.arange(head_size) < 3)
        heads[1][0, 9] = np.inf
    rows = {}

    async def operands(ctx):
        async for _, _, address in ctx.tick().sample(dut.address):
            query, start = min(address.query, queries - 1), address.slice * 16
            part = rows["q"][query, start : start + 16].tolist()
            ctx.set(dut.elements, part + [0] * (16 - len(part)))

    async def bench(ctx):
        ctx.set(dut.wide, int(head_size == 128))
        ctx.set(dut.queries, queries - 1)
        ctx.set(dut.r, r)
        for q in heads:
            rows["q"] = q.view(np.uint16)
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            await ctx.tick().until(dut.done)
            await ctx.tick()
            channels = attention.largest(attention.channel_keys(q), r)
            assert ctx.get(dut.marks) == sum(1 << int(c) for c in channels)
            c, frac = attention.approximate_scale(q, channels)
            got = [(ctx.get(dut.scale[n].c), ctx.get(dut.scale[n].frac)) for n in range(queries)]
            assert got == list(zip(c.tolist(), frac.tolist()))

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    rows["q"] = heads[0].view(np.uint16)
    sim.add_testbench(operands, background=True)
    sim.add_testbench(bench)
    sim.run()
