"""The in-storage attention unit: flash channels on one side, attention outputs and completions on the other.

    commands -> slots -> query unit -> requester -> flash front -> feeders -> two kernels -> outputs
                                          ^                                      | keys
                                          +---- selected pages <- alpha <- argtopk

Dense heads alternate between the kernels. Of a SparF head kernel 0 takes the approximate pass and kernel 1 the exact
one, so that the exact pass of a job streams while the next job is scored; `SLOTS` jobs are under way at once.
"""

from functools import partial

from amaranth import Array, Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from golden.spec.storage import (
    ALPHA_FRAC,
    ATTEND,
    BEAT_ELEMENTS,
    COMPLETION,
    CONFIG,
    COUNTERS,
    GROUP_TOKENS,
    PAGE_DESCRIPTOR,
    PAGE_REQUEST,
    SLOT_BITS,
    Mode,
    PageKind,
    Status,
)
from hw.lib.memories import TypedMemory
from hw.lib.shared import place
from hw.lib.streams import StreamFIFO, check_count, connect
from hw.storage.approximate import AlphaUnit
from hw.storage.feeder import MEAN_ROW, Feeder
from hw.storage.kernel import AttentionKernel, Op
from hw.storage.nfc.filter import RING_PAGES
from hw.storage.nfc.front import OUTSTANDING, FlashFront
from hw.storage.nfc.layouts import CHANNEL, COMMAND, flow, layout_of
from hw.storage.normalise import STATE
from hw.storage.passes import (
    AHEAD,
    CHANNELS,
    ROW,
    SLOTS,
    AllPages,
    ChannelPass,
    Requester,
    SelectedPages,
    TokenPass,
)
from hw.storage.query import SCALE, QueryUnit
from hw.storage.topk.unit import TopK

KERNELS = 2
JOB = layout_of(ATTEND)
OUTPUT = data.StructLayout({"data": 16, "query": 3, "element": 7, "last": 1, "command_id": 16})
ELEMENTS = data.ArrayLayout(16, BEAT_ELEMENTS)
CONFIG_STATUS = data.StructLayout({"status": 8, "field": 8})
_FIELD = {name: index for index, (name, _) in enumerate(ATTEND.fields)}
_CONFIG_FIELD = {name: index for index, (name, _) in enumerate(CONFIG.fields)}


class AttentionUnit(wiring.Component):
    """Ports:

    - `config`: always answered, in the next cycle, at `config_status` (`config_done`); BUSY while jobs run.
    - `command`, then its `operand` beats: q of every query, 16 elements a beat, and for SparF v-bar. A command with a
      bad field completes with that field's index; its operands are taken and dropped (none are, before a config).
    - `cancel`: every job in the unit completes, with ABORTED unless it was already past its last page.
    - `request`, `descriptor`: pages asked of the firmware's maps, and its answers in the same order.
    - `flash`, `grant`, `beat`: per flash channel, and last the DRAM group buffer: page to sense; per kernel, the
      name of the next page that may be sent (`FlashFront`); raw page.
    - `output`: per kernel, elements of whole heads; `completion`: one per command. `softmax`: per kernel, the state of
      the query whose element stands at `output` (golden.spec.storage.SOFTMAX_STATE).
    - `counters`: golden.spec.storage.COUNTERS.
    """

    def __init__(
        self,
        channels: int = CHANNELS,
        lanes: int = 4,
        *,
        max_tokens: int = 32768,
        outstanding: int = OUTSTANDING,
        ring_pages: int = RING_PAGES,
    ):
        self._channels = check_count("Flash channels", channels, 1)
        self._lanes = lanes
        self._max_tokens = max_tokens
        self._outstanding, self._ring_pages = outstanding, ring_pages
        ports = channels + 1
        super().__init__(
            {
                "config": In(stream.Signature(layout_of(CONFIG))),
                "config_status": Out(CONFIG_STATUS),
                "config_done": Out(1),
                "command": In(stream.Signature(JOB)),
                "operand": In(stream.Signature(ELEMENTS)),
                "cancel": In(1),
                "request": Out(stream.Signature(layout_of(PAGE_REQUEST))),
                "descriptor": In(stream.Signature(layout_of(PAGE_DESCRIPTOR))),
                "flash": Out(stream.Signature(COMMAND)).array(ports),
                "grant": Out(flow(SLOT_BITS)).array(ports, KERNELS),
                "beat": In(flow(CHANNEL)).array(ports),
                "output": Out(stream.Signature(OUTPUT)).array(KERNELS),
                "softmax": Out(STATE).array(KERNELS),
                "completion": Out(stream.Signature(layout_of(COMPLETION))),
                "counters": Out(48).array(len(COUNTERS)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        self._config = Signal(layout_of(CONFIG))
        self._configured = Signal()
        self._used = Signal(SLOTS)  # slots that hold a job
        self._sparse = Signal(SLOTS)
        self._loaded, self._prepared = Signal(SLOTS), Signal(SLOTS)
        self._weighed = Signal(SLOTS)  # alpha is known
        self._status = Array(Signal(4, name=f"status_{n}") for n in range(SLOTS))
        self._page = Array(Signal(17, name=f"page_{n}") for n in range(SLOTS))
        self._aborting, self._loading = Signal(), Signal()
        self._refused, self._refusal = (
            Signal(JOB),
            Signal(CONFIG_STATUS),
        )  # the command being taken, and its fault
        self._bad_completion = Signal(layout_of(COMPLETION))
        self._bad_valid, self._bad_taken = Signal(), Signal()
        m.submodules.jobs = self._jobs = Memory(shape=JOB, depth=SLOTS, init=[])
        m.submodules.operands = self._operands = TypedMemory(
            ELEMENTS, SLOTS * 64, read_ports=1 + KERNELS, ram_style="block"
        )
        with m.If(self.cancel):
            m.d.sync += self._aborting.eq(1)
        with m.Elif(~self._used.any()):
            m.d.sync += self._aborting.eq(0)

        self._configure(m)
        self._accept(m)
        feeders, kernels, front = self._datapath(m, platform)
        marks = self._prepare(m, feeders, kernels)
        self._select(m, feeders, kernels, front, marks)
        self._complete(m, feeders, kernels)
        return m

    def _job(self, m, name, slot):
        port = self._jobs.read_port(domain="comb")
        m.d.comb += port.addr.eq(slot)
        return port.data

    def _configure(self, m):
        """One configuration at a time, checked field by field."""
        new = self.config.p
        status, field = Signal(8), Signal(8)
        checks = [
            ("m_log2", new.m_log2 == 0),
            ("group_queries", (new.group_queries == 0) | (new.group_queries > self._lanes)),
            ("kv_heads", new.kv_heads == 0),
            ("channels", (new.channels == 0) | (new.channels > self._channels)),
            ("dies", (new.dies == 0) | (new.dies > 16)),
            ("blocks", (new.blocks == 0) | (new.blocks > 4096)),
            ("pages", (new.pages == 0) | (new.pages > 1024)),
        ]
        with m.If(self._used.any() | self._loading):
            m.d.comb += status.eq(Status.BUSY)
        for name, bad in checks:
            with m.Elif(bad):
                m.d.comb += [status.eq(Status.BAD_FIELD), field.eq(_CONFIG_FIELD[name])]
        m.d.comb += self.config.ready.eq(1)
        m.d.sync += self.config_done.eq(self.config.valid)
        with m.If(self.config.valid):
            m.d.sync += [self.config_status.status.eq(status), self.config_status.field.eq(field)]
            with m.If(status == Status.OK):
                m.d.sync += [self._config.eq(new), self._configured.eq(1)]

    def _accept(self, m):
        """A command into a slot, with its operands."""
        new = self.command.p
        config = self._config
        head = Mux(config.wide_head, 128, 64)
        sparse = new.mode == Mode.SPARF
        checks = [
            ("kv_head", new.kv_head >= config.kv_heads),
            ("tokens", (new.tokens == 0) | (new.tokens > self._max_tokens)),
            ("r", sparse & ((new.r == 0) | (new.r > head))),
            ("k", sparse & ((new.k == 0) | (new.k > new.tokens))),
            ("window", sparse & (new.window > new.k)),
        ]
        slot = Signal(range(SLOTS))
        row, slice_ = Signal(3), Signal(3)
        drop, with_mean = Signal(), Signal()
        write = self._jobs.write_port()
        last_slice = Mux(config.wide_head, 7, 3)
        final = Signal()
        m.d.comb += [
            write.addr.eq(slot),
            write.data.eq(new),
            self._operands.w.addr.eq(Cat(slice_, row, slot)),
            Cat(self._operands.w.data).eq(Cat(self.operand.payload)),
            self._bad_completion.command_id.eq(self._refused.command_id),
            self._bad_completion.sequence.eq(self._refused.sequence),
            self._bad_completion.kv_head.eq(self._refused.kv_head),
            self._bad_completion.status.eq(self._refusal.status),
            self._bad_completion.field.eq(self._refusal.field),
        ]
        with m.FSM(name="accept"):
            free = ~self._aborting & ~self._used.bit_select(slot, 1)
            with m.State("idle"), m.If(self.command.valid & free):
                m.d.comb += self.command.ready.eq(1)
                m.d.sync += [
                    self._refused.eq(new),
                    self._refusal.eq(0),
                    drop.eq(0),
                    with_mean.eq(sparse),
                    row.eq(0),
                    slice_.eq(0),
                ]
                m.next = "load"
                with m.If(~self._configured):
                    m.d.sync += self._refusal.status.eq(Status.NOT_CONFIGURED)
                    m.next = "refuse"
                for name, bad in checks:
                    with m.Elif(bad):
                        m.d.sync += [
                            self._refusal.status.eq(Status.BAD_FIELD),
                            self._refusal.field.eq(_FIELD[name]),
                            drop.eq(1),
                        ]
                m.d.comb += write.en.eq(1)
            with m.State("load"):
                m.d.comb += [
                    self._loading.eq(1),
                    self.operand.ready.eq(1),
                    self._operands.w.en.eq(self.operand.valid),
                    final.eq(
                        (slice_ == last_slice)
                        & ((row == MEAN_ROW) | ((row == config.group_queries - 1) & ~with_mean))
                    ),
                ]
                with m.If(self.operand.valid):
                    m.d.sync += slice_.eq(slice_ + 1)
                    with m.If(slice_ == last_slice):
                        m.d.sync += slice_.eq(0)
                        m.d.sync += row.eq(Mux(row == config.group_queries - 1, MEAN_ROW, row + 1))
                    with m.If(final):
                        m.next = "refuse"
                        with m.If(~drop):
                            m.d.sync += [
                                slot.eq(slot + 1),
                                self._used.bit_select(slot, 1).eq(1),
                                self._loaded.bit_select(slot, 1).eq(1),
                                self._sparse.bit_select(slot, 1).eq(with_mean),
                                self._weighed.bit_select(slot, 1).eq(0),
                                self._status[slot].eq(0),
                            ]
                            m.next = "idle"
            with m.State("refuse"):
                m.d.comb += self._bad_valid.eq(1)
                with m.If(self._bad_taken):
                    m.next = "idle"

    def _datapath(self, m, platform):
        """Flash front, feeders and kernels."""
        m.submodules.front = front = FlashFront(
            self._channels + 1, KERNELS, outstanding=self._outstanding, ring_pages=self._ring_pages
        )
        for channel in range(self._channels + 1):
            connect(m, front.command[channel], wiring.flipped(self.flash[channel]))
            connect(m, wiring.flipped(self.beat[channel]), front.beat[channel])
            for kernel in range(KERNELS):
                connect(m, front.grant[channel][kernel], wiring.flipped(self.grant[channel][kernel]))
        m.submodules.requester = self._requester = Requester(
            self._channels, ledger_depth=(self._channels + 1) * self._outstanding
        )
        connect(m, self._requester.read, front.read)
        connect(m, self._requester.request, wiring.flipped(self.request))
        connect(m, wiring.flipped(self.descriptor), self._requester.descriptor)
        m.d.comb += self._requester.config.eq(self._config)
        feeders, kernels = [], []
        for n in range(KERNELS):
            m.submodules[f"feeder_{n}"] = feeder = Feeder()
            make = partial(AttentionKernel, self._lanes)
            kernel = place(m, platform, f"kernel_{n}", "attention_kernel", make)
            connect(m, self._requester.ledger[n], feeder.ledger)
            connect(m, front.page[n], feeder.page)
            connect(m, feeder.o, kernel.i)
            job = self._job(m, f"feeder_{n}", feeder.slot)
            memory = self._operands.r[1 + n]
            m.d.comb += [
                feeder.wide.eq(self._config.wide_head),
                feeder.m_log2.eq(self._config.m_log2),
                feeder.queries.eq(self._config.group_queries - 1),
                feeder.kernel_idle.eq(kernel.idle),
                feeder.job.sparse.eq(job.mode),
                feeder.job.tokens.eq(job.tokens),
                feeder.ready.eq(self._weighed.bit_select(feeder.slot, 1)),
                memory.addr.eq(Cat(feeder.address.slice, feeder.address.row, feeder.slot)),
                memory.en.eq(1),
                Cat(feeder.elements).eq(Cat(memory.data)),
            ]
            with m.If(feeder.fault_valid & (self._status[feeder.fault.slot] == 0)):
                m.d.sync += [
                    self._status[feeder.fault.slot].eq(feeder.fault.status),
                    self._page[feeder.fault.slot].eq(feeder.fault.index),
                ]
            feeders.append(feeder)
            kernels.append(kernel)
        return feeders, kernels, front

    def _prepare(self, m, feeders, kernels):
        """Channels and scale of SparF jobs, in slot order; returns the marks' memory port."""
        m.submodules.query = query = QueryUnit(self._lanes)
        slot = Signal(range(SLOTS))
        job = self._job(m, "prepare", slot)
        memory = self._operands.r[0]
        m.submodules.marks = marks = Memory(shape=128, depth=SLOTS, init=[])
        scales_shape = data.ArrayLayout(SCALE, self._lanes)
        m.submodules.scales = scales = Memory(shape=scales_shape, depth=SLOTS, init=[])
        marks_write, scales_write = marks.write_port(), scales.write_port()
        m.d.comb += [
            memory.addr.eq(Cat(query.address.slice, query.address.query, slot)),
            memory.en.eq(1),
            Cat(query.elements).eq(Cat(memory.data)),
            query.wide.eq(self._config.wide_head),
            query.queries.eq(self._config.group_queries - 1),
            query.r.eq(job.r),
            marks_write.addr.eq(slot),
            marks_write.data.eq(query.marks),
            scales_write.addr.eq(slot),
            *(scales_write.data[n].eq(query.scale[n]) for n in range(self._lanes)),
        ]
        with m.FSM(name="prepare"):
            with m.State("idle"), m.If(self._loaded.bit_select(slot, 1)):
                m.d.sync += self._loaded.bit_select(slot, 1).eq(0)
                m.next = "store"
                with m.If(self._sparse.bit_select(slot, 1)):
                    m.d.comb += query.start.eq(1)
                    m.next = "wait"
            with m.State("wait"), m.If(query.done):
                m.next = "settle"
            with m.State("settle"):
                m.next = "store"
            with m.State("store"):
                m.d.comb += [marks_write.en.eq(1), scales_write.en.eq(1)]
                m.d.sync += [self._prepared.bit_select(slot, 1).eq(1), slot.eq(slot + 1)]
                m.next = "idle"
        for feeder, kernel in zip(feeders, kernels):
            read = scales.read_port(domain="comb")
            m.d.comb += read.addr.eq(feeder.slot)
            with m.If(kernel.i.valid & kernel.i.ready & (kernel.i.p.op == Op.START)):
                m.d.sync += [kernel.scale[n].eq(read.data[n]) for n in range(self._lanes)]
        return marks

    def _select(self, m, feeders, kernels, front, marks):
        """Both sources of wanted pages: jobs in slot order, and the selection of the approximate pass."""
        m.submodules.all_pages = all_pages = AllPages()
        m.submodules.other_pages = other_pages = AllPages()
        m.submodules.channel_pass = channel_pass = ChannelPass()
        m.submodules.first_pass = first_pass = TokenPass()
        m.submodules.second_pass = second_pass = TokenPass()
        m.submodules.selected = selected = SelectedPages()
        rows_deep = (AHEAD + 1) * self._max_tokens // GROUP_TOKENS
        m.submodules.rows = rows = StreamFIFO(ROW, rows_deep, kind="block")
        m.submodules.owners = owners = StreamFIFO(range(SLOTS), SLOTS)
        m.submodules.topk = topk = TopK(self._max_tokens, lanes=GROUP_TOKENS, in_lanes=1)
        m.submodules.alpha = alpha = AlphaUnit(self._max_tokens, self._lanes)
        connect(m, all_pages.o, first_pass.i)
        connect(m, topk.o, alpha.row)
        connect(m, rows.o, selected.i)
        m.d.comb += [
            rows.i.valid.eq(alpha.selected.valid),
            alpha.selected.ready.eq(rows.i.ready),
            rows.i.p.mask.eq(alpha.selected.p.mask),
            rows.i.p.last.eq(alpha.selected.p.last),
        ]
        # dense heads of kernel 1 use the path of the selected pages, so that both kernels' pages are asked for in turn
        other = Signal()
        m.d.comb += [
            second_pass.i.valid.eq(Mux(other, other_pages.o.valid, selected.o.valid)),
            second_pass.i.payload.eq(Mux(other, other_pages.o.payload, selected.o.payload)),
            other_pages.o.ready.eq(second_pass.i.ready & other),
            selected.o.ready.eq(second_pass.i.ready & ~other),
        ]
        m.d.comb += selected.wide.eq(self._config.wide_head)

        # --- jobs in slot order
        slot = Signal(range(SLOTS))
        job = self._job(m, "issue", slot)
        marks_read = marks.read_port(domain="comb")
        fair, held, held_second = Signal(), Signal(), Signal()
        running = Signal()
        ahead = Signal(range(AHEAD + 1))  # approximate passes begun whose selection is not being asked for
        sparse = self._sparse.bit_select(slot, 1)
        m.d.comb += [
            marks_read.addr.eq(slot),
            all_pages.wide.eq(self._config.wide_head),
            all_pages.tokens.eq(job.tokens),
            other_pages.wide.eq(self._config.wide_head),
            other_pages.tokens.eq(job.tokens),
            channel_pass.wide.eq(self._config.wide_head),
            channel_pass.m_log2.eq(self._config.m_log2),
            channel_pass.tokens.eq(job.tokens),
            channel_pass.marks.eq(marks_read.data),
        ]
        want = self._requester.want
        second = Signal()
        dense_want, sparse_want = first_pass.o, channel_pass.o
        first_valid = running & Mux(sparse, sparse_want.valid, dense_want.valid)
        moved = want.ready & ~second
        m.d.comb += [
            second.eq(Mux(held, held_second, second_pass.o.valid & (fair | ~first_valid))),
            want.valid.eq(second_pass.o.valid | first_valid),
            second_pass.o.ready.eq(want.ready & second),
            dense_want.ready.eq(moved & running & ~sparse),
            sparse_want.ready.eq(moved & running & sparse),
        ]
        last = moved & first_valid & Mux(sparse, sparse_want.p.last, dense_want.p.last)
        with m.If(last):
            m.d.sync += [running.eq(0), slot.eq(slot + 1)]
        started = ~running & self._prepared.bit_select(slot, 1) & (~sparse | (ahead != AHEAD))
        second_moved = second & second_pass.o.valid & want.ready
        second_last = second_moved & second_pass.o.p.last
        second_owner = owners.o.payload
        selection_first = second_moved & second_pass.o.p.first & self._sparse.bit_select(second_owner, 1)
        m.d.sync += [
            ahead.eq(ahead + (started & sparse) - selection_first),
            held.eq(want.valid & ~want.ready),
            held_second.eq(second),
        ]
        with m.If(want.valid & want.ready):
            m.d.sync += fair.eq(~second)
        # kernel 1 takes the exact passes of SparF; while there are none, dense heads go to either
        to_other = Signal()
        m.d.comb += to_other.eq(started & ~self._sparse.any() & ~other & ~owners.o.valid)
        with m.If(to_other):
            m.d.comb += other_pages.start.eq(1)
            m.d.sync += [other.eq(1), slot.eq(slot + 1), self._prepared.bit_select(slot, 1).eq(0)]
        with m.Elif(other_pages.o.valid & other_pages.o.ready & other_pages.o.p.last):
            m.d.sync += other.eq(0)
        with m.If(started & ~to_other):
            m.d.comb += [all_pages.start.eq(~sparse), channel_pass.start.eq(sparse)]
            m.d.sync += [
                running.eq(1),
                self._prepared.bit_select(slot, 1).eq(0),
            ]

        # --- the selection: who owns it, and its pages
        owner = Signal(range(SLOTS))
        asked, granted = Signal(), Signal()
        leader = feeders[0]
        leader_job = self._job(m, "leader", leader.slot)
        owner_job = self._job(m, "owner", owner)
        free = topk.cmd.ready & alpha.idle & owners.i.ready
        m.d.comb += [
            topk.cmd.valid.eq(asked & alpha.idle & owners.i.ready),
            owners.i.valid.eq((asked & free) | to_other),
            owners.i.payload.eq(Mux(to_other, slot, leader.slot)),
            owners.o.ready.eq(second_last),
            topk.cmd.p.count.eq(leader_job.tokens),
            topk.cmd.p.k.eq(leader_job.k),
            topk.cmd.p.window.eq(leader_job.window),
            topk.i.valid.eq(kernels[0].key.valid),
            topk.i.payload[0].eq(kernels[0].key.payload),
            kernels[0].key.ready.eq(topk.i.ready),
            kernels[1].key.ready.eq(1),
            alpha.clear.eq(asked & free),
            alpha.capture.eq(leader.scored),
            alpha.whole.eq(owner_job.k == owner_job.tokens),
            leader.score_ready.eq(granted),
        ]
        with m.If(leader.score):
            m.d.sync += [asked.eq(1), granted.eq(0)]
        with m.Elif(asked & free):
            m.d.sync += [asked.eq(0), granted.eq(1), owner.eq(leader.slot)]
        for n in range(self._lanes):
            m.d.comb += [
                alpha.probability[n].eq(kernels[0].probability[n]),
                alpha.sum[n].eq(kernels[0].sum[n]),
            ]
        self._weigh(m, alpha, owner, leader, feeders, kernels)

        # --- what is wanted
        page, entry = want.p, want.p.ledger
        chosen = Mux(second, second_owner, slot)
        of_slot = self._job(m, "want", chosen)
        # a page that is offered keeps its status: an abort or a fault counts from the next page on
        fault, held_fault = Signal(4), Signal(4)
        m.d.comb += [
            fault.eq(Mux(self._aborting, Status.ABORTED, Mux(second, self._status[second_owner], 0))),
            entry.status.eq(Mux(held, held_fault, fault)),
        ]
        m.d.sync += held_fault.eq(entry.status)
        m.d.comb += [
            entry.slot.eq(chosen),
            page.sequence.eq(of_slot.sequence),
            page.kv_head.eq(of_slot.kv_head),
        ]
        with m.If(second | ~sparse):
            token = second_pass.o.p, dense_want.p
            m.d.comb += [
                page.kernel.eq(second),
                entry.kind.eq(Mux(second, token[0].kind, token[1].kind)),
                entry.index.eq(Mux(second, token[0].index, token[1].index)),
                entry.first.eq(Mux(second, token[0].first, token[1].first)),
                entry.last.eq(Mux(second, token[0].last, token[1].last)),
                page.mask.eq(Mux(second, token[0].mask, token[1].mask)),
            ]
        with m.Else():
            channel = sparse_want.p
            m.d.comb += [
                page.kernel.eq(0),
                entry.kind.eq(PageKind.K_CHANNEL),
                entry.index.eq(channel.index),
                entry.first.eq(channel.first),
                entry.last.eq(channel.last),
                entry.block_end.eq(channel.block_end),
                entry.group.eq(channel.group),
                page.mask.eq(channel.mask),
            ]

    def _weigh(self, m, alpha, owner, leader, feeders, kernels):
        """Alpha and poison of the approximate pass, kept for the exact pass of the same slot."""
        lanes = range(self._lanes)
        shape = data.ArrayLayout(ALPHA_FRAC + 1, self._lanes)
        m.submodules.alphas = alphas = Memory(shape=shape, depth=SLOTS, init=[])
        write = alphas.write_port()
        poison = Array(Signal(self._lanes, name=f"poison_{n}") for n in range(SLOTS))
        finished = Signal()
        m.d.sync += finished.eq(alpha.done)
        m.d.comb += [
            write.addr.eq(owner),
            write.en.eq(finished),
            *(write.data[n].eq(alpha.alpha[n]) for n in lanes),
        ]
        m.submodules.states = states = Memory(
            shape=data.ArrayLayout(STATE, self._lanes), depth=SLOTS, init=[]
        )
        states_write, states_read = states.write_port(), states.read_port(domain="comb")
        exact_slot = Signal(range(SLOTS))  # of the head in kernel 1, the one that takes exact passes of SparF
        m.d.comb += [states_write.addr.eq(leader.slot), states_write.en.eq(leader.scored)]
        m.d.comb += states_read.addr.eq(exact_slot)
        for n in lanes:
            m.d.comb += [
                states_write.data[n].sum.eq(kernels[0].sum[n]),
                states_write.data[n].maximum.eq(kernels[0].probability[n].maximum),
                kernels[1].state[n].eq(states_read.data[n]),
            ]
        with m.If(kernels[1].i.valid & kernels[1].i.ready & (kernels[1].i.p.op == Op.START)):
            m.d.sync += exact_slot.eq(feeders[1].slot)
        with m.If(leader.scored):
            bad = Cat(kernels[0].poisoned[n] | ~kernels[0].sum[n].any() for n in lanes)
            m.d.sync += poison[leader.slot].eq(bad)
        with m.If(finished):
            m.d.sync += self._weighed.bit_select(owner, 1).eq(1)
        for feeder, kernel in zip(feeders, kernels):
            read = alphas.read_port(domain="comb")
            m.d.comb += read.addr.eq(feeder.slot)
            with m.If(kernel.i.valid & kernel.i.ready & (kernel.i.p.op == Op.START)):
                m.d.sync += [kernel.alpha[n].eq(read.data[n]) for n in lanes]
                m.d.sync += [kernel.poison[n].eq(poison[feeder.slot][n]) for n in lanes]

    def _complete(self, m, feeders, kernels):
        """Outputs with their command, one completion per command, and the counters."""
        entry = data.StructLayout({"slot": range(SLOTS), "failed": 1})
        posts = []
        for n, (feeder, kernel) in enumerate(zip(feeders, kernels)):
            m.submodules[f"finished_{n}"] = finished = StreamFIFO(entry, SLOTS)
            head = finished.o.p
            job = self._job(m, f"finished_{n}", head.slot)
            out, source = self.output[n], kernel.o
            given = Signal(name=f"given_{n}")  # the head's last element has left
            open_ = finished.o.valid & ~head.failed & ~given
            m.d.comb += [
                finished.i.valid.eq(feeder.ended),
                finished.i.p.slot.eq(feeder.slot),
                finished.i.p.failed.eq(feeder.failed),
                out.valid.eq(source.valid & open_),
                source.ready.eq(out.ready & open_),
                self.softmax[n].eq(kernel.softmax),
                out.p.data.eq(source.p.data),
                out.p.query.eq(source.p.query),
                out.p.element.eq(source.p.element),
                out.p.last.eq(source.p.last),
                out.p.command_id.eq(job.command_id),
            ]
            with m.If(out.valid & out.ready & out.p.last):
                m.d.sync += given.eq(1)
            posts.append((finished.o, job, head, given))
        done = self.completion
        m.d.comb += [done.valid.eq(self._bad_valid), done.payload.eq(self._bad_completion)]
        m.d.comb += self._bad_taken.eq(self._bad_valid & done.ready)
        taken = self._bad_valid
        for source, job, head, given in posts:
            ready = source.valid & (head.failed | given) & ~taken
            with m.If(ready):
                m.d.comb += [
                    done.valid.eq(1),
                    done.p.command_id.eq(job.command_id),
                    done.p.sequence.eq(job.sequence),
                    done.p.kv_head.eq(job.kv_head),
                    done.p.status.eq(Mux(head.failed, self._status[head.slot], Status.OK)),
                    done.p.field.eq(0),
                    done.p.index.eq(Mux(head.failed, self._page[head.slot], 0)),
                    source.ready.eq(done.ready),
                ]
                with m.If(done.ready):
                    m.d.sync += [given.eq(0), self._used.bit_select(head.slot, 1).eq(0)]
                    m.d.sync += self._sparse.bit_select(head.slot, 1).eq(0)
            taken = taken | ready
        self._count(m, feeders, kernels, done)

    def _count(self, m, feeders, kernels, done):
        moved = [kernel.i.valid & kernel.i.ready for kernel in kernels]
        held = [kernel.i.valid & ~kernel.i.ready for kernel in kernels]
        events = {
            "cycles": 1,
            "pages": sum(feeder.ledger.valid & feeder.ledger.ready for feeder in feeders),
            "beats": sum(feeder.page.valid & feeder.page.ready for feeder in feeders),
            "kernel_busy": sum(moved),
            "kernel_wait": sum(held),
            "requests": self.request.valid & self.request.ready,
            "jobs": done.valid & done.ready,
            "failed_jobs": done.valid & done.ready & (done.p.status != Status.OK),
        }
        clear = self.config.valid & self.config.ready
        for index, name in enumerate(COUNTERS):
            step = Signal(2, name=f"step_{name}")
            m.d.sync += step.eq(events[name])
            m.d.sync += self.counters[index].eq(Mux(clear, 0, self.counters[index] + step))
