"""The LOAD unit: ops to words on every channel, and how each bad op is refused. The memory is the HBM model."""

import pytest

from golden.spec.engine import TINY, WORD_BYTES, Error
from golden.spec.memory import MemoryModel
from hw.engine.mem.channels import ChannelReaders
from hw.engine.mem.hbm import MemoryChannel
from hw.lib.testing import get, pauses, put, simulate
from tests.hw.engine.mem.agents import answer_reads, random_channel

SIZE = 1 << 16


def memories(model, seed=1):
    return [random_channel(model, SIZE, 100 * seed + n, n) for n in range(TINY.channels)]


def answer(dut, channels):
    return [answer_reads(dut.axi[n], channel) for n, channel in enumerate(channels)]


def words(channel, ops):
    starts = [
        (op["addr"] + run * op["stride"] + n) * WORD_BYTES
        for op in ops
        for run in range(op["runs"])
        for n in range(op["count"])
    ]
    return [int.from_bytes(channel.contents[s : s + WORD_BYTES], "little") for s in starts]


@pytest.mark.parametrize(
    "model",
    [MemoryModel("fixed", 2), MemoryModel("random", 30, stall_percent=30), MemoryModel("hbm")],
    ids=lambda m: m.mode,
)
def test_words_of_every_channel_arrive_in_order(model):
    dut, channels = ChannelReaders(TINY, channel_bytes=SIZE), memories(model)
    ops = [
        {"addr": 3, "count": 20, "runs": 1, "stride": 0},
        {"addr": 200, "count": 5, "runs": 4, "stride": 40},
        {"addr": 1023, "count": 1, "runs": 1, "stride": 7},
    ]
    received = [[] for _ in channels]
    done = []

    async def feed(ctx):
        await put(ctx, dut.unit.op, ops)

    def taker(n):
        async def take(ctx):
            await get(ctx, dut.words[n], 41, pauses(n, 0.3), received[n])

        return take

    async def count_done(ctx):
        async for _, _, pulse in ctx.tick().sample(dut.unit.done):
            done.extend([1] * pulse)

    simulate(
        dut, feed, *(taker(n) for n in range(len(channels))), monitors=[*answer(dut, channels), count_done]
    )
    assert received == [words(channel, ops) for channel in channels]
    assert len(done) == len(ops)
    assert [channel.violation for channel in channels] == [None] * len(channels)


@pytest.mark.parametrize(
    ("op", "error"),
    [
        ({"addr": 0, "count": 0, "runs": 1, "stride": 0}, Error.SHAPE),
        ({"addr": 0, "count": 1, "runs": 0, "stride": 0}, Error.SHAPE),
        ({"addr": SIZE // WORD_BYTES - 1, "count": 2, "runs": 1, "stride": 0}, Error.ADDRESS),
        ({"addr": 0, "count": 1, "runs": 2, "stride": SIZE // WORD_BYTES}, Error.ADDRESS),
        ({"addr": 1 << 31, "count": 1, "runs": 1, "stride": 0}, Error.ADDRESS),
    ],
)
def test_a_bad_op_is_refused_and_clear_recovers(op, error):
    dut, channels = ChannelReaders(TINY, channel_bytes=SIZE), memories(MemoryModel("fixed", 3))
    good = {"addr": 8, "count": 4, "runs": 1, "stride": 0}
    received = []

    async def bench(ctx):
        ctx.set(dut.unit.op.payload, op)
        ctx.set(dut.unit.op.valid, 1)
        await ctx.tick().repeat(40)
        ctx.set(dut.unit.op.valid, 0)
        assert ctx.get(dut.unit.error) == error
        ctx.set(dut.abort, 1)
        await ctx.tick().until(dut.idle)
        ctx.set(dut.clear, 1)
        await ctx.tick()
        ctx.set(dut.clear, 0)
        ctx.set(dut.abort, 0)
        assert ctx.get(dut.unit.error) == Error.NONE
        await put(ctx, dut.unit.op, [good])
        received.extend(await get(ctx, dut.words[0], 4))

    simulate(dut, bench, monitors=answer(dut, channels))
    assert received == words(channels[0], [good])


def test_an_error_answer_is_a_bus_error_at_its_burst():
    channels = memories(MemoryModel("fixed", 3))
    bad = MemoryModel("fixed", 3, error_address=40 * WORD_BYTES)
    channels[1] = MemoryChannel(bad, size=SIZE)
    dut = ChannelReaders(TINY, channel_bytes=SIZE)

    async def bench(ctx):
        await put(ctx, dut.unit.op, [{"addr": 0, "count": 64, "runs": 1, "stride": 0}])
        for port in dut.words:
            ctx.set(port.ready, 1)
        await ctx.tick().repeat(120)
        assert ctx.get(dut.unit.error) == Error.BUS
        assert ctx.get(dut.fault_addr) == 32 * WORD_BYTES
        assert ctx.get(dut.fault_channel) == 1

    simulate(dut, bench, monitors=answer(dut, channels))


@pytest.mark.usefixtures("unfinished_blocks")
def test_a_channel_of_part_words_is_refused():
    with pytest.raises(ValueError, match="A channel holds whole words up to 4294967296 bytes, not 100"):
        ChannelReaders(TINY, channel_bytes=100)
