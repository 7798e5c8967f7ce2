"""What one query of a kernel owns: its operands, dot-product unit, softmax, and accumulators.

All lanes of a kernel run in lockstep on the same beats; the kernel sends them one set of control signals. Control
signals are named by when they act, in cycles after the beat left the kernel's input register ("time").
"""

from amaranth import Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from golden.spec.storage import BEAT_ELEMENTS, L_BITS, MAXIMUM_BITS, SCALE_BITS
from hw.storage.fp import (
    SCORE_FLAGS,
    UNPACK_LATENCY,
    UNPACKED,
    Add32,
    Scale32,
    Score,
    Unpack16,
    _registered,
    pipe,
)
from hw.storage.gemv import LANES_32, OPERANDS, BeatTree, DotUnit
from hw.storage.softmax import RING, SoftmaxLane

OPERAND_TIME = UNPACK_LATENCY
"""When both operands enter the multipliers."""
PRODUCT_TIME = OPERAND_TIME + DotUnit.product_latency
LANES_TIME = OPERAND_TIME + DotUnit.lanes_latency
DOT_TIME = OPERAND_TIME + DotUnit.dot_latency
TOTAL_TIME = OPERAND_TIME + DotUnit.total_latency
RESCALE_TIME = DOT_TIME - Scale32.latency
DRAIN_TIME = 2
"""When an approximate sum enters the score unit."""
CHANNEL_ROWS = 64
"""Beats of the longest row of a channel page (m = 2)."""
MAX_HEAD = 128
P_STORE_LATENCY = Unpack16.latency + 1
"""From a probability of the softmax to its place among the operands."""


def score_time(wide: bool) -> int:
    """When the score of a token, exact step, enters the softmax, counted from the token's last beat."""
    return DOT_TIME + BeatTree.latency(wide) + Score.latency


APPROXIMATE_SCORE_TIME = DRAIN_TIME + Score.latency

CONTROL = data.StructLayout(
    {
        "wide": 1,  # head size 128; constant in a head
        "approximate": 1,  # scores come from the accumulators; constant in a head
        "start": 1,
        "slice_0": 3,  # operand slice of q
        "element_1": 4,  # element of the slice that is broadcast
        "bank_0": range(RING),  # group of probabilities
        "source_1": 2,  # SOURCE_*
        "spread_2": 1,
        "load_slice_2": 3,
        "tree_valid": 1,  # at DOT_TIME
        "tree_beat": 3,
        "row_read": 6,  # accumulator row, one cycle before its use
        "row_fresh": 1,  # at PRODUCT_TIME: the accumulator counts as zero
        "row_write": 6,  # at LANES_TIME
        "row_write_en": 1,
        "drain_element": 4,  # at DRAIN_TIME - 1
        "score_valid": 1,
        "score_slot": 4,
        "score_last": 1,
        "bank_rescale": range(RING),  # one cycle before RESCALE_TIME
        "output_read": 7,  # one cycle before RESCALE_TIME; or the normaliser's address
        "output_fresh": 1,  # at RESCALE_TIME
        "output_write": 7,  # at TOTAL_TIME
        "output_write_en": 1,
    }
)
SOURCE_QUERY, SOURCE_PROBABILITY, SOURCE_CHANNEL = range(3)

PROBABILITY = data.StructLayout(
    {"valid": 1, "last": 1, "slot": 4, "p": 16, "maximum": signed(MAXIMUM_BITS), "bank": range(RING)}
)


class QueryLane(wiring.Component):
    """Ports: `control`; `b`, the beat's unpacked elements at OPERAND_TIME; `load`, write `b` into q (time 2);
    `c`, `frac`, the score's scale; `score`, what entered the softmax; `probability`, what left it; `sum`, `poisoned`;
    `o`, the output accumulator at `output_read`, one cycle later."""

    control: In(CONTROL)
    b: In(OPERANDS)
    load: In(1)
    c: In(SCALE_BITS)
    frac: In(5)
    score: Out(SCORE_FLAGS)
    probability: Out(PROBABILITY)
    sum: Out(unsigned(L_BITS))
    poisoned: Out(1)
    o: Out(32)

    def elaborate(self, platform):
        m = Module()
        control = self.control
        m.submodules.dot = dot = DotUnit()
        m.submodules.tree = tree = BeatTree()
        m.submodules.scorer = scorer = Score()
        m.submodules.softmax = softmax = SoftmaxLane()
        m.d.comb += [dot.b.eq(self.b), dot.spread.eq(control.spread_2)]
        self._operand(m, dot, softmax)

        # --- scores: from the tree over beats, or from the accumulators of the approximate step
        approximate = self._accumulate(m, dot)
        m.d.comb += [
            tree.i.eq(dot.dot),
            tree.valid.eq(control.tree_valid),
            tree.beat.eq(control.tree_beat),
            tree.wide.eq(control.wide),
            scorer.s.eq(Mux(control.approximate, approximate, tree.o)),
            scorer.c.eq(self.c),
            scorer.frac.eq(self.frac),
            softmax.start.eq(control.start),
            softmax.score.eq(scorer.o),
            softmax.valid.eq(control.score_valid),
            softmax.slot.eq(control.score_slot),
            softmax.last.eq(control.score_last),
            self.score.eq(scorer.o),
            self.sum.eq(softmax.sum),
            self.poisoned.eq(softmax.poisoned),
            self.probability.valid.eq(softmax.p_valid),
            self.probability.last.eq(softmax.p_valid & softmax.p_last),
            self.probability.slot.eq(softmax.p_slot),
            self.probability.p.eq(softmax.p),
            self.probability.maximum.eq(softmax.maximum),
            self.probability.bank.eq(softmax.p_bank),
        ]
        self._outputs(m, dot, softmax)
        return m

    def _operand(self, m, dot, softmax):
        """Operand a: a slice of q, one broadcast element of it, or the probabilities of a group."""
        control = self.control
        depth = MAX_HEAD // BEAT_ELEMENTS
        m.submodules.q = q = Memory(shape=OPERANDS, depth=depth, init=[], attrs={"ram_style": "distributed"})
        write, read = q.write_port(), q.read_port()
        m.submodules.p = p = Memory(shape=OPERANDS, depth=RING, init=[], attrs={"ram_style": "distributed"})
        p_write, p_read = p.write_port(granularity=1), p.read_port()
        m.submodules.unpack = unpack = Unpack16()
        place = pipe(m, Cat(softmax.p_valid, softmax.p_slot, softmax.p_bank), Unpack16.latency, "place")
        m.d.comb += [
            write.addr.eq(control.load_slice_2),
            write.data.eq(self.b),
            write.en.eq(self.load),
            read.addr.eq(control.slice_0),
            read.en.eq(1),
            unpack.i.eq(softmax.p),
            p_write.addr.eq(place[5:]),
            p_write.en.eq(place[0] << place[1:5]),
            p_read.addr.eq(control.bank_0),
            p_read.en.eq(1),
        ]
        m.d.comb += [p_write.data[lane].eq(unpack.o) for lane in range(BEAT_ELEMENTS)]
        element = Signal(UNPACKED)
        m.d.comb += element.eq(read.data[control.element_1])
        chosen = Signal(OPERANDS, reset_less=True)
        for lane in range(BEAT_ELEMENTS):
            with m.Switch(control.source_1):
                with m.Case(SOURCE_QUERY):
                    m.d.sync += chosen[lane].eq(read.data[lane])
                with m.Case(SOURCE_PROBABILITY):
                    m.d.sync += chosen[lane].eq(p_read.data[lane])
                with m.Default():
                    m.d.sync += chosen[lane].eq(element)
        m.d.comb += dot.a.eq(chosen)

    def _accumulate(self, m, dot):
        """Accumulators of the approximate step, a row of 16 tokens each; returns the element at DRAIN_TIME."""
        control = self.control
        m.submodules.rows = rows = Memory(
            shape=LANES_32, depth=CHANNEL_ROWS, init=[], attrs={"ram_style": "distributed"}
        )
        write, read = rows.write_port(), rows.read_port()
        m.d.comb += [
            read.addr.eq(control.row_read),
            read.en.eq(1),
            write.addr.eq(control.row_write),
            write.data.eq(dot.lanes),
            write.en.eq(control.row_write_en),
        ]
        for lane in range(BEAT_ELEMENTS):
            m.d.comb += dot.carry[lane].eq(Mux(control.row_fresh, 0, read.data[lane]))
        return _registered(m, "approximate", read.data[control.drain_element])

    def _outputs(self, m, dot, softmax):
        """o = o * 2**-d + p.V, an element per beat."""
        control = self.control
        m.submodules.outputs = outputs = Memory(
            shape=unsigned(32), depth=MAX_HEAD, init=[], attrs={"ram_style": "distributed"}
        )
        write, read = outputs.write_port(), outputs.read_port()
        m.submodules.shifts = shifts = Memory(shape=unsigned(8), depth=RING, init=[])
        shift_write, shift_read = shifts.write_port(), shifts.read_port()
        m.submodules.rescale = rescale = Scale32()
        m.d.comb += [
            shift_write.addr.eq(softmax.p_bank),
            shift_write.data.eq(softmax.shift),
            shift_write.en.eq(softmax.p_valid & softmax.p_last),
            shift_read.addr.eq(control.bank_rescale),
            shift_read.en.eq(1),
            read.addr.eq(control.output_read),
            read.en.eq(1),
            rescale.i.eq(Mux(control.output_fresh, Const(0, 32), read.data)),
            rescale.d.eq(shift_read.data),
            dot.carry_total.eq(rescale.o),
            write.addr.eq(control.output_write),
            write.data.eq(dot.total),
            write.en.eq(control.output_write_en),
            self.o.eq(read.data),
        ]


assert DOT_TIME + Add32.latency == TOTAL_TIME
