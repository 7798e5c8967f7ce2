"""Width conversion by a whole ratio: element 0 of the wide array is the narrow payload that comes first."""

from amaranth import Module, ShapeLike, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.lib.streams import check_count


class GearUp(wiring.Component):
    """`ratio` narrow payloads into one wide array.

    Takes a narrow payload in every cycle unless a finished wide one waits; the wide payload is valid in the
    cycle after its last part arrived.
    """

    latency = 1
    """From the transfer of the last part to the valid wide payload."""

    def __init__(self, shape: ShapeLike, ratio: int):
        check_count("Gearbox ratio", ratio, 2)
        self._ratio = ratio
        self._index = Signal(range(ratio))
        self._shadow = Signal(data.ArrayLayout(shape, ratio - 1))
        wide = data.ArrayLayout(shape, ratio)
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(wide))})

    def cycles(self, narrow: int) -> int:
        """Cycles from the first input transfer to the valid output that holds payload `narrow`, unstalled."""
        return -(-narrow // self._ratio) * self._ratio - 1 + self.latency

    def elaborate(self, platform):
        m = Module()
        index = self._index
        free = ~self.o.valid | self.o.ready
        # Only the last part may meet a waiting wide payload: earlier parts go to the shadow.
        shadow = self._shadow
        last = index == self._ratio - 1
        m.d.comb += self.i.ready.eq(~last | free)
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.If(self.i.valid & self.i.ready):
            with m.If(last):
                m.d.sync += [index.eq(0), self.o.valid.eq(1)]
                for part in range(self._ratio - 1):
                    m.d.sync += self.o.payload[part].eq(shadow[part])
                m.d.sync += self.o.payload[self._ratio - 1].eq(self.i.payload)
            with m.Else():
                m.d.sync += [index.eq(index + 1), shadow[index].eq(self.i.payload)]
        return m


class GearDown(wiring.Component):
    """One wide array into `ratio` narrow payloads, combinationally; it is taken with its last part."""

    latency = 0

    def __init__(self, shape: ShapeLike, ratio: int):
        check_count("Gearbox ratio", ratio, 2)
        self._ratio = ratio
        self._index = Signal(range(ratio))
        wide = data.ArrayLayout(shape, ratio)
        super().__init__({"i": In(stream.Signature(wide)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform):
        m = Module()
        index = self._index
        last = index == self._ratio - 1
        m.d.comb += [
            self.o.valid.eq(self.i.valid),
            Value.cast(self.o.payload).eq(self.i.payload[index]),
            self.i.ready.eq(self.o.ready & last),
        ]
        with m.If(self.o.valid & self.o.ready):
            m.d.sync += index.eq(index + 1)
            with m.If(last):
                m.d.sync += index.eq(0)
        return m
