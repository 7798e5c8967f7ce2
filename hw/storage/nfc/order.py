"""Restoration of page order: a kernel's filtered pages of many channels, in the order of their requests."""

from amaranth import Array, Module, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.lib.streams import check_count
from hw.storage.nfc.layouts import PAGE


class PageOrder(wiring.Component):
    """Give a kernel its pages in order, each whole.

    Ports: `i` the kernel's filtered pages per channel; `order`, the channel that its next page comes from; `o`. Pages
    leave without a bubble between them while the order and the pages are at hand; a beat leaves `latency` cycles after
    it is offered.

    Deadlock-free when each channel gives the kernel's pages in an order that agrees with `order`, as they do when
    every request is entered in its channel's queue and its kernel's order in the same cycle.
    """

    latency = 1

    def __init__(self, channels: int, *, payload: data.StructLayout = PAGE):
        self._channels = check_count("Channels of a page order", channels, 1)
        self._payload = payload
        super().__init__(
            {
                "i": In(stream.Signature(payload)).array(channels),
                "order": In(stream.Signature(range(channels))),
                "o": Out(stream.Signature(payload)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        held, source = Signal(), Signal(range(self._channels))
        head = data.View(self._payload, Array(Value.cast(lane.payload) for lane in self.i)[source])
        offered, taken = Signal(), Signal()
        m.d.comb += [
            offered.eq(held & Array(lane.valid for lane in self.i)[source]),
            taken.eq(offered & (~self.o.valid | self.o.ready)),
            self.order.ready.eq(~held | (taken & head.last)),
        ]
        with m.If(self.order.ready):
            m.d.sync += [held.eq(self.order.valid), source.eq(self.order.payload)]
        with m.If(~self.o.valid | self.o.ready):
            m.d.sync += [self.o.valid.eq(offered), self.o.payload.eq(head)]
        for channel, lane in enumerate(self.i):
            m.d.comb += lane.ready.eq(taken & (source == channel))
        return m
