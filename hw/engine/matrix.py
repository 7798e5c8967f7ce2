"""The matrix unit: weight words and activation codes in, Q16 vectors out.

One unit for matrix-vector and matrix-matrix products of every weight format and for both products of attention:
docs/engine.md sections 2 and 3 say what it computes, `hw.timing` how long it takes.
"""

from functools import partial

from amaranth import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import STEP, WORD_BITS, Codes, EngineConfig, Error
from hw.engine.array import DOT_BITS, WHOLE, LanePair, shared_operand
from hw.engine.decoder import Decoder
from hw.engine.drain import Drain, DrainOp
from hw.engine.interfaces import (
    GroupSide,
    MatrixOp,
    act_write,
    collected,
    table_write,
    vb_read,
    vb_write,
    word_stream,
)
from hw.engine.lane import (
    BANKS,
    NARROW_BANKS,
    AddControl,
    Lane,
    RecordControl,
    ScaleControl,
    UpdateControl,
    narrow,
    reach,
)
from hw.lib.arith import thrice
from hw.lib.memories import TypedMemory
from hw.lib.shared import place
from hw.lib.streams import StreamFIFO, connect

ISSUE_TO_FINAL = 1 + LanePair.latency + Lane.latency
"""Cycles from the issue of a step and vector to the first cycle in which its accumulator can be drained."""


class ActBuffer(wiring.Component):
    """The A8 buffer: groups of 32 codes with sidecars, written one at a time, read as 64-byte words.

    `group` of `w` is visible to a read of the next cycle; read data one cycle after `addr`.
    """

    def __init__(self, words: int):
        self._words = words
        super().__init__(
            {
                "w": In(act_write()),
                "addr": In(range(words)),
                "codes": Out(WORD_BITS),
                "sides": Out(data.ArrayLayout(GroupSide, 2)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        for half in range(2):
            for name, value, read in (
                ("codes", self.w.codes, self.codes[half * 8 * STEP :][: 8 * STEP]),
                ("sides", Value.cast(self.w.side), Value.cast(self.sides[half])),
            ):
                make = partial(TypedMemory, unsigned(len(value)), self._words)
                memory = place(m, platform, f"{name}_{half}", f"activation_{name}", make)
                m.d.comb += [
                    memory.w.addr.eq(self.w.addr >> 1),
                    memory.w.data.eq(value),
                    memory.w.en.eq(self.w.en & (self.w.addr[0] == half)),
                    memory.r[0].addr.eq(self.addr),
                    memory.r[0].en.eq(1),
                    read.eq(memory.r[0].data),
                ]
        return m


class Issue(wiring.Component):
    """Walks row blocks, steps and vectors; fires one (step, vector) per cycle.

    A step is taken from the decoder with its first vector. The first step of a row block waits for a free accumulator
    bank: `accumulator_banks` of the operation, and none while an operation with another number of them drains. `final`
    offers each row block when its accumulators are final.

    `counted`: a group of codes of the operation that `follows` was written, readable from the next cycle on. Each step
    of its first row block waits for the groups that it reads.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "op": In(stream.Signature(MatrixOp)),
                "step": In(stream.Signature(0)),
                "free": In(1),
                "counted": In(1),
                "fire": Out(1),
                "load": Out(1),
                "addr": Out(range(config.act_words)),
                "half": Out(1),
                "sparse": Out(1),
                "wide": Out(1),
                "offset": Out(1),
                "values": Out(1),
                "first": Out(1),
                "slot": Out(range(BANKS * config.tokens)),
                "final": Out(stream.Signature(DrainOp)),
                "no_weights": Out(1),
                "no_bank": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        op, busy = Signal(MatrixOp), Signal()
        step, block, vector = Signal(16), Signal(16), Signal(5)
        base, bank, pending = Signal(16), Signal(range(NARROW_BANKS)), Signal(range(NARROW_BANKS + 1))
        few, changed = Signal(), Signal()
        dst = Signal(20)
        last_vector, last_step, last_block = Signal(), Signal(), Signal()
        last = Signal()
        sparse = op.codes == Codes.S24
        starts = (step == 0) & (vector == 0)
        full = Mux(few, pending == NARROW_BANKS, pending >= BANKS)
        uncoded = self._codes(m, op, sparse, block)
        blocked = (starts & (full | (changed & (pending != 0)))) | uncoded
        m.d.comb += [
            last_vector.eq(vector == op.vectors - 1),
            last_step.eq(step == op.steps - 1),
            last_block.eq(block == op.blocks - 1),
            self.no_bank.eq(busy & blocked & ~uncoded),
            self.no_weights.eq(busy & ~blocked & (vector == 0) & ~self.step.valid),
            self.fire.eq(busy & ~blocked & ((vector != 0) | self.step.valid)),
            self.load.eq(self.fire & (vector == 0)),
            self.step.ready.eq(self.load),
            self.addr.eq(base + Mux(sparse, step, step >> 1)),
            self.half.eq(step[0]),
            self.sparse.eq(sparse),
            self.wide.eq(op.codes == Codes.U8),
            self.offset.eq(op.offset),
            self.values.eq(op.values),
            self.first.eq(step == 0),
            self.slot.eq(self._first_slot(few, bank) | vector),
            last.eq(self.fire & last_vector & last_step),
            self.op.ready.eq(~busy | (last & last_block)),
        ]
        with m.If(self.fire):
            m.d.sync += [vector.eq(vector + 1), base.eq(base + op.stride)]
            with m.If(last_vector):
                m.d.sync += [vector.eq(0), base.eq(op.addr), step.eq(step + 1)]
                with m.If(last_step):
                    blocks = self._config.lanes // self._config.vector_lanes
                    m.d.sync += [step.eq(0), block.eq(block + 1), bank.eq(bank + 1), dst.eq(dst + blocks)]
                    with m.If(last_block):
                        m.d.sync += busy.eq(0)
        m.d.sync += pending.eq(pending + (self.fire & starts) - self.free)
        with m.If(self.op.valid & self.op.ready):
            new = self.op.p
            m.d.sync += [Value.cast(op).eq(Value.cast(new)), busy.eq(1), base.eq(new.addr), dst.eq(new.dst)]
            m.d.sync += [x.eq(0) for x in (step, block, vector)]
            few_now = new.vectors <= narrow(self._config.tokens)
            m.d.sync += [few.eq(few_now), changed.eq(few_now != few)]
        with m.Elif(self.fire):
            m.d.sync += changed.eq(0)
        self._finals(m, op, self._first_slot(few, bank), dst, block, last, last_block)
        return m

    def _first_slot(self, few, bank):
        """Accumulator of a bank's vector 0; those of the others differ in the low bits."""
        tokens = self._config.tokens
        return Mux(few, bank * narrow(tokens), (bank % BANKS) * tokens)

    def _codes(self, m, op, sparse, block):
        """Counts groups for the operation that follows them; whether the step at hand lacks its own."""
        written, takes, waits = Signal(range(2 * self._config.act_words + 1)), Signal(), Signal()
        m.d.comb += [
            waits.eq(op.follows & (block == 0)),
            takes.eq(waits & self.fire),
        ]
        m.d.sync += written.eq(written + self.counted - Mux(takes, Mux(sparse, 2, 1), 0))
        return waits & Mux(sparse, ~written[1:].any(), ~written.any())

    def _finals(self, m, op, slot, dst, block, last, last_block):
        """Finished blocks wait in a queue (one per bank) until the pipeline has run dry behind them."""
        m.submodules.finals = finals = StreamFIFO(DrainOp, NARROW_BANKS)
        finished = Signal(ISSUE_TO_FINAL - 1)
        ready = Signal(range(NARROW_BANKS + 1))
        item = finals.i.p
        m.d.comb += [
            finals.i.valid.eq(last),
            item.slot.eq(slot),
            item.vectors.eq(op.vectors),
            item.table.eq(op.table),
            item.dst.eq(dst),
            item.dst_stride.eq(op.dst_stride),
            item.accumulate.eq(op.accumulate),
            item.vec_group.eq(op.vec_group),
            item.vec_rows.eq(op.vec_rows),
            item.collect.eq(op.collect),
            item.joins.eq(op.joins | (block != 0)),
            item.last.eq(last_block),
            item.turn.eq(op.turn),
            Value.cast(self.final.payload).eq(Value.cast(finals.o.payload)),
            self.final.valid.eq(finals.o.valid & (ready != 0)),
            finals.o.ready.eq(self.final.ready & (ready != 0)),
        ]
        m.d.sync += [
            finished.eq(Cat(last, finished)),
            ready.eq(ready + finished[-1] - (self.final.valid & self.final.ready)),
        ]


class MatrixUnit(wiring.Component):
    """Everything between the memory channels and the vector buffer.

    `op`: operations, in order, two buffered ahead; `done` pulses when an operation's last output is in the vector
    buffer. `words[c]`: the weight channels. `act`, `table`: writes of activation groups and output scales (visible to
    operations that are accepted later). `y`, `old`: the vector buffer, never made to wait. `error` stays at
    `Error.PATTERN` after an illegal 2:4 pattern. `fired`, `no_weights`, `no_bank`, `taken` count in the controller.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "op": In(stream.Signature(MatrixOp)),
                "done": Out(1),
                "error": Out(4),
                "words": In(word_stream()).array(config.channels),
                "act": In(act_write()),
                "table": In(table_write()),
                "y": Out(vb_write(config)),
                "old": Out(vb_read(config)),
                "collected": Out(collected(config)),
                "fired": Out(1),
                "no_weights": Out(1),
                "no_bank": Out(1),
                "taken": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.decoder = decoder = Decoder(self._config)
        m.submodules.issue = issue = Issue(self._config)
        m.submodules.acts = acts = ActBuffer(self._config.act_words)
        m.submodules.drain = drain = Drain(self._config)
        self._operations(m, decoder, issue)
        connect(m, decoder.step, issue.step)
        connect(m, issue.final, drain.i)
        connect(m, wiring.flipped(self.act), acts.w)
        connect(m, wiring.flipped(self.table), drain.table)
        connect(m, drain.y, wiring.flipped(self.y))
        connect(m, drain.old, wiring.flipped(self.old))
        connect(m, drain.collected, wiring.flipped(self.collected))
        for c, words in enumerate(self.words):
            connect(m, wiring.flipped(words), decoder.words[c])
        m.d.comb += [
            acts.addr.eq(issue.addr),
            issue.free.eq(drain.free),
            issue.counted.eq(self.act.en & self.act.counted),
            self.done.eq(drain.done),
            self.fired.eq(issue.fire),
            self.no_weights.eq(issue.no_weights),
            self.no_bank.eq(issue.no_bank),
            self.taken.eq(decoder.taken),
        ]
        with m.If(decoder.illegal):
            m.d.sync += self.error.eq(Error.PATTERN)
        self._lanes(m, platform, decoder, issue, acts, drain)
        return m

    def _operations(self, m, decoder, issue):
        m.submodules.ops = ops = StreamFIFO(MatrixOp, 2)
        connect(m, ops.o, issue.op)
        m.d.comb += [
            Value.cast(ops.i.payload).eq(Value.cast(self.op.payload)),
            ops.i.valid.eq(self.op.valid & decoder.op.ready),
            decoder.op.valid.eq(self.op.valid & ops.i.ready),
            self.op.ready.eq(ops.i.ready & decoder.op.ready),
        ]
        for name in ("codes", "scaled", "minimum", "group_steps", "blocks", "steps"):
            m.d.comb += decoder.op.p[name].eq(self.op.p[name])

    def _lanes(self, m, platform, decoder, issue, acts, drain):
        """The shared part of the pipeline: activations, sidecars and control, delayed to where lanes want them."""
        half, sparse, offset, values, fired = (Signal() for _ in range(5))
        m.d.sync += [
            half.eq(issue.half),
            sparse.eq(issue.sparse),
            offset.eq(issue.offset),
            values.eq(issue.values),
            fired.eq(issue.fire),
        ]
        side = acts.sides[half]
        dense, shared = Signal(8 * STEP), Signal(WHOLE * STEP)
        m.d.comb += [
            dense.eq(Mux(half, acts.codes[8 * STEP :], acts.codes[: 8 * STEP])),
            shared.eq(shared_operand(dense, sparse, WHOLE)),
        ]
        total = -side.addend[: DOT_BITS - 7].as_signed()
        correction = Mux(offset & ~sparse, Cat(Const(0, 7), total[: DOT_BITS - 7]), 0).as_signed()
        correction = self._delayed(m, "correction", correction, LanePair.latency - 1)
        record, control, add, update = self._controls(m, issue, side, values)
        tokens = self._config.tokens
        for pair in range(self._config.lanes // 2):
            channel, index = divmod(pair, self._config.lanes_per_channel // 2)
            step = decoder.steps[channel]
            dots = place(m, platform, f"pair_{pair}", "lane_pair", LanePair)
            m.d.comb += [
                dots.load.eq(issue.load),
                dots.valid.eq(fired),
                dots.sparse.eq(issue.sparse),
                dots.wide.eq(issue.wide),
                dots.shared.eq(shared),
                dots.acts.eq(acts.codes),
                dots.correction.eq(correction),
                *(
                    dots.planes[p][h].eq(plane)
                    for p, blocks in enumerate(step.planes[index])
                    for h, plane in enumerate(blocks)
                ),
                *(dots.patterns[p].eq(step.patterns[p].word_select(index, STEP)) for p in range(3)),
            ]
            for row in range(2):
                lane = place(m, platform, f"lane_{2 * pair + row}", f"lane_{tokens}", lambda: Lane(tokens))
                source = 2 * index + row
                m.d.comb += [
                    lane.load.eq(issue.load),
                    lane.scale.eq(step.scale[source]),
                    lane.minimum.eq(step.minimum[source]),
                    lane.dot.eq(dots.dots[row]),
                    Value.cast(lane.record).eq(Value.cast(record)),
                    Value.cast(lane.control).eq(Value.cast(control)),
                    Value.cast(lane.add).eq(Value.cast(add)),
                    Value.cast(lane.update).eq(Value.cast(update)),
                    lane.drain.eq(drain.slot),
                    drain.acc[2 * pair + row].eq(lane.drained),
                ]

    def _controls(self, m, issue, side, values):
        """The lanes' controls: made when the activations arrive, delayed once for all lanes."""
        now = Signal(UpdateControl)
        m.d.sync += [now.valid.eq(issue.fire), now.first.eq(issue.first), now.slot.eq(issue.slot)]
        record, control = Signal(RecordControl), Signal(ScaleControl)
        add, update = Signal(AddControl), Signal(UpdateControl)
        m.d.comb += [
            record.values.eq(values),
            record.shift.eq(side.shift),
            control.sum.eq(side.addend),
            control.thrice.eq(thrice(control.sum)),
            add.values.eq(values),
            add.addend.eq(side.addend),
            Value.cast(update).eq(Value.cast(now)),
            update.decay.eq(Mux(values, side.decay, 0)),
            update.reach.eq(reach(update.decay, update.first)),
        ]
        delays = (("record", record, -2), ("control", control, 0), ("add", add, 2), ("update", update, 4))
        return (self._delayed(m, name, Value.cast(x), LanePair.latency + d) for name, x, d in delays)

    @staticmethod
    def _delayed(m, name, value, cycles):
        for stage in range(cycles):
            later = Signal(value.shape(), name=f"{name}_d{stage + 1}", reset_less=name != "update")
            m.d.sync += Value.cast(later).eq(Value.cast(value))
            value = later
        return value
