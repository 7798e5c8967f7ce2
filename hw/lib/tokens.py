"""Credits and dependency tokens: counters that never lose, double or overflow an item.

A credit counter bounds what is in flight. A dependency token orders two queues of instructions: the unit that
produces pushes a token, the unit that consumes pops one before it starts (the decoupled access-execute scheme
of VTA and FlightLLM).
"""

from amaranth import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.lib.streams import check_count


class CreditCounter(wiring.Component):
    """`limit` credits at reset. `take` transfers one while any is left; `give` returns one.

    A return in the same cycle does not help an empty counter before the next one (registered, no loop).
    `give` with all credits home would be a double return: it is refused and raises the sticky `overflow`.
    """

    latency = 1
    """From `give` to the credit that can be taken."""

    def __init__(self, limit: int):
        check_count("Number of credits", limit, 1)
        self._limit = limit
        super().__init__(
            {
                "take": In(stream.Signature(0)),
                "give": In(1),
                "available": Out(range(limit + 1), init=limit),
                "overflow": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        home = self.available == self._limit
        taken = self.take.valid & self.take.ready
        m.d.comb += self.take.ready.eq(self.available != 0)
        with m.If(self.give & home & ~taken):
            m.d.sync += self.overflow.eq(1)
        with m.Elif(self.give & ~taken):
            m.d.sync += self.available.eq(self.available + 1)
        with m.Elif(taken & ~self.give):
            m.d.sync += self.available.eq(self.available - 1)
        return m


class TokenNetwork(wiring.Component):
    """Dependency tokens between `units`: one counter of at most `capacity` for each ordered pair.

    Unit u asks to start with `wait[u]`: a mask of the units whose tokens it needs; the transfer happens in
    the cycle in which every named counter holds one, and takes one from each, all or nothing. It reports
    with `release[u]`: a mask of units to push one token each to; the transfer waits until none of those
    counters is full, again all or nothing, so a full counter stalls its producer and nothing is lost. A mask
    of zero passes at once; the unit's own bit is a counter like any other.

    `level[u][v]` counts the tokens from u to v; bit u of `some[v]` says that it is not zero, from a register of its
    own, because whether a unit starts hangs on it.
    """

    latency = 1
    """From a release to the wait it satisfies."""

    def __init__(self, units: int, capacity: int):
        check_count("Number of units of a token network", units, 2)
        check_count("Capacity of a token counter", capacity, 1)
        self._units = units
        self._capacity = capacity
        super().__init__(
            {
                "wait": In(stream.Signature(units)).array(units),
                "release": In(stream.Signature(units)).array(units),
                "level": Out(range(capacity + 1)).array(units, units),
                "some": Out(units).array(units),
            }
        )

    def elaborate(self, platform):
        m = Module()
        units = range(self._units)
        for u in units:
            full = Signal(self._units, name=f"full_{u}")
            m.d.comb += [
                *(full[v].eq(self.level[u][v] == self._capacity) for v in units),
                self.wait[u].ready.eq(~(self.wait[u].payload & ~self.some[u]).any()),
                self.release[u].ready.eq(~(self.release[u].payload & full).any()),
            ]
        waits = [port.valid & port.ready for port in self.wait]
        releases = [port.valid & port.ready for port in self.release]
        for source in units:
            for sink in units:
                pushed = releases[source] & self.release[source].payload[sink]
                popped = waits[sink] & self.wait[sink].payload[source]
                level = self.level[source][sink]
                with m.If(pushed & ~popped):
                    m.d.sync += [level.eq(level + 1), self.some[sink][source].eq(1)]
                with m.Elif(popped & ~pushed):
                    m.d.sync += [level.eq(level - 1), self.some[sink][source].eq(level != 1)]
        return m
