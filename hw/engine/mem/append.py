"""The APPEND unit: quantised K and V vectors into their places in the channels.

A key's row lies in one channel: its words are written with byte strobes. A value's elements lie in all channels of its
head, two bits per plane inside words that hold 32 slots: those words are read from all channels at once, changed one
channel after the other and written back.
"""

from amaranth import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import STEP, WORD_BITS, WORD_BYTES, EngineConfig, Error
from hw.engine.interfaces import AppendOp, kv_record, unit_port
from hw.engine.mem.axi import BURST_INCR, OKAY, axi_read, axi_write
from hw.engine.mem.channels import ADDR_BITS
from hw.lib.memories import TypedMemory

OFFSET_BITS = WORD_BYTES.bit_length() - 1
HEAD_MAX = 256
IN_FLIGHT = 64
"""Writes whose answers may be outstanding."""


class AppendUnit(wiring.Component):
    """Executes `AppendOp`s one at a time, vector by vector as the `kv` stream delivers them.

    `read[c]`, `write[c]`: the weight channels, single words; `aux`: V scale records. `done` comes when memory has
    answered the last write, so that every later read sees the data. Errors, sticky until `clear`: `SHAPE` (a vector of
    another length than `head_size`, or a head size that is no multiple of 32), `BUS`. `abort` stops before the next word;
    hold it until `idle`.
    """

    def __init__(self, config: EngineConfig):
        if config.lanes & (config.lanes - 1):
            raise ValueError(
                f"slots divide by the lanes with a shift, so lanes must be a power of two, not {config.lanes}"
            )
        self._config = config
        self._plane_bits = config.lanes_per_channel * STEP * 2
        self._per_word = WORD_BITS // self._plane_bits
        super().__init__(
            {
                "unit": In(unit_port(AppendOp)),
                "kv": In(stream.Signature(kv_record(config))),
                "read": Out(axi_read(ADDR_BITS, WORD_BITS)).array(config.channels),
                "write": Out(axi_write(ADDR_BITS, WORD_BITS)).array(config.channels),
                "aux": Out(axi_write(ADDR_BITS, WORD_BITS)),
                "abort": In(1),
                "clear": In(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        self.op = op = Signal(AppendOp)
        self.row, self.left, self.slot = (
            Signal(range(HEAD_MAX // config.vector_lanes + 1)),
            Signal(8),
            Signal(16),
        )
        self.scale, self.minimum = Signal(16), Signal(16)
        self.word, self.strobes, self.at = Signal(WORD_BITS), Signal(WORD_BYTES), Signal(ADDR_BITS)
        self.target, self.to_aux = Signal(range(max(2, config.channels))), Signal()
        self.wide, self.reading = Signal(), Signal()
        self.value_begin, self.value_end = (
            Signal(range(config.channels + 1), name=f"value_{n}") for n in ("begin", "end")
        )
        self.value_next, self.values_left = Signal(), Signal()
        m.d.comb += self.wide.eq(op.bits == 8)
        m.submodules.codes = self.codes = TypedMemory(
            unsigned(8 * config.vector_lanes), HEAD_MAX // config.vector_lanes, asynchronous_read=True
        )
        pending = self._writes(m)
        captured, all_captured = self._reads(m)
        with m.FSM(name="append"):
            self._idle(m)
            self._collect(m)
            self._keys(m)
            self._values(m, captured, all_captured, pending)
            self._send(m, pending)
        return m

    # --- states
    def _idle(self, m):
        with m.State("IDLE"):
            m.d.comb += self.unit.op.ready.eq(~self.abort & (self.unit.error == 0))
            with m.If(self.unit.op.valid & self.unit.op.ready):
                m.d.sync += [Value.cast(self.op).eq(Value.cast(self.unit.op.payload))]
                m.d.sync += [
                    self.slot.eq(self.unit.op.p.addr),
                    self.left.eq(self.unit.op.p.count),
                    self.row.eq(0),
                ]
                m.next = "COLLECT"
                with m.If((self.unit.op.p.head_size[:5] != 0) | (self.unit.op.p.count == 0)):
                    m.d.sync += self.unit.error.eq(Error.SHAPE)
                    m.next = "IDLE"

    def _collect(self, m):
        """One vector into the code memory; its scale record is that of its last beat."""
        shift = (self._config.vector_lanes - 1).bit_length()
        with m.State("COLLECT"):
            m.d.comb += self.kv.ready.eq(~self.abort)
            with m.If(self.kv.valid & self.kv.ready):
                m.d.comb += self.codes.w.en.eq(1)
                m.d.sync += [
                    self.row.eq(self.row + 1),
                    self.scale.eq(self.kv.p.scale),
                    self.minimum.eq(self.kv.p.minimum),
                ]
                ends = self.row == (self.op.head_size >> shift) - 1
                with m.If(ends != self.kv.p.last):
                    m.d.sync += self.unit.error.eq(Error.SHAPE)
                    m.next = "IDLE"
                with m.Elif(ends):
                    m.d.sync += self.row.eq(0)
                    with m.If(self.op.values):
                        m.next = "VALUES"
                    with m.Else():
                        m.next = "KEY_SCALE"
            with m.If(self.abort):
                m.next = "IDLE"
        m.d.comb += [self.codes.w.addr.eq(self.row), self.codes.w.data.eq(Value.cast(self.kv.p.codes))]

    def _keys(self, m):
        """The scale word, then the code words; a word is gathered piece by piece (a step and plane of the row)."""
        config, op = self._config, self.op
        lanes, per_word = config.lanes_per_channel, self._per_word
        lane = self.slot[: (config.lanes - 1).bit_length()]
        within = lane[: (lanes - 1).bit_length()]
        channel = lane >> (lanes - 1).bit_length()
        block = self.slot >> (config.lanes - 1).bit_length()
        steps = op.head_size >> 5
        pieces = Mux(self.wide, steps << 2, steps << 1)
        words = Signal(8)
        m.d.comb += words.eq(1 + ((pieces + per_word - 1) >> (per_word - 1).bit_length()))
        base = Signal(ADDR_BITS)
        m.d.comb += base.eq(op.base + block * words)
        halves = STEP // config.vector_lanes
        half, place, plane = Signal(range(halves)), Signal(range(max(2, per_word))), Signal(2)
        step, piece_words = Signal(4), Signal(8)
        gathered = Signal(data.ArrayLayout(2 * STEP, per_word))
        self.key_more = Signal()
        m.d.comb += self.key_more.eq(step != steps)
        with m.State("KEY_SCALE"):
            m.d.sync += [
                self.word.eq(Cat(self.scale, self.minimum).replicate(WORD_BITS // 32)),
                self.strobes.eq(Const(15, WORD_BYTES) << (within << 2)),
                self.at.eq(base),
                self.target.eq(channel),
                self.to_aux.eq(0),
                *(x.eq(0) for x in (half, place, plane, step)),
                piece_words.eq(1),
            ]
            m.next = "SEND"
        with m.State("KEY_CODES"):
            codes = self.codes.r[0].data
            m.d.comb += self.codes.r[0].addr.eq(step * halves + half)
            two = Cat(codes.word_select(i, 8).bit_select(plane << 1, 2) for i in range(config.vector_lanes))
            for p in range(per_word):
                for h in range(halves):
                    with m.If((place == p) & (half == h)):
                        m.d.sync += gathered[p].word_select(h, 2 * config.vector_lanes).eq(two)
            last_half, last_plane = half == halves - 1, plane == Mux(self.wide, 3, 1)
            m.d.sync += half.eq(half + 1)
            with m.If(last_half):
                m.d.sync += [half.eq(0), plane.eq(Mux(last_plane, 0, plane + 1)), step.eq(step + last_plane)]
                full = (place == per_word - 1) | (last_plane & (step == steps - 1))
                m.d.sync += place.eq(Mux(full, 0, place + 1))
                with m.If(full):
                    m.d.sync += [piece_words.eq(piece_words + 1), self.key_places.eq(place)]
                    m.next = "KEY_WORD"
        with m.State("KEY_WORD"):
            for p in range(per_word):
                low = p * self._plane_bits
                m.d.sync += self.word[low : low + self._plane_bits].eq(gathered[p].replicate(lanes))
                here = Mux(self.key_places >= p, Const(0xFF, self._plane_bits // 8) << (within << 3), 0)
                m.d.sync += self.strobes[low // 8 : (low + self._plane_bits) // 8].eq(here)
            m.d.sync += self.at.eq(base + piece_words - 1)
            m.next = "SEND"

    def _values(self, m, captured, all_captured, pending):
        """Word by word of each row block of the head: read all its channels, change and write one after the other."""
        config, op = self._config, self.op
        lanes, per_word = config.lanes_per_channel, self._per_word
        lane_bits, within_bits = (config.lanes - 1).bit_length(), (lanes - 1).bit_length()
        planes = Mux(self.wide, 4, 2)
        tile, place = self.slot >> 5, self.slot[:5]
        words = Mux(self.wide, max(1, 4 // per_word), max(1, 2 // per_word))
        first_word = (tile * planes) >> (per_word - 1).bit_length()
        first_place = Signal(range(max(2, per_word)))
        m.d.comb += first_place.eq((tile * planes)[: (per_word - 1).bit_length()] if per_word > 1 else 0)
        element, block_base, word = Signal(range(HEAD_MAX + 1)), Signal(ADDR_BITS), Signal(3)
        first_element, channel = Signal(range(HEAD_MAX + 1)), Signal(range(config.channels + 1))
        start_lane = Signal(lane_bits)
        m.d.comb += start_lane.eq(Mux(first_element == 0, op.row[:lane_bits], 0))
        begin = start_lane >> within_bits
        rows = Mux(
            op.head_size - first_element > config.lanes - start_lane,
            config.lanes - start_lane,
            op.head_size - first_element,
        )
        end = (start_lane + rows) >> within_bits
        m.d.comb += [self.value_begin.eq(begin), self.value_end.eq(end)]
        address = block_base + first_word + word
        with m.State("VALUES"):
            m.d.sync += [
                block_base.eq(op.base + (op.row >> lane_bits) * op.block_words),
                *(x.eq(0) for x in (first_element, word)),
            ]
            m.next = "READ"
        with m.State("READ"):
            m.d.comb += self.read_at.eq(address)
            m.d.sync += [channel.eq(begin), element.eq(first_element)]
            with m.If(self.abort):
                m.next = "IDLE"
            with m.Elif(pending == 0):  # the word may be one that the vector before has just written
                m.d.comb += self.read_start.eq(1)
                m.next = "WAIT"
        with m.State("WAIT"):
            with m.If(all_captured):
                m.next = "CHANGE"
        with m.State("CHANGE"):
            m.d.comb += self.codes.r[0].addr.eq(element >> (config.vector_lanes - 1).bit_length())
            sub = (
                element[within_bits : (config.vector_lanes - 1).bit_length()]
                if config.vector_lanes > lanes
                else 0
            )
            codes = self.codes.r[0].data.word_select(sub, 8 * lanes)
            old = Signal(WORD_BITS)
            with m.Switch(channel):
                for c in range(config.channels):
                    with m.Case(c):
                        m.d.comb += old.eq(captured[c])
            m.d.sync += [
                self.word.eq(self._changed(old, codes, place, word, first_place, planes)),
                self.strobes.eq(-1),
                self.at.eq(address),
                self.target.eq(channel),
                self.to_aux.eq(0),
                channel.eq(channel + 1),
                element.eq(element + lanes),
                self.value_next.eq(channel + 1 == end),
            ]
            with m.If(channel + 1 == end):
                m.d.sync += word.eq(word + 1)
                with m.If(word == words - 1):
                    m.d.sync += [word.eq(0), first_element.eq(first_element + rows)]
                    m.d.sync += block_base.eq(block_base + op.block_words)
            m.next = "SEND"
        m.d.comb += self.values_left.eq(first_element != op.head_size)
        with m.State("VALUE_SCALE"):
            byte = op.scale_base + (self.slot << 2)
            m.d.sync += [
                self.word.eq(Cat(self.scale, self.minimum).replicate(WORD_BITS // 32)),
                self.strobes.eq(Const(15, WORD_BYTES) << byte[:OFFSET_BITS]),
                self.at.eq(byte >> OFFSET_BITS),
                self.to_aux.eq(1),
            ]
            m.next = "SEND"

    def _changed(self, old, codes, place, word, first_place, planes):
        """A channel's word with one slot's two bits per lane and plane replaced."""
        parts = []
        for p in range(self._per_word):
            plane = (word * self._per_word + p - first_place)[:3]
            active = (p >= first_place) & (p - first_place < planes) if self._per_word > 1 else Const(1)
            for lane in range(self._config.lanes_per_channel):
                code = codes.word_select(lane, 8)
                two = code.bit_select(plane[:2] << 1, 2)
                for slot in range(STEP):
                    low = p * self._plane_bits + (lane * STEP + slot) * 2
                    parts.append(Mux(active & (place == slot), two, old[low : low + 2]))
        return Cat(parts)

    # --- bus
    def _writes(self, m):
        """Single-word writes: `word`, `strobes`, `at` (a word address) to `target` or the auxiliary port."""
        self.key_places = Signal(range(max(2, self._per_word)))
        self.sending, self.address_sent, self.data_sent = Signal(), Signal(), Signal()
        pending = Signal(range(IN_FLIGHT + 1))
        self.written = Signal()
        address_moves, data_moves, answers, bad = [], [], [], []
        ports = [(p, ~self.to_aux & (self.target == c)) for c, p in enumerate(self.write)] + [
            (self.aux, self.to_aux)
        ]
        for port, chosen in ports:
            m.d.comb += [
                port.awid.eq(0),
                port.awaddr.eq(self.at << OFFSET_BITS),
                port.awlen.eq(0),
                port.awsize.eq(OFFSET_BITS),
                port.awburst.eq(BURST_INCR),
                port.awvalid.eq(self.sending & chosen & ~self.address_sent),
                port.wdata.eq(self.word),
                port.wstrb.eq(self.strobes),
                port.wlast.eq(1),
                port.wvalid.eq(self.sending & chosen & ~self.data_sent),
                port.bready.eq(1),
            ]
            address_moves.append(port.awvalid & port.awready)
            data_moves.append(port.wvalid & port.wready)
            answers.append(port.bvalid)
            bad.append(port.bvalid & (port.bresp != OKAY))
        address_now = self.address_sent | Cat(address_moves).any()
        data_now = self.data_sent | Cat(data_moves).any()
        m.d.comb += self.written.eq(self.sending & address_now & data_now)
        with m.If(self.sending):
            m.d.sync += [
                self.address_sent.eq(address_now & ~self.written),
                self.data_sent.eq(data_now & ~self.written),
            ]
        m.d.sync += pending.eq(pending + self.written - sum(answers))
        with m.If(self.clear):
            m.d.sync += self.unit.error.eq(0)
        with m.Elif(Cat(bad).any()):
            m.d.sync += self.unit.error.eq(Error.BUS)
        return pending

    def _reads(self, m):
        """One word of every channel in [begin, end): requested at once, captured as it comes."""
        count = self._config.channels
        self.read_start, self.read_at = Signal(), Signal(ADDR_BITS)
        asked, waiting, at = Signal(count), Signal(count), Signal(ADDR_BITS)
        captured = [Signal(WORD_BITS, name=f"captured_{c}", reset_less=True) for c in range(count)]
        with m.If(self.read_start):
            m.d.sync += at.eq(self.read_at)
        for c, port in enumerate(self.read):
            m.d.comb += [
                port.arid.eq(0),
                port.araddr.eq(at << OFFSET_BITS),
                port.arlen.eq(0),
                port.arsize.eq(OFFSET_BITS),
                port.arburst.eq(BURST_INCR),
                port.arvalid.eq(asked[c]),
                port.rready.eq(1),
            ]
            with m.If(self.read_start):
                wanted = (c >= self.value_begin) & (c < self.value_end)
                m.d.sync += [asked[c].eq(wanted), waiting[c].eq(wanted)]
            with m.Else():
                with m.If(port.arready):
                    m.d.sync += asked[c].eq(0)
                with m.If(port.rvalid):
                    m.d.sync += [captured[c].eq(port.rdata), waiting[c].eq(0)]
                    with m.If(port.rresp != OKAY):
                        m.d.sync += self.unit.error.eq(Error.BUS)
        m.d.comb += self.reading.eq(waiting.any())
        return captured, ~waiting.any()

    def _send(self, m, pending):
        """Write the prepared word, then go on with the vector, the next vector, or the end."""
        with m.State("SEND"):
            with m.If((pending < IN_FLIGHT - 1) & ~self.sending):
                m.d.sync += self.sending.eq(1)
            with m.If(self.written):
                m.d.sync += self.sending.eq(0)
                with m.If(self.abort | (self.unit.error != 0)):
                    m.next = "DRAIN"
                with m.Elif(self.to_aux):
                    m.next = "NEXT"
                with m.Elif(self.op.values):
                    with m.If(~self.value_next):
                        m.next = "CHANGE"
                    with m.Elif(self.values_left):
                        m.next = "READ"
                    with m.Else():
                        m.next = "VALUE_SCALE"
                with m.Elif(self.key_more):
                    m.next = "KEY_CODES"
                with m.Else():
                    m.next = "NEXT"
        with m.State("NEXT"):
            m.d.sync += [self.slot.eq(self.slot + 1), self.left.eq(self.left - 1), self.row.eq(0)]
            m.next = "COLLECT"
            with m.If(self.left == 1):
                m.next = "DRAIN"
        with m.State("DRAIN"):
            with m.If(pending == 0):
                m.d.comb += self.unit.done.eq((self.unit.error == 0) & ~self.abort)
                m.next = "IDLE"
        m.d.comb += self.idle.eq(~self.sending & (pending == 0) & ~self.reading)
