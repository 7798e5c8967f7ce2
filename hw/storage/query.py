"""What SparF needs of q before any page: the r largest channels, and the scale that their share of |q| asks for.

docs/formats-storage.md, section 6, steps 1 and 2. The unit walks q element by element, one query after the other,
once for the weights and once more for the marked share; both walks hide behind the pages of the jobs before.
"""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.storage import BEAT_ELEMENTS, RATIO_FRAC, SCALE_BITS, SCALE_FRAC, SOFTMAX_SCALE
from hw.lib.arith import Divider, ISqrt, bit_length
from hw.lib.memories import TypedMemory
from hw.storage.fp import UNPACKED_SPECIAL, Add32, Unpack16, _registered, pipe
from hw.storage.topk.unit import TopK

MAX_HEAD = 128
MAGNITUDE_BITS = 49
"""|q| as an integer (42 bits at most) summed over 128 channels."""
SCALE = data.StructLayout({"c": SCALE_BITS, "frac": 5})


class QueryUnit(wiring.Component):
    """Ports:

    - `start` (one cycle) with `wide`, `queries` (number - 1) and `r`, all held until `done` (one cycle).
    - `address`: {slice, query} of the 16 elements wanted, `elements` one cycle later.
    - `marks`: the r channels; `scale`: per lane; both hold until the next `start`.
    """

    def __init__(self, lanes: int):
        self._lanes = lanes
        super().__init__(
            {
                "start": In(1),
                "wide": In(1),
                "queries": In(3),
                "r": In(8),
                "address": Out(data.StructLayout({"slice": 3, "query": 3})),
                "elements": In(data.ArrayLayout(16, BEAT_ELEMENTS)),
                "marks": Out(MAX_HEAD),
                "scale": Out(SCALE).array(lanes),
                "done": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.select = select = TopK(
            MAX_HEAD, signed_keys=False, lanes=BEAT_ELEMENTS, in_lanes=1, digit_bits=4
        )
        element, query = Signal(7), Signal(3)
        walking, second = Signal(), Signal()
        last_element = Mux(self.wide, 127, 63)
        m.d.comb += [self.address.slice.eq(element[4:]), self.address.query.eq(query)]

        # --- 1: pick the element; 2 and 3: unpack; magnitude beside it
        tag = Cat(walking & ~second, walking & second & self.marks.bit_select(element, 1), element, query)
        tag_1 = pipe(m, tag, 1, "tag_1")
        pattern = Signal(16)
        m.d.comb += pattern.eq(self.elements[tag_1[2:6]])
        pattern_2 = _registered(m, "pattern_2", pattern)
        normal_2 = _registered(m, "normal_2", pattern[10:15].any())
        tag_2 = _registered(m, "tag_2", tag_1)
        # A subnormal counts as exponent 1; one place too far and back again costs no subtraction.
        places = pattern_2[10:15] | ~normal_2
        magnitude_3 = _registered(m, "magnitude_3", (Cat(pattern_2[:10], normal_2) << places) >> 1)
        tag_3 = _registered(m, "tag_3", tag_2)
        all_sum = Array(Signal(MAGNITUDE_BITS, name=f"all_{n}") for n in range(self._lanes))
        marked_sum = Array(Signal(MAGNITUDE_BITS, name=f"marked_{n}") for n in range(self._lanes))
        with m.If(self.start):
            m.d.sync += [s.eq(0) for s in (*all_sum, *marked_sum)]
        with m.Elif(tag_3[0]):
            m.d.sync += all_sum[tag_3[9:]].eq(all_sum[tag_3[9:]] + magnitude_3)
        with m.Elif(tag_3[1]):
            m.d.sync += marked_sum[tag_3[9:]].eq(marked_sum[tag_3[9:]] + magnitude_3)

        # --- channel weights: binary32 sum over the queries, a walk per query
        m.submodules.unpack = unpack = Unpack16()
        m.submodules.add = add = Add32()
        m.submodules.sums = sums = TypedMemory(32, MAX_HEAD)
        m.d.comb += unpack.i.eq(pattern_2)
        tag_4 = _registered(m, "tag_4", tag_3)
        wide = unpack.o
        special = wide.exp == UNPACKED_SPECIAL
        nan = special & (wide.frac != 0)
        biased = Mux(special, 255, Mux(wide.exp == 0, 0, wide.exp + 96))
        single = Cat(Mux(nan, Const(1 << 22, 23), Cat(Const(0, 13), wide.frac)), biased[:8], Const(0, 1))
        tag_5 = _registered(m, "tag_5", tag_4)
        m.d.comb += [
            sums.r[0].addr.eq(tag_4[2:9]),
            sums.r[0].en.eq(1),
            add.a.eq(Mux(tag_5[9:] == 0, 0, sums.r[0].data)),
            add.b.eq(_registered(m, "single_5", single)),
        ]
        final_5 = tag_5[0] & (tag_5[9:] == self.queries)  # of the channel's sum
        summed = pipe(m, Cat(tag_5[:9], final_5), Add32.latency, "summed")
        m.d.comb += [sums.w.addr.eq(summed[2:9]), sums.w.data.eq(add.o), sums.w.en.eq(summed[0])]
        m.d.comb += [
            select.i.valid.eq(summed[9]),
            select.i.payload[0].eq(add.o),
            select.cmd.p.count.eq(Mux(self.wide, 128, 64)),
            select.cmd.p.k.eq(self.r),
            select.o.ready.eq(1),
        ]
        with m.If(select.o.valid), m.Switch(select.o.p.row):
            for row in range(MAX_HEAD // BEAT_ELEMENTS):
                with m.Case(row):
                    m.d.sync += self.marks[row * 16 : row * 16 + 16].eq(select.o.p.mask)

        step = walking & (element == last_element)
        with m.If(walking):
            m.d.sync += element.eq(Mux(step, 0, element + 1))
            with m.If(step):
                m.d.sync += query.eq(query + 1)
        walked = step & (query == self.queries)
        wait = Signal(range(8))
        begin, ready = Signal(), Signal()
        lane = Signal(range(self._lanes))
        with m.FSM():
            with m.State("idle"), m.If(self.start):
                m.d.sync += [element.eq(0), query.eq(0), second.eq(0), self.marks.eq(0)]
                m.next = "command"
            with m.State("command"):
                m.d.comb += select.cmd.valid.eq(1)
                with m.If(select.cmd.ready):
                    m.next = "weights"
            with m.State("weights"):
                m.d.comb += walking.eq(1)
                with m.If(walked):
                    m.d.sync += [element.eq(0), query.eq(0)]
                    m.next = "select"
            with m.State("select"), m.If(select.o.valid & select.o.p.last):
                m.d.sync += second.eq(1)
                m.next = "share"
            with m.State("share"):
                m.d.comb += walking.eq(1)
                m.d.sync += [wait.eq(5), lane.eq(0)]
                with m.If(walked):
                    m.next = "settle"
            with m.State("settle"):
                m.d.sync += wait.eq(wait - 1)
                with m.If(wait == 0):
                    m.next = "scale"
            with m.State("scale"):
                m.d.comb += begin.eq(1)
                m.next = "scaling"
            with m.State("scaling"), m.If(ready):
                m.d.sync += lane.eq(lane + 1)
                m.next = "scale"
                with m.If(lane == self._lanes - 1):
                    m.d.comb += self.done.eq(1)
                    m.next = "idle"
        self._scale(m, all_sum[lane], marked_sum[lane], lane, begin, ready)
        return m

    def _scale(self, m, b, a, lane, begin, ready):
        """C of one query: SOFTMAX_SCALE * sqrt(b / a), normalised to 17 bits."""
        m.submodules.divider = divider = Divider(MAGNITUDE_BITS + RATIO_FRAC, MAGNITUDE_BITS, 32, digits=1)
        m.submodules.root = root = ISqrt(40)
        capped = Signal()
        scaled = Signal(21)
        length = Signal(5)
        constant = Mux(self.wide, SOFTMAX_SCALE[128], SOFTMAX_SCALE[64])
        m.d.comb += [
            divider.i.p.n.eq(b << RATIO_FRAC),
            divider.i.p.d.eq(a),
            root.i.payload.eq(Mux(capped, (1 << 32) - 1, divider.o.payload) << 8),
        ]
        with m.FSM(name="scale"):
            with m.State("idle"), m.If(begin):
                m.next = "divide"
            with m.State("divide"):
                m.d.comb += divider.i.valid.eq(1)
                m.d.sync += capped.eq((b >> 8) >= a)
                with m.If(divider.i.ready):
                    m.next = "root"
            with m.State("root"):
                m.d.comb += [root.i.valid.eq(divider.o.valid), divider.o.ready.eq(root.i.ready)]
                with m.If(divider.o.valid & root.i.ready):
                    m.next = "multiply"
            with m.State("multiply"):
                m.d.comb += root.o.ready.eq(1)
                m.d.sync += scaled.eq((root.o.payload * constant) >> 16)
                with m.If(root.o.valid):
                    m.next = "length"
            with m.State("length"):
                m.d.sync += length.eq(bit_length(scaled))
                m.next = "store"
            with m.State("store"):
                over = Mux(length > SCALE_BITS, length - SCALE_BITS, 0)[:3]
                with m.Switch(lane):
                    for n in range(self._lanes):
                        with m.Case(n):
                            m.d.sync += [
                                self.scale[n].c.eq(scaled >> over),
                                self.scale[n].frac.eq(SCALE_FRAC - over),
                            ]
                m.d.comb += ready.eq(1)
                m.next = "idle"
