"""Two or more write masters on one AXI4 port."""

from amaranth import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.engine.mem.axi import axi_write
from hw.lib.streams import check_count


class WriteMux(wiring.Component):
    """Write masters on one AXI write port: the owner keeps the port from its first address to its last answer.

    For masters that write rarely (records beside a main stream). The lowest number goes first; changing owner takes one
    cycle. A master that starts addresses without end keeps the others waiting.
    """

    def __init__(self, addr_bits: int, data_bits: int, count: int, *, max_bursts: int = 64):
        self._count = check_count("Masters of a write multiplexer", count, 2)
        self._max_bursts = max_bursts
        signature = axi_write(addr_bits, data_bits)
        super().__init__({"masters": In(signature).array(count), "port": Out(signature)})

    def elaborate(self, platform):
        m = Module()
        port, owner, owned = self.port, Signal(range(self._count)), Signal()
        in_flight = Signal(range(self._max_bursts + 1))
        with m.Switch(owner):
            for index, master in enumerate(self.masters):
                with m.Case(index):
                    for name, member in port.signature.members.items():
                        ours, theirs = getattr(port, name), getattr(master, name)
                        control = name in ("awvalid", "wvalid", "awready", "wready")
                        gate = owned if control else 1
                        if member.flow is Out:
                            m.d.comb += ours.eq(Mux(gate, theirs, 0))
                        else:
                            m.d.comb += theirs.eq(Mux(gate, ours, 0))
        started = port.awvalid & port.awready
        answered = port.bvalid & port.bready
        m.d.sync += in_flight.eq(in_flight + started - answered)
        asking = Signal(self._count)
        m.d.comb += [asking[i].eq(master.awvalid | master.wvalid) for i, master in enumerate(self.masters)]
        with m.If(owned):
            held = asking.bit_select(owner, 1).any()
            with m.If(~held & ((in_flight == 0) | ((in_flight == 1) & answered))):
                m.d.sync += owned.eq(0)
        with m.Elif(asking.any()):
            m.d.sync += owned.eq(1)
            for index in reversed(range(self._count)):
                with m.If(asking[index]):
                    m.d.sync += owner.eq(index)
        return m
