"""Accumulators to vector words: the output scale, the residual and the way into the vector buffer."""

from amaranth import Cat, Const, EnableInserter, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import TURN_BITS, EngineConfig
from golden.spec.formats import ATTN_ACC_BITS, VEC_BITS
from hw.engine.interfaces import TABLE_ADDR, VB_ADDR, OutputScale, collected, table_write, vb_read, vb_write
from hw.engine.lane import BANKS
from hw.lib.arith import round_half, saturate, shift_left
from hw.lib.memories import TypedMemory
from hw.lib.pipeline import Pipe
from hw.lib.shared import place

PRE_BITS = 40
"""Width after the first rounding: legal tensors and softmax outputs stay below 2**39 (docs/formats.md, 3 and 8)."""
MULT_BITS = 17
SPLIT = 17
"""The wide operand enters two DSPs: its low bits, unsigned, and the rest."""


class DrainOp(data.Struct):
    """One row block to drain."""

    slot: 5
    """Accumulator of vector 0."""
    vectors: 5
    table: TABLE_ADDR
    dst: VB_ADDR
    dst_stride: 16
    accumulate: 1
    vec_group: 5
    vec_rows: 9
    collect: 1
    joins: 1
    last: 1
    turn: TURN_BITS


class ScaleLane(wiring.Component):
    """`sat(rnd_shift(rnd_shift(acc, pre) * mult, post), 32)`; one per cycle, `latency` cycles of `move` after its
    operands."""

    latency = 7

    def __init__(self):
        super().__init__(
            {
                "move": In(1),
                "acc": In(signed(ATTN_ACC_BITS)),
                "scale": In(OutputScale),
                "y": Out(signed(VEC_BITS)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p = Pipe(m)
        rounded = self._round_shift(p, "first", self.acc, self.scale.pre)[:PRE_BITS].as_signed()
        mult = p.reg(self.scale.mult, "mult", 2)
        low, high = p.reg(rounded[:SPLIT] * mult, "low"), p.reg(rounded[SPLIT:].as_signed() * mult, "high")
        product = p.reg((low + shift_left(high, SPLIT))[: PRE_BITS + MULT_BITS].as_signed(), "product")
        rounded = self._round_shift(p, "second", product, p.reg(self.scale.post, "post", 4))
        m.d.sync += self.y.eq(saturate(rounded, VEC_BITS))
        return EnableInserter(self.move)(m)

    @staticmethod
    def _coarse(p, name, x, n):
        """`x` with a fraction bit, shifted by the multiple of eight in `n`, and what is left to shift."""
        return p.reg(shift_left(x, 1) >> Cat(Const(0, 3), n[3:]), f"{name}_coarse"), p.reg(
            n[:3], f"{name}_fine"
        )

    def _round_shift(self, p, name, x, n):
        coarse, fine = self._coarse(p, name, x, n)
        return p.reg(round_half(coarse >> fine), f"{name}_rounded")


class Drain(wiring.Component):
    """Reads finished accumulators, `vector_lanes` rows of one vector per cycle, and writes VB words.

    `i`: row blocks; a transfer says that the accumulators are final. `slot` selects the accumulator in all lanes,
    `acc` is the answer of the same cycle. `free` pulses when the bank has been read, `done` when the last word of an
    operation is in the vector buffer. The VB ports have the buffer's top priority: `rdy` is taken for granted.
    `collected` shows what is written by an operation that asks for it.

    A block of v vectors takes `vectors * groups` cycles; the last word is written `latency` cycles after its read.
    """

    latency = ScaleLane.latency + 2

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "i": In(stream.Signature(DrainOp)),
                "slot": Out(range(BANKS * config.tokens)),
                "acc": In(data.ArrayLayout(signed(ATTN_ACC_BITS), config.lanes)),
                "table": In(table_write()),
                "y": Out(vb_write(config)),
                "old": Out(vb_read(config)),
                "collected": Out(collected(config)),
                "free": Out(1),
                "done": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        lanes, groups = self._config.vector_lanes, self._config.lanes // self._config.vector_lanes
        op, active, group, address, ends = self._walk(m, groups)
        m.submodules.table = table = TypedMemory(
            OutputScale, self._config.table_entries, asynchronous_read=True, ram_style="distributed"
        )
        scale = Signal(OutputScale, reset_less=True)
        acc = Signal(data.ArrayLayout(signed(ATTN_ACC_BITS), lanes), reset_less=True)
        m.d.comb += [
            table.w.addr.eq(self.table.addr),
            table.w.en.eq(self.table.en),
            Value.cast(table.w.data).eq(Value.cast(self.table.entry)),
        ]
        width = lanes * ATTN_ACC_BITS
        with m.If(active):
            m.d.sync += Value.cast(scale).eq(Value.cast(table.r[0].data))
            with m.Switch((group ^ op["turn"])[: len(group)]):
                for g in range(groups):
                    with m.Case(g):
                        m.d.sync += Value.cast(acc).eq(Value.cast(self.acc)[g * width :][:width])
        m.d.comb += table.r[0].addr.eq(op["entry"])
        writes = self._delay(m, active, address, op, ends)
        for i in range(lanes):
            lane = place(m, platform, f"scale_{i}", "scale_lane", ScaleLane)
            total = Signal(signed(VEC_BITS), name=f"total_{i}", reset_less=True)
            old = self.old.data[VEC_BITS * i :][:VEC_BITS].as_signed()
            m.d.comb += [
                lane.acc.eq(acc[i]),
                Value.cast(lane.scale).eq(Value.cast(scale)),
                lane.move.eq(writes["move"]),
            ]
            with m.If(writes["move"]):
                m.d.sync += total.eq(saturate(lane.y + Mux(writes["accumulate"], old, 0), VEC_BITS))
            for port in (self.y, self.collected):
                m.d.comb += port.data[VEC_BITS * i :][:VEC_BITS].eq(total)
        return m

    def _walk(self, m, groups):
        """Vector by vector, group by group; everything of one cycle's read is returned."""
        op, active = Signal(DrainOp), Signal()
        vector, in_group, first_group = Signal(5), Signal(5), Signal(range(groups + 1))
        left = Signal(range(groups + 1))
        address, base, entry = Signal(VB_ADDR), Signal(VB_ADDR), Signal(TABLE_ADDR)
        group = Signal(range(max(groups, 2)))
        shift = (self._config.vector_lanes - 1).bit_length()

        def count(of):
            return Mux(of.vec_group == 0, groups, of.vec_rows >> shift)

        last_group, last_vector = left == 1, vector == op.vectors - 1
        finish = Signal()
        m.d.comb += [
            finish.eq(active & last_group & last_vector),
            self.i.ready.eq(~active | finish),
            self.free.eq(finish),
            self.slot.eq(op.slot | vector),
        ]
        with m.If(active):
            m.d.sync += [group.eq(group + 1), left.eq(left - 1), address.eq(address + 1)]
            with m.If(last_group):
                next_head = (op.vec_group != 0) & (in_group == op.vec_group - 1)
                start = Mux(next_head, first_group + count(op), first_group)
                m.d.sync += [
                    vector.eq(vector + 1),
                    entry.eq(entry + 1),
                    in_group.eq(Mux(next_head, 0, in_group + 1)),
                    first_group.eq(start),
                    group.eq(start),
                    left.eq(count(op)),
                    base.eq(base + op.dst_stride),
                    address.eq(base + op.dst_stride),
                ]
        with m.If(finish):
            m.d.sync += active.eq(0)
        with m.If(self.i.valid & self.i.ready):
            new = self.i.p
            m.d.sync += [Value.cast(op).eq(Value.cast(new)), active.eq(1)]
            m.d.sync += [x.eq(0) for x in (vector, in_group, first_group, group)]
            m.d.sync += [base.eq(new.dst), address.eq(new.dst), entry.eq(new.table), left.eq(count(new))]
        carried = {"accumulate": op.accumulate, "collect": op.collect, "joins": op.joins, "last": finish}
        return {"entry": entry, "turn": op.turn, **carried}, active, group, address, finish & op.last

    def _delay(self, m, active, address, op, finish):
        """Carries a read's address along the scale lanes; the residual is read one cycle before it is added."""
        carried = ("accumulate", "collect", "joins", "last")
        layout = data.StructLayout(
            {"valid": 1, "addr": unsigned(VB_ADDR), **dict.fromkeys(carried, 1), "finish": 1}
        )
        stage = Signal(layout, name="stage_0")
        m.d.sync += [
            stage.valid.eq(active),
            stage.addr.eq(address),
            *(stage[name].eq(op[name]) for name in carried),
            stage.finish.eq(finish),
        ]
        stages = [stage]
        for i in range(1, self.latency):
            later = Signal(layout, name=f"stage_{i}")
            m.d.sync += Value.cast(later).eq(Value.cast(stages[-1]))
            stages.append(later)
        before, adding, writing = stages[-3], stages[-2], stages[-1]
        m.d.comb += [
            self.old.en.eq(before.valid & before.accumulate),
            self.old.addr.eq(before.addr),
            self.y.en.eq(writing.valid),
            self.y.addr.eq(writing.addr),
            self.y.mask.eq(Const(-1, self._config.vector_lanes)),
            self.collected.en.eq(writing.valid & writing.collect),
            self.collected.last.eq(writing.last),
            self.collected.joins.eq(writing.joins),
        ]
        m.d.sync += self.done.eq(writing.finish)
        # Empty stages stand still, on the board for their power and in simulation for their time.
        return {"accumulate": adding.accumulate, "move": Cat(stage.valid for stage in stages).any()}
