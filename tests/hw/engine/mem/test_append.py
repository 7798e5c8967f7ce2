"""The APPEND unit against `KVLayout`: every bit where the layout says and no other, at any latency."""

import random

import pytest

from golden.spec.engine import SMALL, TINY, EngineConfig, Error, KVLayout
from golden.spec.memory import MemoryModel
from hw.engine.mem.append import AppendUnit
from hw.lib.testing import no_pause, pauses, put, simulate
from tests.hw.engine.mem.agents import answer_reads, answer_writes, random_channel

SIZE = 1 << 16
EIGHT = EngineConfig("eight", 4, 8, 16, 16, 256, 2048, 64, 32)
MODELS = [MemoryModel("fixed", 2), MemoryModel("random", 25, stall_percent=30), MemoryModel("hbm")]
SLOTS = 128


def set_bits(memory: bytearray, bit: int, width: int, value: int) -> None:
    number = int.from_bytes(memory, "little")
    mask = ((1 << width) - 1) << bit
    memory[:] = ((number & ~mask) | value << bit).to_bytes(len(memory), "little")


class Case:
    """Random vectors for one op, the memories before, and what they must hold after."""

    def __init__(self, config, bits, head_size, values, slot, count, row=0, seed=1, turn=0):
        source = random.Random(seed)
        self.config, self.layout = config, KVLayout(config, bits, head_size, SLOTS)
        self.vectors = [[source.randrange(1 << bits) for _ in range(head_size)] for _ in range(count)]
        self.records = [(source.getrandbits(16), source.getrandbits(16)) for _ in range(count)]
        self.op = {
            "values": int(values), "addr": slot, "count": count, "bits": bits, "head_size": head_size, "base": 5,
            "block_words": self.layout.value_block_words, "row": row, "scale_base": 0x1000, "turn": turn,
        }  # fmt: skip

    def beats(self):
        lanes = self.config.vector_lanes
        for codes, (scale, minimum) in zip(self.vectors, self.records):
            for at in range(0, len(codes), lanes):
                yield {
                    "codes": codes[at : at + lanes],
                    "scale": scale,
                    "minimum": minimum,
                    "last": at + lanes == len(codes),
                }

    def expect(self, channels: list[bytes], aux: bytes) -> tuple[list[bytes], bytes]:
        after, aux = [bytearray(c) for c in channels], bytearray(aux)
        words: dict[tuple[int, int], bytearray] = {}

        def change(position, width, value):
            channel, word, bit = position
            at = (channel, (self.op["base"] + word) * 64)
            if at not in words:
                words[at] = after[channel][at[1] : at[1] + 64]
            set_bits(words[at], bit, width, value)

        for n, (codes, (scale, minimum)) in enumerate(zip(self.vectors, self.records)):
            slot = self.op["addr"] + n
            record = scale | minimum << 16
            if self.op["values"]:
                aux[0x1000 + 4 * slot : 0x1000 + 4 * slot + 4] = record.to_bytes(4, "little")
            else:
                change(self.layout.key_scale_position(slot, self.op["turn"]), 32, record)
            for element, code in enumerate(codes):
                for plane in range(self.op["bits"] // 2):
                    crumb = code >> 2 * plane & 3
                    if self.op["values"]:
                        position = self.layout.value_code_position(slot, self.op["row"] + element, plane)
                    else:
                        position = self.layout.key_code_position(slot, element, plane, self.op["turn"])
                    change(position, 2, crumb)
        for (channel, at), word in words.items():
            after[channel][at : at + 64] = word
        return [bytes(c) for c in after], bytes(aux)


def offer(dut, beats):
    """Background bench: offers the beats one after the other for as long as the run lasts."""
    waiting = list(beats)

    async def run(ctx):
        ctx.set(dut.kv.payload, waiting.pop(0))
        ctx.set(dut.kv.valid, 1)
        async for _, _, taken in ctx.tick().sample(dut.kv.ready & dut.kv.valid):
            if taken and waiting:
                ctx.set(dut.kv.payload, waiting.pop(0))
            elif taken:
                ctx.set(dut.kv.valid, 0)

    return run


def build(config, model):
    dut = AppendUnit(config, channel_bytes=SIZE)
    channels = [random_channel(model, SIZE, 10 + n, n) for n in range(config.channels)]
    aux = random_channel(model, SIZE, 99)
    agents = [answer_reads(dut.axi_read[n], c) for n, c in enumerate(channels)]
    agents += [answer_writes(dut.axi_write[n], c) for n, c in enumerate(channels)]
    return dut, channels, aux, [*agents, answer_writes(dut.aux_write, aux)]


def run(config, model, cases, pause=no_pause):
    dut, channels, aux, agents = build(config, model)
    want = [bytes(c.contents) for c in channels], bytes(aux.contents)
    for case in cases:
        want = case.expect(*want)
    done = []

    async def feed(ctx):
        await put(ctx, dut.kv, [beat for case in cases for beat in case.beats()], pause)

    async def command(ctx):
        await put(ctx, dut.unit.op, [case.op for case in cases])
        for _ in range(20_000):
            await ctx.tick()
            assert ctx.get(dut.unit.error) == Error.NONE
            if len(done) == len(cases):
                break
        # Nothing is under way after the last done: the memories are final.
        assert [bytes(c.contents) for c in channels] == want[0]
        assert bytes(aux.contents) == want[1]

    async def count(ctx):
        async for _, _, pulse in ctx.tick().sample(dut.unit.done):
            done.extend([1] * pulse)

    simulate(dut, feed, command, monitors=[*agents, count])
    assert len(done) == len(cases)
    assert [c.violation for c in (*channels, aux)] == [None] * (len(channels) + 1)


@pytest.mark.parametrize(
    "config", [TINY, EIGHT, pytest.param(SMALL, marks=pytest.mark.slow)], ids=lambda c: c.name
)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_size", [32, 64])
def test_keys_lie_where_the_layout_says(config, bits, head_size):
    cases = [
        Case(config, bits, head_size, False, slot, n, seed=slot, turn=turn % config.turns)
        for turn, (slot, n) in enumerate(((0, 3), (37, 1), (37, 1), (127, 1)))
    ]
    run(config, MODELS[0], cases)


@pytest.mark.parametrize(
    "config", [TINY, EIGHT, pytest.param(SMALL, marks=pytest.mark.slow)], ids=lambda c: c.name
)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_size", [32, 64])
def test_values_change_only_their_bits(config, bits, head_size):
    row = config.lanes - head_size if config.lanes > head_size else 0
    cases = [Case(config, bits, head_size, True, slot, n, row, seed=slot) for slot, n in ((30, 4), (101, 1))]
    run(config, MODELS[0], cases)


@pytest.mark.parametrize("model", MODELS[1:], ids=lambda m: m.mode)
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_any_latency_gives_the_same_bytes(model, values, seed):
    cases = [Case(EIGHT, 4, 64, values, 60 + n, 3, seed=10 * seed + n) for n in range(2)]
    run(EIGHT, model, cases, pauses(seed, 0.3))


@pytest.mark.parametrize(("bits", "head_size", "count"), [(4, 64, 1), (8, 32, 3)])
def test_keys_take_the_stated_cycles(bits, head_size, count):
    latency = 6
    dut, _, _, agents = build(TINY, MemoryModel("fixed", latency))
    case, cycles = Case(TINY, bits, head_size, False, 3, count), []

    async def feed(ctx):
        await put(ctx, dut.kv, case.beats())

    async def command(ctx):
        await put(ctx, dut.unit.op, [case.op])
        passed = 1
        while not ctx.get(dut.unit.done):
            await ctx.tick()
            passed += 1
        cycles.append(passed)

    simulate(dut, feed, command, monitors=agents)
    assert cycles == [dut.key_cycles(head_size, bits, count, latency)]


@pytest.mark.parametrize(
    ("change", "model", "error"),
    [
        ({"bits": 5}, {}, Error.SHAPE),
        ({"head_size": 40}, {}, Error.SHAPE),
        ({"head_size": 0}, {}, Error.SHAPE),
        ({"head_size": 288}, {}, Error.SHAPE),
        ({"count": 0}, {}, Error.SHAPE),
        ({"head_size": 32}, {}, Error.SHAPE),
        ({"values": 1, "row": 3}, {}, Error.SHAPE),
        ({"turn": 1}, {}, Error.SHAPE),
        ({"values": 1, "scale_base": 6}, {}, Error.ADDRESS),
        ({"base": 1 << 20}, {}, Error.ADDRESS),
        ({"values": 1, "base": SIZE // 64 - 1}, {}, Error.ADDRESS),
        ({}, {"error_address": 5 * 64}, Error.BUS),
        ({"values": 1}, {"error_address": 5 * 64, "error_response": 3}, Error.BUS),
    ],
)
def test_a_bad_op_stops_with_its_code_and_drains(change, model, error):
    dut, channels, aux, agents = build(TINY, MemoryModel("fixed", 5, **model))
    case = Case(TINY, 4, 64, bool(change.get("values")), 3, 1)

    async def bench(ctx):
        await put(ctx, dut.unit.op, [case.op | change])
        await ctx.tick().repeat(400)
        assert ctx.get(dut.unit.error) == error
        assert not ctx.get(dut.unit.op.ready)
        assert not ctx.get(dut.kv.ready)
        ctx.set(dut.abort, 1)
        await ctx.tick()
        assert ctx.get(dut.idle)
        assert ctx.get(dut.unit.error) == error

    simulate(dut, bench, monitors=[*agents, offer(dut, case.beats())])
    assert all(channel.idle for channel in (*channels, aux))


@pytest.mark.parametrize("after", [2, 12, 25, 33, 60])
def test_an_abort_finishes_the_bus_and_leaves_other_bytes_alone(after):
    dut, channels, aux, agents = build(TINY, MODELS[1])
    case = Case(TINY, 4, 64, True, 3, 2)
    before = [bytes(c.contents) for c in channels]
    touched = case.expect(before, bytes(aux.contents))[0]

    async def bench(ctx):
        await put(ctx, dut.unit.op, [case.op])
        await ctx.tick().repeat(after)
        ctx.set(dut.abort, 1)
        for _ in range(300):
            await ctx.tick()
            if ctx.get(dut.idle):
                break
        assert ctx.get(dut.idle)
        await ctx.tick()  # the agents see the last transfer at this edge
        assert all(channel.idle for channel in channels)

    simulate(dut, bench, monitors=[*agents, offer(dut, case.beats())])
    for channel, old, new in zip(channels, before, touched):
        assert all(now in (o, n) for now, o, n in zip(channel.contents, old, new))


@pytest.mark.usefixtures("unfinished_blocks")
def test_a_configuration_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="Appending needs a power of two of lanes, not 24"):
        AppendUnit(EngineConfig("odd", 3, 8, 8, 16, 256, 2048, 64, 32))
    with pytest.raises(ValueError, match="A channel holds whole words up to .* not 100"):
        AppendUnit(TINY, channel_bytes=100)
