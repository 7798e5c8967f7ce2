"""The vector unit as a whole: every instruction over its buffers against plain integers."""

import random
from dataclasses import replace

import pytest

from golden.spec.engine import TINY, Error, Op
from hw.lib import arith
from tests.hw.sfu import reference as ref
from tests.hw.sfu.bench import RESET, Machine, instruction
from tests.hw.sfu.scenarios import Case

OPS = (Op.NORM, Op.QUANT, Op.ROPE, Op.GATE, Op.ADD, Op.SOFTMAX, Op.KVQUANT)
WIDE = replace(TINY, name="wide", lanes_per_channel=8, vector_lanes=16)
CONFIGS = {8: TINY, 16: WIDE}


def check(ops: list[Op], seed: int, lanes: int, stall: float) -> None:
    """Random instructions of these kinds, one after the other on one machine, each compared before the next."""
    rng = random.Random(f"{ops} {seed}")
    machine = Machine(CONFIGS[lanes], seed=seed, stall=stall)

    def steps():
        for op in ops:
            case = Case(op, rng, lanes)
            machine.load(0, [rng.randint(-(1 << 31), (1 << 31) - 1) for _ in range(len(machine.vb))])
            yield case.prepare(machine)
            yield lambda case=case: case.check(machine)

    machine.run(steps())
    assert machine.error == 0
    assert len(machine.cycles) == len(ops)


def test_each_instruction_equals_plain_integers():
    check([op for op in OPS for _ in range(8)], seed=0, lanes=8, stall=0.0)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_mixed_instructions_under_stalls_of_every_port(seed):
    check(random.Random(seed).sample(OPS * 2, 14), seed, lanes=8, stall=0.4)


@pytest.mark.slow
def test_twice_the_lanes_give_the_same_bits():
    check(random.Random(7).sample(OPS * 2, 12), seed=7, lanes=16, stall=0.2)


def fresh_pairs(rng, lanes: int):
    """A writer and a reader of its result: with `fresh` the reader must do exactly what it does without."""
    n = rng.choice([32, 64])
    words = n // lanes
    common = {"count": n, "vectors": 3, "stride": words, "stride_b": words, "dst_stride": words}
    writer = instruction(rng.choice([Op.ADD, Op.GATE]), addr=0, addr_b=512, dst=1024, **common)
    reader = {
        "norm": instruction(Op.NORM, addr=1024, addr_b=1536, dst=1100, exponent=3, epsilon=99, **common),
        "quant": instruction(Op.QUANT, addr=1024, dst=0, table=5, factor=47274, exponent=18, **common),
        "rectify": instruction(Op.QUANT, addr=1024, dst=0, table=5, rectify=1, **common),
        "kvquant": instruction(Op.KVQUANT, addr=1024, bits=4, **common),
    }
    return writer, reader


@pytest.mark.parametrize(
    "name", ["norm", "quant", *(pytest.param(n, marks=pytest.mark.slow) for n in ("rectify", "kvquant"))]
)
def test_fresh_operands_give_the_same_bits_in_fewer_cycles(name):
    rng, lanes, seen = random.Random(name), 8, []
    machine = Machine(TINY, seed=3)
    machine.load(0, ref.vector(rng, 96 * lanes, "ordinary"))
    machine.load(512, ref.vector(rng, 96 * lanes, "wide"))
    machine.load(1536, [rng.randint(-32768, 32767) for _ in range(96 * lanes)])
    writer, readers = fresh_pairs(rng, lanes)

    def snapshot():
        seen.append((machine.read(1100, 192), dict(machine.groups), dict(machine.table), list(machine.kv)))
        machine.groups.clear()
        machine.table.clear()
        machine.kv.clear()

    reader = readers[name] | ({"dst_stride": 2} if name in ("quant", "rectify") else {})
    half = writer | {"count": writer["count"] // 2}
    rest = {name: half[name] + half["count"] // lanes for name in ("addr", "addr_b", "dst")}
    pieces = [half, half | rest | {"fresh": 1}]
    machine.run([writer, reader, snapshot, writer, reader | {"fresh": 1}, snapshot])
    machine.run([*pieces, reader | {"fresh": 1}, snapshot])
    assert seen[0] == seen[1] == seen[2]
    assert machine.cycles[3] < machine.cycles[1]


ILLEGAL = [
    (instruction(Op.MATRIX, count=32), Error.ILLEGAL_INSTRUCTION),
    (instruction(0xEE, count=32), Error.ILLEGAL_INSTRUCTION),
    (instruction(Op.ADD, count=0), Error.SHAPE),
    (instruction(Op.ADD, count=32, vectors=0), Error.SHAPE),
    (instruction(Op.ROPE, count=33), Error.SHAPE),
    (instruction(Op.KVQUANT, count=40, bits=4), Error.SHAPE),
    (instruction(Op.KVQUANT, count=32, bits=5), Error.SHAPE),
    (instruction(Op.SOFTMAX, count=32, vec_group=0), Error.SHAPE),
    (instruction(Op.ADD, count=32, addr=2046), Error.ADDRESS),
    (instruction(Op.ADD, count=32, addr_b=2045), Error.ADDRESS),
    (instruction(Op.ADD, count=32, dst=(1 << 20) - 1), Error.ADDRESS),
    (instruction(Op.ADD, count=32, vectors=255, stride=65535), Error.ADDRESS),
    (instruction(Op.QUANT, count=32, dst=512), Error.ADDRESS),
    (instruction(Op.QUANT, count=32, vectors=3, table=62), Error.ADDRESS),
]


def test_an_illegal_instruction_stops_the_unit_with_its_code_until_reset():
    machine, legal = Machine(TINY), instruction(Op.ADD, count=32)

    def steps():
        for op, error in ILLEGAL:
            yield op
            yield (
                lambda op=op, error=error: (
                    pytest.fail(f"{op}: {machine.error}") if machine.error != error else None
                )
            )
            yield lambda: machine.cycles.clear()
            yield RESET
            yield legal
            yield lambda op=op: pytest.fail(f"not usable after {op}") if len(machine.cycles) != 1 else None

    machine.run(steps(), limit=2000)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_reset_in_the_middle_of_an_instruction_leaves_nothing_behind(seed):
    rng = random.Random(seed)
    machine = Machine(TINY, seed=seed, stall=0.3)

    def steps():
        for _ in range(8):
            broken = Case(rng.choice(OPS), rng, 8).prepare(machine)
            yield broken | {"cut": rng.randint(3, 90)}
            yield RESET
            yield lambda: (machine.groups.clear(), machine.table.clear(), machine.kv.clear())
            case = Case(rng.choice(OPS), rng, 8)
            yield case.prepare(machine)
            yield lambda case=case: case.check(machine)

    machine.run(steps())
    assert machine.error == 0


def _round_down(monkeypatch):
    monkeypatch.setattr(arith, "round_half", lambda y: y >> 1)


def _no_saturation(monkeypatch):
    monkeypatch.setattr(arith, "saturate", lambda x, bits: arith.resize(x, bits))


@pytest.mark.parametrize(
    ("mutate", "op"),
    [
        (_round_down, Op.QUANT),
        (_round_down, Op.NORM),
        (_round_down, Op.SOFTMAX),
        (_no_saturation, Op.KVQUANT),
        (_no_saturation, Op.ADD),
    ],
)
def test_mutations_turn_the_comparison_red(mutate, op, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=op.name):
        check([op] * 16, seed=0, lanes=8, stall=0.0)
