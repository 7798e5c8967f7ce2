"""The last stage of a head: normalise, mix with v-bar, convert (docs/formats-storage.md, sections 5 and 6).

One pipeline serves the queries of a kernel one after the other; dense attention is the mix with alpha = 1 and
v-bar = 0, so both go the same way.
"""

from amaranth import Array, Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.storage import ALPHA_FRAC, F32_NAN, L_BITS, MAXIMUM_BITS, RECIPROCAL_BITS
from hw.lib.arith import Divider, bit_length
from hw.lib.streams import StreamFIFO, connect
from hw.storage.fp import Add32, MulInt32, ToFp16, _registered, pipe

OUTPUT = data.StructLayout({"data": 16, "query": 3, "element": 7, "last": 1})
"""One element of the attention output; `last` with the last element of the last query."""

STATE = data.StructLayout({"maximum": signed(MAXIMUM_BITS), "sum": unsigned(L_BITS)})
"""golden.spec.storage.SOFTMAX_STATE."""
STATES = 4
"""States of queries with elements under way: the output queue holds 64, at least a query's worth."""

_READ = 1
"""Cycles from an element's address to its value."""
PIPELINE = _READ + 1 + 2 * MulInt32.latency + Add32.latency + ToFp16.latency
RECIPROCAL_CYCLES = 6 + RECIPROCAL_BITS + 1
"""From one query's turn to its first element: measure the sum's length, shift, divide."""


def cycles(queries: int, head_size: int) -> int:
    """Cycles from `start` to the cycle in which the last output is valid, nothing stalling."""
    return queries * (RECIPROCAL_CYCLES + head_size) + PIPELINE + 2


class Normaliser(wiring.Component):
    """Ports:

    - `start`: begin; `wide`, `queries` (number - 1), `sums`, `poisoned`, `alpha` hold until `busy` falls.
    - `address` (element) and `query` select `o` (binary32), due one cycle later, and `mean` (v-bar, binary32), two.
    - `output`: the elements, query after query. `busy` until the last has entered the output queue.
    - `states` go in with `sums`; `softmax` is that of the query whose element stands at `output`.
    """

    def __init__(self, lanes: int):
        self._lanes = lanes
        super().__init__(
            {
                "start": In(1),
                "wide": In(1),
                "queries": In(3),
                "sums": In(unsigned(L_BITS)).array(lanes),
                "states": In(STATE).array(lanes),
                "poisoned": In(1).array(lanes),
                "alpha": In(ALPHA_FRAC + 1).array(lanes),
                "address": Out(7),
                "query": Out(3),
                "o": In(32),
                "mean": In(32),
                "busy": Out(1),
                "output": Out(stream.Signature(OUTPUT)),
                "softmax": Out(STATE),
            }
        )

    def elaborate(self, platform):
        m = Module()
        depth = 64
        m.submodules.queue = queue = StreamFIFO(OUTPUT, depth)
        m.submodules.divider = divider = Divider(34, RECIPROCAL_BITS, RECIPROCAL_BITS, digits=1)
        connect(m, wiring.flipped(self.output), queue.o)

        m.submodules.held = held = StreamFIFO(STATE, STATES)
        last_element = Mux(self.wide, 127, 63)
        left = self.output.valid & self.output.ready
        m.d.comb += [
            self.softmax.eq(held.o.payload),
            held.o.ready.eq(left & (self.output.p.element == last_element)),
        ]
        query, element = Signal(3), Signal(7)
        m.d.comb += [self.query.eq(query), self.address.eq(element)]
        total = _registered(m, "total", Array(self.sums)[query])
        empty, bad = Signal(), Signal()
        zeros = Signal(6)
        top = Signal(RECIPROCAL_BITS)
        reciprocal, exponent = Signal(RECIPROCAL_BITS), Signal(6)
        alpha, rest = Signal(ALPHA_FRAC + 1), Signal(ALPHA_FRAC + 1)
        issue = Signal()
        m.d.comb += [divider.i.p.n.eq((1 << 33) - 1), divider.i.p.d.eq(top)]
        m.d.comb += self.busy.eq(1)
        in_flight = Signal(range(PIPELINE + 2))

        length = _registered(m, "length", bit_length(total))
        shifted = Signal(L_BITS)

        with m.FSM():
            with m.State("idle"):
                m.d.comb += self.busy.eq(self.start | (in_flight != 0))
                with m.If(self.start):
                    m.d.sync += query.eq(0)
                    m.next = "fetch"
            with m.State("fetch"):
                m.next = "measure"
            with m.State("measure"):
                m.next = "count"
            with m.State("count"):
                m.d.comb += [
                    held.i.valid.eq(1),
                    held.i.p.sum.eq(Array(state.sum for state in self.states)[query]),
                    held.i.p.maximum.eq(Array(state.maximum for state in self.states)[query]),
                ]
                m.d.sync += [
                    exponent.eq(length - 24),
                    zeros.eq(L_BITS - length),
                    empty.eq(~total.any()),
                    bad.eq(Array(self.poisoned)[query]),
                    alpha.eq(Array(self.alpha)[query]),
                ]
                m.next = "shift"
            with m.State("shift"):
                m.d.sync += [
                    shifted.eq(total << zeros),
                    rest.eq((1 << ALPHA_FRAC) - alpha),
                    bad.eq(bad | empty),
                ]
                m.next = "divide"
            with m.State("divide"):
                m.d.comb += [top.eq(shifted[-RECIPROCAL_BITS:]), divider.i.valid.eq(1)]
                with m.If(divider.i.ready):
                    m.next = "quotient"
            with m.State("quotient"):
                m.d.comb += divider.o.ready.eq(1)
                with m.If(divider.o.valid):
                    m.d.sync += [reciprocal.eq(divider.o.payload), element.eq(0)]
                    m.next = "stream"
            with m.State("stream"):
                m.d.comb += issue.eq(queue.level + in_flight < depth)
                with m.If(issue):
                    m.d.sync += element.eq(element + 1)
                    with m.If(element == last_element):
                        m.next = "drain"
            with m.State("drain"):
                # `bad`, the reciprocal and alpha are read within three cycles of an element's turn; the next query
                # changes them no sooner than that
                with m.If(query == self.queries):
                    m.next = "idle"
                with m.Else():
                    m.d.sync += query.eq(query + 1)
                    m.next = "fetch"

        # --- elements: y = o / l, then alpha * y + (1 - alpha) * v-bar
        m.submodules.divide = divide = MulInt32()
        m.submodules.weigh = weigh = MulInt32()
        m.submodules.weigh_mean = weigh_mean = MulInt32()
        m.submodules.mix = mix = Add32()
        m.submodules.convert = convert = ToFp16()
        m.d.comb += [
            divide.i.eq(_registered(m, "o_held", Mux(bad, F32_NAN, self.o))),
            divide.n.eq(reciprocal),
            divide.f.eq(exponent),
            weigh.i.eq(divide.o),
            weigh.n.eq(pipe(m, alpha, MulInt32.latency, "alpha")),
            weigh.f.eq(ALPHA_FRAC),
            weigh_mean.i.eq(pipe(m, self.mean, MulInt32.latency, "mean")),
            weigh_mean.n.eq(pipe(m, rest, MulInt32.latency, "rest")),
            weigh_mean.f.eq(ALPHA_FRAC),
            mix.a.eq(weigh.o),
            mix.b.eq(weigh_mean.o),
            convert.i.eq(mix.o),
        ]
        finished = (element == last_element) & (query == self.queries)
        tag = pipe(m, Cat(issue, query, element, finished), PIPELINE, "tag")
        m.d.comb += [
            queue.i.valid.eq(tag[0]),
            queue.i.p.data.eq(convert.o),
            Cat(queue.i.p.query, queue.i.p.element, queue.i.p.last).eq(tag[1:]),
        ]
        m.d.sync += in_flight.eq(in_flight + issue - tag[0])
        return m
