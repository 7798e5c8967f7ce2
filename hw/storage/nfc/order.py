"""Restoration of page order: filtered pages of many channels, given to the kernels in the order of their requests."""

from amaranth import Array, Cat, Module, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.storage import TAG_BITS
from hw.lib.streams import check_count
from hw.storage.nfc.layouts import PAGE


class PageOrder(wiring.Component):
    """Give each of `kernels` consumers its pages in its own order, each page whole.

    Ports: `i` filtered pages per channel; `order` per kernel, the channel that its next page comes from; `o` per
    kernel. The top bits of a page's tag name its kernel, so a page never goes to another one; with one kernel no tag
    bit is spent. Pages leave without a bubble between them while the order and the pages are at hand; a beat leaves
    `latency` cycles after it is offered.

    Deadlock-free when each channel's pages come in one order that agrees with all kernels' orders, as they do when
    every request is entered in its channel's queue and its kernel's order in the same cycle.
    """

    latency = 1

    def __init__(
        self, channels: int, kernels: int, *, payload: data.StructLayout = PAGE, tag_bits: int = TAG_BITS
    ):
        self._channels = check_count("Channels of a page order", channels, 1)
        self._kernels = check_count("Kernels of a page order", kernels, 1)
        self._payload, self._tag_bits = payload, tag_bits
        super().__init__(
            {
                "i": In(stream.Signature(payload)).array(channels),
                "order": In(stream.Signature(range(channels))).array(kernels),
                "o": Out(stream.Signature(payload)).array(kernels),
            }
        )

    def _kernel_of(self, page: data.View) -> Value:
        return page.tag[self._tag_bits - (self._kernels - 1).bit_length() :]

    def elaborate(self, platform):
        m = Module()
        granted = [[] for _ in range(self._channels)]
        heads = Array(Value.cast(lane.payload) for lane in self.i)
        mine = [[] for _ in range(self._kernels)]
        for kernel in range(self._kernels):
            for lane in self.i:
                match = self._kernel_of(lane.payload) == kernel if self._kernels > 1 else 1
                mine[kernel].append(lane.valid & match)
        for kernel, (order, out) in enumerate(zip(self.order, self.o)):
            held, source = (
                Signal(name=f"held_{kernel}"),
                Signal(range(self._channels), name=f"source_{kernel}"),
            )
            head = data.View(self._payload, heads[source])
            offered, taken = Signal(name=f"offered_{kernel}"), Signal(name=f"taken_{kernel}")
            m.d.comb += [
                offered.eq(held & Array(mine[kernel])[source]),
                taken.eq(offered & (~out.valid | out.ready)),
                order.ready.eq(~held | (taken & head.last)),
            ]
            with m.If(order.ready):
                m.d.sync += [held.eq(order.valid), source.eq(order.payload)]
            with m.If(~out.valid | out.ready):
                m.d.sync += [out.valid.eq(offered), out.payload.eq(head)]
            for channel in range(self._channels):
                granted[channel].append(taken & (source == channel))
        for lane, grants in zip(self.i, granted):
            m.d.comb += lane.ready.eq(Cat(grants).any())
        return m
