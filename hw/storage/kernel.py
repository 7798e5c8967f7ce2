"""One attention kernel: beats in, attention of up to `lanes` queries of one KV head out (docs/storage.md).

The kernel is driven by one in-order stream of beats, so no two sources race; what a beat means is in its `op`.
Two identical kernels stand behind the flash channels, and either takes any computation.
"""

from amaranth import Array, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from golden.spec.storage import (
    ALPHA_FRAC,
    BEAT_ELEMENTS,
    GROUP_TOKENS,
    L_BITS,
    SCALE_BITS,
    SCALE_FRAC,
    SOFTMAX_SCALE,
)
from hw.lib.shared import place
from hw.lib.streams import StreamFIFO, check_count, connect
from hw.storage import lane as at
from hw.storage.fp import UNPACKED, Unpack16, pipe
from hw.storage.gemv import OPERANDS
from hw.storage.lane import QueryLane
from hw.storage.normalise import OUTPUT, STATE, Normaliser
from hw.storage.softmax import RING


class Op(enum.Enum, shape=3):
    """What a beat is."""

    START = 0
    """A new pass of a head; `data` holds `HEAD`. Waits until the kernel is empty."""
    QUERY = 1
    """16 elements of q of query `index`."""
    MEAN = 2
    """16 elements of v-bar."""
    K = 3
    """16 channels of one token; tokens of `mask` ascending, dh / 16 beats each."""
    V = 4
    """One dimension of 16 tokens; dh beats. Waits until the group's probabilities are there."""
    CHANNEL = 5
    """16 tokens of channel `index`."""
    DRAIN = 6
    """Score the next 16 accumulated tokens, those of `mask`; takes 16 cycles."""


HEAD = data.StructLayout({"wide": 1, "queries": 3, "approximate": 1, "sparse": 1})
"""`queries` is their number - 1; `sparse`: alpha, v-bar and the poison of the approximate pass count."""

BEAT = data.StructLayout(
    {
        "data": data.ArrayLayout(16, BEAT_ELEMENTS),
        "op": Op,
        "mask": GROUP_TOKENS,
        "index": 7,
        "first": 1,  # of a block of 16 tokens, of a row, of q of one query
        "last": 1,
        "flag": 1,  # V: the head's last block; CHANNEL: the first channel of its tokens; DRAIN: the first row
    }
)

SCALE = data.StructLayout({"c": SCALE_BITS, "frac": 5})
LANES_MAX = 8
KEY_QUEUE = 64
QUIET = 200
"""Cycles without a beat after which nothing is in flight, whatever went wrong before."""


class AttentionKernel(wiring.Component):
    """Ports:

    - `i`: beats. `o`: output elements. `scale`, `alpha`, `poison`: of the approximate pass and of the mix, per lane,
      held by the sequencer from the START beat on.
    - `key`: pooled scores of the approximate pass in token order. `probability`: what the softmax of each lane gives.
    - `softmax`: state of the query whose element stands at `o`; `state`: what it is for the mix, from the approximate
      pass, held like `alpha`.
    - `idle`: nothing is in flight but output elements; `sum` and `poisoned` are those of the pass that has ended.

    Timing: `hw.storage.timing` has the closed forms. A K or V block takes one cycle per beat; nothing inside stalls.
    """

    def __init__(self, lanes: int = 4):
        check_count("Query lanes of a kernel", lanes, 1)
        if lanes > LANES_MAX:
            raise ValueError(f"A kernel has at most {LANES_MAX} query lanes, not {lanes}")
        self._lanes = lanes
        super().__init__(
            {
                "i": In(stream.Signature(BEAT)),
                "o": Out(stream.Signature(OUTPUT)),
                "softmax": Out(STATE),
                "state": In(STATE).array(lanes),
                "scale": In(SCALE).array(lanes),
                "alpha": In(ALPHA_FRAC + 1).array(lanes),
                "poison": In(1).array(lanes),
                "key": Out(stream.Signature(32)),
                "probability": Out(at.PROBABILITY).array(lanes),
                "sum": Out(unsigned(L_BITS)).array(lanes),
                "poisoned": Out(1).array(lanes),
                "idle": Out(1),
            }
        )

    @property
    def lanes(self) -> int:
        """Queries that the kernel serves at once."""
        return self._lanes

    def elaborate(self, platform):
        m = Module()
        lanes = []
        for index in range(self._lanes):
            lane = place(m, platform, f"lane_{index}", "query_lane", QueryLane)
            lanes.append(lane)
            m.d.comb += [
                self.probability[index].eq(lane.probability),
                self.sum[index].eq(lane.sum),
                self.poisoned[index].eq(lane.poisoned),
            ]
        m.submodules.normaliser = normaliser = Normaliser(self._lanes)
        connect(m, wiring.flipped(self.o), normaliser.output)
        m.d.comb += self.softmax.eq(normaliser.softmax)

        control = Signal(at.CONTROL)
        self._busy = Signal()
        self._key_level = Signal(range(KEY_QUEUE + 1))
        head = Signal(HEAD)
        beat = Signal(BEAT)  # the input register: time 0
        valid = Signal()
        m.d.comb += [lane.control.eq(control) for lane in lanes]
        m.d.comb += [control.wide.eq(head.wide), control.approximate.eq(head.approximate)]
        draining = self._admit(m, lanes[0], normaliser, head, beat, valid)
        is_op = {op: Signal(name=f"is_{op.name.lower()}") for op in Op}
        for op, flag in is_op.items():
            m.d.comb += flag.eq(valid & (beat.op == op))

        count = Signal(7)  # beat of the block, row, or vector
        with m.If(valid & ~draining):
            m.d.sync += count.eq(Mux(beat.last, 0, count + 1))
        m.submodules.mean = mean = Memory(
            shape=OPERANDS, depth=8, init=[], attrs={"ram_style": "distributed"}
        )
        self._unpack(m, lanes, beat, is_op, count, mean)
        in_token = Signal(3)  # beat of the token
        m.d.comb += in_token.eq(Mux(head.wide, count[:3], count[:2]))
        self._operands(m, control, beat, is_op, count, in_token)
        self._scores(m, control, head, beat, is_op, in_token)
        self._rows(m, control, beat, is_op, count)
        self._outputs(m, control, normaliser, beat, is_op, count, head)
        self._pool(m, control, lanes, head)
        self._finish(m, lanes, normaliser, head, beat, is_op, mean)
        for index, lane in enumerate(lanes):
            constant = Mux(head.wide, SOFTMAX_SCALE[128], SOFTMAX_SCALE[64])
            m.d.sync += [
                lane.c.eq(Mux(head.approximate, self.scale[index].c, constant)),
                lane.frac.eq(Mux(head.approximate, self.scale[index].frac, SCALE_FRAC)),
            ]
        m.d.comb += control.start.eq(is_op[Op.START])
        return m

    def _admit(self, m, lane, normaliser, head, beat, valid):
        """Take a beat when what it needs is there; fills the input register. Returns `draining`: it holds a beat on."""
        incoming = self.i.p
        groups = Signal(range(RING + 1))  # between a group's first score and its last use
        scored = Signal(range(RING + 1))  # groups whose probabilities wait for V
        quiet = Signal(range(QUIET + 1))
        settling = Signal(range(at.LANES_TIME + 3))  # until the accumulators hold the last CHANNEL beat
        steps = Signal(4)  # of a DRAIN beat in the input register
        loading = Signal(range(at.OPERAND_TIME + 2))  # until q holds the last QUERY beat
        with m.If(self.i.valid & self.i.ready & (incoming.op == Op.QUERY)):
            m.d.sync += loading.eq(at.OPERAND_TIME + 1)
        with m.Elif(loading != 0):
            m.d.sync += loading.eq(loading - 1)
        draining = Signal()
        m.d.comb += draining.eq(valid & (beat.op == Op.DRAIN) & (steps != GROUP_TOKENS - 1))
        empty = (groups == 0) | (quiet == QUIET)
        room = Signal()
        m.d.comb += room.eq(groups != RING)
        allowed = Signal()
        with m.Switch(incoming.op):
            with m.Case(Op.START):
                m.d.comb += allowed.eq(empty & ~normaliser.busy & ~self._busy)
            with m.Case(Op.K):
                m.d.comb += allowed.eq(~incoming.first | room)
            with m.Case(Op.V):
                m.d.comb += allowed.eq(~incoming.first | (scored != 0))
            with m.Case(Op.CHANNEL):
                m.d.comb += allowed.eq(loading == 0)
            with m.Case(Op.DRAIN):
                m.d.comb += allowed.eq(room & (settling == 0) & (self._key_level < KEY_QUEUE // 2))
            with m.Default():
                m.d.comb += allowed.eq(1)
        taken = Signal()
        m.d.comb += [self.i.ready.eq(allowed & ~draining), taken.eq(self.i.valid & self.i.ready)]
        with m.If(taken):
            m.d.sync += beat.eq(incoming)
            with m.If(incoming.op == Op.START):
                m.d.sync += head.eq(Cat(incoming.data)[: len(head.as_value())])
            for element in range(BEAT_ELEMENTS):
                with m.If((incoming.op == Op.V) & ~incoming.mask[element]):
                    m.d.sync += beat.data[element].eq(0)
        with m.If(~draining):
            m.d.sync += valid.eq(taken)
        m.d.sync += steps.eq(Mux(draining, steps + 1, 0))
        self._steps = steps
        with m.If(taken & (incoming.op == Op.CHANNEL)):
            m.d.sync += settling.eq(at.LANES_TIME + 2)
        with m.Elif(settling != 0):
            m.d.sync += settling.eq(settling - 1)
        with m.If(taken | draining):
            m.d.sync += quiet.eq(0)
        with m.Elif(quiet != QUIET):
            m.d.sync += quiet.eq(quiet + 1)

        probability = lane.probability
        grown = taken & (((incoming.op == Op.K) & incoming.first) | (incoming.op == Op.DRAIN))
        shrunk = Mux(head.approximate, probability.last, taken & (incoming.op == Op.V) & incoming.last)
        ready = pipe(m, probability.last & ~head.approximate, at.P_STORE_LATENCY, "stored")
        with m.If(taken & (incoming.op == Op.START)):
            m.d.sync += [groups.eq(0), scored.eq(0)]
        with m.Else():
            m.d.sync += [
                groups.eq(groups + grown - shrunk),
                scored.eq(scored + ready - (taken & (incoming.op == Op.V) & incoming.first)),
            ]
        m.d.comb += self.idle.eq(empty & ~normaliser.busy & ~self._busy & ~valid)
        return draining

    def _unpack(self, m, lanes, beat, is_op, count, mean):
        """Elements with their leading ones in place at OPERAND_TIME; q and v-bar are stored that way."""
        operands = Signal(OPERANDS)
        for element in range(BEAT_ELEMENTS):
            m.submodules[f"unpack_{element}"] = unpack = Unpack16()
            m.d.comb += [unpack.i.eq(beat.data[element]), operands[element].eq(unpack.o)]
        load = pipe(m, is_op[Op.QUERY], at.OPERAND_TIME, "load")
        query = pipe(m, beat.index, at.OPERAND_TIME, "load_query")
        write = mean.write_port()
        m.d.comb += [
            write.addr.eq(pipe(m, count[:3], at.OPERAND_TIME, "mean_slice")),
            write.data.eq(operands),
            write.en.eq(pipe(m, is_op[Op.MEAN], at.OPERAND_TIME, "mean_load")),
        ]
        for index, lane in enumerate(lanes):
            m.d.comb += [lane.b.eq(operands), lane.load.eq(load & (query == index))]

    def _operands(self, m, control, beat, is_op, count, in_token):
        bank = Signal(range(RING))
        with m.If(is_op[Op.START]):
            m.d.sync += bank.eq(0)
        with m.Elif(is_op[Op.V] & beat.last):
            m.d.sync += bank.eq(bank + 1)
        self._bank = bank
        channel = is_op[Op.CHANNEL]
        source = Mux(channel, at.SOURCE_CHANNEL, Mux(is_op[Op.V], at.SOURCE_PROBABILITY, at.SOURCE_QUERY))
        m.d.comb += [
            control.slice_0.eq(Mux(channel, beat.index[4:], in_token)),
            control.element_1.eq(pipe(m, beat.index[:4], 1, "element")),
            control.bank_0.eq(bank),
            control.source_1.eq(pipe(m, source, 1, "source")),
            control.spread_2.eq(pipe(m, channel, at.OPERAND_TIME, "spread")),
            control.load_slice_2.eq(pipe(m, count[:3], at.OPERAND_TIME, "load_slice")),
        ]

    def _scores(self, m, control, head, beat, is_op, in_token):
        """Where each score belongs, delayed until the score is there."""
        left = Signal(GROUP_TOKENS)  # tokens of the block that are still to come, the present one included
        now = Signal(GROUP_TOKENS)
        m.d.comb += now.eq(Mux(beat.first, beat.mask, left))
        token_end = in_token == Mux(head.wide, 7, 3)
        lowest = now & (-now)[:GROUP_TOKENS]
        others = now & ~lowest
        with m.If(is_op[Op.K]):
            m.d.sync += left.eq(Mux(token_end, others, now))
        slot = Cat(
            (lowest & sum(1 << n for n in range(GROUP_TOKENS) if n >> bit & 1)).any() for bit in range(4)
        )
        tree = pipe(m, Cat(is_op[Op.K], in_token), at.DOT_TIME, "tree")
        exact = pipe(m, Cat(is_op[Op.K] & token_end, slot, others == 0), at.score_time(False), "exact")
        wider = pipe(m, exact, at.score_time(True) - at.score_time(False), "wider")
        step = Cat(self._steps)
        after = (beat.mask >> step)[1:].any()
        drained = pipe(
            m,
            Cat(is_op[Op.DRAIN] & beat.mask.bit_select(step, 1), step, ~after),
            at.APPROXIMATE_SCORE_TIME,
            "drained",
        )
        chosen = Mux(head.approximate, drained, Mux(head.wide, wider, exact))
        m.d.comb += [
            Cat(control.tree_valid, control.tree_beat).eq(tree),
            Cat(control.score_valid, control.score_slot, control.score_last).eq(chosen),
        ]

    def _rows(self, m, control, beat, is_op, count):
        """Accumulator rows of the approximate step: read, add, write; and read out again."""
        channel = is_op[Op.CHANNEL]
        drain_row = Signal(6)
        with m.If(is_op[Op.DRAIN] & (self._steps == GROUP_TOKENS - 1)):
            m.d.sync += drain_row.eq(drain_row + 1)
        with m.Elif(channel):
            m.d.sync += drain_row.eq(0)
        row = pipe(m, Cat(channel, beat.flag, count[:6]), at.PRODUCT_TIME - 1, "row")
        fresh = pipe(m, row[1], 1, "row_fresh")
        write = pipe(m, row, at.LANES_TIME - at.PRODUCT_TIME + 1, "row_write")
        m.d.comb += [
            control.row_read.eq(Mux(is_op[Op.DRAIN], drain_row, row[2:])),
            control.row_fresh.eq(fresh),
            control.row_write_en.eq(write[0]),
            control.row_write.eq(write[2:]),
            control.drain_element.eq(pipe(m, self._steps, at.DRAIN_TIME - 1, "drain_element")),
        ]

    def _outputs(self, m, control, normaliser, beat, is_op, count, head):
        first_block = Signal()
        with m.If(is_op[Op.START]):
            m.d.sync += first_block.eq(1)
        with m.Elif(is_op[Op.V] & beat.last):
            m.d.sync += first_block.eq(0)
        tag = pipe(m, Cat(is_op[Op.V], first_block, count, self._bank), at.RESCALE_TIME - 1, "output")
        row = slice(2, 2 + len(count))
        write = pipe(m, tag, at.TOTAL_TIME - at.RESCALE_TIME + 1, "output_write")
        m.d.comb += [
            control.bank_rescale.eq(tag[row.stop :]),
            control.output_read.eq(Mux(normaliser.busy, normaliser.address, tag[row])),
            control.output_fresh.eq(pipe(m, tag[1], 1, "output_fresh")),
            control.output_write_en.eq(write[0]),
            control.output_write.eq(write[row]),
        ]

    def _pool(self, m, control, lanes, head):
        """Sum of the group's scores per token, the keys of the token selection."""
        m.submodules.keys = keys = StreamFIFO(32, KEY_QUEUE)
        connect(m, wiring.flipped(self.key), keys.o)
        m.d.comb += self._key_level.eq(keys.level)
        terms = [Mux(head.queries >= index, lane.score.z, 0) for index, lane in enumerate(lanes)]
        total = Signal(32, reset_less=True)
        m.d.sync += [
            total.eq(sum(terms[1:], terms[0])),
            keys.i.valid.eq(control.score_valid & head.approximate),
        ]
        m.d.comb += keys.i.payload.eq(total)

    def _finish(self, m, lanes, normaliser, head, beat, is_op, mean):
        """After the head's last V beat has left the adders, normalise."""
        wait = Signal(range(at.TOTAL_TIME + 3))
        with m.If(is_op[Op.V] & beat.last & beat.flag):
            m.d.sync += wait.eq(at.TOTAL_TIME + 1)
        with m.Elif(wait != 0):
            m.d.sync += wait.eq(wait - 1)
        read = mean.read_port()
        element = pipe(m, normaliser.address[:4], 1, "mean_element")
        chosen = Signal(UNPACKED)
        special = chosen.exp == 63
        exponent = Mux(special, 255, Mux(chosen.exp == 0, 0, chosen.exp + 96))
        value = Cat(
            Mux(special & (chosen.frac != 0), Const(1 << 22, 23), Cat(Const(0, 13), chosen.frac)),
            exponent[:8],
        )
        sign = chosen.sign & ~(special & (chosen.frac != 0))
        held = Signal(32, reset_less=True)
        m.d.sync += held.eq(Mux(head.sparse, Cat(value, sign), 0))
        m.d.comb += [
            read.addr.eq(normaliser.address[4:]),
            read.en.eq(1),
            chosen.eq(read.data[element]),
            normaliser.mean.eq(held),
            normaliser.start.eq(wait == 1),
            normaliser.wide.eq(head.wide),
            normaliser.queries.eq(head.queries),
            normaliser.o.eq(Array(lane.o for lane in lanes)[pipe(m, normaliser.query, 1, "o_query")]),
            self._busy.eq((wait != 0) | (is_op[Op.V] & beat.last & beat.flag)),
        ]
        for index, lane in enumerate(lanes):
            m.d.comb += [
                normaliser.sums[index].eq(lane.sum),
                normaliser.states[index].sum.eq(Mux(head.sparse, self.state[index].sum, lane.sum)),
                normaliser.states[index].maximum.eq(
                    Mux(head.sparse, self.state[index].maximum, lane.probability.maximum)
                ),
                normaliser.poisoned[index].eq(lane.poisoned | (head.sparse & self.poison[index])),
                normaliser.alpha[index].eq(Mux(head.sparse, self.alpha[index], 1 << ALPHA_FRAC)),
            ]
