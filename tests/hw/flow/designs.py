"""Two small designs that the build layer's tests are made of."""

from amaranth.hdl import Assert, Module, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out


class Counter(wiring.Component):
    """Counts enabled cycles up to 9; its assertion holds only if `limit` is 9."""

    en: In(1)
    o: Out(4)

    def __init__(self, limit: int = 9):
        super().__init__()
        self._limit = limit

    def elaborate(self, platform):
        m = Module()
        with m.If(self.en & (self.o < self._limit)):
            m.d.sync += self.o.eq(self.o + 1)
        m.d.comb += Assert(self.o <= 9)
        return m


class PackedMultiplier(wiring.Component):
    """Two int8 products by one shared operand in one DSP, registered."""

    a0: In(signed(8))
    a1: In(signed(8))
    w: In(signed(8))
    p: Out(signed(36))

    def elaborate(self, platform):
        m = Module()
        m.d.sync += self.p.eq(((self.a1 << 18) + self.a0) * self.w)
        return m
