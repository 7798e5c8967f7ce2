"""The array's sequencer: accumulator banks by number of vectors, and products that follow their codes."""

import random

import pytest
from amaranth.lib import data
from amaranth.sim import Simulator

from golden.spec.engine import TINY, Codes
from hw.engine.interfaces import MatrixOp
from hw.engine.lane import BANKS, accumulator_banks, narrow
from hw.engine.matrix import Issue
from hw.lib.testing import CLOCK_SECONDS


def operation(**fields):
    values = {"codes": int(Codes.U4), "blocks": 1, "steps": 1, "vectors": 1, "group_steps": 1, **fields}
    return dict.fromkeys((name for name, _ in data.Layout.cast(MatrixOp)), 0) | values


def run(ops, seed=0, drain=0.3, coded=(), limit=4000):
    """Fires as (cycle, slot), and (operation, blocks not drained yet) where a row block begins; `coded`: counts per
    cycle."""
    dut, rng = Issue(TINY), random.Random(seed)
    fires, begun, pending = [], [], 0
    total = sum(op["blocks"] * op["steps"] * op["vectors"] for op in ops)

    async def bench(ctx):
        nonlocal pending
        left, number = list(ops), -1
        steps = 0
        ctx.set(dut.final.ready, 1)
        for cycle in range(limit):
            ctx.set(dut.op.valid, bool(left))
            if left:
                ctx.set(dut.op.payload, left[0])
            ctx.set(dut.step.valid, rng.random() < 0.8)
            frees = pending > 0 and rng.random() < drain
            ctx.set(dut.free, frees)
            ctx.set(dut.counted, coded[cycle] if cycle < len(coded) else 0)
            if ctx.get(dut.fire):
                fires.append((cycle, ctx.get(dut.slot)))
                if steps % (ops[number]["steps"] * ops[number]["vectors"]) == 0:
                    begun.append((number, pending))
                    pending += 1
                steps += 1
            pending -= frees
            if left and ctx.get(dut.op.ready):
                left.pop(0)
                number, steps = number + 1, 0
            await ctx.tick()
            if len(fires) == total:
                return
        raise AssertionError(f"{len(fires)} of {total} steps in {limit} cycles")

    simulator = Simulator(dut)
    simulator.add_clock(CLOCK_SECONDS)
    simulator.add_testbench(bench)
    simulator.run()
    return fires, begun


@pytest.mark.parametrize("vectors", [1, narrow(TINY.tokens), narrow(TINY.tokens) + 1, TINY.tokens])
def test_an_operation_uses_all_its_banks_and_no_more(vectors):
    fires, begun = run([operation(blocks=20, steps=2, vectors=vectors)], drain=0.02)
    assert max(pending for _, pending in begun) == accumulator_banks(TINY, vectors) - 1
    slots = {slot for _, slot in fires}
    assert len(slots) == vectors * accumulator_banks(TINY, vectors)
    assert max(slots) < BANKS * TINY.tokens


def test_operations_with_other_banks_do_not_meet_in_the_accumulators():
    """Before the first block of an operation with another number of banks, every block before it is drained."""
    wide, few = operation(blocks=3, steps=2, vectors=16), operation(blocks=9, steps=1, vectors=2)
    for seed in range(3):
        _, begun = run([few, wide, few, few, wide], seed=seed, drain=0.05)
        firsts = dict(reversed(begun))
        assert [firsts[n] for n in (1, 2, 4)] == [0, 0, 0]
        assert firsts[3] > 0, "an operation of the same kind waited for the one before"


@pytest.mark.parametrize(("codes", "groups"), [(Codes.U2, 1), (Codes.S24, 2)])
def test_a_product_that_follows_takes_each_group_after_it_was_counted(codes, groups):
    steps, rng = 12, random.Random(1)
    coded = [0] * 30
    while sum(coded) < steps * groups:
        coded.append(int(rng.random() < 0.3))
    ready = [cycle + 1 for cycle, one in enumerate(coded) if one]
    ops = [operation(codes=int(codes), blocks=2, steps=steps, follows=1), operation(steps=steps)]
    fires, _ = run(ops, coded=coded, drain=1.0)
    first = [cycle for cycle, _ in fires[:steps]]
    assert all(cycle >= ready[(step + 1) * groups - 1] for step, cycle in enumerate(first))
    assert first[0] - ready[groups - 1] < 8, "the first step waited for more than its own codes"
    # The second row block and the next operation wait for nothing: the counter is back at zero.
    assert len(fires) == 3 * steps
