"""What enters the vector unit besides one instruction at a time: SOFTMAX behind SOFTMAX, and results of the drain."""

import random

import pytest

from golden.spec.engine import SMALL, TINY, Op
from hw.engine.sfu.unit import SETTLE_WORDS
from sw_stack.compile.cycles import Softmaxes
from tests.hw.sfu.bench import Machine, instruction


class Queue(Machine):
    """A machine whose instructions are offered all the time: `taken` and `finished` hold cycles."""

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.taken, self.finished = [], []

    async def _issue(self, ctx, op, limit):
        """Offer `op`, a list of instructions, and wait until all are done."""
        port, left = self.dut.unit, list(op["all"])
        while len(self.finished) < len(op["all"]):
            ctx.set(port.op.valid, bool(left))
            if left:
                ctx.set(port.op.payload, left[0])
            ready, done = ctx.get(port.op.ready), ctx.get(port.done)
            if left and ready:
                self.taken.append(self.now)
                left.pop(0)
            if done:
                self.finished.append(self.now)
            assert self.now < limit
            await ctx.tick()
            self.now += 1

    now = 0


def softmaxes(lanes, shapes, export=0):
    """SOFTMAXes over scores from word 0 and V records from word 512 on; every result in a place of its own."""
    ops, group, table, state = [], 0, 0, 1500
    for count, vectors in shapes:
        tiles, words = -(-count // 32), -(-count // lanes)
        ops.append(
            instruction(
                Op.SOFTMAX, count=count, vectors=vectors, stride=words, addr_b=512, dst=group, dst_stride=tiles,
                table=table, vec_group=1, high=65000, export=export, state=state,
            )
        )  # fmt: skip
        group, table, state = group + tiles * vectors, table + vectors, state + vectors
    return ops


def filled(machine):
    rng = random.Random(3)
    machine.load(0, [rng.randrange(-(1 << 20), 1 << 20) for _ in range(512 * machine.lanes)])
    records = [rng.randrange(0x3000, 0x3C00) | rng.randrange(0xB000, 0xBC00) << 16 for _ in range(8192)]
    machine.load(512, records[: 512 * machine.lanes])
    return machine


SHAPES = [(64, 1), (40, 3), (64, 2), (8, 5), (33, 1), (96, 2)]


@pytest.mark.parametrize(
    ("config", "stall"),
    [(TINY, 0.0), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((TINY, 0.4), (SMALL, 0.0)))],
)
def test_softmaxes_behind_each_other_leave_what_they_leave_alone(config, stall):
    ops = softmaxes(config.vector_lanes, SHAPES)
    alone = filled(Machine(config))
    alone.run(ops)
    queue = filled(Queue(config, stall=stall, seed=5))
    queue.run([{"all": ops}])
    assert (queue.groups, queue.table) == (alone.groups, alone.table)
    assert len(queue.table) == sum(vectors for _, vectors in SHAPES)
    if not stall:
        model, predicted = Softmaxes(config.vector_lanes), []
        for start, (count, vectors) in zip(queue.taken, SHAPES):
            predicted.append(model.run(start, count, vectors))
        assert queue.finished == predicted
        assert queue.taken[1] < queue.finished[0], "the second SOFTMAX did not overlap the first"


def test_the_next_softmax_is_taken_as_soon_as_predicted():
    queue = filled(Queue(TINY))
    shapes = [(64, 1)] * 4
    queue.run([{"all": softmaxes(TINY.vector_lanes, shapes)}])
    model, start = Softmaxes(TINY.vector_lanes), queue.taken[0]
    for taken, (count, vectors) in zip(queue.taken, shapes):
        assert taken == start
        model.run(start, count, vectors)
        start = model.next


def test_whatever_exports_or_is_no_softmax_waits_for_the_softmax_before():
    for ops in (
        softmaxes(8, [(64, 1)] * 2, export=1),
        [*softmaxes(8, [(64, 1)]), instruction(Op.ADD, count=8)],
    ):
        queue = filled(Queue(TINY))
        queue.run([{"all": ops}])
        assert queue.taken[1] > queue.finished[0]


class Collecting(Machine):
    """Offers words of a product's drain to the unit before an instruction."""

    async def _issue(self, ctx, op, limit):
        port = self.dut.collected
        for index, (values, last, joins) in enumerate(op.pop("collected", [])):
            ctx.set(port.en, 1)
            ctx.set(port.data, sum((v & 0xFFFFFFFF) << 32 * k for k, v in enumerate(values)))
            ctx.set(port.last, last)
            ctx.set(port.joins, joins)
            await ctx.tick()
            if index % 3 == 2:
                ctx.set(port.en, 0)
                await ctx.tick()
        ctx.set(port.en, 0)
        await ctx.tick().repeat(op.pop("pause", SETTLE_WORDS))
        await super()._issue(ctx, op, limit)


@pytest.mark.parametrize("pause", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 9))])
def test_extremes_of_collected_words_are_those_of_the_vector(pause):
    """Three row blocks of four words each, the later ones joined; then the fresh quantisation of what they wrote."""
    rng, lanes = random.Random(pause), TINY.vector_lanes
    values = [rng.randrange(-(1 << 24), 1 << 24) for _ in range(12 * lanes)]
    values[5 * lanes + 3], values[-1] = 1 << 27, -(1 << 26)
    words = [values[k : k + lanes] for k in range(0, len(values), lanes)]
    before = [([1 << 30] * lanes, 1, 0)]
    collected = [(word, k % 4 == 3, int(k > 3)) for k, word in enumerate(words)]
    quant = instruction(Op.QUANT, count=len(values), dst=4, table=2)
    machines = Machine(TINY), Collecting(TINY)
    for machine, op in zip(
        machines, (quant, {**quant, "fresh": 1, "collected": before + collected, "pause": pause})
    ):
        machine.load(0, values)
        machine.run([op])
    assert (machines[0].groups, machines[0].table) == (machines[1].groups, machines[1].table)
    assert len(machines[0].groups) == 3
