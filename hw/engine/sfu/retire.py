"""A8 groups from words of codes: 32 codes and their sum, written together."""

from amaranth import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.formats import ATTN_TILE
from hw.engine.interfaces import GROUP_ADDR, act_write
from hw.lib.pipeline import Pipe, fold


class GroupWriter(wiring.Component):
    """Collects words of int8 codes into groups of 32; a vector that ends within a group fills it up with zeros.

    `en` takes a word (always accepted): `codes`, `slot` within its group, `last` of its vector, `addr` of the group.
    The group is written `latency` cycles after its last word.
    """

    latency = 2

    def __init__(self, lanes: int):
        self._lanes = lanes
        super().__init__(
            {
                "en": In(1),
                "codes": In(data.ArrayLayout(signed(8), lanes)),
                "slot": In(unsigned(3)),
                "last": In(1),
                "addr": In(unsigned(GROUP_ADDR)),
                "act": Out(act_write()),
            }
        )

    def elaborate(self, platform):
        m = Module()
        pipe = Pipe(m)
        slots = ATTN_TILE // self._lanes
        part = pipe.reg(fold([self.codes[k] for k in range(self._lanes)], lambda x, y: x + y), "part")
        codes, slot = pipe.reg(self.codes, "codes").as_value(), pipe.reg(self.slot, "slot")
        addr, ends = pipe.reg(self.addr, "addr"), pipe.reg(self.last | (self.slot == slots - 1), "ends")
        taken = Signal()
        total = Signal(signed(self.act.side.addend.shape().width))
        begin = slot == 0
        m.d.sync += [taken.eq(self.en), self.act.en.eq(taken & ends)]
        m.d.comb += self.act.side.addend.eq(total)
        with m.If(taken):
            m.d.sync += [self.act.addr.eq(addr), total.eq(Mux(begin, 0, total) + part)]
            words = [self.act.codes[k * len(codes) : (k + 1) * len(codes)] for k in range(slots)]
            m.d.sync += self.act.codes.eq(
                Cat(Mux(slot == k, codes, Mux(begin, 0, word)) for k, word in enumerate(words))
            )
        return m
