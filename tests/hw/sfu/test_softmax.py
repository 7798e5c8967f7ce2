"""The online softmax against plain integers: real-looking and extreme scores, masks, stalls, latency, reset."""

import random
import struct

import pytest

from hw.engine.sfu.softmax import Exp2, SoftmaxUnit
from hw.lib import arith
from hw.lib.testing import no_pause, pauses, put, simulate
from tests.hw.sfu import reference as ref

TILE = 32


def vector_of(rng, tiles: int) -> dict:
    n = tiles * TILE
    kind = rng.choice(["ordinary", "ordinary", "rising", "falling", "extreme", "equal"])
    z = {
        "ordinary": lambda: [int(rng.gauss(0, 4 * 65536)) for _ in range(n)],
        "rising": lambda: [k * 40000 + rng.randint(0, 65536) for k in range(n)],
        "falling": lambda: [-k * 40000 + rng.randint(0, 65536) for k in range(n)],
        "extreme": lambda: [rng.choice([-(1 << 31), (1 << 31) - 1, 0, 65536, -65536, 1]) for _ in range(n)],
        "equal": lambda: [rng.choice([0, 65536, -(1 << 31), (1 << 31) - 1])] * n,
    }[kind]()
    mask = rng.choice(["all", "all", "some", "tiles", "none"])
    live = {
        "all": lambda: [1] * n,
        "some": lambda: [rng.randint(0, 1) for _ in range(n)],
        "tiles": lambda: [bit for _ in range(tiles) for bit in [rng.randint(0, 1)] * TILE],
        "none": lambda: [0] * n,
    }[mask]()
    magnitude = rng.choice([1e-7, 0.01, 1.0, 60.0, 65504.0])
    scale = [half(rng.random() * magnitude) for _ in range(n)]
    minimum = [half(-rng.random() * magnitude * 8) for _ in range(n)]
    return {"z": z, "live": live, "scale": scale, "minimum": minimum}


def half(value: float) -> float:
    clamped = max(-65504.0, min(65504.0, value))
    return struct.unpack("<e", struct.pack("<e", clamped))[0]


def words_of(lanes: int, index: int, vector: dict) -> list[dict]:
    n, words = len(vector["z"]), []
    for at in range(0, n, lanes):
        part = slice(at, at + lanes)
        words.append(
            {
                "z": vector["z"][part],
                "scale": [ref.bits16(h) for h in vector["scale"][part]],
                "minimum": [ref.bits16(h) for h in vector["minimum"][part]],
                "live": vector["live"][part],
                "start": at == 0,
                "place": {
                    "first_tile": at < TILE,
                    "tile_last": (at + lanes) % TILE == 0,
                    "last": at + lanes == n,
                    "group": (index * 64 + at // TILE) % (1 << 17),
                    "table": index % 256,
                },
            }
        )
    return words


def signed8(bits: int) -> list[int]:
    codes = [bits >> 8 * k & 255 for k in range(TILE)]
    return [c - 256 if c > 127 else c for c in codes]


class Trace:
    """What the unit wrote, and when."""

    def __init__(self):
        self.tiles, self.finals, self.entered, self.states = {}, {}, [], []
        self.tile_cycles, self.final_cycles = [], []


def run(lanes: int, vectors: list[dict], pause=no_pause) -> Trace:
    dut, trace = SoftmaxUnit(lanes), Trace()
    words = [word for index, vector in enumerate(vectors) for word in words_of(lanes, index, vector)]

    taker = random.Random(len(words))

    async def states(ctx):
        while True:
            ctx.set(dut.state.ready, pause is no_pause or taker.random() < 0.1)
            await ctx.tick()

    async def producer(ctx):
        await put(ctx, dut.i, words, pause)
        await ctx.tick().until(dut.idle)

    async def monitor(ctx):
        cycle = 0
        async for sample in ctx.tick().sample(
            dut.i.valid,
            dut.i.ready,
            dut.act.en,
            dut.act.addr,
            dut.act.codes,
            dut.act.side,
            dut.table.en,
            dut.table.addr,
            dut.table.entry,
            dut.state.valid & dut.state.ready,
            dut.state.payload,
        ):
            valid, ready, wrote, addr, codes, side, final, table, entry, state, softmax = sample[2:]
            if state:
                trace.states.append((softmax.maximum, softmax.sum))
            if valid and ready:
                trace.entered.append(cycle)
            if wrote:
                assert addr not in trace.tiles, f"group {addr} written twice"
                sidecar = {"addend": side.addend, "shift": side.shift, "decay": side.decay}
                trace.tiles[addr] = {"codes": signed8(codes)} | sidecar
                trace.tile_cycles.append(cycle)
            if final:
                trace.finals[table] = {"pre": entry.pre, "mult": entry.mult, "post": entry.post}
                trace.final_cycles.append(cycle)
            cycle += 1

    simulate(dut, producer, monitors=[monitor, states])
    return trace


def check(lanes: int, seed: int, count: int, stall: float = 0.0) -> None:
    rng = random.Random(seed)
    vectors = [vector_of(rng, rng.choice([1, 1, 2, 3, 7])) for _ in range(count)]
    trace = run(lanes, vectors, pauses(seed, stall))
    for index, vector in enumerate(vectors):
        tiles, final, state = ref.softmax(**vector)
        for tile, want in enumerate(tiles):
            assert trace.tiles.get(index * 64 + tile) == want, f"tile {tile} of vector {index}"
        assert trace.finals[index] == final, f"output scale of vector {index}"
        assert trace.states[index] == state, f"maximum and sum of vector {index}"
    assert len(trace.tiles) == sum(len(v["z"]) // TILE for v in vectors)


@pytest.mark.parametrize("lanes", [8, 16, 32])
def test_tiles_and_output_scales_equal_plain_integers(lanes):
    check(lanes, seed=lanes, count=25)


@pytest.mark.parametrize("seed", range(2))
def test_stalls_change_no_bit(seed):
    check(8, seed=seed, count=20, stall=0.3)


@pytest.mark.parametrize("lanes", [8, 16])
def test_latencies_are_the_stated_cycles(lanes):
    vectors = [vector_of(random.Random(5), 4)]
    trace = run(lanes, vectors)
    per_tile = TILE // lanes
    ends = trace.entered[per_tile - 1 :: per_tile]
    assert [b - a for a, b in zip(ends, trace.tile_cycles)] == [SoftmaxUnit.tile_latency_of(lanes)] * 4
    assert trace.final_cycles[0] - trace.entered[-1] == SoftmaxUnit.vector_latency_of(lanes)
    assert trace.entered[-1] - trace.entered[0] == 4 * per_tile - 1


def test_exp2_over_its_fractions_and_beyond_its_range():
    dut = Exp2()
    values = [*range(0, 3 << 16, 97), *(k << 16 for k in range(40)), (1 << 33) - 1, (31 << 16) + 65535]
    seen = []

    async def bench(ctx):
        for value in [*values, *[0] * Exp2.latency]:
            ctx.set(dut.x, value)
            seen.append(ctx.get(dut.p))
            await ctx.tick()

    simulate(dut, bench)
    assert seen[Exp2.latency :] == [ref.exp2(v) for v in values]


@pytest.mark.parametrize("lanes", [2, 12, 64])
@pytest.mark.usefixtures("unfinished_blocks")
def test_lanes_that_do_not_divide_a_tile_are_refused(lanes):
    with pytest.raises(ValueError, match=f"Lanes of a softmax unit must .*not {lanes}"):
        SoftmaxUnit(lanes)


def test_mutation_in_rounding_turns_the_comparison_red(monkeypatch):
    monkeypatch.setattr(arith, "round_half", lambda y: y >> 1)
    with pytest.raises(AssertionError, match=r"tile|scale"):
        check(8, seed=8, count=4)
