"""Instruction words to operations: opcode checks, register addition, shape checks, one queue per unit."""

from amaranth import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import (
    COMMON_FIELDS,
    FIELDS,
    INSTRUCTION_BITS,
    REGISTERS,
    Codes,
    EngineConfig,
    Error,
    Op,
    Unit,
)
from hw.engine.interfaces import AppendOp, DmaOp, LoadOp, MatrixOp, VectorOp
from hw.engine.queue import PC_BITS, queued

UNIT_OPS = {
    Unit.LOAD: LoadOp,
    Unit.MATRIX: MatrixOp,
    Unit.VECTOR: VectorOp,
    Unit.DMA: DmaOp,
    Unit.APPEND: AppendOp,
}
CHECK = 3
"""Cycles from a product's way into its queue to the verdict on its extents."""


def field_slices(op: Op, word) -> dict:
    """Slices of a 256-bit instruction word by field name, the common fields included."""
    slices, position = {}, 0
    for name, width in (*COMMON_FIELDS, *FIELDS[op]):
        slices[name] = word[position : position + width]
        position += width
    slices["rest"] = word[position:]
    return slices


class Instruction(data.Struct):
    """An instruction word and its index in the program."""

    word: INSTRUCTION_BITS
    pc: PC_BITS


class Dispatch(wiring.Component):
    """Decodes one instruction per cycle into its unit's queue; two cycles from `i` to the queue.

    `registers`: the scalar registers. `halt` is high while a HALT is at the head (`interrupt` is its bit), until `i`
    is transferred by `take_halt`. `error` is a one-cycle code with `error_pc`: an unknown opcode or a reserved bit
    (ILLEGAL_INSTRUCTION), an empty product or more vectors than the array holds (SHAPE), a product outside the
    activation buffer, the scale table or the vector buffer (ADDRESS). An illegal instruction does not reach its queue.
    A product does: its extents take `CHECK` cycles to compute and compare, during which the array could at most have
    begun to read; the stop that follows resets it.
    """

    latency = 2

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "i": In(stream.Signature(Instruction)),
                "registers": In(data.ArrayLayout(32, REGISTERS)),
                **{u.name.lower(): Out(stream.Signature(queued(op))) for u, op in UNIT_OPS.items()},
                "halt": Out(1),
                "interrupt": Out(1),
                "empty": Out(1),
                "error": Out(4),
                "error_pc": Out(PC_BITS),
            }
        )

    def elaborate(self, platform):
        m = Module()
        decoded = {u: Signal(queued(op), name=f"decoded_{u.name.lower()}") for u, op in UNIT_OPS.items()}
        code, full, pc = Signal(4), Signal(), Signal(PC_BITS)
        held, moves = Signal(len(UNIT_OPS)), Signal()
        stops, illegal_halt = self._halt(m)
        m.d.comb += [self.i.ready.eq((~full | moves) & ~stops), self.empty.eq(~full)]
        with m.If(moves):
            m.d.sync += [full.eq(0), held.eq(0)]
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [full.eq(1), pc.eq(self.i.p.pc)]
            self._decode(m, decoded, held, code)
        for u in UNIT_OPS:
            port = getattr(self, u.name.lower())
            m.d.comb += Value.cast(port.payload).eq(Value.cast(decoded[u]))
            m.d.comb += port.valid.eq(held[u])
            with m.If(port.valid & port.ready):
                m.d.comb += moves.eq(1)
        fault, fault_pc = self._product_fault(m, decoded[Unit.MATRIX], moves & held[Unit.MATRIX])
        with m.If(fault != 0):
            m.d.comb += [self.error.eq(fault), self.error_pc.eq(fault_pc)]
        with m.Elif(full & (code != 0)):
            m.d.comb += [self.error.eq(code), self.error_pc.eq(pc)]
        with m.Elif(illegal_halt):
            m.d.comb += [self.error.eq(Error.ILLEGAL_INSTRUCTION), self.error_pc.eq(self.i.p.pc)]
        return m

    def _halt(self, m):
        """Whether a HALT is at the head, and a cycle later whether it is an illegal one: neither leaves, so that only
        the opcode is on the way back to the fetcher, not all bits that must be zero."""
        word, illegal = self.i.p.word, Signal(name="illegal_halt")
        stops = self.i.valid & (word[:8] == Op.HALT)
        beyond = field_slices(Op.HALT, word)["rest"].any()
        m.d.comb += [
            self.halt.eq(stops & ~beyond),
            self.interrupt.eq(field_slices(Op.HALT, word)["interrupt"]),
        ]
        m.d.sync += illegal.eq(stops & beyond)
        return stops, illegal

    def _decode(self, m, decoded, held, code):
        """`held`: one bit per unit, that of a legal operation's; what moves hangs on it and the fetcher on that."""
        word = self.i.p.word
        common = field_slices(Op.HALT, word)
        address, count = (self.registers[common[n]] for n in ("addr_reg", "count_reg"))
        m.d.sync += [held.eq(0), code.eq(Error.ILLEGAL_INSTRUCTION)]
        with m.Switch(word[:8]):
            for op in Op:
                if op is Op.HALT:
                    continue
                with m.Case(op):
                    f = field_slices(op, word)
                    illegal = f["rest"].any() | f["reserved"].any()
                    unit = Unit(op >> 4)
                    m.d.sync += [
                        held[unit].eq(~illegal),
                        code.eq(Mux(illegal, Error.ILLEGAL_INSTRUCTION, Error.NONE)),
                    ]
                    target = decoded[unit]
                    m.d.sync += [
                        target.wait.eq(f["wait"]),
                        target.signal.eq(f["signal"]),
                        target.pc.eq(self.i.p.pc),
                    ]
                    if op is Op.SOFTMAX:
                        f["sinks_live"] = self.registers[f["sinks_reg"]]
                    values = {**f, "addr": (f["addr"] + address)[:32], "count": (f["count"] + count)[:24]}
                    m.d.sync += self._assign(op, target.op, values)

    @staticmethod
    def _assign(op, target, f):
        """Field assignments of an operation structure; fields that the instruction lacks are zero."""
        extra = {}
        if op is Op.MATRIX:
            extra = {
                "blocks": Mux(f["values"], f["steps"], f["count"]),
                "steps": Mux(f["values"], f["count"], f["steps"]),
            }
        elif op in (Op.READ, Op.WRITE):
            extra = {"write": int(op is Op.WRITE)}
        elif op is Op.SOFTMAX:
            extra = {"sinks": f["sinks"] + f["sinks_live"]}
        elif op in (Op.APPEND_K, Op.APPEND_V):
            extra = {"values": int(op is Op.APPEND_V)}
        sources = {**f, **extra}
        return [
            Value.cast(target[name]).eq(sources.get(name, 0)) for name, _ in data.Layout.cast(target.shape())
        ]

    def _product_fault(self, m, queued_op, moves):
        """Error code and instruction of a product that the array or its buffers do not hold, `CHECK` cycles later."""
        config, groups = self._config, self._config.lanes // self._config.vector_lanes
        op = queued_op.op
        last = (op.vectors - 1)[:5]
        rows = Mux(
            op.vec_group != 0, op.vec_rows >> (config.vector_lanes - 1).bit_length(), op.blocks * groups
        )
        terms = {
            "act_skip": last * op.stride,
            "act_words": op.addr + Mux(op.codes == Codes.S24, op.steps, (op.steps + 1) >> 1),
            "vb_skip": last * op.dst_stride,
            "vb_words": op.dst + rows,
            "table_end": op.table + op.vectors,
            "bad_shape": Cat(op.vectors == 0, op.vectors > config.tokens, op.blocks == 0, op.steps == 0,
                             op.group_steps == 0, op.follows & (op.vectors != 1), op.turn >= config.turns).any(),
            "pc": queued_op.pc,
            "valid": moves,
        }  # fmt: skip
        terms = self._held(m, "terms", terms)
        ends = {
            "act_end": terms["act_skip"] + terms["act_words"],
            "vb_end": terms["vb_skip"] + terms["vb_words"],
            "table_end": terms["table_end"],
            "bad_shape": terms["bad_shape"],
            "pc": terms["pc"],
            "valid": terms["valid"],
        }
        ends = self._held(m, "ends", ends)
        beyond = Cat(
            ends["act_end"] > config.act_words,
            ends["vb_end"] > config.vb_words,
            ends["table_end"] > config.table_entries,
        ).any()
        kind = Mux(ends["bad_shape"], Error.SHAPE, Mux(beyond, Error.ADDRESS, Error.NONE))
        found = self._held(m, "found", {"code": Mux(ends["valid"], kind, Error.NONE), "pc": ends["pc"]})
        return found["code"], found["pc"]

    @staticmethod
    def _held(m, name, values):
        """A register behind each value."""
        held = {key: Signal(value.shape(), name=f"{name}_{key}") for key, value in values.items()}
        m.d.sync += [held[key].eq(value) for key, value in values.items()]
        return held
