"""The APPEND unit: quantised K and V vectors into the KV cache, where `golden.spec.engine.KVLayout` says."""

from amaranth import Array, Cat, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import STEP, WORD_BITS, WORD_BYTES, EngineConfig, Error
from golden.spec.memory import CHANNEL_BYTES
from hw.engine.interfaces import AppendOp, kv_record, unit_port
from hw.engine.mem.append_ports import (
    ADDR_BITS,
    HEAD_MAX,
    JOBS,
    PIECES,
    TILE_WORDS,
    WORD_SIZE,
    TileReader,
    WordWriter,
    word_write,
)
from hw.engine.mem.axi import WRITE_ID_BITS, axi_read, axi_write
from hw.lib.streams import StreamFIFO, connect

AHEAD = 3
"""Vectors placed, their tiles asked for, behind the one that is written: they cover a refresh of a channel."""
HANDOVER = 1
"""Latency of the queue that holds them."""


class AppendUnit(wiring.Component):
    """Executes `AppendOp`s in order: takes `count` vectors from `kv` and writes each to its slot.

    K: one scale record and `head_size / 32 * bits / 2` pieces of 8 bytes with byte strobes, no read. V: two bits per
    row and plane, so each word that the slot's tile spans is read, changed and written; all channels of a row block
    are read at once, and the row blocks one behind the other. The V scale record goes to auxiliary memory.

    Up to `AHEAD` vectors are placed, and their tiles read, while one is written (`Placer`, `Emitter`); up to `JOBS`
    vectors wait for the answers to their writes (`Jobs`). A tile is read once no such vector shares a word with it.
    `done` when every response of an op has arrived: from then on a LOAD sees its vectors.

    Timing of K, nothing stalling, write latency Lw (data accepted to response): `key_cycles` from an op's transfer to
    `done`.

    `unit.error` is `Error.SHAPE` (bits, head size, row, count, a vector of another length than the op's), `ADDRESS`
    (beyond the channel, or a misaligned scale record) or `BUS`, and stays until reset. On an error or `abort` the unit
    finishes what is on the buses and drops the rest; hold `abort` until `idle`, then reset.

    Raises ValueError for a configuration whose lanes or vector beats do not fit the layout.
    """

    def __init__(self, config: EngineConfig, *, channel_bytes: int = CHANNEL_BYTES):
        if config.lanes & (config.lanes - 1) or PIECES % config.lanes_per_channel:
            raise ValueError(f"Appending needs a power of two of lanes, not {config.lanes}")
        if STEP % config.vector_lanes or config.vector_lanes % config.lanes_per_channel:
            raise ValueError(
                f"A beat must hold a channel's lanes and divide {STEP}, not {config.vector_lanes}"
            )
        if channel_bytes % WORD_BYTES or not 0 < channel_bytes <= 1 << ADDR_BITS:
            raise ValueError(
                f"A channel holds whole words up to {1 << ADDR_BITS} bytes, not {channel_bytes!r}"
            )
        self._config = config
        self._channel_words = channel_bytes // WORD_BYTES
        channels = config.channels
        super().__init__(
            {
                "unit": In(unit_port(AppendOp)),
                "kv": In(stream.Signature(kv_record(config))),
                "axi_read": Out(axi_read(ADDR_BITS, WORD_BITS)).array(channels),
                "axi_write": Out(axi_write(ADDR_BITS, WORD_BITS)).array(channels),
                "aux_write": Out(axi_write(ADDR_BITS, WORD_BITS)),
                "abort": In(1),
                "idle": Out(1),
            }
        )

    def key_cycles(self, head_size: int, bits: int, count: int, write_latency: int) -> int:
        """Cycles from an op's transfer to `done` for K vectors, when `kv` never waits and nothing stalls."""
        vector = head_size // self._config.vector_lanes + 1 + head_size // STEP * bits // 2
        handed, begun, answered = 1, list[int](), list[int]()
        for n in range(count):
            full = max(begun[n - AHEAD] if n >= AHEAD else 0, answered[n - JOBS] if n >= JOBS else 0) + 1
            handed = max(handed + Placer.interval, full)
            begun.append(max(handed + HANDOVER, begun[-1] + vector + 1 if begun else 0))
            written = begun[-1] + vector + WordWriter.latency
            answered.append(written + write_latency + WordWriter.answer_latency)
        return answered[-1]

    def elaborate(self, platform):
        m = Module()
        config, channels = self._config, self._config.channels
        error = Signal(4)
        failed = error != Error.NONE
        running = ~self.abort & ~failed
        placer, emitter, jobs = Placer(config, self._channel_words), Emitter(config), Jobs(channels)
        for name, part in (("placer", placer), ("emitter", emitter), ("jobs", jobs)):
            m.submodules[name] = ResetInserter(~running)(part)
        m.submodules.writer = writer = WordWriter(channels + 1)
        m.submodules.reader = reader = TileReader(channels, tile_rows(config))
        for n in range(channels):
            connect(m, reader.axi[n], wiring.flipped(self.axi_read[n]))
            connect(m, writer.axi[n], wiring.flipped(self.axi_write[n]))
            m.d.comb += emitter.old[n].eq(reader.old[n])
        connect(m, writer.axi[channels], wiring.flipped(self.aux_write))
        m.submodules.ahead = ahead = ResetInserter(~running)(StreamFIFO(placed(channels), AHEAD))
        connect(m, placer.o, ahead.i)
        connect(m, ahead.o, emitter.i)
        m.d.comb += [
            placer.op.payload.eq(self.unit.op.payload),
            placer.op.valid.eq(self.unit.op.valid & running),
            self.unit.op.ready.eq(placer.op.ready & running),
            placer.read_ready.eq(reader.ready),
            placer.clash.eq(jobs.clash),
            placer.room.eq(jobs.room),
            placer.job.eq(jobs.next),
            jobs.check.eq(placer.block),
            jobs.add.eq(placer.o.valid & placer.o.ready),
            jobs.entry.eq(placer.extent),
            jobs.last.eq(placer.last),
            jobs.written.eq(emitter.written),
            jobs.answered.eq(writer.answered),
            reader.go.eq(placer.go & running),
            reader.mask.eq(placer.block.mask),
            reader.addr.eq(placer.block.start << WORD_SIZE),
            reader.words.eq(placer.words),
            reader.byte.eq(placer.byte),
            reader.flush.eq(~running),
            reader.pop.eq(emitter.pop),
            emitter.here.eq(reader.here),
            Value.cast(emitter.kv.payload).eq(Value.cast(self.kv.payload)),
            emitter.kv.valid.eq(self.kv.valid & running),
            self.kv.ready.eq(emitter.kv.ready & running),
            writer.i.payload.eq(emitter.o.payload),
            writer.i.valid.eq(emitter.o.valid & running),
            # Without `running`, on the longest path: emitter and queues are reset or flushed without it.
            emitter.o.ready.eq(writer.i.ready),
            self.unit.done.eq(jobs.done & running),
            self.unit.error.eq(error),
            self.idle.eq(placer.op.ready & ~jobs.busy & writer.quiet & reader.quiet),
        ]
        with m.If(~failed):
            found = Mux(self.abort, 0, placer.error | emitter.error)
            m.d.sync += error.eq(Mux(writer.bad | reader.bad, Error.BUS, found))
        return m


def extent(channels: int) -> data.StructLayout:
    """Words [start, end) of the channels in `mask`."""
    return data.StructLayout({"start": ADDR_BITS, "end": ADDR_BITS + 1, "mask": channels})


class Jobs(wiring.Component):
    """Vectors whose writes may not all be answered, in order: where they write, and when they are done.

    `add` gives vector `next` its place while there is `room`. `clash`, a cycle behind `check`: some such vector shares
    a word with it. `written` (one bit per job): its last word has left. `done`: the last vector of an op is answered.
    """

    def __init__(self, channels: int):
        self._extent = extent(channels)
        super().__init__(
            {
                "check": In(self._extent),
                "clash": Out(1),
                "add": In(1),
                "entry": In(self._extent),
                "last": In(1),
                "next": Out(WRITE_ID_BITS),
                "room": Out(1),
                "written": In(JOBS),
                "answered": In(JOBS),
                "busy": Out(1),
                "done": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        oldest = Signal(WRITE_ID_BITS)
        live, written, last, near = (Signal(JOBS, name=n) for n in ("live", "gone", "ends", "near"))
        over = live & written & self.answered
        retires = over.bit_select(oldest, 1)
        m.d.comb += [
            self.clash.eq((near & live).any()),
            self.room.eq(~live.bit_select(self.next, 1)),
            self.busy.eq(live.any()),
            self.done.eq(retires & last.bit_select(oldest, 1)),
        ]
        m.d.sync += [oldest.eq(oldest + retires), self.next.eq(self.next + self.add)]
        for job in range(JOBS):
            held = Signal(self._extent, name=f"held_{job}")
            apart = (self.check.start >= held.end) | (held.start >= self.check.end)
            m.d.sync += near[job].eq(~apart & (self.check.mask & held.mask).any())
            with m.If(self.written[job]):
                m.d.sync += written[job].eq(1)
            with m.If(self.add & (self.next == job)):
                m.d.sync += [
                    held.eq(self.entry),
                    live[job].eq(1),
                    written[job].eq(0),
                    last[job].eq(self.last),
                ]
            with m.Elif(retires & (oldest == job)):
                m.d.sync += live[job].eq(0)
        return m


def placed(channels: int) -> data.StructLayout:
    """A vector and the place of its words: slot, first word, first channel, job."""
    return data.StructLayout(
        {
            "values": 1,
            "eight": 1,
            "head_size": 9,
            "slot": 16,
            "word": ADDR_BITS,
            "channel": range(channels),
            "block_words": 24,
            "scale_base": 32,
            "job": WRITE_ID_BITS,
        }
    )


class Placer(wiring.Component):
    """Ops in, vectors with their places out; asks for the tile of a V vector before it hands it over.

    `block`: the row block at hand, read with `go`; `extent`: all row blocks of the vector handed over. `interval`
    cycles from one vector of K to the next, and one more behind the transfer of an op. `error` is valid for one cycle;
    its owner resets the placer then.
    """

    interval = 7

    def __init__(self, config: EngineConfig, channel_words: int):
        self._config, self._channel_words = config, channel_words
        super().__init__(
            {
                "op": In(stream.Signature(AppendOp)),
                "o": Out(stream.Signature(placed(config.channels))),
                "block": Out(extent(config.channels)),
                "extent": Out(extent(config.channels)),
                "last": Out(1),
                "job": In(WRITE_ID_BITS),
                "room": In(1),
                "clash": In(1),
                "go": Out(1),
                "read_ready": In(1),
                "words": Out(range(TILE_WORDS + 1)),
                "byte": Out(range(PIECES)),
                "error": Out(4),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config, lanes = self._config, self._config.lanes_per_channel
        op, slot, left = Signal(AppendOp), Signal(16), Signal(8)
        word, end, first = Signal(ADDR_BITS), Signal(ADDR_BITS + 1), Signal(ADDR_BITS)
        channel, groups = Signal(range(config.channels)), Signal(8)
        span, channels_done = Signal(9), Signal(config.channels)
        eight, steps = op.bits == 8, op.head_size // STEP
        # Registered once per op or vector, so that no sum or product is chained behind another.
        key_words, tile, blocks_in, offset = Signal(8), Signal(ADDR_BITS), Signal(16), Signal(ADDR_BITS)
        beyond, more = Signal(), groups > config.channels - channel
        m.d.comb += [
            self.words.eq(Mux(eight, _tile_words(4, lanes), _tile_words(2, lanes))),
            self.byte.eq(slot[2:5]),
            self.block.start.eq(word),
            self.block.end.eq(end),
            self.block.mask.eq(Cat((channel <= c) & (c - channel < groups) for c in range(config.channels))),
            self.extent.start.eq(first),
            self.extent.end.eq(end),
            self.extent.mask.eq(Mux(op.values, channels_done, ~0)),
            self.last.eq(left == 1),
            self.o.p.values.eq(op.values),
            self.o.p.eight.eq(eight),
            self.o.p.head_size.eq(op.head_size),
            self.o.p.slot.eq(slot),
            self.o.p.word.eq(first),
            self.o.p.channel.eq(Mux(op.values, op.row // lanes, self._key_channel(slot, op.turn))),
            self.o.p.block_words.eq(op.block_words),
            self.o.p.scale_base.eq(op.scale_base),
            self.o.p.job.eq(self.job),
        ]
        with m.FSM(init="IDLE"):
            with m.State("IDLE"):
                m.d.comb += self.op.ready.eq(1)
                with m.If(self.op.valid):
                    want = self.op.payload
                    m.d.sync += [op.eq(want), slot.eq(want.addr), left.eq(want.count)]
                    m.next = "CHECK"
            with m.State("CHECK"):
                m.d.sync += key_words.eq(
                    1 + Mux(eight, _key_words(steps, 4, lanes), _key_words(steps, 2, lanes))
                )
                m.next = "PLACE"
                with m.If(self._bad_shape(op)):
                    m.d.comb += self.error.eq(Error.SHAPE)
                with m.Elif(op.values & op.scale_base[:2].any()):
                    m.d.comb += self.error.eq(Error.ADDRESS)
            with m.State("PLACE"):
                tiles = slot // STEP
                m.d.sync += [
                    tile.eq(Mux(eight, tiles * 4 * lanes // PIECES, tiles * 2 * lanes // PIECES)),
                    blocks_in.eq(slot >> (config.lanes.bit_length() - 1)),
                    span.eq(Mux(op.values, self.words, key_words)),
                    channel.eq(op.row // lanes),
                    groups.eq(op.head_size // lanes),
                    channels_done.eq(0),
                ]
                m.next = "MULTIPLY"
            with m.State("MULTIPLY"):
                m.d.sync += offset.eq(blocks_in * key_words)
                m.next = "OFFSET"
            with m.State("OFFSET"):
                at = (op.base + Mux(op.values, tile, offset))[:ADDR_BITS]
                m.d.sync += [word.eq(at), first.eq(at)]
                m.next = "END"
            with m.State("END"):
                m.d.sync += end.eq(word + span)
                m.next = "COMPARE"
            with m.State("COMPARE"):
                m.d.sync += beyond.eq(end > self._channel_words)
                m.next = "RANGE"
            with m.State("RANGE"):
                with m.If(beyond):
                    m.d.comb += self.error.eq(Error.ADDRESS)
                with m.If(op.values):
                    m.next = "READ"
                with m.Else():
                    m.next = "HAND"
            with m.State("READ"):
                m.d.comb += self.go.eq(~self.clash)
                with m.If(self.go & self.read_ready):
                    m.d.sync += channels_done.eq(channels_done | self.block.mask)
                    m.next = "HAND"
                    with m.If(more):
                        m.d.sync += [
                            word.eq(word + op.block_words),
                            groups.eq(groups - (config.channels - channel)),
                            channel.eq(0),
                        ]
                        m.next = "END"
            with m.State("HAND"):
                m.d.comb += self.o.valid.eq(self.room)
                with m.If(self.o.valid & self.o.ready):
                    m.d.sync += [left.eq(left - 1), slot.eq(slot + 1)]
                    m.next = "PLACE"
                    with m.If(self.last):
                        m.next = "IDLE"
        return m

    def _key_channel(self, slot, turn):
        """Channel of a key: that of its lane, turned."""
        config = self._config
        turned = turn * (config.vector_lanes // config.lanes_per_channel)
        return (slot // config.lanes_per_channel ^ turned) % config.channels

    def _bad_shape(self, op):
        bad_bits = (op.bits != 4) & (op.bits != 8)
        bad_head = op.head_size[:5].any() | (op.head_size == 0) | (op.head_size > HEAD_MAX)
        bad_row = (op.row % self._config.lanes_per_channel != 0) | (op.row >= self._config.lanes)
        bad_turn = op.turn >= self._config.turns
        return bad_bits | bad_head | Mux(op.values, bad_row, bad_turn) | (op.count == 0)


PIECE = data.StructLayout(
    {"number": range(HEAD_MAX // STEP * 4), "step": range(HEAD_MAX // STEP), "plane": range(4)}
)
"""A piece of a K vector: two bits, those of a plane, of a step's 32 codes. Registered with the index of its write, so
that no subtraction stands before the choice of bits."""


class Emitter(wiring.Component):
    """Collects a placed vector's codes and emits its words one after the other; of V, when the old bytes are `here`.

    `written`: one bit per job, with the last word of a vector. `error` is valid for one cycle; its owner resets the
    emitter then.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        channels = config.channels
        super().__init__(
            {
                "i": In(stream.Signature(placed(channels))),
                "kv": In(stream.Signature(kv_record(config))),
                "o": Out(stream.Signature(word_write(channels + 1))),
                "here": In(channels),
                "pop": Out(channels),
                "old": In(8 * PIECES).array(channels),
                "written": Out(JOBS),
                "error": Out(4),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config, lanes = self._config, self._config.lanes_per_channel
        at, codes = Signal(placed(config.channels)), Signal(8 * HEAD_MAX)
        record = Signal(32)  # scale low, minimum high
        beat = Signal(range(HEAD_MAX // config.vector_lanes))
        index = Signal(range(1 + HEAD_MAX // STEP * 4))
        piece = Signal(PIECE)
        group, part = Signal(8), Signal(range(TILE_WORDS))
        words = Mux(at.eight, _tile_words(4, lanes), _tile_words(2, lanes))
        moved = self.o.valid & self.o.ready
        m.d.comb += self.o.payload.job.eq(at.job)
        with m.FSM(init="IDLE"):
            with m.State("IDLE"):
                m.d.comb += self.i.ready.eq(1)
                m.d.sync += [at.eq(self.i.payload), beat.eq(0), index.eq(0), group.eq(0), part.eq(0)]
                with m.If(self.i.valid):
                    m.next = "FILL"
            with m.State("FILL"):
                m.d.comb += self.kv.ready.eq(1)
                ends = beat + 1 == at.head_size // config.vector_lanes
                with m.If(self.kv.valid):
                    taken = self.kv.payload
                    m.d.sync += [
                        codes.word_select(beat, 8 * config.vector_lanes).eq(Value.cast(taken.codes)),
                        record.eq(Cat(taken.scale, taken.minimum)),
                        beat.eq(beat + 1),
                    ]
                    with m.If(ends):
                        m.next = "KEY"
                        with m.If(at.values):
                            m.next = "CHANGE"
                    with m.If(taken.last != ends):
                        m.d.comb += self.error.eq(Error.SHAPE)
            with m.State("KEY"):
                self._key(m, at, codes, index, piece, record)
                with m.If(self.o.ready):
                    m.d.sync += [
                        index.eq(index + 1),
                        piece.number.eq(index),
                        piece.step.eq(Mux(at.eight, index // 4, index // 2)),
                        piece.plane.eq(Mux(at.eight, index % 4, index % 2)),
                    ]
                    with m.If(index == at.head_size // STEP * Mux(at.eight, 4, 2)):
                        self._end(m, at)
            with m.State("CHANGE"):
                self._value(m, at, codes, group, part)
                with m.If(moved):
                    m.d.comb += self.pop.eq(1 << at.channel)
                    m.d.sync += part.eq(part + 1)
                    with m.If(part + 1 == words):
                        m.d.sync += [part.eq(0), at.channel.eq(at.channel + 1), group.eq(group + 1)]
                        with m.If(at.channel == config.channels - 1):
                            m.d.sync += [at.word.eq(at.word + at.block_words), at.channel.eq(0)]
                        with m.If(group + 1 == at.head_size // lanes):
                            m.next = "SCALE"
            with m.State("SCALE"):
                byte = Signal(ADDR_BITS)
                m.d.comb += byte.eq(at.scale_base + 4 * at.slot)
                strobes = 0xF << (byte[2:6] << 2)
                self._emit(m, config.channels, byte[WORD_SIZE:], record.replicate(16), strobes)
                with m.If(self.o.ready):
                    self._end(m, at)
        return m

    def _end(self, m, at) -> None:
        m.d.comb += self.written.eq(1 << at.job)
        m.next = "IDLE"

    def _emit(self, m, target, word, data, strb, valid=1) -> None:
        m.d.comb += [
            self.o.valid.eq(valid),
            self.o.payload.target.eq(target),
            self.o.payload.addr.eq(word << WORD_SIZE),
            self.o.payload.data.eq(data),
            self.o.payload.strb.eq(strb),
        ]

    def _key(self, m, at, codes, index, piece, record) -> None:
        """Write `index` of a K vector: 0 is its scale record, the others its pieces by step and plane."""
        lanes = self._config.lanes_per_channel
        lane = at.slot % lanes
        steps = range(HEAD_MAX // STEP)
        bits = Cat(
            Cat(codes[8 * (n * STEP + k) :][:8] for n in steps).word_select(Cat(piece.plane, piece.step), 2)
            for k in range(STEP)
        )
        place = piece.number * lanes + lane
        with m.If(index == 0):
            self._emit(m, at.channel, at.word, record.replicate(WORD_BITS // 32), 0xF << (lane << 2))
        with m.Else():
            strobes = 0xFF << ((place % PIECES) << 3)
            self._emit(m, at.channel, at.word + 1 + place // PIECES, bits.replicate(PIECES), strobes)

    def _value(self, m, at, codes, group, part) -> None:
        """Word `part` of the tile on the channel at hand: two bits of each piece's byte change."""
        lanes = self._config.lanes_per_channel
        rows = codes.word_select(group, 8 * lanes)
        old = Array(self.old)[at.channel]
        pair = at.slot[:2]
        fresh, strobes = [], []
        half = (at.slot // STEP) % 2 if 2 * lanes < PIECES else 0
        for q in range(PIECES):
            plane = (part * (PIECES // lanes) + q // lanes) % 4
            wanted = _plane(rows.word_select(q % lanes, 8), Mux(at.eight, plane, plane % 2))
            was = old.word_select(q, 8)
            keep = was & ~(0b11 << (pair << 1))
            fresh.append((keep | (wanted << (pair << 1)))[:8].replicate(8))
            inside = 1 if 2 * lanes >= PIECES else at.eight | (half == q // (2 * lanes))
            strobes.append(Mux(inside, (1 << at.slot[2:5])[:8], 0)[:8])
        here = self.here.bit_select(at.channel, 1)
        self._emit(m, at.channel, at.word + part, Cat(*fresh), Cat(*strobes), here)


def tile_rows(config: EngineConfig) -> int:
    """Words of a channel at most that the tiles span: of the vector that is written, those behind it, and the next."""
    blocks = -(-HEAD_MAX // config.lanes)
    return (AHEAD + 2) * blocks * _tile_words(4, config.lanes_per_channel)


def _tile_words(planes: int, lanes: int) -> int:
    """Words of a channel that a tile of V spans."""
    return max(1, planes * lanes // PIECES)


def _key_words(steps, planes: int, lanes: int):
    """Code words of a channel in a row block of keys: `steps` is a signal, the factor a power of two."""
    return (steps * (planes * lanes) + PIECES - 1) // PIECES


def _plane(codes, plane):
    """Bits [2 * plane, 2 * plane + 1] of each 8-bit code."""
    picked = [codes[8 * k : 8 * k + 8].word_select(plane, 2) for k in range(len(codes) // 8)]
    return Cat(*picked)
