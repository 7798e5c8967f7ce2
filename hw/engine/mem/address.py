"""Nested-stride address generator: a descriptor in, naturally aligned AXI bursts inside a region out."""

from collections.abc import Iterator, Sequence

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.memory import MAX_BURST_BEATS, MemoryFault
from hw.engine.mem.axi import Fault, burst_layout, burst_stream, check_burst
from hw.lib.streams import check_count

BEATS_BITS = 24
COUNT_BITS = 16


def descriptor_layout(addr_bits: int, levels: int) -> data.StructLayout:
    """`beats` beats from byte address `addr`, repeated: loop n runs `counts[n]` times, `strides[n]` bytes apart.

    Loop 0 is the innermost. Strides are two's complement, so a loop may walk backwards.
    """
    return data.StructLayout(
        {
            "addr": addr_bits,
            "beats": BEATS_BITS,
            "counts": data.ArrayLayout(COUNT_BITS, levels),
            "strides": data.ArrayLayout(addr_bits, levels),
        }
    )


def bursts(
    addr: int,
    beats: int,
    counts: Sequence[int] = (),
    strides: Sequence[int] = (),
    *,
    beat_bytes: int,
    max_burst: int = MAX_BURST_BEATS,
) -> Iterator[tuple[int, int]]:
    """(byte address, beats) of every burst of a descriptor, in order: what the generator must produce."""
    if counts:
        for turn in range(counts[-1]):
            start = addr + turn * strides[-1]
            yield from bursts(
                start, beats, counts[:-1], strides[:-1], beat_bytes=beat_bytes, max_burst=max_burst
            )
        return
    while beats:
        taken = min(beats, max_burst - addr // beat_bytes % max_burst)
        yield addr, taken
        addr += taken * beat_bytes
        beats -= taken


class AddressGenerator(wiring.Component):
    """Turns descriptors into bursts that end at multiples of the longest burst, hence never cross 4 KB.

    Timing: the first burst is valid `latency` cycles after the descriptor's transfer, then one burst per cycle;
    the next descriptor is taken in the cycle after the last burst left the loop: `cycles(bursts)` per descriptor.

    Checks, before any address leaves: alignment of `addr` and strides to the beat, no empty loop, every burst in
    [region_base, region_limit). The first violation stops the generator with `fault` until `clear`; bursts before it
    are valid and were issued. `abort` drops the descriptor and what is queued here; hold it for `latency` cycles.
    """

    latency = 3

    def __init__(self, *, addr_bits: int, data_bits: int, levels: int = 1, max_burst: int = MAX_BURST_BEATS):
        check_count("Loops of an address generator", levels, 1)
        check_count("Address bits", addr_bits, 12)
        if addr_bits > 32:
            raise ValueError(f"Address bits of a channel are at most 32, not {addr_bits!r}")
        self._max_burst = check_burst(max_burst, data_bits)
        self._addr_bits = addr_bits
        self._levels = levels
        self._offset_bits = (data_bits // 8).bit_length() - 1
        self._job = Signal(descriptor_layout(addr_bits, levels))
        self._active = Signal()
        self._left = Signal(BEATS_BITS)
        self._stage = Signal(burst_layout(addr_bits, max_burst))
        self._staged = Signal()
        self._step = Signal()
        self._checked = Signal()
        # One bit more than an address: it is set for whatever runs off either end of the address space.
        word_bits = addr_bits - self._offset_bits + 1
        self._cursor = Signal(word_bits)
        self._starts = Signal(data.ArrayLayout(word_bits, levels))
        self._turns = Signal(data.ArrayLayout(COUNT_BITS, levels))
        super().__init__(
            {
                "i": In(stream.Signature(descriptor_layout(addr_bits, levels))),
                "o": Out(burst_stream(addr_bits, max_burst)),
                "region_base": In(addr_bits),
                "region_limit": In(addr_bits + 1),
                "abort": In(1),
                "clear": In(1),
                "fault": Out(Fault),
                "busy": Out(1),
            }
        )

    def cycles(self, burst_count: int) -> int:
        """Cycles from a descriptor's transfer to that of the next, when bursts are taken at once."""
        return burst_count + 1

    def elaborate(self, platform):
        m = Module()
        low = self._offset_bits
        halted = self.fault.code != MemoryFault.NONE

        job, active, left, stage, staged = self._job, self._active, self._left, self._stage, self._staged
        cursor, starts, turns, step, checked = (
            self._cursor,
            self._starts,
            self._turns,
            self._step,
            self._checked,
        )
        wrapped = Signal()

        # Stage 1: cut the current row into bursts, and step the loops at its end.
        room = self._max_burst - cursor[: self._max_burst.bit_length() - 1]
        row_ends = left <= room
        taken = Signal(range(self._max_burst + 1))
        m.d.comb += taken.eq(Mux(row_ends, left, room))
        ends = [turns[n] == 1 for n in range(self._levels)]
        m.d.comb += step.eq(active & (~staged | checked))
        with m.If(step):
            m.d.sync += [
                stage.addr.eq(Cat(Const(0, low), cursor)),
                wrapped.eq(cursor[-1]),
                stage.len.eq(taken - 1),
                stage.last.eq(row_ends & Cat(*ends).all()),
                staged.eq(1),
                cursor.eq(cursor + taken),
                left.eq(left - taken),
            ]
            with m.If(row_ends):
                m.d.sync += left.eq(job.beats)
                self._step_loops(m, job, starts, turns, ends, cursor, active)
        with m.Elif(checked):
            m.d.sync += staged.eq(0)

        # Stage 2: a burst leaves only if it lies in the region.
        end = Signal(self._addr_bits + 1)
        outside = Signal()
        m.d.comb += [
            end.eq(stage.addr + Cat(Const(0, low), stage.len + 1)),
            outside.eq(wrapped | (stage.addr < self.region_base) | (end > self.region_limit)),
            checked.eq(staged & ~outside & ~halted & (~self.o.valid | self.o.ready)),
        ]
        with m.If(checked):
            m.d.sync += [self.o.payload.eq(stage), self.o.valid.eq(1)]
        with m.Elif(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.If(staged & outside & ~halted):
            m.d.sync += [self.fault.code.eq(MemoryFault.OUT_OF_REGION), self.fault.addr.eq(stage.addr)]

        # Stage 0: take a descriptor, or refuse it.
        want = self.i.payload
        m.d.comb += [
            self.i.ready.eq(~active & ~halted & ~self.abort),
            self.busy.eq(active | staged | self.o.valid),
        ]
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [job.eq(want), cursor.eq(want.addr[low:]), left.eq(want.beats)]
            for n in range(self._levels):
                m.d.sync += [starts[n].eq(want.addr[low:]), turns[n].eq(want.counts[n])]
            low_bits = Cat(want.addr[:low], *(want.strides[n][:low] for n in range(self._levels)))
            empty = Cat(want.beats == 0, *(want.counts[n] == 0 for n in range(self._levels)))
            with m.If(low_bits.any()):
                m.d.sync += [self.fault.code.eq(MemoryFault.UNALIGNED), self.fault.addr.eq(want.addr)]
            with m.Elif(empty.any()):
                m.d.sync += [self.fault.code.eq(MemoryFault.EMPTY), self.fault.addr.eq(want.addr)]
            with m.Else():
                m.d.sync += active.eq(1)

        with m.If(self.abort):
            m.d.sync += [active.eq(0), staged.eq(0), self.o.valid.eq(0)]
        with m.If(self.clear):
            m.d.sync += self.fault.eq(0)
        return m

    def _step_loops(self, m, job, starts, turns, ends, cursor, active) -> None:
        """At the end of a row: the innermost unfinished loop turns; those inside it start again."""
        low = self._offset_bits
        for n in range(self._levels):
            turn_here = Cat(*ends[:n]).all() & ~ends[n] if n else ~ends[0]
            with m.If(turn_here):
                stride = job.strides[n].as_signed()[low:].as_signed()
                start = (starts[n] + stride)[: len(cursor)]
                m.d.sync += [cursor.eq(start), turns[n].eq(turns[n] - 1), starts[n].eq(start)]
                for inner in range(n):
                    m.d.sync += [turns[inner].eq(job.counts[inner]), starts[inner].eq(start)]
        with m.If(Cat(*ends).all()):
            m.d.sync += active.eq(0)
