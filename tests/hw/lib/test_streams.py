"""Stream blocks under random stalls on both sides, with reset in mid-traffic, at their stated latency."""

import pytest
from amaranth import Module, Signal, signed, unsigned
from amaranth.hdl import Elaboratable, ResetInserter
from amaranth.lib import data, wiring

from hw.lib.arbiter import RoundRobin, StreamArbiter, StreamRouter
from hw.lib.gearbox import GearDown, GearUp
from hw.lib.streams import Fork, Join, PipeStage, SkidBuffer, StreamFIFO, connect
from hw.lib.testing import assert_stable, get, pauses, put, simulate, through

WORD = data.StructLayout({"value": signed(9), "last": 1})
ONE_TO_ONE = {
    "lut fifo": lambda: StreamFIFO(WORD, 2),
    "lut fifo of odd depth": lambda: StreamFIFO(WORD, 5),
    "block fifo": lambda: StreamFIFO(WORD, 3, kind="block"),
    "deep block fifo": lambda: StreamFIFO(WORD, 17, kind="block"),
    "skid buffer": lambda: SkidBuffer(WORD),
    "pipe stage": lambda: PipeStage(WORD),
}
STALLS = {"none": (0, 0), "source": (0.5, 0), "sink": (0, 0.5), "both": (0.4, 0.4)}
block = pytest.mark.parametrize("make", ONE_TO_ONE.values(), ids=ONE_TO_ONE.keys())


def words(count):
    return [{"value": (37 * n) % 512 - 256, "last": n % 7 == 6} for n in range(count)]


def stall_pair(name, seed):
    source, sink = STALLS[name]
    return pauses(2 * seed, source), pauses(2 * seed + 1, sink)


class WithReset(Elaboratable):
    def __init__(self, dut):
        self.dut = dut
        self.reset = Signal()

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = ResetInserter(self.reset)(self.dut)
        return m


@block
@pytest.mark.parametrize("stall", STALLS)
@pytest.mark.parametrize("seed", range(3))
def test_passes_every_payload_once_in_order(make, stall, seed):
    sent = words(60)
    received = through(make(), sent, *stall_pair(stall, seed)).taken
    assert received == [WORD.const(word) for word in sent]


@block
def test_latency_and_full_rate_are_as_stated(make):
    dut = make()
    _, entered, left = through(dut, words(20))
    assert [b - a for a, b in zip(entered, left)] == [dut.latency] * 20
    assert left == list(range(left[0], left[0] + 20))


@block
def test_reset_in_mid_traffic_empties_the_block(make):
    dut = make()
    top = WithReset(dut)
    received = []

    async def run(ctx):
        ctx.set(dut.i.payload, {"value": -1, "last": 1})
        ctx.set(dut.i.valid, 1)
        await ctx.tick().repeat(4)
        ctx.set(top.reset, 1)
        ctx.set(dut.i.valid, 0)
        await ctx.tick()
        ctx.set(top.reset, 0)
        assert not ctx.get(dut.o.valid)
        await ctx.tick().repeat(3)
        assert not ctx.get(dut.o.valid)
        for n in range(3):
            await put(ctx, dut.i, words(3)[n : n + 1])
            received.extend(await get(ctx, dut.o, 1))

    simulate(top, run)
    assert received == [WORD.const(word) for word in words(3)]


def test_fifo_level_counts_what_is_inside():
    dut = StreamFIFO(unsigned(8), 4)

    async def run(ctx):
        await put(ctx, dut.i, [1, 2, 3, 4])
        assert ctx.get(dut.level) == 4
        assert not ctx.get(dut.i.ready)
        assert await get(ctx, dut.o, 3) == [1, 2, 3]
        assert ctx.get(dut.level) == 1

    simulate(dut, run)


@pytest.mark.parametrize("seed", range(4))
def test_fork_gives_each_consumer_everything_once(seed):
    dut = Fork(unsigned(8), 3)
    sent, received = list(range(40)), [[], [], []]

    async def write(ctx):
        await put(ctx, dut.i, sent, pauses(seed, 0.3))

    def reader(index):
        async def read(ctx):
            await get(ctx, dut.o[index], len(sent), pauses(10 * seed + index, 0.2 * index), received[index])

        return read

    def watcher(index):
        async def watch(ctx):
            await assert_stable(ctx, dut.o[index])

        return watch

    simulate(dut, write, *map(reader, range(3)), monitors=map(watcher, range(3)))
    assert received == [sent] * 3


@pytest.mark.parametrize("seed", range(4))
def test_join_takes_one_of_each(seed):
    dut, received = Join(unsigned(8), 3), []

    def writer(index):
        async def write(ctx):
            await put(ctx, dut.i[index], range(index, 90, 3), pauses(10 * seed + index, 0.2 * index))

        return write

    async def read(ctx):
        await get(ctx, dut.o, 30, pauses(seed, 0.3), received)

    simulate(dut, *map(writer, range(3)), read)
    assert [list(row) for row in received] == [[n, n + 1, n + 2] for n in range(0, 90, 3)]


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("stall", STALLS)
def test_gearboxes_invert_each_other(ratio, stall):
    up, down = GearUp(signed(5), ratio), GearDown(signed(5), ratio)
    top = Module()
    top.submodules.up, top.submodules.down = up, down
    connect(top, up.o, down.i)
    sent = [(n * 7) % 32 - 16 for n in range(12 * ratio)]
    received = through(up, sent, *stall_pair(stall, ratio), o=down.o, top=top).taken
    assert received == sent


@pytest.mark.parametrize("ratio", [2, 3, 8])
def test_gear_up_cycles_are_as_stated(ratio):
    dut, arrivals = GearUp(unsigned(4), ratio), []

    async def write(ctx):
        await put(ctx, dut.i, range(3 * ratio) if ratio < 6 else [1] * 3 * ratio)

    async def read(ctx):
        ctx.set(dut.o.ready, 1)
        for cycle in range(3 * ratio + 1):
            _, _, valid = await ctx.tick().sample(dut.o.valid)
            if valid:
                arrivals.append(cycle)

    simulate(dut, write, read)
    assert arrivals == [dut.cycles(ratio), dut.cycles(2 * ratio), dut.cycles(3 * ratio)]


@pytest.mark.parametrize("seed", range(4))
def test_arbiter_and_router_return_each_stream_in_order(seed):
    merge, split = StreamArbiter(unsigned(8), 3), StreamRouter(unsigned(8), 3)
    top = Module()
    top.submodules.merge, top.submodules.split = merge, split
    connect(top, merge.o, split.i)
    received = [[], [], []]

    def writer(index):
        async def write(ctx):
            await put(ctx, merge.i[index], range(64 * index, 64 * index + 30), pauses(10 * seed + index, 0.3))

        return write

    def reader(index):
        async def read(ctx):
            await get(ctx, split.o[index], 30, pauses(20 * seed + index, 0.3), received[index])

        return read

    async def watch(ctx):
        await assert_stable(ctx, merge.o)

    simulate(top, *map(writer, range(3)), *map(reader, range(3)), monitors=[watch])
    assert received == [list(range(64 * index, 64 * index + 30)) for index in range(3)]


def test_round_robin_serves_standing_requests_in_turn():
    dut, grants = RoundRobin(4), []

    async def run(ctx):
        ctx.set(dut.requests, 0b1011)
        ctx.set(dut.advance, 1)
        for _ in range(6):
            grants.append(ctx.get(dut.grant))
            await ctx.tick()

    simulate(dut, run)
    assert grants == [1, 2, 8, 1, 2, 8]


@pytest.mark.usefixtures("unfinished_blocks")
def test_connect_refuses_what_amaranth_accepts():
    packed = data.StructLayout({"a": 4, "b": 4})
    for left, right in ((unsigned(8), signed(8)), (packed, 8), (packed, data.StructLayout({"b": 4, "a": 4}))):
        producer, consumer = SkidBuffer(left), SkidBuffer(right)
        with pytest.raises(
            wiring.ConnectionError, match="Connected ports have one shape, but payload is .* and"
        ):
            connect(Module(), producer.o, consumer.i)


@pytest.mark.usefixtures("unfinished_blocks")
def test_connect_takes_one_shape_written_two_ways():
    class Pair(data.Struct):
        a: 4
        b: unsigned(4)

    producer, consumer = SkidBuffer(Pair), SkidBuffer(data.StructLayout({"a": unsigned(4), "b": 4}))
    top = Module()
    connect(top, producer.o, consumer.i)


@pytest.mark.usefixtures("unfinished_blocks")
def test_connect_refuses_a_second_consumer():
    producer, first, second = SkidBuffer(8), SkidBuffer(8), SkidBuffer(8)
    top = Module()
    connect(top, producer.o, first.i)
    with pytest.raises(wiring.ConnectionError, match="An input has one driver, but ready .* through Fork"):
        connect(top, producer.o, second.i)


@pytest.mark.usefixtures("unfinished_blocks")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StreamFIFO(8, 1), "Depth of a full-rate lut FIFO must be an integer of at least 2, not 1"),
        (
            lambda: StreamFIFO(8, 2, kind="block"),
            "full-rate block FIFO must be an integer of at least 3, not 2",
        ),
        (lambda: StreamFIFO(8, 4, kind="fast"), "FIFO kind must be 'lut' or 'block', not 'fast'"),
        (lambda: StreamFIFO(8, 1024), "LUT RAM, which is at most 512 deep, but the memory is 1024 x 8 bit"),
        (lambda: Fork(8, 1), "consumers of a fork must be an integer of at least 2, not 1"),
        (lambda: Join(8, 0), "producers of a join must be an integer of at least 1, not 0"),
        (lambda: GearUp(8, 1), "Gearbox ratio must be an integer of at least 2, not 1"),
        (lambda: GearDown(8, 2.5), "Gearbox ratio must be an integer of at least 2, not 2.5"),
        (lambda: RoundRobin(0), "Number of requesters must be an integer of at least 1, not 0"),
        (lambda: StreamArbiter(8, 1), "inputs of an arbiter must be an integer of at least 2, not 1"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
