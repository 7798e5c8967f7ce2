"""The closed forms of `hw.engine.sfu.timing` against cycles counted on the RTL."""

import random
import re
from pathlib import Path

import pytest

from golden.spec.engine import Op
from hw.engine.sfu.timing import Times, instruction_cycles
from tests.hw.sfu.bench import Machine, instruction
from tests.hw.sfu.test_unit import CONFIGS, OPS

SHAPES = [(8, 1), (64, 1), (64, 9), (32, 6), (8, 12), (576, 1), (256, 3), (40, 20), (32, 40), (33, 2)]


def legal(op: Op, count: int, lanes: int) -> int:
    if op is Op.KVQUANT:
        return -(-count // 32) * 32
    return count & ~1


def run(wanted: list[tuple[Op, list]], lanes: int, fresh: bool) -> tuple[list, list]:
    """Predicted and measured cycles of every operation over its shapes, one after the other on one machine."""
    machine, ops, predicted = Machine(CONFIGS[lanes]), [], []
    for op, count, vectors in ((op, *shape) for op, shapes in wanted for shape in shapes):
        count = legal(op, count, lanes)
        fields = {
            "count": count,
            "vectors": vectors,
            "fresh": fresh,
            "vec_group": 1,
            "bits": 4,
            "high": 65000,
        }
        ops.append(instruction(op, stride=1, addr_b=512, dst_stride=1, **fields))
        predicted.append(
            (op.name, lanes, count, vectors, instruction_cycles(op, lanes, count, vectors, fresh=fresh))
        )
    machine.run(ops)
    assert machine.error == 0
    return predicted, [(*p[:4], got) for p, got in zip(predicted, machine.cycles)]


@pytest.mark.parametrize("shapes", [SHAPES[:3], pytest.param(SHAPES[3:], marks=pytest.mark.slow)])
def test_cycles_of_every_instruction_are_the_closed_form(shapes):
    # GATE and ADD take ROPE's way through the unit.
    wanted = [(op, shapes[:3] if op in (Op.GATE, Op.ADD) else shapes) for op in OPS]
    predicted, measured = run(wanted, 8, fresh=False)
    assert measured == predicted


@pytest.mark.slow
def test_cycles_over_fresh_operands_are_the_closed_form():
    predicted, measured = run([(op, SHAPES) for op in (Op.NORM, Op.QUANT, Op.KVQUANT)], 8, fresh=True)
    assert measured == predicted


@pytest.mark.slow
def test_sixteen_lanes_follow_the_same_closed_form():
    shapes = [(576, 1), (64, 9), (130, 3)]
    predicted, measured = run([(Op.NORM, shapes), (Op.SOFTMAX, shapes)], 16, fresh=False)
    assert measured == predicted


def test_max_plus_sequences_equal_their_recurrence():
    rng = random.Random(0)
    for _ in range(50):
        lines = tuple((rng.randint(0, 30), rng.randint(0, 9)) for _ in range(3))
        service, arrivals = rng.randint(1, 12), Times(lines)
        start = arrivals.of(0)
        for v in range(1, 20):
            start = max(arrivals.of(v), start + service)
            assert arrivals.served(service).of(v) == start


def test_the_cycles_in_the_documentation_are_the_closed_form():
    text = (Path(__file__).parents[3] / "docs" / "sfu.md").read_text()
    rows = re.findall(r"^\| ([A-Z]+) \| (\d+) \| (\d+) \| (yes|no) \| (\d+) \|$", text, re.M)
    assert len(rows) > 10
    for name, count, vectors, fresh, cycles in rows:
        got = instruction_cycles(Op[name], 16, int(count), int(vectors), fresh=fresh == "yes")
        assert got == int(cycles), f"{name} of {vectors} x {count}"


def test_a_smollm2_layer_outside_products_and_softmax_is_within_its_budget():
    """Hidden 576, FFN 1536, 9 query and 3 KV heads of 64: every operation of a decode step, nothing hidden."""
    hidden, ffn, heads, kv_heads, size, lanes = 576, 1536, 9, 3, 64, 16
    layer = [
        *2 * [(Op.NORM, hidden, 1, False), (Op.QUANT, hidden, 1, True)],
        *[(Op.ROPE, size, heads, False), (Op.QUANT, size, heads, True)],
        *[
            (Op.ROPE, size, kv_heads, False),
            (Op.KVQUANT, size, kv_heads, True),
            (Op.KVQUANT, size, kv_heads, False),
        ],
        *[(Op.QUANT, hidden, 1, False), (Op.GATE, ffn, 1, False), (Op.QUANT, ffn, 1, True)],
    ]
    assert sum(instruction_cycles(op, lanes, n, v, fresh=fresh) for op, n, v, fresh in layer) <= 1300
