"""The online softmax: scores in, probability codes, sidecars and final scales out (docs/formats.md section 8).

Words of L scores stream through three stretches, each waiting in a queue for what its tile of 32 still has to show:

1. the tile's largest live score moves the running maximum M to M', in whole log2 units, and gives the shift d = M' - M;
2. each lane forms p = exp2(z - M') and w = p * int24(V scale); the tile gives the sum of p, the sum of
   p * int24(V minimum) and the bit length of the largest w, which is the largest bit length of any w;
3. that bit length gives the tile's shift sh, each lane rounds w to a 7-bit code, and the group of 32 is written.

The sum l runs along at one tile per cycle; its final reciprocal is divided out while the next vector streams.
One word enters per cycle; nothing ever stalls but the first word of a vector while `VECTORS_IN_FLIGHT` others wait for
their reciprocal.
"""

from amaranth import Array, Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec import formats
from golden.spec.engine import SOFTMAX_EMPTY
from hw.engine.interfaces import GROUP_ADDR, TABLE_ADDR, act_write, table_write
from hw.engine.sfu import tables
from hw.engine.sfu.scalars import RECIP_BITS, RECIP_ONE
from hw.lib import arith
from hw.lib.pipeline import Pipe, tree_cycles
from hw.lib.streams import StreamFIFO, check_count

TILE = formats.ATTN_TILE
EMPTY_MAX = SOFTMAX_EMPTY
"""Running maximum before any live slot: the first shift is then the largest, of a zero sum."""
MAX_BITS = signed(21)
DECAY_MAX = 63
L_BITS = 48
"""2**16 slots of probability 1.0 with 31 fraction bits."""
P_BITS = formats.P_FRAC + 1
W_BITS = P_BITS + 11
W_EXPONENT = 5
W_LENGTH = 6
"""Bit length of p * int24(scale): at most 57."""
MIN_SUM = signed(64)
SH_MIN = formats.P_FRAC
CODE_LIFT = 6
"""A code whose shift is negative is at most this much left of its product, or it would exceed seven bits."""
FINISH_SHIFT = 23
QUEUE = 32
VECTORS_IN_FLIGHT = 8
DIVIDE_PERIOD = RECIP_BITS // 2 + 4
"""Cycles between the reciprocals of two vectors."""


def softmax_word(lanes: int) -> data.StructLayout:
    """Input: scores (Q16, log2 units), V records, live flags, and where the word stands in its tile and vector.

    `start`: first word of the vector; `first_tile`: any word of its first tile; `tile_last`: last word of a tile;
    `last`: last word of the vector; `final`: of the instruction. `group` and `table` are write addresses.
    """
    return data.StructLayout(
        {
            "z": data.ArrayLayout(signed(32), lanes),
            "scale": data.ArrayLayout(unsigned(16), lanes),
            "minimum": data.ArrayLayout(unsigned(16), lanes),
            "live": data.ArrayLayout(unsigned(1), lanes),
            "start": unsigned(1),
            "place": _Place,
        }
    )


class _Place(data.Struct):
    first_tile: unsigned(1)
    tile_last: unsigned(1)
    last: unsigned(1)
    final: unsigned(1)
    group: unsigned(GROUP_ADDR)
    table: unsigned(TABLE_ADDR)


class _TileTop(data.Struct):
    """What stretch 1 knows of a tile."""

    top: MAX_BITS
    decay: unsigned(6)


class _TileSum(data.Struct):
    """What stretch 2 knows of a tile."""

    length: unsigned(W_LENGTH)
    minima: MIN_SUM
    p: unsigned(P_BITS + 5)
    decay: unsigned(6)
    place: _Place


class _Final(data.Struct):
    l: unsigned(L_BITS)
    table: unsigned(TABLE_ADDR)
    final: unsigned(1)


class SoftmaxState(data.Struct):
    """What a vector's softmax ended in: golden.spec.engine.SOFTMAX_STATE."""

    maximum: MAX_BITS
    sum: unsigned(L_BITS)


def fp16_parts(half) -> tuple:
    """(11-bit mantissa, exponent of int24, sign) of finite binary16 bits: int24 = mantissa << exponent."""
    normal = half[10:15].any()
    return Cat(half[:10], normal), Mux(normal, half[10:15] - 1, 0)[:W_EXPONENT], half[15]


class Exp2(wiring.Component):
    """`p = exp2(-x)` of docs/formats.md section 9, 16 bit, 1.0 = 2**15; `latency` cycles, one value per cycle."""

    X_BITS = 33
    latency = 4

    def __init__(self):
        super().__init__({"x": In(unsigned(self.X_BITS)), "p": Out(unsigned(P_BITS))})

    def elaborate(self, platform):
        m = Module()
        pipe = Pipe(m)
        table = tables.exp2_table()
        rows = [(low, low - high) for low, high in zip(table, table[1:])]
        fraction_bits = formats.VEC_FRAC - formats.EXP2_SEGMENTS_LOG2
        segment = self.x[fraction_bits : formats.VEC_FRAC]
        whole = self.x[formats.VEC_FRAC :]
        base = pipe.reg(Array(Const(base, P_BITS) for base, _ in rows)[segment], "base")
        fall = pipe.reg(Array(Const(fall, 9) for _, fall in rows)[segment], "fall")
        fraction = pipe.reg(self.x[:fraction_bits], "fraction")
        count = pipe.reg(Mux(whole[5:].any(), 31, whole[:5]), "count", 3)
        product = pipe.reg(fall * fraction, "product")
        value = pipe.reg(
            (pipe.reg(base, "base_late") - arith.rnd_shift(product, fraction_bits))[:P_BITS], "value"
        )
        m.d.comb += self.p.eq(pipe.reg(arith.rnd_shift(value, count)[:P_BITS], "p"))
        return m


class SoftmaxUnit(wiring.Component):
    """Scores of one vector after the other to A8 groups with sidecars, and one output scale per vector.

    `i`: stream of `softmax_word`; whole tiles, of which dead words may hold anything. `act`: one write per tile;
    `table`: (g, rl, 23) per vector, (0, 0, 23) when no slot is live. `state`: maximum and sum per vector, before
    its `table` write; the next vector's reciprocal waits for the transfer. `idle`: nothing is inside. `ended`: the
    `table` write is that of an instruction's last vector.

    Timing, from the transfer of a tile's last word to its `act` write: `tile_latency_of(lanes)`; from the transfer of a
    vector's last word to its `table` write: `vector_latency_of(lanes)`, when no earlier vector waits for the divider.
    Raises ValueError unless `lanes` is 4 to 32 and divides 32.
    """

    def __init__(self, lanes: int):
        check_count("Lanes of a softmax unit", lanes, 4)
        if TILE % lanes:
            raise ValueError(f"Lanes of a softmax unit must divide a tile of {TILE}, not {lanes}")
        self._lanes = lanes
        super().__init__(
            {
                "i": In(stream.Signature(softmax_word(lanes))),
                "act": Out(act_write()),
                "table": Out(table_write()),
                "state": Out(stream.Signature(SoftmaxState)),
                "idle": Out(1),
                "ended": Out(1),
            }
        )

    @staticmethod
    def tile_latency_of(lanes: int) -> int:
        """From the transfer of a tile's last word to the cycle of its `act` write, when words arrive back to back."""
        top = tree_cycles(lanes) + 5  # ... to the tile's maximum at the head of its queue
        sums = 1 + Exp2.latency + 2 + 2 + tree_cycles(lanes, 2) + 2  # ... to its sums at the head of theirs
        return top + sums + 2 * (TILE // lanes - 1) + 4

    @staticmethod
    def vector_latency_of(lanes: int) -> int:
        """From the transfer of a vector's last word to the cycle of its `table` write, likewise."""
        return SoftmaxUnit.tile_latency_of(lanes) + RECIP_BITS // 2 + 2

    def elaborate(self, platform):
        m = Module()
        waiting = Signal(range(VECTORS_IN_FLIGHT + 1))
        begin = self.i.valid & self.i.ready & self.i.p.start
        m.d.comb += [
            self.i.ready.eq(~self.i.p.start | (waiting != VECTORS_IN_FLIGHT)),
            self.idle.eq((waiting == 0) & ~self.state.valid),
        ]
        m.d.sync += waiting.eq(waiting + begin - self.table.en)

        m.submodules.words = words = StreamFIFO(self.i.p.shape(), QUEUE)
        m.submodules.tops = tops = StreamFIFO(_TileTop, QUEUE)
        m.d.comb += [words.i.payload.eq(self.i.payload), words.i.valid.eq(self.i.valid & self.i.ready)]
        self._running_maximum(m, tops.i)

        step = words.o.valid & tops.o.valid
        m.d.comb += [words.o.ready.eq(step), tops.o.ready.eq(step & words.o.p.place.tile_last)]
        weights = data.ArrayLayout(
            data.StructLayout({"w": unsigned(W_BITS), "e": unsigned(W_EXPONENT)}), self._lanes
        )
        m.submodules.weights = products = StreamFIFO(weights, QUEUE)
        m.submodules.sums = sums = StreamFIFO(_TileSum, QUEUE)
        self._probabilities(m, words.o.p, tops.o.p, step, products.i, sums.i)

        take = products.o.valid & sums.o.valid
        slot = Signal(range(max(2, TILE // self._lanes)))
        tile_end = slot == TILE // self._lanes - 1
        m.d.comb += [products.o.ready.eq(take), sums.o.ready.eq(take & tile_end)]
        with m.If(take):
            m.d.sync += slot.eq(Mux(tile_end, 0, slot + 1))
        self._codes(m, products.o.p, sums.o.p, take, tile_end)
        self._sum(m, sums.o.p, take & tile_end)
        return m

    def _running_maximum(self, m: Module, out) -> None:
        """Stretch 1: one entry of `out` per tile."""
        pipe = Pipe(m, "top_")
        word, cycles = self.i.p, 1 + tree_cycles(self._lanes)
        lowest = -(1 << 31)
        live = [pipe.reg(Mux(word.live[k], word.z[k], lowest), f"live_{k}") for k in range(self._lanes)]
        best = pipe.tree(live, lambda x, y: Mux(x > y, x, y), "score")
        any_live = pipe.reg(word.live.as_value().any(), "any", cycles)
        place = pipe.reg(word.place, "place", cycles)
        valid = _valid(m, self.i.valid & self.i.ready, cycles + 2, "top")

        # The words of a tile, one after the other; then the ceiling; then the running maximum.
        held, held_any, fresh = Signal(signed(32)), Signal(), Signal(init=1)
        score = Mux(~fresh & (held > best), held, best)
        seen = any_live | (~fresh & held_any)
        with m.If(valid[cycles]):
            m.d.sync += [held.eq(score), held_any.eq(seen), fresh.eq(place.tile_last)]
        ceiling = pipe.reg((score + ((1 << formats.VEC_FRAC) - 1)) >> formats.VEC_FRAC, "ceiling")
        seen_late, place_late = pipe.reg(seen, "seen"), pipe.reg(place, "place_late")
        running = Signal(MAX_BITS, init=EMPTY_MAX)
        old = Mux(place_late.first_tile, EMPTY_MAX, running)
        new = Mux(seen_late & (ceiling > old), ceiling, old)
        ends = valid[cycles + 1] & place_late.tile_last
        with m.If(ends):
            m.d.sync += running.eq(new)
        ended = Signal()
        rise = running - pipe.reg(old, "old")
        m.submodules.maxima = self._maxima = StreamFIFO(MAX_BITS, VECTORS_IN_FLIGHT)
        m.d.comb += [
            self._maxima.i.valid.eq(ended & pipe.reg(place_late.last, "last")),
            self._maxima.i.payload.eq(running),
        ]
        m.d.sync += [
            ended.eq(ends),
            out.valid.eq(ended),
            out.p.top.eq(running),
            out.p.decay.eq(Mux(rise > DECAY_MAX, DECAY_MAX, rise)),
        ]

    def _probabilities(self, m: Module, word, top, step, products, sums) -> None:
        """Stretch 2: a word of products into `products`, one entry of `sums` per tile."""
        pipe = Pipe(m, "p_")
        lanes, cycles = self._lanes, tree_cycles(self._lanes)
        to_p, to_w = 1 + Exp2.latency, 1 + Exp2.latency + 2
        ps, lengths, minima = [], [], []
        for k in range(lanes):
            m.submodules[f"exp2_{k}"] = exp2 = Exp2()
            distance = Cat(Const(0, formats.VEC_FRAC), top.top).as_signed() - word.z[k]
            m.d.comb += exp2.x.eq(pipe.reg(distance[: Exp2.X_BITS], f"distance_{k}"))
            p = Mux(pipe.reg(word.live[k], f"live_{k}", to_p), exp2.p, 0)
            ps.append(p)
            s_m, s_e, _ = fp16_parts(pipe.reg(word.scale[k], f"scale_{k}", to_p))
            n_m, n_e, n_sign = fp16_parts(pipe.reg(word.minimum[k], f"minimum_{k}", to_p))
            w, e = pipe.reg(p * s_m, f"w_{k}", 2), pipe.reg(s_e, f"e_{k}", 2)
            m.d.comb += [products.p[k].w.eq(w), products.p[k].e.eq(e)]
            length = pipe.reg(arith.bit_length(w), f"w_length_{k}")
            with_exponent = Mux(length.any(), length + pipe.reg(e, f"e_late_{k}"), 0)[:W_LENGTH]
            lengths.append(pipe.reg(with_exponent, f"length_{k}"))
            minima.append(_shifted_minimum(pipe, k, pipe.reg(p * n_m, f"n_{k}", 2), n_e, n_sign))
        # Comparing takes more gates than adding: two lengths per cycle, and the sums wait.
        at = to_w + 2 + tree_cycles(lanes, 2)
        wait = tree_cycles(lanes, 2) - cycles
        valid = _valid(m, step, at, "p")
        m.d.comb += products.valid.eq(valid[to_w])

        total = pipe.reg(pipe.tree(ps, lambda x, y: x + y, "sum"), "sum_late", 4 + wait)
        length = pipe.tree(lengths, lambda x, y: Mux(x > y, x, y), "longest", 2)
        minimum = pipe.reg(pipe.tree(minima, lambda x, y: x + y, "minima"), "minimum_late", wait)
        place, decay = pipe.reg(word.place, "place", at), pipe.reg(top.decay, "decay", at)
        fresh = Signal(init=1)
        held = Signal(_TileSum)
        longest = Mux(~fresh & (held.length > length), held.length, length)
        with m.If(valid[at]):
            m.d.sync += [
                held.length.eq(longest),
                held.p.eq(total + Mux(fresh, 0, held.p)),
                held.minima.eq(minimum + Mux(fresh, 0, held.minima)),
                held.place.eq(place),
                held.decay.eq(decay),
                fresh.eq(place.tile_last),
            ]
        m.d.sync += sums.valid.eq(valid[at] & place.tile_last)
        m.d.comb += sums.payload.eq(held)

    def _codes(self, m: Module, products, tile, take, tile_end) -> None:
        """Stretch 3: the tile's shift, each lane's code, and the write of the group."""
        pipe = Pipe(m, "code_")
        lanes = self._lanes
        # Below the least shift every code rounds with it; a longer product loses all but seven bits.
        code_bits = formats.P_CODE_BITS
        shift = Mux(tile.length > SH_MIN + code_bits, tile.length - code_bits, SH_MIN)[:W_LENGTH]
        codes = []
        for k in range(lanes):
            w = pipe.reg(products[k].w, f"w_{k}")
            count = pipe.reg((shift + CODE_LIFT - products[k].e)[:W_LENGTH], f"count_{k}")
            coarse = pipe.reg(
                arith.shift_left(w, CODE_LIFT + 1) >> Cat(Const(0, 3), count[3:]), f"coarse_{k}"
            )
            rounded = arith.round_half(coarse >> pipe.reg(count[:3], f"fine_{k}"))
            top = (1 << code_bits) - 1
            codes.append(pipe.reg(Mux(rounded > top, top, rounded)[:8], f"code_{k}"))
        ends, written = pipe.reg(tile_end, "ends", 3), _valid(m, take, 3, "code")[3]
        place, decay, shift_late = (
            pipe.reg(tile.place, "place", 3),
            pipe.reg(tile.decay, "decay", 3),
            pipe.reg(shift, "shift", 3),
        )
        minima = pipe.reg(arith.rnd_shift(tile.minima, formats.P_FRAC), "minima", 3)
        group = Signal(8 * TILE)
        joined = Cat(group[8 * lanes :], *codes)
        with m.If(written):
            m.d.sync += group.eq(joined)
        m.d.comb += self.act.codes.eq(group)
        m.d.sync += [
            self.act.en.eq(written & ends),
            self.act.addr.eq(place.group),
            self.act.side.addend.eq(minima),
            self.act.side.shift.eq(shift_late - SH_MIN),
            self.act.side.decay.eq(decay),
        ]

    def _sum(self, m: Module, tile, take) -> None:
        """The running sum l, and its reciprocal once the vector has ended."""
        l = Signal(L_BITS)
        m.submodules.finals = finals = StreamFIFO(_Final, VECTORS_IN_FLIGHT)
        old = Mux(tile.place.first_tile, 0, l >> tile.decay)
        with m.If(take):
            m.d.sync += l.eq(old + (tile.p << formats.L_EXTRA_FRAC))
        m.d.sync += [finals.i.valid.eq(take & tile.place.last), finals.i.p.table.eq(tile.place.table)]
        m.d.sync += finals.i.p.final.eq(tile.place.final)
        m.d.comb += finals.i.p.l.eq(l)
        final = Signal()
        m.d.comb += self.ended.eq(self.table.en & final)

        m.submodules.divider = divider = arith.Divider(31, 17, RECIP_BITS)
        total, length = Signal(L_BITS), Signal(range(L_BITS + 1))
        normal = arith.normalise(total, length)
        m.d.comb += [
            divider.i.p.n.eq(RECIP_ONE),
            divider.i.p.d.eq(normal[L_BITS - RECIP_BITS :]),
            divider.o.ready.eq(1),
        ]
        m.d.sync += self.table.en.eq(0)
        with m.If(self.state.ready):
            m.d.sync += self.state.valid.eq(0)
        with m.FSM(name="finish"):
            with m.State("WAIT"), m.If(finals.o.valid & ~self.state.valid):
                m.d.sync += [total.eq(finals.o.p.l), self.table.addr.eq(finals.o.p.table)]
                m.d.sync += final.eq(finals.o.p.final)
                m.d.sync += [
                    self.state.valid.eq(1),
                    self.state.p.maximum.eq(self._maxima.o.payload),
                    self.state.p.sum.eq(finals.o.p.l),
                ]
                m.d.comb += [finals.o.ready.eq(1), self._maxima.o.ready.eq(1)]
                m.next = "LENGTH"
            with m.State("LENGTH"):
                m.d.sync += length.eq(arith.bit_length(total))
                m.next = "START"
            with m.State("START"):
                m.d.comb += divider.i.valid.eq(1)
                m.next = "DIVIDE"
            with m.State("DIVIDE"), m.If(divider.o.valid):
                # A live slot leaves l above 2**30, so the first shift is never negative; l = 0 gives zeros.
                live = length != 0
                m.d.sync += [
                    self.table.en.eq(1),
                    self.table.entry.pre.eq(Mux(live, length - 31, 0)),
                    self.table.entry.mult.eq(Mux(live, divider.o.payload, 0)),
                    self.table.entry.post.eq(FINISH_SHIFT),
                ]
                m.next = "WAIT"


def _valid(m: Module, first, cycles: int, name: str) -> list:
    """`first` delayed by 0 to `cycles` cycles, with reset."""
    bits = [first]
    for cycle in range(cycles):
        bit = Signal(name=f"valid_{name}_{cycle}")
        m.d.sync += bit.eq(bits[-1])
        bits.append(bit)
    return bits


def _shifted_minimum(pipe: Pipe, k: int, product, exponent, sign):
    """`(-1)**sign * product << exponent` in two cycles after the product's two."""
    exponent, sign = pipe.reg(exponent, f"ne_{k}", 2), pipe.reg(sign, f"ns_{k}", 2)
    coarse = pipe.reg((product << Cat(Const(0, 3), exponent[3:]))[: MIN_SUM.width - 6], f"n_coarse_{k}")
    full = (coarse << pipe.reg(exponent[:3], f"n_fine_{k}"))[: MIN_SUM.width - 6]
    negative = pipe.reg(sign, f"n_sign_{k}")
    return pipe.reg(Mux(negative, -full, full).as_signed(), f"n_term_{k}")
