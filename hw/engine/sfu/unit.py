"""The vector unit: vector instructions over the vector buffer, one at a time, in order.

    op -> Walker -> Fetch (VB a, b) -> join with scalars -> lanes --+-> VB / A8 groups / KV records
                                          ^         |               +-> Reducer -> ScalarUnit
                                          |         +-> softmax -> A8 groups, scale table     |
                                          +---------------------------------------------------+

An instruction is one to three passes over its vectors; passes follow each other without a gap, and a word waits only
for the scalars of its own vector. So many short vectors (heads) overlap their sequential work, and a long one hides
everything but one latency per pass.

| instruction | passes (lane operation -> what becomes of the result) |
|-------------|-------------------------------------------------------|
| NORM        | scan -> shift of the squares; square -> reciprocal root; norm -> VB |
| QUANT       | scan -> reciprocal, scale table; scale -> A8 groups (`rectify`: of max(a, 0)) |
| KVQUANT     | scan -> record; kv -> KV stream                       |
| ROPE, GATE, ADD | the operation -> VB                               |
| SOFTMAX     | words to the softmax unit -> A8 groups, scale table   |

`fresh` replaces the scan: every write to VB collects the extremes of its vector, and they are replayed. In ROPE, GATE
and ADD it continues the vectors that the instruction before wrote: their extremes join. What a product `collected`
goes through the same reducer, as vector 0; while one does, no instruction but SOFTMAX may run that reduces.
"""

from amaranth import Cat, EnableInserter, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec import formats
from golden.spec.engine import SOFTMAX_STATE, EngineConfig, Op
from hw.engine.interfaces import (
    VB_ADDR,
    VectorOp,
    act_write,
    collected,
    kv_record,
    table_write,
    unit_port,
    vb_read,
    vb_write,
)
from hw.engine.sfu.fetch import Fetch, Reducer
from hw.engine.sfu.lanes import N1_BIAS, VEC, LaneArray, LaneOp
from hw.engine.sfu.retire import GroupWriter
from hw.engine.sfu.scalars import SUM_BITS, LaneScalars, ScalarKind, ScalarUnit
from hw.engine.sfu.softmax import VECTORS_IN_FLIGHT, SoftmaxUnit
from hw.engine.sfu.walker import Beat, Pass, Walker, is_op
from hw.lib.memories import TypedMemory
from hw.lib.streams import PipeStage, connect

LANE_OPS = {
    Op.NORM: LaneOp.NORM,
    Op.QUANT: LaneOp.SCALE,
    Op.KVQUANT: LaneOp.KV,
    Op.ROPE: LaneOp.ROPE,
    Op.GATE: LaneOp.GATE,
    Op.ADD: LaneOp.ADD,
}
"""What the lanes do in the last pass of an instruction."""
SCANNING = (Op.NORM, Op.QUANT, Op.KVQUANT)
"""Instructions that need the extremes of their operand first."""
VECTORS_MAX = 256
COUNT = range(2 * VECTORS_MAX + 1)
"""Vectors of an instruction, twice over for the two reductions of NORM."""
SUM = unsigned(SUM_BITS)
SETTLE_WORDS = 1
"""Cycles from the last result word to `done`: a VB write is visible in the next cycle."""
SETTLE_GROUPS = 4
"""The same for A8 groups, which take two cycles to write and are visible two later, and for scale table entries."""


SCORES_IN = 2
"""From the last score of a SOFTMAX to the transfer of the next one."""


class Extremes(data.Struct):
    """Least and greatest element of a vector in Q16."""

    least: VEC
    most: VEC


class VectorUnit(wiring.Component):
    """Executes `VectorOp`s; ports and effects as docs/engine.md section 4, cycles as `hw.engine.sfu.timing`.

    An illegal instruction sets `unit.error` (a `golden.spec.engine.Error`) and leaves no effect; the unit then accepts
    nothing until reset.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "unit": In(unit_port(VectorOp)),
                "a": Out(vb_read(config)),
                "b": Out(vb_read(config)),
                "y": Out(vb_write(config)),
                "act": Out(act_write()),
                "table": Out(table_write()),
                "kv": Out(stream.Signature(kv_record(config))),
                "collected": In(collected(config)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config, lanes = self._config, self._config.vector_lanes
        beat = Beat(lanes)
        m.submodules.walker = walker = Walker(config)
        m.submodules.fetch = fetch = Fetch(config, beat)
        m.submodules.lanes = array = LaneArray(lanes, beat)
        softmax = SoftmaxUnit(lanes)
        m.submodules.softmax = EnableInserter(softmax.i.valid | ~softmax.idle)(softmax)
        m.submodules.reducer = reducer = Reducer(lanes, beat)
        m.submodules.scalars = scalars = ScalarUnit()
        m.submodules.groups = groups = GroupWriter(lanes)
        # The bounds check of a beat and the grant of its words, through an arbiter outside, are a cycle each.
        m.submodules.beats = beats = PipeStage(walker.o.p.shape())
        connect(m, walker.o, beats.i)
        connect(m, beats.o, fetch.i)
        connect(m, wiring.flipped(self.a), fetch.a)
        connect(m, wiring.flipped(self.b), fetch.b)
        known = self._scalars(m, walker, reducer, scalars, fetch, array)
        self._join(m, walker.op, fetch.o, known, array.i, softmax.i)
        self._retire(m, walker.op, array.o, reducer.i, groups)
        self._merge(m, walker.op, scalars, softmax, groups)
        self._export(m, walker, softmax.state)
        self._control(m, walker, softmax, array)
        return m

    def _control(self, m: Module, walker, softmax, array) -> None:
        """Instructions in, `done` out: one instruction is inside at a time; but a SOFTMAX that exports nothing follows
        another one when all scores of that are in the softmax unit."""
        op, port = walker.op, self.unit
        settle = Signal(range(SETTLE_GROUPS))
        all_scores, overlaps, taken = Signal(), Signal(), Signal()
        softmaxes = Signal(range(VECTORS_IN_FLIGHT + 2))
        wanted = port.op.payload
        score = wanted.op == int(Op.SOFTMAX)
        may = (softmaxes == 0) | (overlaps & score & ~wanted.export)
        written = softmax.ended
        for cycle in range(1 + SETTLE_GROUPS):
            later = Signal(name=f"written_{cycle}")
            m.d.sync += later.eq(written)
            written = later
        ended = array.o.valid & array.o.ready & array.o.p.tag.final
        m.d.comb += [
            walker.i.payload.eq(wanted),
            port.error.eq(walker.error),
            taken.eq(port.op.valid & port.op.ready),
            port.done.eq(written),
        ]
        m.d.sync += softmaxes.eq(softmaxes + (taken & score) - written)
        with m.If(softmax.i.valid & softmax.i.ready):
            m.d.sync += all_scores.eq(self._last_scores)
        with m.FSM(name="unit"):
            with m.State("IDLE"):
                m.d.comb += [walker.i.valid.eq(port.op.valid & may), port.op.ready.eq(walker.i.ready & may)]
                with m.If(taken):
                    m.d.sync += [all_scores.eq(0), overlaps.eq(score & ~wanted.export)]
                    m.next = "BUSY"
            with m.State("BUSY"):
                m.d.sync += settle.eq(Mux(op.op == int(Op.QUANT), SETTLE_GROUPS, SETTLE_WORDS) - 1)
                with m.If(all_scores):
                    m.next = "IDLE"
                with m.Elif(ended):
                    m.next = "SETTLE"
            with m.State("SETTLE"):
                m.d.sync += settle.eq(settle - 1)
                with m.If(settle == 0):
                    m.d.comb += port.done.eq(1)
                    m.next = "IDLE"

    def _scalars(self, m: Module, walker, reducer, scalars, fetch, array):
        """Extremes and sums to scalars and their memories; returns how many scalars of the instruction are known.

        Reduced vectors wait in memories, so that no pass ever stalls behind the sequential unit. The feeder takes
        them in order: the vectors of the first pass (at once if they are fresh), then for NORM those of the second.
        """
        op, request, result = walker.op, scalars.i, scalars.o
        m.submodules.extremes = extremes = TypedMemory(
            Extremes, VECTORS_MAX, read_ports=2, asynchronous_read=True
        )
        m.submodules.totals = totals = TypedMemory(SUM, VECTORS_MAX, asynchronous_read=True)
        m.submodules.factors = factors = TypedMemory(
            LaneScalars, VECTORS_MAX, read_ports=3, asynchronous_read=True
        )
        norm, scanning = op.op == int(Op.NORM), is_op(op.op, *SCANNING)
        available, fed, known = (Signal(COUNT, name=name) for name in ("available", "fed", "known"))
        index, second = Signal(8), Signal()
        main = reducer.o.p.tag.stage == Pass.MAIN
        least, most, before = reducer.o.p.least, reducer.o.p.most, extremes.r[1].data
        joins = reducer.o.p.tag.joins
        below, above = joins & (before.least < least), joins & (before.most > most)
        m.d.comb += [
            reducer.o.ready.eq(1),
            extremes.w.addr.eq(reducer.o.p.tag.vector),
            extremes.r[1].addr.eq(reducer.o.p.tag.vector),
            extremes.w.data.least.eq(Mux(below, before.least, least)),
            extremes.w.data.most.eq(Mux(above, before.most, most)),
            extremes.w.en.eq(reducer.o.valid & (reducer.o.p.tag.stage != Pass.SQUARE)),
            totals.w.addr.eq(reducer.o.p.tag.vector),
            totals.w.data.eq(reducer.o.p.total),
            totals.w.en.eq(reducer.o.valid & (reducer.o.p.tag.stage == Pass.SQUARE)),
            extremes.r[0].addr.eq(index),
            totals.r[0].addr.eq(index),
            factors.r[0].addr.eq(fetch.o.p.tag.vector),
            factors.r[1].addr.eq(index),
            factors.r[2].addr.eq(array.o.p.tag.vector),
        ]
        first = Mux(
            norm, ScalarKind.SQUARE_SHIFT, Mux(op.op == int(Op.KVQUANT), ScalarKind.KV, ScalarKind.A8)
        )
        m.d.comb += [
            request.valid.eq((available != fed) & (self._settling(m) == 0)),
            request.p.kind.eq(Mux(second, ScalarKind.NORM, first)),
            request.p.v.eq(index),
            # Extremes that a `fresh` instruction finds are those before max(a, 0).
            request.p.least.eq(Mux(op.rectify, 0, extremes.r[0].data.least)),
            request.p.most.eq(Mux(op.rectify & extremes.r[0].data.most[-1], 0, extremes.r[0].data.most)),
            request.p.total.eq(totals.r[0].data),
            request.p.shift.eq(factors.r[1].data.n1 - N1_BIAS),
            request.p.epsilon.eq(op.epsilon),
            request.p.factor.eq(op.factor),
            request.p.exponent.eq(op.exponent),
            request.p.wide.eq(op.bits == 8),
        ]
        with m.If(walker.accepted):
            m.d.sync += [
                available.eq(Mux(op.fresh & scanning, op.vectors, 0)),
                fed.eq(0),
                index.eq(0),
                second.eq(0),
            ]
        with m.Else():
            m.d.sync += available.eq(available + (reducer.o.valid & ~main))
            with m.If(request.valid & request.ready):
                m.d.sync += [fed.eq(fed + 1), index.eq(index + 1)]
                with m.If(index == op.vectors - 1):
                    m.d.sync += [index.eq(0), second.eq(1)]
        m.d.comb += [
            result.ready.eq(1),
            factors.w.en.eq(result.valid),
            factors.w.addr.eq(result.p.v),
            factors.w.data.eq(result.p.lanes),
        ]
        m.d.sync += known.eq(Mux(walker.accepted, 0, known + result.valid))
        self._lane_factors, self._records = factors.r[0].data, factors.r[2].data
        return known

    def _settling(self, m: Module):
        """Cycles until the extremes of what was collected last are in their memory."""
        latency = Reducer.latency_of(self._config.vector_lanes)
        left = Signal(range(latency + 1), name="settling")
        with m.If(self.collected.en):
            m.d.sync += left.eq(latency)
        with m.Elif(left != 0):
            m.d.sync += left.eq(left - 1)
        return left

    def _join(self, m: Module, op, words, known, lanes, softmax) -> None:
        """Operands meet the scalars of their vector and go to the lanes, or to the softmax unit."""
        tag, factors = words.p.tag, self._lane_factors
        scan, main = tag.stage == Pass.SCAN, tag.stage == Pass.MAIN
        to_softmax, needs_scalars = Signal(), Signal()
        m.d.sync += [to_softmax.eq(op.op == int(Op.SOFTMAX)), needs_scalars.eq(is_op(op.op, *SCANNING))]
        # The scalars come in order: those of the first pass, and for NORM again as many of the second.
        go = words.valid & (scan | ~needs_scalars | (known > tag.ordinal))
        m.d.comb += [
            lanes.valid.eq(go & ~to_softmax),
            softmax.valid.eq(go & to_softmax),
            words.ready.eq(Mux(to_softmax, softmax.ready, lanes.ready) & go),
            lanes.p.tag.eq(tag),
        ]
        operation = Signal(LaneOp)
        with m.Switch(op.op):
            for code, lane_op in LANE_OPS.items():
                with m.Case(int(code)):
                    m.d.comb += operation.eq(lane_op)
        control = lanes.p.control
        m.d.comb += [
            control.op.eq(Mux(main, operation, Mux(scan, LaneOp.SCALE, LaneOp.SQUARE))),
            control.m1.eq(Mux(scan, 1, factors.m1)),
            control.n1.eq(Mux(scan, N1_BIAS, factors.n1)),
            control.n2.eq(op.exponent + 6),
            control.m0.eq(factors.m0),
            control.wide.eq(op.bits == 8),
        ]
        place = softmax.p.place
        m.d.comb += [
            softmax.p.start.eq(tag.first),
            place.first_tile.eq(tag.first_tile),
            place.tile_last.eq(tag.slot == formats.ATTN_TILE // self._config.vector_lanes - 1),
            place.last.eq(tag.last),
            place.final.eq(tag.final),
            place.group.eq(tag.dst),
            place.table.eq(op.table + tag.vector),
        ]
        for k in range(self._config.vector_lanes):
            live = tag.mask[k]
            m.d.comb += [
                lanes.p.a[k].eq(Mux(live & ~(op.rectify & words.p.a[k][-1]), words.p.a[k], 0)),
                lanes.p.b[k].eq(Mux(live, words.p.b[k], 0)),
                softmax.p.z[k].eq(words.p.a[k]),
                softmax.p.scale[k].eq(words.p.b[k][:16]),
                softmax.p.minimum[k].eq(words.p.b[k][16:]),
                softmax.p.live[k].eq(live),
            ]
        self._last_scores = tag.final

    def _retire(self, m: Module, op, results, reducer, groups) -> None:
        """Results to the vector buffer, the group writer or the KV stream, and to the reducer where they matter."""
        tag, records = results.p.tag, self._records
        main = tag.stage == Pass.MAIN
        to_kv, to_groups = main & (op.op == int(Op.KVQUANT)), main & (op.op == int(Op.QUANT))
        to_words = main & ~to_kv & ~to_groups
        reduces = ~main | to_words
        sunk = Mux(to_words, self.y.rdy, Mux(to_kv, self.kv.ready, 1))
        reduced = ~reduces | (reducer.ready & ~self.collected.en)
        m.d.comb += [
            results.ready.eq(sunk & reduced),
            reducer.valid.eq(results.valid & reduces & sunk & ~self.collected.en),
            reducer.p.y.eq(results.p.y),
            reducer.p.last.eq(tag.last),
            reducer.p.tag.eq(tag),
            self.y.en.eq(results.valid & to_words & reduced),
            self.y.addr.eq(tag.dst),
            self.y.data.eq(results.p.y.as_value()),
            self.y.mask.eq(tag.mask),
            self.kv.valid.eq(results.valid & to_kv),
            self.kv.p.scale.eq(records.scale),
            self.kv.p.minimum.eq(records.minimum),
            self.kv.p.last.eq(tag.last),
            groups.en.eq(results.valid & to_groups),
            groups.slot.eq(tag.slot),
            groups.last.eq(tag.last),
            groups.addr.eq(tag.dst),
        ]
        for k in range(self._config.vector_lanes):
            m.d.comb += [self.kv.p.codes[k].eq(results.p.y[k]), groups.codes[k].eq(results.p.y[k])]
        with m.If(self.collected.en):
            m.d.comb += [
                reducer.valid.eq(1),
                Value.cast(reducer.p.y).eq(self.collected.data),
                reducer.p.last.eq(self.collected.last),
                Value.cast(reducer.p.tag).eq(0),
                reducer.p.tag.stage.eq(Pass.MAIN),
                reducer.p.tag.joins.eq(self.collected.joins),
            ]

    def _export(self, m: Module, walker, state) -> None:
        """Softmax states to the vector buffer, whose port no other result of a SOFTMAX takes; or to nowhere."""
        op, address, maximum = walker.op, Signal(VB_ADDR), Signal(signed(32))
        m.d.comb += [state.ready.eq(~op.export | self.y.rdy), maximum.eq(state.p.maximum)]
        with m.If(walker.accepted):
            m.d.sync += address.eq(op.state)
        with m.Elif(state.valid & state.ready):
            m.d.sync += address.eq(address + 1)
        with m.If(state.valid & op.export):
            m.d.comb += [
                self.y.en.eq(1),
                self.y.addr.eq(address),
                self.y.data.eq(Cat(maximum, state.p.sum)),
                self.y.mask.eq((1 << len(SOFTMAX_STATE)) - 1),
            ]

    def _merge(self, m: Module, op, scalars, softmax, groups) -> None:
        """The two writers of groups and of the scale table: one of them works at a time."""
        result = scalars.o.p
        with m.If(op.op == int(Op.SOFTMAX)):
            wiring.connect(m, wiring.flipped(self.act), softmax.act)
            wiring.connect(m, wiring.flipped(self.table), softmax.table)
        with m.Else():
            wiring.connect(m, wiring.flipped(self.act), groups.act)
            m.d.comb += [
                self.act.counted.eq(op.counted),
                self.table.en.eq(scalars.o.valid & (result.kind == ScalarKind.A8)),
                self.table.addr.eq(op.table + result.v),
                self.table.entry.eq(result.output),
            ]
