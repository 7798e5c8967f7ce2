"""The DMA unit: vectors move whole and to the right place, under stalls of memory and buffer, and bad ops are named."""

import random

import pytest

from golden.spec.engine import TINY, EngineConfig, Error
from golden.spec.memory import MemoryModel
from hw.engine.mem.dma import DmaUnit
from hw.lib.testing import put, simulate
from tests.hw.engine.mem.agents import answer_reads, answer_writes, grant_reads, grant_writes, random_channel

SIZE = 1 << 16
HALF = EngineConfig("half", 2, 4, 8, 16, 256, 2048, 64, 32)
MODELS = [MemoryModel("fixed", 2), MemoryModel("random", 30, stall_percent=30), MemoryModel("hbm")]
OPS = [
    {"addr": 0x1000, "count": 5, "vectors": 3, "stride": 0x400, "dst": 7, "dst_stride": 100},
    {"addr": 0x80, "count": 1, "vectors": 1, "stride": 0, "dst": 0, "dst_stride": 1},
    {"addr": 0x3F40, "count": 40, "vectors": 2, "stride": 0x1000, "dst": 1000, "dst_stride": 40},
]


def moves(op, vb_bytes):
    """(memory byte address, VB word address) of every VB word of an op."""
    for vector in range(op["vectors"]):
        for word in range(op["count"]):
            start = op["addr"] + vector * op["stride"] + word * vb_bytes
            yield start, op["dst"] + vector * op["dst_stride"] + word


def run(dut, ops, channel, store, seed, percent):
    """Run ops one after the other; returns the number of done pulses."""
    done = []

    async def feed(ctx):
        await put(ctx, dut.unit.op, ops)
        while len(done) < len(ops):
            await ctx.tick()
        await ctx.tick().repeat(3)
        assert ctx.get(dut.unit.error) == Error.NONE
        assert ctx.get(dut.idle)

    async def count(ctx):
        async for _, _, pulse in ctx.tick().sample(dut.unit.done):
            done.extend([1] * pulse)

    agents = [
        answer_reads(dut.axi_read, channel),
        answer_writes(dut.axi_write, channel),
        grant_writes(dut.vb_write, store, random.Random(seed), percent),
        grant_reads(dut.vb_read, store, random.Random(seed + 1), percent),
        count,
    ]
    simulate(dut, feed, monitors=agents)
    assert channel.violation is None
    return len(done)


@pytest.mark.parametrize("config", [TINY, HALF], ids=lambda c: c.name)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.mode)
@pytest.mark.parametrize("percent", [0, 50])
def test_reads_fill_exactly_their_words(config, model, percent):
    vb_bytes = 4 * config.vector_lanes
    channel, store = random_channel(model, SIZE, 3), {}
    ops = [op | {"write": 0} for op in OPS]
    assert run(DmaUnit(config, memory_bytes=SIZE), ops, channel, store, 5, percent) == len(ops)
    want = {
        word: int.from_bytes(channel.contents[at : at + vb_bytes], "little")
        for op in ops
        for at, word in moves(op, vb_bytes)
    }
    assert store == want


@pytest.mark.parametrize("config", [TINY, HALF], ids=lambda c: c.name)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.mode)
@pytest.mark.parametrize("percent", [0, 50])
def test_writes_change_exactly_their_bytes(config, model, percent):
    vb_bytes = 4 * config.vector_lanes
    channel = random_channel(model, SIZE, 4)
    source = random.Random(6)
    store = {word: source.getrandbits(8 * vb_bytes) for word in range(1200)}
    want = bytearray(channel.contents)
    ops = [op | {"write": 1} for op in OPS]
    for op in ops:
        for at, word in moves(op, vb_bytes):
            want[at : at + vb_bytes] = store[word].to_bytes(vb_bytes, "little")
    assert run(DmaUnit(config, memory_bytes=SIZE), ops, channel, store, 7, percent) == len(ops)
    assert bytes(channel.contents) == bytes(want)


@pytest.mark.parametrize("latency", [1, 20])
def test_a_read_takes_the_stated_cycles(latency):
    dut, words = DmaUnit(TINY, memory_bytes=SIZE), 30
    channel = random_channel(MemoryModel("fixed", latency), SIZE, 3)
    cycles = []

    async def feed(ctx):
        await put(ctx, dut.unit.op, [OPS[0] | {"count": words, "vectors": 1, "write": 0}])
        count = 1
        while not ctx.get(dut.unit.done):
            await ctx.tick()
            count += 1
        cycles.append(count)

    simulate(dut, feed, monitors=[answer_reads(dut.axi_read, channel), grant_writes(dut.vb_write, {})])
    assert cycles == [DmaUnit.read_cycles(words, latency)]


@pytest.mark.parametrize("write", [0, 1])
@pytest.mark.parametrize(
    ("change", "model", "error"),
    [
        ({"addr": 0x1004}, {}, Error.ADDRESS),
        ({"stride": 100}, {}, Error.ADDRESS),
        ({"addr": SIZE - 64}, {}, Error.ADDRESS),
        ({"count": 0}, {}, Error.SHAPE),
        ({"vectors": 0}, {}, Error.SHAPE),
        ({}, {"error_address": 0x1400}, Error.BUS),
        ({}, {"error_address": 0x1400, "error_response": 3}, Error.BUS),
    ],
)
def test_a_bad_op_stops_with_its_code_and_drains(write, change, model, error):
    dut = DmaUnit(TINY, memory_bytes=SIZE)
    channel = random_channel(MemoryModel("fixed", 5, **model), SIZE, 1)

    async def bench(ctx):
        await put(ctx, dut.unit.op, [OPS[0] | change | {"write": write}])
        await ctx.tick().repeat(120)
        assert ctx.get(dut.unit.error) == error
        assert not ctx.get(dut.unit.op.ready)
        ctx.set(dut.abort, 1)
        for _ in range(100):
            await ctx.tick()
            if ctx.get(dut.idle):
                break
        assert ctx.get(dut.idle)
        assert ctx.get(dut.unit.error) == error

    agents = [
        answer_reads(dut.axi_read, channel),
        answer_writes(dut.axi_write, channel),
        grant_writes(dut.vb_write, {}),
        grant_reads(dut.vb_read, {}),
    ]
    simulate(dut, bench, monitors=agents)
    assert channel.idle


@pytest.mark.usefixtures("unfinished_blocks")
def test_a_buffer_word_wider_than_memory_is_refused():
    wide = EngineConfig("wide", 8, 4, 32, 16, 256, 2048, 64, 32)
    with pytest.raises(ValueError, match="512-bit memory word must hold whole VB words, not 1024 bits"):
        DmaUnit(wide)
