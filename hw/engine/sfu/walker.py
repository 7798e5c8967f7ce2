"""From a vector instruction to its beats: addresses, masks and the place of each word, pass after pass."""

from amaranth import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import EngineConfig, Error, Op
from golden.spec.formats import ATTN_TILE
from hw.engine.interfaces import VB_ADDR, VectorOp
from hw.engine.sfu.fetch import fetch_request

JOINING = (Op.ROPE, Op.GATE, Op.ADD)
"""Instructions whose `fresh` continues the vectors of the one before."""
ADDRESS_SUM = 25
"""An address before it is checked: the last vector may start 255 * 65535 words behind the first."""


class Pass(enum.Enum, shape=2):
    """Which of an instruction's passes a word belongs to."""

    SCAN = 0
    SQUARE = 1
    MAIN = 2


class Beat(data.StructLayout):
    """What travels with a word.

    `vector`: its index; `ordinal`: vectors before it in all passes but the scan; `mask`: elements that count (SOFTMAX:
    live slots); `dst`: VB word, or A8 group; `slot`: word within its group of 32; `first`, `last`: first and last word
    of the vector; `first_tile`: among its first 32 elements; `final`: last word of the instruction; `joins`: the vector
    goes on where the instruction before ended it.
    """

    def __init__(self, lanes: int):
        super().__init__(
            {
                "stage": Pass,
                "vector": unsigned(8),
                "ordinal": unsigned(9),
                "mask": unsigned(lanes),
                "dst": unsigned(VB_ADDR),
                "slot": unsigned(3),
                "first": unsigned(1),
                "first_tile": unsigned(1),
                "last": unsigned(1),
                "final": unsigned(1),
                "joins": unsigned(1),
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
        op, self._stage, fault = self.op, Signal(Pass), Signal(4)
        self._decode(m)
        self._state()
        m.d.comb += fault.eq(self._fault(op))
        outside, ends = self._beat(m)
        with m.FSM(name="walk"):
            with m.State("IDLE"):
                m.d.comb += self.i.ready.eq(1)
                with m.If(self.i.valid):
                    m.d.sync += op.eq(self.i.payload)
                    m.next = "CHECK"
            with m.State("CHECK"):
                scans = is_op(op.op, Op.NORM, Op.QUANT, Op.KVQUANT) & ~op.fresh
                m.d.sync += self._stage.eq(Mux(scans, Pass.SCAN, self._after_scan(op)))
                self._first_vector(m)
                m.d.sync += self._ordinal.eq(0)
                m.d.comb += self.accepted.eq(fault == Error.NONE.value)
                m.next = "WALK"
                with m.If(~self.accepted):
                    m.d.sync += self.error.eq(fault)
                    m.next = "STOPPED"
            with m.State("WALK"):
                m.d.comb += self.o.valid.eq(~outside)
                with m.If(outside):
                    m.d.sync += self.error.eq(Error.ADDRESS.value)
                    m.next = "STOPPED"
                with m.Elif(self.o.ready):
                    self._step(m, ends)
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
        counted = op.counted & (op.vectors != 1)
        shape = (op.count == 0) | (op.vectors == 0) | kv | softmax | rope | counted
        entries = is_op(op.op, Op.QUANT, Op.SOFTMAX) & (op.table + op.vectors > self._config.table_entries)
        states = (op.op == int(Op.SOFTMAX)) & op.export & (op.state + op.vectors > self._config.vb_words)
        return Mux(
            ~known,
            Error.ILLEGAL_INSTRUCTION.value,
            Mux(shape, Error.SHAPE.value, Mux(entries | states, Error.ADDRESS.value, Error.NONE.value)),
        )

    def _decode(self, m: Module) -> None:
        """What the opcode says, registered while the instruction is checked."""
        code = self.op.op
        for name, ops in {
            "softmax": (Op.SOFTMAX,),
            "groups": (Op.QUANT, Op.SOFTMAX),
            "words": (Op.NORM, Op.ROPE, Op.GATE, Op.ADD),
            "b": (Op.NORM, Op.ROPE, Op.GATE, Op.ADD, Op.SOFTMAX),
        }.items():
            flag = Signal(name=f"is_{name}")
            m.d.sync += flag.eq(is_op(code, *ops))
            setattr(self, f"_is_{name}", flag)
        self._joins = Signal()
        m.d.sync += self._joins.eq(is_op(code, *JOINING) & self.op.fresh)

    def _state(self) -> None:
        """Where the walk stands; everything is a register, so that a beat is a few gates behind it.

        `base_*`, `address_*`: first word of the vector and word at hand. `words`: words left in the vector. `room_*`:
        elements from the word at hand to a bound, not positive when it is passed.
        """
        self._base = {name: Signal(ADDRESS_SUM, name=f"base_{name}") for name in ("a", "b", "dst")}
        self._address = {name: Signal(ADDRESS_SUM, name=f"address_{name}") for name in self._base}
        self._words = Signal(17)
        self._vectors = Signal(8)
        self._vector = Signal(8)
        self._ordinal = Signal(9)
        self._slot = Signal(range(max(2, ATTN_TILE // self._config.vector_lanes)))
        self._first, self._first_tile = Signal(), Signal()
        self._room = {
            name: Signal(signed(18), name=f"room_{name}") for name in ("count", "low", "high", "sinks")
        }
        self._token_low, self._token_high = Signal(signed(18)), Signal(signed(18))
        self._in_token = Signal(5)

    def _beat(self, m: Module) -> tuple:
        """The beat at hand; returns whether it lies outside a buffer that it uses, and the ends of vector and walk."""
        out, config, lanes = self.o.p, self._config, self._config.vector_lanes
        main = self._stage == Pass.MAIN
        last_word, last_vector = self._words == 1, self._vectors == 1
        below = {name: _below(room, lanes) for name, room in self._room.items()}
        live = below["sinks"] | (below["high"] & ~below["low"])
        m.d.comb += [
            out.a.eq(self._address["a"]),
            out.b.eq(self._address["b"]),
            out.use_b.eq(main & self._is_b),
            out.tag.stage.eq(self._stage),
            out.tag.vector.eq(self._vector),
            out.tag.ordinal.eq(self._ordinal),
            out.tag.dst.eq(self._address["dst"]),
            out.tag.slot.eq(self._slot),
            out.tag.first.eq(self._first),
            out.tag.first_tile.eq(self._first_tile),
            out.tag.last.eq(last_word),
            out.tag.joins.eq(self._joins),
            out.tag.final.eq(last_word & last_vector & main),
            out.tag.mask.eq(below["count"] & (live | ~self._is_softmax.replicate(lanes))),
        ]
        beyond_words = {name: address >= config.vb_words for name, address in self._address.items()}
        beyond_groups = self._address["dst"] >= 2 * config.act_words
        dst = (self._is_words & beyond_words["dst"]) | (self._is_groups & beyond_groups)
        outside = beyond_words["a"] | (main & ((self._is_b & beyond_words["b"]) | dst))
        return outside, (last_word, last_vector)

    def _first_vector(self, m: Module) -> None:
        op = self.op
        for name, address in (("a", op.addr), ("b", op.addr_b), ("dst", op.dst)):
            m.d.sync += [self._base[name].eq(address), self._address[name].eq(address)]
        low, high = op.low.as_signed(), op.high
        m.d.sync += [
            self._vector.eq(0),
            self._vectors.eq(op.vectors),
            self._in_token.eq(op.vec_group),
            self._token_low.eq(low),
            self._token_high.eq(high),
        ]
        self._first_word(m, low, high)

    def _first_word(self, m: Module, low, high) -> None:
        op, lanes = self.op, self._config.vector_lanes
        slots, lane_bits = ATTN_TILE // lanes, (lanes - 1).bit_length()
        tiles = (op.count + (ATTN_TILE - 1)) >> 5
        words = Mux(
            op.op == int(Op.SOFTMAX), tiles << (slots - 1).bit_length(), (op.count + (lanes - 1)) >> lane_bits
        )
        m.d.sync += [
            self._words.eq(words),
            self._slot.eq(0),
            self._first.eq(1),
            self._first_tile.eq(1),
            self._room["count"].eq(op.count),
            self._room["sinks"].eq(op.sinks),
            self._room["low"].eq(low),
            self._room["high"].eq(high),
        ]

    def _step(self, m: Module, ends: tuple) -> None:
        """To the next word, vector or pass, or back to idle."""
        last_word, last_vector = ends
        lanes = self._config.vector_lanes
        group_ends = self._slot == ATTN_TILE // lanes - 1
        m.d.sync += [
            self._words.eq(self._words - 1),
            self._slot.eq(Mux(group_ends, 0, self._slot + 1)),
            self._first.eq(0),
            self._address["a"].eq(self._address["a"] + 1),
            self._address["b"].eq(self._address["b"] + 1),
            self._address["dst"].eq(self._address["dst"] + (group_ends | ~self._is_groups)),
        ]
        with m.If(group_ends):
            m.d.sync += self._first_tile.eq(0)
        for room in self._room.values():
            # A bound that is passed stays passed: the counter must not wrap in a long vector.
            with m.If(room > -lanes):
                m.d.sync += room.eq(room - lanes)
        with m.If(last_word & (self._stage != Pass.SCAN)):
            m.d.sync += self._ordinal.eq(self._ordinal + 1)
        with m.If(last_word & last_vector):
            self._first_vector(m)
            m.d.sync += self._stage.eq(Mux(self._stage == Pass.SCAN, self._after_scan(self.op), Pass.MAIN))
            with m.If(self._stage == Pass.MAIN):
                m.next = "IDLE"
        with m.Elif(last_word):
            self._next_vector(m)

    def _next_vector(self, m: Module) -> None:
        op = self.op
        for name, stride in (("a", op.stride), ("b", op.stride_b), ("dst", op.dst_stride)):
            following = self._base[name] + stride
            m.d.sync += [self._base[name].eq(following), self._address[name].eq(following)]
        token_ends = self._in_token == 1
        low, high = self._token_low + token_ends, self._token_high + token_ends
        m.d.sync += [
            self._vector.eq(self._vector + 1),
            self._vectors.eq(self._vectors - 1),
            self._in_token.eq(Mux(token_ends, op.vec_group, self._in_token - 1)),
            self._token_low.eq(low),
            self._token_high.eq(high),
        ]
        self._first_word(m, low, high)


def _below(room, lanes: int):
    """Bit k of the result: whether element k of the word is before a bound that is `room` elements away."""
    some = ~room[-1] & (room[lanes.bit_length() - 1 : -1].any())
    return Cat(some | (~room[-1] & (room[: lanes.bit_length() - 1] > k)) for k in range(lanes))
