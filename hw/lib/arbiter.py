"""Round-robin arbitration: the bare grant, and streams merged onto one with their source's number."""

from amaranth import Module, Mux, ShapeLike, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.lib.streams import check_count


def rotate_grant(requests: Value, last: Value) -> Value:
    """One-hot grant to the first request above the one-hot `last`, wrapping: requests wait at most one round.

    Bits at and below `last` are masked; the least set bit of what remains wins, or of all when none remains.
    """
    width = len(requests)
    above = requests & ~((last - 1) | last)[:width]
    chosen = Mux(above.any(), above, requests)
    return chosen & (~chosen + 1)[:width]


class RoundRobin(wiring.Component):
    """Grants one of `count` requesters per cycle.

    Combinational: `grant` is one-hot whenever a request stands and zero otherwise. The turn moves on in
    cycles in which `advance` is high, so a standing request is granted within `count` advances.
    """

    latency = 0

    def __init__(self, count: int):
        check_count("Number of requesters", count, 1)
        self._count = count
        self._last = Signal(count, init=1 << (count - 1))
        super().__init__({"requests": In(count), "advance": In(1), "grant": Out(count)})

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.grant.eq(rotate_grant(self.requests, self._last))
        with m.If(self.advance & self.requests.any()):
            m.d.sync += self._last.eq(self.grant)
        return m


class StreamArbiter(wiring.Component):
    """`count` streams onto one, round robin; the payload carries `source`, the index it came from.

    Once the output is valid the choice holds until the transfer, as the stream rules require. Each waiting
    input is served after at most `count - 1` others.
    """

    latency = 0

    def __init__(self, shape: ShapeLike, count: int):
        check_count("Number of inputs of an arbiter", count, 2)
        self._count = count
        self._turn = RoundRobin(count)
        self._locked = Signal(count)
        merged = data.StructLayout({"data": shape, "source": range(count)})
        super().__init__({"i": In(stream.Signature(shape)).array(count), "o": Out(stream.Signature(merged))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.turn = turn = self._turn
        locked = self._locked
        grant = Signal(self._count)
        transfer = self.o.valid & self.o.ready
        for index, lane in enumerate(self.i):
            m.d.comb += [
                turn.requests[index].eq(lane.valid & (~locked.any() | locked[index])),
                lane.ready.eq(grant[index] & self.o.ready),
            ]
            with m.If(grant[index]):
                m.d.comb += [
                    self.o.payload.data.eq(lane.payload),
                    self.o.payload.source.eq(index),
                ]
        m.d.comb += [grant.eq(turn.grant), turn.advance.eq(transfer), self.o.valid.eq(grant.any())]
        m.d.sync += locked.eq(Mux(transfer, 0, grant))
        return m


class StreamRouter(wiring.Component):
    """The way back: a payload that carries `source` goes to the output of that index alone.

    Raises nothing at run time: a `source` at or above `count` is never accepted, so it must not occur.
    """

    latency = 0

    def __init__(self, shape: ShapeLike, count: int):
        check_count("Number of outputs of a router", count, 2)
        self._count = count
        merged = data.StructLayout({"data": shape, "source": range(count)})
        super().__init__({"i": In(stream.Signature(merged)), "o": Out(stream.Signature(shape)).array(count)})

    def elaborate(self, platform):
        m = Module()
        for index, lane in enumerate(self.o):
            m.d.comb += Value.cast(lane.payload).eq(self.i.payload.data)
            with m.If(self.i.payload.source == index):
                m.d.comb += [lane.valid.eq(self.i.valid), self.i.ready.eq(lane.ready)]
        return m
