"""The weight channels: one descriptor walks all pseudo-channels in lock step, each behind its own prefetch FIFO."""

from amaranth import Cat, Module, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.memory import MAX_BURST_BEATS, MemoryFault
from hw.engine.mem.address import AddressGenerator, descriptor_layout
from hw.engine.mem.axi import Fault, FaultLatch, axi_read, burst_layout, event_counter
from hw.engine.mem.reader import ReadChannel
from hw.lib.streams import Fork, StreamFIFO, check_count, connect

BURST_QUEUE = 4
"""Bursts that a channel may lag behind the address generator before it holds up the others."""
COUNTER_BITS = 40


class StripedReader(wiring.Component):
    """`channels` AXI4 read ports that execute the same descriptors, each on its own memory.

    Channel c delivers its own memory's beats on `o[c]`, all channels the same addresses in the same order. Channels may
    drift apart by what their FIFOs hold: a refresh of one is hidden from the others until those run full.

    Timing: `first_beat(L)` cycles from the descriptor's transfer to the first valid beat with memory latency L, then
    one beat per cycle and channel while the FIFO covers L; `cycles(beats, L)` in all.

    `requested` pulses when the last burst of a descriptor has been handed to every channel. `fault` keeps the first
    fault with `fault_channel`. `abort` until `idle`, and `clear`, as in `ReadChannel`.

    Counters (wrap at 2**40, zeroed by `clear`): `busy` cycles with work, `beats` taken from channel 0, `starved`
    cycles with work in which some channel has no beat to offer, `blocked` cycles in which every channel offers one
    and the consumer takes none, `full` cycles in which a burst waits for FIFO room.
    """

    def __init__(
        self,
        channels: int,
        *,
        addr_bits: int,
        data_bits: int,
        fifo_beats: int,
        levels: int = 1,
        max_burst: int = MAX_BURST_BEATS,
        max_bursts: int = 64,
    ):
        self._channels = check_count("Memory channels", channels, 1)
        self._addr_bits = addr_bits
        self._max_burst = max_burst
        self._generator = AddressGenerator(
            addr_bits=addr_bits, data_bits=data_bits, levels=levels, max_burst=max_burst
        )
        self._ports = [
            ReadChannel(
                addr_bits=addr_bits,
                data_bits=data_bits,
                fifo_beats=fifo_beats,
                max_burst=max_burst,
                max_bursts=max_bursts,
            )
            for _ in range(channels)
        ]
        super().__init__(
            {
                "i": In(stream.Signature(descriptor_layout(addr_bits, levels))),
                "o": Out(stream.Signature(data_bits)).array(channels),
                "axi": Out(axi_read(addr_bits, data_bits)).array(channels),
                "region_base": In(addr_bits),
                "region_limit": In(addr_bits + 1),
                "abort": In(1),
                "clear": In(1),
                "requested": Out(1),
                "fault": Out(Fault),
                "fault_channel": Out(range(max(2, channels))),
                "idle": Out(1),
                "busy": Out(COUNTER_BITS),
                "beats": Out(COUNTER_BITS),
                "starved": Out(COUNTER_BITS),
                "blocked": Out(COUNTER_BITS),
                "full": Out(COUNTER_BITS),
            }
        )

    @staticmethod
    def first_beat(memory_latency: int) -> int:
        """Cycles from a descriptor's transfer to its first valid beat: generator, burst queue, channel, memory."""
        return AddressGenerator.latency + 1 + ReadChannel.latency + memory_latency

    @classmethod
    def cycles(cls, beats: int, memory_latency: int) -> int:
        """Cycles from a descriptor's transfer to that of its last beat, when nothing but latency stalls."""
        return cls.first_beat(memory_latency) + beats - 1

    def elaborate(self, platform):
        m = Module()
        generator = m.submodules.generator = self._generator
        m.d.comb += [
            generator.region_base.eq(self.region_base),
            generator.region_limit.eq(self.region_limit),
            generator.abort.eq(self.abort),
            generator.clear.eq(self.clear),
        ]
        connect(m, wiring.flipped(self.i), generator.i)
        bursts, empty = self._fan_out(m, generator.o)
        for index, (port, source) in enumerate(zip(self._ports, bursts)):
            m.submodules[f"port_{index}"] = port
            m.d.comb += [port.abort.eq(self.abort), port.clear.eq(self.clear)]
            connect(m, source, port.i)
            connect(m, port.axi, wiring.flipped(self.axi[index]))
            connect(m, port.o, wiring.flipped(self.o[index]))
        m.d.comb += [
            self.requested.eq(generator.o.valid & generator.o.ready & generator.o.payload.last),
            self.idle.eq(~generator.busy & empty & Cat(port.idle for port in self._ports).all()),
        ]
        self._collect_faults(m, generator)
        self._count(m)
        return m

    def _fan_out(self, m, source):
        """One burst stream per channel, each with a short queue, so that a slow channel does not stop the rest.

        Returns the streams and whether all queues are empty; on abort they drain by themselves.
        """
        if self._channels == 1:
            outputs = [source]
        else:
            fork = Fork(burst_layout(self._addr_bits, self._max_burst), self._channels)
            m.submodules.fork = ResetInserter(self.abort)(fork)
            connect(m, source, fork.i)
            outputs = fork.o
        queues, levels = [], []
        for index, output in enumerate(outputs):
            queue = StreamFIFO(burst_layout(self._addr_bits, self._max_burst), BURST_QUEUE)
            m.submodules[f"queue_{index}"] = queue
            connect(m, output, queue.i)
            drained = queue.o.signature.create()
            m.d.comb += [
                drained.payload.eq(queue.o.payload),
                drained.valid.eq(queue.o.valid & ~self.abort),
                queue.o.ready.eq(drained.ready | self.abort),
            ]
            queues.append(drained)
            levels.append(queue.level)
        return queues, Cat(*levels) == 0

    def _collect_faults(self, m, generator) -> None:
        m.submodules.latch = latch = FaultLatch()
        m.d.comb += [latch.i.eq(generator.fault), latch.clear.eq(self.clear), self.fault.eq(latch.o)]
        which = Signal(range(max(2, self._channels)))
        for index, port in reversed(list(enumerate(self._ports))):
            with m.If(port.fault.code != MemoryFault.NONE):
                m.d.comb += [latch.i.eq(port.fault), which.eq(index)]
        with m.If(latch.o.code == MemoryFault.NONE):
            m.d.sync += self.fault_channel.eq(which)

    def _count(self, m) -> None:
        working = ~self.idle
        offered = Cat(o.valid for o in self.o)
        wanted = Cat(o.ready for o in self.o)
        event_counter(m, self.busy, working, self.clear)
        event_counter(m, self.beats, self.o[0].valid & self.o[0].ready, self.clear)
        event_counter(m, self.starved, working & ~offered.all(), self.clear)
        event_counter(m, self.blocked, offered.all() & ~wanted.any(), self.clear)
        event_counter(m, self.full, Cat(port.full for port in self._ports).any(), self.clear)
