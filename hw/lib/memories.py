"""On-chip memories as a typed component, refused when no device could hold them.

A memory is described by what it stores; the kind of RAM follows from its ports, as synthesis infers it:
block RAM and URAM read through a register, LUT RAM reads combinationally.
"""

from collections.abc import Iterable

from amaranth import Module, Shape, ShapeLike, Value
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

BRAM36_BITS = 36 * 1024
URAM_BITS = 288 * 1024
LUT_RAM_MAX_DEPTH = 512
"""Deepest LUT RAM that one UltraScale+ CLB builds (eight 64-deep LUTs); deeper ones cost multiplexers."""
DEVICE_ON_CHIP_BITS = 2016 * BRAM36_BITS + 960 * URAM_BITS
"""Block RAM and URAM of the XCU280 together (reference: board data sheet DS963)."""


def check_memory(
    width: int, depth: int, *, asynchronous_read: bool = False, granularity: int | None = None
) -> None:
    """Raise ValueError if no device of this project can hold such a memory without falling back to registers.

    `width` in bits, `depth` in rows, `granularity` in bits per write enable. One write port is assumed.
    """
    if width < 1 or depth < 1:
        raise ValueError(f"A memory has at least one bit and one row, not {depth} x {width} bit")
    if asynchronous_read and depth > LUT_RAM_MAX_DEPTH:
        raise ValueError(
            f"A combinational read needs LUT RAM, which is at most {LUT_RAM_MAX_DEPTH} deep, "
            f"but the memory is {depth} x {width} bit; read it through a register"
        )
    if width * depth > DEVICE_ON_CHIP_BITS:
        raise ValueError(
            f"A memory fits the device's {DEVICE_ON_CHIP_BITS} bit of RAM, "
            f"but {depth} x {width} bit are {depth * width}"
        )
    if granularity is not None and granularity % 8 and granularity % 9:
        raise ValueError(f"Write enables of block RAM cover 8 or 9 bit each, not {granularity}")


def bram36_count(width: int, depth: int) -> int:
    """Block RAMs (36 kbit) of a simple dual-port memory, the least over the primitive's aspect ratios."""
    shapes = ((72, 512), (36, 1024), (18, 2048), (9, 4096), (4, 8192), (2, 16384), (1, 32768))
    return min(-(-width // w) * -(-depth // d) for w, d in shapes)


def uram_count(width: int, depth: int) -> int:
    """URAMs of a memory: the primitive is 4096 x 72 bit in every use."""
    return -(-width // 72) * -(-depth // 4096)


class TypedMemory(wiring.Component):
    """One write port, one read port per consumer, one clock.

    Ports: `w.addr`, `w.data`, `w.en` (one bit, or one per `granularity` bits); `r[n].addr`, `r[n].en`,
    `r[n].data`. Read latency is `latency` cycles: 1 (registered read, old data when the same row is written
    in that cycle) or 0 (`asynchronous_read`). Each further read port is a copy of the memory, as in the device.

    `granularity` is in bits for an unsigned shape and in elements for an array layout, as in Amaranth.

    Raises ValueError for a memory that no device holds (see `check_memory`).
    """

    def __init__(
        self,
        shape: ShapeLike,
        depth: int,
        *,
        read_ports: int = 1,
        granularity: int | None = None,
        asynchronous_read: bool = False,
        init: Iterable = (),
        ram_style: str | None = None,
    ):
        width = Shape.cast(shape).width
        if ram_style not in (None, "block", "ultra", "distributed"):
            raise ValueError(f"RAM style must be 'block', 'ultra' or 'distributed', not {ram_style!r}")
        init = list(init)
        if ram_style == "ultra" and init:
            raise ValueError(f"A URAM has no initial contents, but {len(init)} rows are given")
        if read_ports < 1:
            raise ValueError(f"A memory has at least one read port, not {read_ports!r}")
        self._memory = memory.Memory(
            shape=shape, depth=depth, init=init, attrs={"ram_style": ram_style} if ram_style else {}
        )
        enable = memory.WritePort.Signature(addr_width=ceil_log2(depth), shape=shape, granularity=granularity)
        enable_width = Shape.cast(enable.members["en"].shape).width
        bits = None if granularity is None else width // enable_width
        check_memory(width, depth, asynchronous_read=asynchronous_read, granularity=bits)
        self._granularity = granularity
        self._asynchronous_read = asynchronous_read
        address = range(depth)
        super().__init__(
            {
                "w": In(
                    wiring.Signature({"addr": Out(address), "data": Out(shape), "en": Out(enable_width)})
                ),
                "r": In(wiring.Signature({"addr": Out(address), "en": Out(1), "data": In(shape)})).array(
                    read_ports
                ),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from a read address to its data."""
        return 0 if self._asynchronous_read else 1

    @property
    def data(self) -> data.Layout:
        """The rows, readable and writable in simulation."""
        return self._memory.data

    def elaborate(self, platform):
        m = Module()
        m.submodules.memory = self._memory
        write = self._memory.write_port(granularity=self._granularity)
        m.d.comb += [
            write.addr.eq(self.w.addr),
            Value.cast(write.data).eq(self.w.data),
            write.en.eq(self.w.en),
        ]
        for port in self.r:
            read = self._memory.read_port(domain="comb" if self._asynchronous_read else "sync")
            m.d.comb += [read.addr.eq(port.addr), Value.cast(port.data).eq(read.data)]
            if not self._asynchronous_read:
                m.d.comb += read.en.eq(port.en)
        return m
