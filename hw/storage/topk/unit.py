"""Streaming exact argtopk: radix select over stored keys, its first histogram built while the keys arrive."""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from hw.lib.memories import TypedMemory
from hw.lib.streams import StreamFIFO, check_count
from hw.storage.topk.histogram import HistogramBank
from hw.storage.topk.lanes import LaneCompare, TieBreak, reduce_tree

OUTPUT_DEPTH = 16
"""Rows that may wait at the output; more than the read pipeline holds, so that a row leaves every cycle."""


class TopK(wiring.Component):
    """Mark the k largest of n unsigned keys, the lowest indices among equal keys at the threshold.

    Ports:
    - `cmd`: `{count, k, window}`, 1 <= count <= `max_count`, window <= k; a k above the count selects everything,
      0 nothing. The last `window` indices are selected whatever their keys, and count towards k.
    - `i`: the keys in index order, `in_lanes` per beat; lanes past the count are ignored. With `signed_keys` they
      are in two's complement, and the greatest value is reserved for the window.
    - `o`: one row per `lanes` indices in ascending order: `{row, mask, last}`, bit j of `mask` for index
      `row * lanes + j`. Rows without a marked index are emitted as well.
    - `busy`: from the command until the last row has left.

    Every key is compared in full: the result does not depend on the distribution of the keys; the time does,
    in that refinement stops once the threshold digit's keys are all selected. `hw.storage.topk.timing` gives it.

    A reset in mid-traffic costs `1 << digit_bits` cycles, in which the histogram is cleared.
    Raises ValueError when the lanes do not divide each other or are not powers of two.
    """

    def __init__(
        self,
        max_count: int = 32768,
        *,
        key_bits: int = 32,
        signed_keys: bool = True,
        lanes: int = 16,
        in_lanes: int = 4,
        digit_bits: int = 8,
    ):
        for name, value in (("lanes", lanes), ("in_lanes", in_lanes)):
            check_count(f"{name} of a top-k unit", value, 1)
            if value & (value - 1):
                raise ValueError(f"{name} of a top-k unit is a power of two, not {value}")
        if in_lanes > lanes or max_count % lanes or max_count < 2 * lanes:
            raise ValueError(
                f"a top-k unit takes at most {lanes} keys per beat and holds two or more full rows of {lanes}, "
                f"not {in_lanes} per beat and {max_count} keys"
            )
        if key_bits % digit_bits:
            raise ValueError(
                f"a key is a whole number of digits, not {key_bits} bits in digits of {digit_bits}"
            )
        self.max_count, self.key_bits, self.lanes = max_count, key_bits, lanes
        self.in_lanes, self.digit_bits, self.signed_keys = in_lanes, digit_bits, signed_keys
        self.rows = max_count // lanes
        self.digits = key_bits // digit_bits
        count = range(max_count + 1)
        super().__init__(
            {
                "cmd": In(stream.Signature(data.StructLayout({"count": count, "k": count, "window": count}))),
                "i": In(stream.Signature(data.ArrayLayout(key_bits, in_lanes))),
                "o": Out(stream.Signature(self.row_layout(max_count, lanes))),
                "busy": Out(1),
            }
        )

    @staticmethod
    def row_layout(max_count: int, lanes: int) -> data.StructLayout:
        """One output row."""
        return data.StructLayout({"row": range(max_count // lanes), "mask": lanes, "last": 1})

    def elaborate(self, platform):
        m = Module()
        lanes, digits, dbits = self.lanes, self.digits, self.digit_bits
        groups = lanes // self.in_lanes

        # --- keys: one memory per beat position of a row, so that a beat writes one and a read takes all
        memories = [
            TypedMemory(data.ArrayLayout(self.key_bits, self.in_lanes), self.rows, ram_style="block")
            for _ in range(groups)
        ]
        for index, bank in enumerate(memories):
            m.submodules[f"keys_{index}"] = bank

        count, need = Signal(range(self.max_count + 1)), Signal(range(self.max_count + 1))
        last_row, last_group = Signal(range(self.rows)), Signal(range(groups))  # the last beat's
        last_mask = Signal(lanes)  # lanes of the last row that hold an index
        threshold = Signal(data.ArrayLayout(dbits, digits))  # element 0 is the most significant digit
        known = Signal(range(digits + 1))  # leading digits of the threshold found so far
        nothing = Signal()

        row = Signal(range(self.rows))
        group = Signal(range(groups))
        bin_ = Signal(dbits, init=(1 << dbits) - 1)

        # --- read pipeline: row -> memory -> register -> comparison against the known digits
        issue, issued, fetched, compared = Signal(), Signal(), Signal(), Signal()
        issued_last, fetched_last, compared_last = Signal(), Signal(), Signal()
        all_issued = issued & issued_last  # in the cycle after the last row's, whatever row that is
        issued_row, fetched_row, compared_row = (Signal(range(self.rows)) for _ in range(3))
        keys = Signal(data.ArrayLayout(self.key_bits, lanes))
        m.d.sync += [
            issued.eq(issue),
            issued_row.eq(row),
            issued_last.eq(row == last_row),
            fetched.eq(issued),
            fetched_row.eq(issued_row),
            fetched_last.eq(issued_last),
            compared.eq(fetched),
            compared_row.eq(fetched_row),
            compared_last.eq(fetched_last),
            Cat(keys).eq(Cat(bank.r[0].data for bank in memories)),
        ]
        for bank in memories:
            m.d.comb += [bank.r[0].addr.eq(row), bank.r[0].en.eq(1)]

        row_mask = Signal(lanes)
        m.d.comb += row_mask.eq(Mux(compared_last, last_mask, (1 << lanes) - 1))
        compares = []
        for lane in range(lanes):
            m.submodules[f"compare_{lane}"] = compare = LaneCompare(digits, dbits)
            m.d.comb += [
                compare.key.eq(keys[lane]),
                compare.threshold.eq(threshold),
                compare.known.eq(known),
            ]
            compares.append(compare)

        # --- histogram banks, one per lane
        banks = []
        scanning, counting_new = Signal(), Signal()
        beat_valid, beat_group, beat_last = Signal(), Signal(range(groups)), Signal()
        ready = Signal()  # a register: it falls in the cycle after the last beat
        accept = self.i.valid & ready
        beat_row = Signal(range(self.rows))
        beat = Signal(data.ArrayLayout(self.key_bits, self.in_lanes))
        first_forced = Signal(range(self.max_count + 1))
        m.d.sync += [
            beat_valid.eq(accept),
            beat_group.eq(group),
            beat_row.eq(row),
            beat_last.eq(row == last_row),
        ]
        beat_index = Cat(Const(0, ceil_log2(self.in_lanes)), group[: ceil_log2(groups)], row)
        flip = 1 << (self.key_bits - 1) if self.signed_keys else 0
        for lane in range(self.in_lanes):
            forced = (beat_index | lane) >= first_forced
            m.d.sync += beat[lane].eq((self.i.payload[lane] ^ flip) | forced.replicate(self.key_bits))
        for index, memory in enumerate(memories):
            m.d.comb += [
                memory.w.addr.eq(beat_row),
                Cat(memory.w.data).eq(Cat(beat)),
                memory.w.en.eq(beat_valid & (beat_group == index)),
            ]
        for lane in range(lanes):
            m.submodules[f"histogram_{lane}"] = bank = HistogramBank(dbits, self.rows)
            arrives = beat_valid & (beat_group == lane // self.in_lanes) & (~beat_last | last_mask[lane])
            refines = compared & counting_new & compares[lane].equal & row_mask[lane]
            digit = Mux(counting_new, compares[lane].digit, beat[lane % self.in_lanes][-dbits:])
            m.d.sync += [
                bank.valid.eq(arrives | refines),
                bank.digit.eq(Mux(scanning, bin_, digit)),
                bank.scan.eq(scanning),
            ]
            banks.append(bank)

        # --- scan: bins from the top, the sum over the banks through a tree
        total, tree_latency = reduce_tree(m, [bank.count for bank in banks])
        scan_latency = 1 + HistogramBank.scan_latency + tree_latency
        scan_pipe = Signal(scan_latency)
        bin_pipe = [Signal(dbits, name=f"bin_pipe_{n}") for n in range(scan_latency)]
        m.d.sync += [scan_pipe.eq(Cat(scanning, scan_pipe)), bin_pipe[0].eq(bin_)]
        m.d.sync += [bin_pipe[n].eq(bin_pipe[n - 1]) for n in range(1, scan_latency)]
        left = Signal(range(self.max_count + 1))  # of `need`, what the bins above have not covered
        found, clearing, exact = Signal(), Signal(), Signal()
        with m.If(scan_pipe[-1] & ~found & ~clearing):
            with m.If(left <= total):
                m.d.sync += [
                    found.eq(1),
                    need.eq(left),
                    exact.eq(left == total),
                    Array(threshold)[known].eq(bin_pipe[-1]),
                ]
            with m.Else():
                m.d.sync += left.eq(left - total)

        # --- emission: ties at the threshold in index order, then a queue that hides the pipeline from stalls
        emitting, emit_start = Signal(), Signal()
        m.submodules.ties = ties = TieBreak(lanes, self.max_count)
        m.submodules.queue = queue = StreamFIFO(self.row_layout(self.max_count, self.lanes), OUTPUT_DEPTH)
        credit = Signal(range(OUTPUT_DEPTH + 1), init=OUTPUT_DEPTH)
        taken = self.o.valid & self.o.ready
        m.d.sync += credit.eq(credit + taken - (issue & emitting))
        m.d.comb += [
            ties.above.eq(Cat(c.above for c in compares) & row_mask),
            ties.equal.eq(Cat(c.equal for c in compares) & row_mask),
            ties.valid.eq(compared & emitting),
            ties.start.eq(emit_start),
            ties.need.eq(need),
        ]
        tie_row = [Signal(range(self.rows), name=f"tie_row_{n}") for n in range(TieBreak.latency)]
        tie_last = Signal(TieBreak.latency)
        m.d.sync += [tie_row[0].eq(compared_row), tie_last.eq(Cat(compared_last & compared, tie_last))]
        m.d.sync += [tie_row[n].eq(tie_row[n - 1]) for n in range(1, TieBreak.latency)]
        m.d.comb += [
            queue.i.payload.row.eq(tie_row[-1]),
            queue.i.payload.mask.eq(Mux(nothing, 0, ties.mask)),
            queue.i.payload.last.eq(tie_last[-1]),
            queue.i.valid.eq(ties.done),
        ]
        wiring.connect(m, wiring.flipped(self.o), queue.o)

        # --- control
        drain = Signal(range(8))
        m.d.comb += [self.busy.eq(1), self.i.ready.eq(ready)]
        with m.If(accept):
            m.d.sync += group.eq(group + 1)
            with m.If(group == groups - 1):
                m.d.sync += [row.eq(row + 1), group.eq(0)]
            with m.If((row == last_row) & (group == last_group)):
                m.d.sync += ready.eq(0)
        with m.FSM(init="CLEAR"):
            with m.State("CLEAR"):
                m.d.comb += [scanning.eq(1), clearing.eq(1)]
                m.d.sync += bin_.eq(bin_ - 1)
                with m.If(bin_ == 0):
                    m.next = "SETTLE"
            with m.State("SETTLE"):
                m.d.comb += clearing.eq(1)
                with m.If(~scan_pipe.any()):
                    m.next = "IDLE"
            with m.State("IDLE"):
                m.d.comb += [self.cmd.ready.eq(1), self.busy.eq(0)]
                m.d.sync += [
                    count.eq(self.cmd.payload.count),
                    need.eq(self.cmd.payload.k),
                    first_forced.eq(self.cmd.payload.count - self.cmd.payload.window),
                    row.eq(0),
                    group.eq(0),
                    known.eq(0),
                ]
                with m.If(self.cmd.valid):
                    m.next = "PREPARE"
            with m.State("PREPARE"):
                m.d.sync += [
                    Cat(last_group, last_row).eq((count - 1) >> ceil_log2(self.in_lanes)),
                    last_mask.eq((2 << (count - 1)[: ceil_log2(lanes)]) - 1),
                    need.eq(Mux(need > count, count, need)),
                    nothing.eq(need == 0),
                ]
                m.d.sync += ready.eq(1)
                m.next = "LOAD"
            with m.State("LOAD"):
                m.d.sync += drain.eq(1)
                with m.If(~ready):
                    m.next = "DRAIN"
            with m.State("DRAIN"):  # the last digits reach their bins
                m.d.sync += [drain.eq(drain - 1), bin_.eq((1 << dbits) - 1), left.eq(need), found.eq(0)]
                with m.If(drain == 0):
                    m.next = "SCAN"
            with m.State("SCAN"):
                m.d.comb += scanning.eq(1)
                m.d.sync += bin_.eq(bin_ - 1)
                with m.If(bin_ == 0):
                    m.next = "DECIDE"
            with m.State("DECIDE"), m.If(~scan_pipe.any()):
                m.d.sync += [known.eq(known + 1), row.eq(0)]
                with m.If(nothing | exact | (known == digits - 1)):
                    m.next = "EMIT"
                with m.Else():
                    m.next = "REFINE"
            with m.State("REFINE"):
                m.d.comb += counting_new.eq(1)
                with m.If(all_issued):
                    m.next = "REFINE-DRAIN"
                with m.Else():
                    m.d.comb += issue.eq(1)
                    m.d.sync += row.eq(row + 1)
            with m.State("REFINE-DRAIN"):
                m.d.comb += counting_new.eq(1)
                m.d.sync += drain.eq(2)
                with m.If(compared & compared_last):
                    m.next = "DRAIN"
            with m.State("EMIT"):
                m.d.comb += emitting.eq(1)
                with m.If(all_issued):
                    m.next = "EMIT-DRAIN"
                with m.Elif(credit != 0):
                    m.d.comb += [issue.eq(1), emit_start.eq(row == 0)]
                    m.d.sync += row.eq(row + 1)
            with m.State("EMIT-DRAIN"):
                m.d.comb += emitting.eq(1)
                with m.If(taken & self.o.payload.last):
                    m.next = "IDLE"
        return m
