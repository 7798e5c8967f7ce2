"""From a vector instruction to its beats: addresses, masks and the place of each word, pass after pass."""

from amaranth import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import EngineConfig, Error, Op
from golden.spec.formats import ATTN_TILE
from hw.engine.interfaces import VB_ADDR, VectorOp
from hw.engine.sfu.fetch import fetch_request

ADDRESS_SUM = 25
"""An address before it is checked: the last vector may start 255 * 65535 words behind the first."""


class Pass(enum.Enum, shape=2):
    """Which of an instruction's passes a word belongs to."""

    SCAN = 0
    SQUARE = 1
    MAIN = 2


class Beat(data.StructLayout):
    """What travels with a word.

    `vector`: its index; `mask`: elements that count (SOFTMAX: live slots); `dst`: VB word, or A8 group; `slot`: word
    within its group of 32; `first`, `last`: first and last word of the vector; `first_tile`: among its first 32
    elements; `final`: last word of the instruction.
    """

    def __init__(self, lanes: int):
        super().__init__(
            {
                "stage": Pass,
                "vector": unsigned(8),
                "mask": unsigned(lanes),
                "dst": unsigned(VB_ADDR),
                "slot": unsigned(3),
                "first": unsigned(1),
                "first_tile": unsigned(1),
                "last": unsigned(1),
                "final": unsigned(1),
            }
        )


def is_op(op, *ops: Op):
    """Whether an opcode field is one of `ops`."""
    return Cat(op == int(one) for one in ops).any()


class Walker(wiring.Component):
    """Takes one instruction, checks it, and sends its beats; then takes the next.

    `op` holds the instruction until the next one is taken. `error` is sticky: the `Error` of an illegal instruction,
    for which no beat is sent, or of a word outside the buffers, before which the beats end. `latency` cycles from an
    instruction's transfer to its first beat, then one beat per cycle.
    """

    latency = 2

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "i": In(stream.Signature(VectorOp)),
                "o": Out(stream.Signature(fetch_request(Beat(config.vector_lanes)))),
                "op": Out(VectorOp),
                "accepted": Out(1),
                "error": Out(4),
            }
        )

    def elaborate(self, platform):
        m = Module()
        op, stage = self.op, Signal(Pass)
        bases = {name: Signal(ADDRESS_SUM, name=f"base_{name}") for name in ("a", "b", "dst")}
        addresses = {name: Signal(ADDRESS_SUM, name=f"address_{name}") for name in bases}
        outside, fault = Signal(), Signal(4)
        m.d.comb += [outside.eq(self._outside(addresses, stage)), fault.eq(self._fault(op))]
        last_word, last_vector = self._beat(m, bases, addresses, stage)
        with m.FSM(name="walk"):
            with m.State("IDLE"):
                m.d.comb += self.i.ready.eq(1)
                with m.If(self.i.valid):
                    m.d.sync += op.eq(self.i.payload)
                    m.next = "CHECK"
            with m.State("CHECK"):
                scans = is_op(op.op, Op.NORM, Op.QUANT, Op.KVQUANT) & ~op.fresh
                m.d.sync += stage.eq(Mux(scans, Pass.SCAN, self._after_scan(op)))
                self._restart(m, bases)
                m.next = "WALK"
                m.d.comb += self.accepted.eq(fault == Error.NONE.value)
                with m.If(~self.accepted):
                    m.d.sync += self.error.eq(fault)
                    m.next = "STOPPED"
            with m.State("WALK"):
                m.d.comb += self.o.valid.eq(~outside)
                with m.If(outside):
                    m.d.sync += self.error.eq(Error.ADDRESS.value)
                    m.next = "STOPPED"
                with m.Elif(self.o.ready):
                    self._step(m, bases, stage, last_word, last_vector)
            with m.State("STOPPED"):
                pass
        return m

    @staticmethod
    def _after_scan(op):
        return Mux(op.op == int(Op.NORM), Pass.SQUARE, Pass.MAIN)

    def _fault(self, op):
        """The `Error` of the instruction as such."""
        known = is_op(op.op, Op.NORM, Op.QUANT, Op.ROPE, Op.GATE, Op.SOFTMAX, Op.KVQUANT, Op.ADD)
        kv = (op.op == int(Op.KVQUANT)) & (op.count[:5].any() | ((op.bits != 4) & (op.bits != 8)))
        softmax = (op.op == int(Op.SOFTMAX)) & (op.vec_group == 0)
        rope = (op.op == int(Op.ROPE)) & op.count[0]
        shape = (op.count == 0) | (op.vectors == 0) | kv | softmax | rope
        entries = is_op(op.op, Op.QUANT, Op.SOFTMAX) & (op.table + op.vectors > self._config.table_entries)
        return Mux(
            ~known,
            Error.ILLEGAL_INSTRUCTION.value,
            Mux(shape, Error.SHAPE.value, Mux(entries, Error.ADDRESS.value, Error.NONE.value)),
        )

    def _outside(self, addresses: dict, stage):
        """Whether the word at hand lies outside a buffer that it uses."""
        op, config = self.op.op, self._config
        to_groups = is_op(op, Op.QUANT, Op.SOFTMAX)
        to_words = is_op(op, Op.NORM, Op.ROPE, Op.GATE, Op.ADD)
        dst = (to_words & (addresses["dst"] >= config.vb_words)) | (
            to_groups & (addresses["dst"] >= 2 * config.act_words)
        )
        b = self.o.p.use_b & (addresses["b"] >= config.vb_words)
        return (addresses["a"] >= config.vb_words) | b | ((stage == Pass.MAIN) & dst)

    def _beat(self, m: Module, bases: dict, addresses: dict, stage) -> tuple:
        """The beat at the current position; returns whether it ends its vector, and whether that is the last one."""
        op, out, lanes = self.op, self.o.p, self._config.vector_lanes
        slots = ATTN_TILE // lanes
        slot_bits, lane_bits = (slots - 1).bit_length(), (lanes - 1).bit_length()
        self._word, self._vector = Signal(17), Signal(8)
        self._token, self._in_token = Signal(8), Signal(5)
        word, softmax = self._word, op.op == int(Op.SOFTMAX)
        words = Mux(
            softmax, ((op.count + (ATTN_TILE - 1)) >> 5) << slot_bits, (op.count + (lanes - 1)) >> lane_bits
        )
        last_word, last_vector = word == words - 1, self._vector == op.vectors - 1
        in_groups = is_op(op.op, Op.QUANT, Op.SOFTMAX)
        m.d.comb += [
            addresses["a"].eq(bases["a"] + word),
            addresses["b"].eq(bases["b"] + word),
            addresses["dst"].eq(bases["dst"] + Mux(in_groups, word >> slot_bits, word)),
            out.a.eq(addresses["a"]),
            out.b.eq(addresses["b"]),
            out.use_b.eq((stage == Pass.MAIN) & ~is_op(op.op, Op.QUANT, Op.KVQUANT)),
            out.tag.stage.eq(stage),
            out.tag.vector.eq(self._vector),
            out.tag.dst.eq(addresses["dst"]),
            out.tag.slot.eq(word[:slot_bits] if slot_bits else 0),
            out.tag.first.eq(word == 0),
            out.tag.first_tile.eq(word < slots),
            out.tag.last.eq(last_word),
            out.tag.final.eq(last_word & last_vector & (stage == Pass.MAIN)),
        ]
        start = word << lane_bits
        inside = _below(op.count, start, lanes)
        low = op.low.as_signed() + self._token
        window = _below(op.high + self._token, start, lanes) & ~_below(low, start, lanes)
        live = window | _below(op.sinks, start, lanes)
        m.d.comb += out.tag.mask.eq(Mux(softmax, inside & live, inside))
        return last_word, last_vector

    def _restart(self, m: Module, bases: dict) -> None:
        op = self.op
        m.d.sync += [
            bases["a"].eq(op.addr),
            bases["b"].eq(op.addr_b),
            bases["dst"].eq(op.dst),
            self._word.eq(0),
            self._vector.eq(0),
            self._token.eq(0),
            self._in_token.eq(0),
        ]

    def _step(self, m: Module, bases: dict, stage, last_word, last_vector) -> None:
        op = self.op
        m.d.sync += self._word.eq(self._word + 1)
        with m.If(last_word):
            m.d.sync += [
                self._word.eq(0),
                self._vector.eq(self._vector + 1),
                bases["a"].eq(bases["a"] + op.stride),
                bases["b"].eq(bases["b"] + op.stride_b),
                bases["dst"].eq(bases["dst"] + op.dst_stride),
                self._in_token.eq(self._in_token + 1),
            ]
            with m.If(self._in_token == op.vec_group - 1):
                m.d.sync += [self._in_token.eq(0), self._token.eq(self._token + 1)]
            with m.If(last_vector):
                self._restart(m, bases)
                m.d.sync += stage.eq(Mux(stage == Pass.SCAN, self._after_scan(op), Pass.MAIN))
                with m.If(stage == Pass.MAIN):
                    m.next = "IDLE"


def _below(bound, start, lanes: int):
    """Bit k of the result: whether element `start + k` is below `bound`."""
    room = bound - start
    count = Mux(room < 0, 0, Mux(room > lanes, lanes, room))[: lanes.bit_length()]
    return Cat(count > k for k in range(lanes))
