"""Operand fetch and reduction: what stands before and behind the lanes.

`Fetch` turns word addresses into operand words from two ports of the vector buffer that are granted independently;
`Reducer` turns a vector's words into its extremes and its sum.
"""

from amaranth import Cat, Const, EnableInserter, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import EngineConfig
from hw.engine.interfaces import VB_ADDR, vb_read
from hw.engine.sfu.lanes import VEC
from hw.engine.sfu.scalars import SUM_BITS
from hw.lib.pipeline import Pipe, tree_cycles
from hw.lib.streams import StreamFIFO, check_count

PREFETCH = 4
"""Words between a grant and the lanes: two cycles of reading, and slack for an uneven pair of ports."""


def fetch_request(tag) -> data.StructLayout:
    """A word of `a`, and of `b` if `use_b`; the tag arrives with the operands."""
    return data.StructLayout(
        {"a": unsigned(VB_ADDR), "b": unsigned(VB_ADDR), "use_b": unsigned(1), "tag": tag}
    )


def operands(lanes: int, tag) -> data.StructLayout:
    """Operand words; `b` is unspecified when it was not asked for."""
    words = data.ArrayLayout(VEC, lanes)
    return data.StructLayout({"a": words, "b": words, "tag": tag})


def remembered(granted, grant, complete):
    """Next state of "this request has its word from this port"."""
    return (granted | grant) & ~complete


class Fetch(wiring.Component):
    """Requests in, operand words out, in order, one per cycle while both ports grant.

    `latency` cycles from a request, granted at once, to its operands.
    """

    latency = 2

    def __init__(self, config: EngineConfig, tag):
        self._lanes, self._tag = config.vector_lanes, tag
        super().__init__(
            {
                "i": In(stream.Signature(fetch_request(tag))),
                "a": Out(vb_read(config)),
                "b": Out(vb_read(config)),
                "o": Out(stream.Signature(operands(self._lanes, tag))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        carried = data.StructLayout({"use_b": unsigned(1), "tag": self._tag})
        m.submodules.tags = tags = StreamFIFO(carried, PREFETCH)
        inside = Signal(range(PREFETCH + 1))
        room = inside != PREFETCH
        leaves = self.o.valid & self.o.ready
        complete = Signal()
        words_a, done_a = self._port(m, "a", self.a, room, Const(1, 1), complete, leaves)
        words_b, done_b = self._port(m, "b", self.b, room, self.i.p.use_b, complete, leaves & tags.o.p.use_b)
        m.d.comb += [
            complete.eq(self.i.valid & room & done_a & done_b),
            self.i.ready.eq(complete),
            tags.i.valid.eq(complete),
            tags.i.p.use_b.eq(self.i.p.use_b),
            tags.i.p.tag.eq(self.i.p.tag),
            self.o.p.tag.eq(tags.o.p.tag),
            self.o.valid.eq(tags.o.valid & words_a.valid & (words_b.valid | ~tags.o.p.use_b)),
            tags.o.ready.eq(leaves),
        ]
        m.d.sync += inside.eq(inside + complete - leaves)
        return m

    def _port(self, m: Module, name: str, port, room, wanted, complete, leaves):
        """One port with its queue: the queue's output, and whether this request needs no more of the port."""
        queue = StreamFIFO(unsigned(len(port.data)), PREFETCH)
        m.submodules[f"words_{name}"] = queue
        granted, arriving = Signal(name=f"granted_{name}"), Signal(name=f"arriving_{name}")
        grant = port.en & port.rdy
        m.d.comb += [
            port.en.eq(self.i.valid & room & wanted & ~granted),
            port.addr.eq(self.i.p[name]),
            queue.i.payload.eq(port.data),
            queue.i.valid.eq(arriving),
            self.o.p[name].as_value().eq(queue.o.payload),
            queue.o.ready.eq(leaves),
        ]
        m.d.sync += [arriving.eq(grant), granted.eq(remembered(granted, grant, complete))]
        return queue.o, granted | grant | ~wanted


def reducer_word(lanes: int, tag) -> data.StructLayout:
    """A word of results; `last` ends its vector, whose tag is that of its last word."""
    return data.StructLayout({"y": data.ArrayLayout(VEC, lanes), "last": unsigned(1), "tag": tag})


def reduced(tag) -> data.StructLayout:
    """Extremes of a vector and the sum of its elements (meant for squares: not negative)."""
    return data.StructLayout({"least": VEC, "most": VEC, "total": unsigned(SUM_BITS), "tag": tag})


class Reducer(wiring.Component):
    """Words of a vector in, its extremes and sum out; one word per cycle, `latency_of(lanes)` after the last."""

    def __init__(self, lanes: int, tag):
        check_count("Lanes of a reducer", lanes, 2)
        self._lanes, self._tag = lanes, tag
        super().__init__(
            {
                "i": In(stream.Signature(reducer_word(lanes, tag))),
                "o": Out(stream.Signature(reduced(tag))),
            }
        )

    @staticmethod
    def latency_of(lanes: int) -> int:
        """Cycles from the transfer of a vector's last word to its valid result."""
        return tree_cycles(lanes) + 1

    def elaborate(self, platform):
        m = Module()
        cycles = tree_cycles(self._lanes)
        move, valid = Signal(), Signal(cycles)
        m.d.comb += [
            self.i.ready.eq(~self.o.valid | self.o.ready),
            move.eq(self.i.ready & (self.i.valid | valid.any() | self.o.valid)),
        ]
        tree = Module()
        pipe = Pipe(tree)
        words = [self.i.p.y[k] for k in range(self._lanes)]
        least = pipe.tree(words, lambda x, y: Mux(x < y, x, y), "least")
        most = pipe.tree(words, lambda x, y: Mux(x > y, x, y), "most")
        total = pipe.tree([word.as_unsigned() for word in words], lambda x, y: x + y, "total")
        last, tag = pipe.reg(self.i.p.last, "last", cycles), pipe.reg(self.i.p.tag, "tag", cycles)
        m.submodules.tree = EnableInserter(move)(tree)
        fresh = Signal(init=1)
        with m.If(move):
            m.d.sync += [
                valid.eq(Cat(self.i.valid, valid[:-1])),
                self.o.valid.eq(valid[-1] & last),
                Value.cast(self.o.p.tag).eq(Value.cast(tag)),
            ]
            with m.If(valid[-1]):
                m.d.sync += [
                    self.o.p.least.eq(Mux(~fresh & (self.o.p.least < least), self.o.p.least, least)),
                    self.o.p.most.eq(Mux(~fresh & (self.o.p.most > most), self.o.p.most, most)),
                    self.o.p.total.eq(Mux(fresh, 0, self.o.p.total) + total),
                    fresh.eq(last),
                ]
        return m
