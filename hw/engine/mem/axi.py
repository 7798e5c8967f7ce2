"""AXI4 as the engine's masters speak it: INCR bursts of whole beats, answers in order per ID.

Port names are the standard's, so that a third-party model or a vendor's interconnect attaches by prefix.
Signals that would be constant in this subset (lock, cache, prot, qos, region) are left to the integrator's tie-offs.
"""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.memory import AXI_BOUNDARY_BYTES, MAX_BURST_BEATS, MemoryFault
from hw.lib.streams import check_count

OKAY, SLVERR, DECERR = 0, 2, 3
BURST_INCR = 1
LEN_BITS = 8
WRITE_ID_BITS = 3
"""Writes carry a number, so that a master tells the answers of several jobs apart."""

FAULT_BITS = 3


def axi_read(addr_bits: int, data_bits: int, id_bits: int = 1) -> wiring.Signature:
    """Read address and read data channels, seen from the master."""
    _check(addr_bits, data_bits, id_bits)
    return wiring.Signature(
        {
            "arid": Out(id_bits),
            "araddr": Out(addr_bits),
            "arlen": Out(LEN_BITS),
            "arsize": Out(3),
            "arburst": Out(2),
            "arvalid": Out(1),
            "arready": In(1),
            "rid": In(id_bits),
            "rdata": In(data_bits),
            "rresp": In(2),
            "rlast": In(1),
            "rvalid": In(1),
            "rready": Out(1),
        }
    )


def axi_write(addr_bits: int, data_bits: int, id_bits: int = WRITE_ID_BITS) -> wiring.Signature:
    """Write address, write data and write response channels, seen from the master."""
    _check(addr_bits, data_bits, id_bits)
    return wiring.Signature(
        {
            "awid": Out(id_bits),
            "awaddr": Out(addr_bits),
            "awlen": Out(LEN_BITS),
            "awsize": Out(3),
            "awburst": Out(2),
            "awvalid": Out(1),
            "awready": In(1),
            "wdata": Out(data_bits),
            "wstrb": Out(data_bits // 8),
            "wlast": Out(1),
            "wvalid": Out(1),
            "wready": In(1),
            "bid": In(id_bits),
            "bresp": In(2),
            "bvalid": In(1),
            "bready": Out(1),
        }
    )


def _check(addr_bits: int, data_bits: int, id_bits: int) -> None:
    if data_bits not in (32, 64, 128, 256, 512):
        raise ValueError(f"An AXI data bus here has 32 to 512 bits, a power of two, not {data_bits!r}")
    check_count("AXI address bits", addr_bits, 12)
    check_count("AXI ID bits", id_bits, 1)


def check_burst(max_burst: int, data_bits: int) -> int:
    """Return `max_burst` if naturally aligned bursts of it never cross the 4 KB boundary, else raise ValueError."""
    most = min(256, AXI_BOUNDARY_BYTES * 8 // data_bits)
    if not isinstance(max_burst, int) or max_burst & (max_burst - 1) or not 2 <= max_burst <= most:
        raise ValueError(
            f"Bursts of {data_bits} bit are a power of two of 2 to {most} beats, not {max_burst!r}: "
            f"longer ones would cross {AXI_BOUNDARY_BYTES} bytes"
        )
    return max_burst


def burst_layout(addr_bits: int, max_burst: int = MAX_BURST_BEATS) -> data.StructLayout:
    """One burst: byte address, beats - 1, and whether it ends its descriptor."""
    return data.StructLayout({"addr": addr_bits, "len": range(max_burst), "last": 1})


class Fault(data.Struct):
    """A fault and the byte address of the burst (or descriptor) that caused it; `code` is a `MemoryFault`."""

    code: FAULT_BITS
    addr: 32


def response_fault(resp) -> Mux:
    """Fault code of an AXI response."""
    return Mux(
        resp == OKAY,
        MemoryFault.NONE,
        Mux(resp == DECERR, MemoryFault.DECERR, MemoryFault.SLVERR),
    )


class ReadMux(wiring.Component):
    """`count` read masters on one AXI read port, round robin; the master's number travels as the ID.

    Address latency 0; once `arvalid` is high the choice holds. Answers go back by `rid`, so a port that
    interleaves IDs is served; a master that lowers `rready` holds up all, which masters here never do.
    """

    latency = 0

    def __init__(self, addr_bits: int, data_bits: int, count: int):
        check_count("Masters of a read multiplexer", count, 2)
        self._count = count
        self._id_bits = max(1, (count - 1).bit_length())
        master = axi_read(addr_bits, data_bits)
        port = axi_read(addr_bits, data_bits, self._id_bits)
        super().__init__({"masters": In(master).array(count), "port": Out(port)})

    def elaborate(self, platform):
        from hw.lib.arbiter import StreamArbiter

        m = Module()
        request = data.StructLayout(
            {
                name: self.port.signature.members[name].shape
                for name in ("araddr", "arlen", "arsize", "arburst")
            }
        )
        m.submodules.arbiter = arbiter = StreamArbiter(request, self._count)
        for index, master in enumerate(self.masters):
            lane = arbiter.i[index]
            m.d.comb += [lane.valid.eq(master.arvalid), master.arready.eq(lane.ready)]
            m.d.comb += [lane.payload[name].eq(getattr(master, name)) for name, _ in request]
            m.d.comb += [
                master.rvalid.eq(self.port.rvalid & (self.port.rid == index)),
                master.rdata.eq(self.port.rdata),
                master.rresp.eq(self.port.rresp),
                master.rlast.eq(self.port.rlast),
            ]
            with m.If(self.port.rid == index):
                m.d.comb += self.port.rready.eq(master.rready)
        m.d.comb += [
            self.port.arvalid.eq(arbiter.o.valid),
            arbiter.o.ready.eq(self.port.arready),
            self.port.arid.eq(arbiter.o.payload.source),
        ]
        m.d.comb += [getattr(self.port, name).eq(arbiter.o.payload.data[name]) for name, _ in request]
        return m


class FaultLatch(wiring.Component):
    """Keeps the first fault until `clear`; `i.code` of zero is no fault."""

    latency = 1

    def __init__(self):
        super().__init__({"i": In(Fault), "clear": In(1), "o": Out(Fault)})

    def elaborate(self, platform):
        m = Module()
        with m.If(self.clear):
            m.d.sync += self.o.eq(0)
        with m.Elif((self.o.code == MemoryFault.NONE) & (self.i.code != MemoryFault.NONE)):
            m.d.sync += self.o.eq(self.i)
        return m


def burst_stream(addr_bits: int, max_burst: int = MAX_BURST_BEATS) -> stream.Signature:
    """Stream of bursts from an address generator to a channel."""
    return stream.Signature(burst_layout(addr_bits, max_burst))


def event_counter(m: Module, total: Signal, event, clear) -> None:
    """Count cycles in which `event` is high into `total`; it wraps, and `clear` zeroes it."""
    with m.If(clear):
        m.d.sync += total.eq(0)
    with m.Elif(event):
        m.d.sync += total.eq(total + 1)
