"""The lane array against plain integers: every operation, corners, stalls, reset, latency."""

import random

import pytest
from amaranth import unsigned

from hw.engine.sfu import lanes as lanes_module
from hw.engine.sfu.lanes import N1_BIAS, LaneArray, LaneOp, Sigmoid
from hw.lib import arith
from hw.lib.testing import pauses, simulate, through
from tests.hw.sfu import reference as ref

LANES = 4
CORNERS = [0, 1, -1, (1 << 31) - 1, -(1 << 31), 65536, -65536, 0x55555555, (1 << 20) - 1, 1 << 20, -(1 << 20)]


def control(op: LaneOp, **fields) -> dict:
    n1 = fields.pop("n1", 0) + N1_BIAS
    return {"op": op, "m1": 0, "n1": n1, "n2": 0, "m0": 0, "wide": 0} | fields


def element(rng) -> int:
    return (
        rng.choice(CORNERS)
        if rng.random() < 0.4
        else rng.randint(-(1 << 31), (1 << 31) - 1) >> rng.randint(0, 31)
    )


def words(rng) -> tuple[list[int], list[int]]:
    return [element(rng) for _ in range(LANES)], [element(rng) for _ in range(LANES)]


def case_scale(rng):
    a, b = words(rng)
    codes, _, _ = ref.a8(a)
    amax = max(map(abs, a)) or 1
    sh = amax.bit_length() - 16
    D = -((-amax) >> sh) if sh > 0 else amax << -sh
    return a, b, control(LaneOp.SCALE, m1=(127 << 24) // D, n1=24 + sh), codes


def case_square(rng):
    a, b = words(rng)
    s = max(0, max(map(abs, a)).bit_length() - 15)
    return a, b, control(LaneOp.SQUARE, n1=s), [ref.rs(v, s) ** 2 for v in a]


def case_norm(rng):
    a, _ = words(rng)
    w, f = [rng.randint(-(1 << 15), (1 << 15) - 1) for _ in a], rng.randint(0, 20)
    _, r, n1 = ref.rms_scale(a, rng.choice([0, 1, 24_739_011]))
    expected = [ref.sat(ref.rs(ref.rs(v * r, n1) * wi, f + 6), 32) for v, wi in zip(a, w)]
    return a, w, control(LaneOp.NORM, m1=r, n1=n1, n2=f + 6), expected


def case_rope(rng):
    a, _ = words(rng)
    table = [rng.choice([16384, -16384, 0, rng.randint(-16384, 16384)]) for _ in a]
    return a, table, control(LaneOp.ROPE), ref.rope(a, table)


def case_gate(rng):
    a, b = words(rng)
    return a, b, control(LaneOp.GATE), [ref.gate(g, u) for g, u in zip(a, b)]


def case_add(rng):
    a, b = words(rng)
    return a, b, control(LaneOp.ADD), [ref.add(x, y) for x, y in zip(a, b)]


def case_kv(rng):
    a, b = words(rng)
    bits = rng.choice([4, 8])
    codes, minimum, scale = ref.kv(a, bits)
    if scale == 0:
        return a, b, control(LaneOp.KV, m0=int(minimum * 65536), wide=bits == 8), codes
    M, E = scale, 0
    while M >= 2048:
        M, E = M / 2, E + 1
    while M < 1024:
        M, E = M * 2, E - 1
    fields = {"m1": ((1 << 26) - 1) // int(M), "n1": 42 + E, "m0": int(minimum * 65536), "wide": bits == 8}
    return a, b, control(LaneOp.KV, **fields), codes


CASES = {op: globals()[f"case_{op.name.lower()}"] for op in LaneOp}


def scenario(rng, ops: list[LaneOp], count: int) -> tuple[list[dict], list[list[int]]]:
    items, expected = [], []
    for index in range(count):
        a, b, fields, y = CASES[rng.choice(ops)](rng)
        items.append({"a": a, "b": b, "control": fields, "tag": index % 256})
        expected.append(y)
    return items, expected


def check(ops, seed: int, count: int, stall: float) -> None:
    items, expected = scenario(random.Random(seed), ops, count)
    dut = LaneArray(LANES, unsigned(8))
    got = through(dut, items, pauses(seed + 1, stall), pauses(seed + 2, stall)).taken
    for index, (word, want) in enumerate(zip(got, expected)):
        assert list(word.y) == want, f"word {index}, {items[index]}"
        assert word.tag == index % 256


@pytest.mark.parametrize("op", list(LaneOp), ids=lambda op: op.name.lower())
def test_each_operation_equals_plain_integers(op):
    check([op], seed=op.value, count=120, stall=0.0)


@pytest.mark.parametrize("seed", range(3))
def test_mixed_operations_under_stalls_keep_order_and_tags(seed):
    check(list(LaneOp), seed=100 + seed, count=150, stall=0.35)


def test_latency_and_rate_are_the_stated_cycles():
    items, _ = scenario(random.Random(0), list(LaneOp), 20)
    _, entered, left = through(LaneArray(LANES, unsigned(8)), items)
    assert [b - a for a, b in zip(entered, left)] == [LaneArray.latency] * len(items)
    assert [b - a for a, b in zip(left, left[1:])] == [1] * (len(items) - 1)


def test_sigmoid_over_its_whole_table_and_beyond():
    dut, values = Sigmoid(), [*range(-(17 << 16), 17 << 16, 1021), *CORNERS]
    seen = []

    async def bench(ctx):
        for value in [*values, *[0] * Sigmoid.latency]:
            ctx.set(dut.a, value)
            seen.append(ctx.get(dut.sg))
            await ctx.tick()

    simulate(dut, bench)
    assert seen[Sigmoid.latency :] == [ref.sigmoid(v) for v in values]


@pytest.mark.parametrize("lanes", [0, 3, True])
@pytest.mark.usefixtures("unfinished_blocks")
def test_an_odd_or_empty_array_is_refused(lanes):
    with pytest.raises(ValueError, match=f"Lanes of a lane array must be .*not {lanes}"):
        LaneArray(lanes, unsigned(1))


def _mutate_rounding(monkeypatch):
    monkeypatch.setattr(arith, "round_half", lambda y: y >> 1)


def _mutate_saturation(monkeypatch):
    monkeypatch.setattr(arith, "saturate", lambda x, bits: arith.resize(x, bits))


def _mutate_clamp(monkeypatch):
    monkeypatch.setattr(lanes_module, "_clamp_code", lambda x, wide: x)


@pytest.mark.parametrize(
    ("mutate", "op"),
    [
        (_mutate_rounding, LaneOp.GATE),
        (_mutate_rounding, LaneOp.ROPE),
        (_mutate_saturation, LaneOp.ADD),
        (_mutate_clamp, LaneOp.KV),
    ],
)
def test_mutations_turn_the_comparison_red(mutate, op, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="word"):
        check([op], seed=op.value, count=120, stall=0.0)
