"""The approximate pass of a kernel in Amaranth's simulator: keys and probabilities, channel rows in, bit by bit."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from golden.storage import attention
from hw.storage.kernel import AttentionKernel, Op

LANES = 2


def channel_beats(q, k, channels, block):
    """Beats of one head: q, then per block of tokens the rows of the marked channels and a DRAIN per group."""
    beats = [{"op": Op.START, "data": [int(q.shape[1] == 128) | (len(q) - 1) << 1 | 1 << 4] + [0] * 15}]
    for index, row in enumerate(q.view(np.uint16)):
        slices = row.reshape(-1, 16).tolist()
        beats += [
            {"op": Op.QUERY, "data": x, "index": index, "first": n == 0, "last": n == len(slices) - 1}
            for n, x in enumerate(slices)
        ]
    for start in range(0, len(k), block):
        rows = np.zeros((block, k.shape[1]), np.uint16)
        rows[: len(k) - start] = k[start : start + block].view(np.uint16)
        for order, channel in enumerate(channels):
            row = rows[:, channel].reshape(-1, 16).tolist()
            beats += [
                {
                    "op": Op.CHANNEL,
                    "data": x,
                    "index": int(channel),
                    "first": n == 0,
                    "last": n == len(row) - 1,
                }
                | {"flag": order == 0}
                for n, x in enumerate(row)
            ]
        for group in range(start, min(start + block, len(k)), 16):
            count = min(16, len(k) - group)
            beats.append({"op": Op.DRAIN, "data": [0] * 16, "mask": (1 << count) - 1, "last": 1})
    return beats


@pytest.mark.parametrize(
    ("head_size", "tokens", "r"),
    [(64, 75, 5), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((128, 300, 3), (64, 16, 1)))],
)
def test_keys_probabilities_and_sum(head_size, tokens, r):
    rng = np.random.default_rng(tokens)
    q = (rng.normal(size=(LANES, head_size)) * 3).astype(np.float16)
    k = rng.normal(size=(tokens, head_size)).astype(np.float16)
    channels = attention.largest(attention.channel_keys(q), r)
    c, frac = attention.approximate_scale(q, channels)
    z, p, maxima, state = attention._approximate(q, k, channels)
    dut = AttentionKernel(LANES)
    keys, weights, tops, sums = [], [[] for _ in range(LANES)], [[] for _ in range(LANES)], []

    async def feed(ctx):
        for lane in range(LANES):
            ctx.set(dut.scale[lane], {"c": int(c[lane]), "frac": int(frac[lane])})
        for beat in channel_beats(q, k, channels, 256):
            ctx.set(dut.i.payload, {"mask": 0, "index": 0, "first": 1, "last": 1, "flag": 0, **beat})
            ctx.set(dut.i.valid, 1)
            await ctx.tick().until(dut.i.ready)
        ctx.set(dut.i.valid, 0)
        await ctx.tick().until(dut.idle)
        await ctx.tick().repeat(10)
        sums.extend(ctx.get(dut.sum[lane]) for lane in range(LANES))

    async def watch(ctx):
        ctx.set(dut.key.ready, 1)
        async for _, _, valid, key, *lanes in ctx.tick().sample(
            dut.key.valid, dut.key.payload, *dut.probability
        ):
            if valid:
                keys.append(key if key < 1 << 31 else key - (1 << 32))
            for lane, view in enumerate(lanes):
                if view.valid:
                    weights[lane].append(view.p)
                    tops[lane].append(view.maximum)

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(feed)
    sim.add_testbench(watch, background=True)
    sim.run()
    assert keys == z.sum(1).tolist()
    padded = -(-tokens // 16) * 16
    for lane in range(LANES):
        got = np.array(weights[lane], np.uint16).view(np.float16)
        assert len(got) == padded
        assert (attention.p_integer(got)[:tokens] == p[:, lane]).all()
        assert (got[tokens:] == 0).all()
        assert tops[lane][:tokens] == maxima[:, lane].tolist()
        assert sums[lane] == state.sum[lane]
