"""The APPEND unit: quantised K and V vectors into the KV cache, where `golden.spec.engine.KVLayout` says."""

from amaranth import Array, Cat, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import STEP, WORD_BITS, WORD_BYTES, EngineConfig, Error
from golden.spec.memory import CHANNEL_BYTES
from hw.engine.interfaces import AppendOp, kv_record, unit_port
from hw.engine.mem.append_ports import (
    ADDR_BITS,
    PIECES,
    TILE_WORDS,
    WORD_SIZE,
    TileReader,
    WordWriter,
    word_write,
)
from hw.engine.mem.axi import axi_read, axi_write
from hw.lib.streams import connect

HEAD_MAX = 256


class AppendUnit(wiring.Component):
    """Executes `AppendOp`s, one at a time: takes `count` vectors from `kv` and writes each to its slot.

    K: one scale record and `head_size / 32 * bits / 2` pieces of 8 bytes with byte strobes, no read. V: two bits per
    row and plane, so each word that the slot's tile spans is read, changed and written; all channels of a row block
    are read at once. The V scale record goes to auxiliary memory. Reads wait for the responses of earlier writes,
    since they may share bytes. `done` when every response has arrived: from then on a LOAD sees the vectors.

    Timing of K, nothing stalling, write latency Lw (data accepted to response): `key_cycles` from an op's transfer to
    `done`. V adds a read latency and two responses per vector and row block.

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
        self._sequencer = Sequencer(config, channel_bytes // WORD_BYTES)
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
        beats, writes = head_size // self._config.vector_lanes, 1 + head_size // STEP * bits // 2
        return 2 + count * (beats + 6 + writes + 1) + write_latency

    def elaborate(self, platform):
        m = Module()
        channels = self._config.channels
        sequencer = self._sequencer
        error = Signal(4)
        failed = error != Error.NONE
        m.submodules.sequencer = ResetInserter(self.abort | failed)(sequencer)
        m.submodules.writer = writer = WordWriter(channels + 1)
        m.submodules.reader = reader = TileReader(channels)
        running = ~self.abort & ~failed
        for n in range(channels):
            connect(m, reader.axi[n], wiring.flipped(self.axi_read[n]))
            connect(m, writer.axi[n], wiring.flipped(self.axi_write[n]))
        connect(m, writer.axi[channels], wiring.flipped(self.aux_write))
        m.d.comb += [
            sequencer.op.payload.eq(self.unit.op.payload),
            sequencer.op.valid.eq(self.unit.op.valid & running),
            self.unit.op.ready.eq(sequencer.op.ready & running),
            Value.cast(sequencer.kv.payload).eq(Value.cast(self.kv.payload)),
            sequencer.kv.valid.eq(self.kv.valid & running),
            self.kv.ready.eq(sequencer.kv.ready & running),
            writer.i.payload.eq(sequencer.o.payload),
            writer.i.valid.eq(sequencer.o.valid & running),
            sequencer.o.ready.eq(writer.i.ready & running),
            sequencer.written.eq(writer.quiet),
            reader.go.eq(sequencer.go & running),
            reader.mask.eq(sequencer.mask),
            reader.addr.eq(sequencer.word << WORD_SIZE),
            reader.words.eq(sequencer.words),
            reader.byte.eq(sequencer.byte),
            reader.part.eq(sequencer.part),
            self.unit.done.eq(sequencer.done & running),
            self.unit.error.eq(error),
            self.idle.eq(sequencer.op.ready & writer.quiet & reader.quiet),
        ]
        for n in range(channels):
            m.d.comb += [sequencer.got[n].eq(reader.got[n]), sequencer.old[n].eq(reader.old[n])]
        with m.If(~failed):
            m.d.sync += error.eq(Mux(writer.bad | reader.bad, Error.BUS, Mux(self.abort, 0, sequencer.error)))
        return m


class Sequencer(wiring.Component):
    """Control of the APPEND unit: collects a vector, works out its words, and emits them one after the other.

    `error` is valid for one cycle; its owner resets the sequencer then.
    """

    def __init__(self, config: EngineConfig, channel_words: int):
        self._config = config
        self._channel_words = channel_words
        channels = config.channels
        super().__init__(
            {
                "op": In(stream.Signature(AppendOp)),
                "kv": In(stream.Signature(kv_record(config))),
                "o": Out(stream.Signature(word_write(channels + 1))),
                "written": In(1),
                "go": Out(1),
                "mask": Out(channels),
                "word": Out(ADDR_BITS),
                "words": Out(range(TILE_WORDS + 1)),
                "byte": Out(range(PIECES)),
                "part": Out(range(TILE_WORDS)),
                "got": In(range(TILE_WORDS + 1)).array(channels),
                "old": In(8 * PIECES).array(channels),
                "done": Out(1),
                "error": Out(4),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config, lanes = self._config, self._config.lanes_per_channel
        op, slot, left = Signal(AppendOp), Signal(16), Signal(8)
        codes = Signal(8 * HEAD_MAX)
        record = Signal(32)  # scale low, minimum high
        beat = Signal(range(HEAD_MAX // config.vector_lanes))
        span = Signal(9)
        index = Signal(range(1 + HEAD_MAX // STEP * 4))
        group, channel, start = Signal(8), Signal(range(config.channels)), Signal(range(config.channels))
        eight = op.bits == 8
        steps, groups = op.head_size // STEP, op.head_size // lanes
        # Registered once per op or vector, so that no sum or product is chained behind another.
        key_words, tile, blocks_in, offset = Signal(8), Signal(ADDR_BITS), Signal(16), Signal(ADDR_BITS)
        end, beyond = Signal(ADDR_BITS + 1), Signal()
        m.d.comb += [
            self.words.eq(Mux(eight, _tile_words(4, lanes), _tile_words(2, lanes))),
            self.byte.eq(slot[2:5]),
        ]
        state = {"op": op, "slot": slot, "codes": codes, "eight": eight}

        with m.FSM(init="IDLE"):
            with m.State("IDLE"):
                m.d.comb += self.op.ready.eq(1)
                with m.If(self.op.valid):
                    want = self.op.payload
                    m.d.sync += [op.eq(want), slot.eq(want.addr), left.eq(want.count), beat.eq(0)]
                    m.next = "CHECK"
            with m.State("CHECK"):
                m.d.sync += key_words.eq(
                    1 + Mux(eight, _key_words(steps, 4, lanes), _key_words(steps, 2, lanes))
                )
                m.next = "FILL"
                with m.If(self._bad_shape(op)):
                    m.d.comb += self.error.eq(Error.SHAPE)
                with m.Elif(op.values & op.scale_base[:2].any()):
                    m.d.comb += self.error.eq(Error.ADDRESS)
            with m.State("FILL"):
                m.d.comb += self.kv.ready.eq(1)
                ends = beat + 1 == op.head_size // config.vector_lanes
                with m.If(self.kv.valid):
                    taken = self.kv.payload
                    m.d.sync += [
                        codes.word_select(beat, 8 * config.vector_lanes).eq(Value.cast(taken.codes)),
                        record.eq(Cat(taken.scale, taken.minimum)),
                        beat.eq(Mux(ends, 0, beat + 1)),
                    ]
                    with m.If(ends):
                        m.next = "PLACE"
                    with m.If(taken.last != ends):
                        m.d.comb += self.error.eq(Error.SHAPE)
            with m.State("PLACE"):
                tiles = slot // STEP
                m.d.sync += [
                    tile.eq(Mux(eight, tiles * 4 * lanes // PIECES, tiles * 2 * lanes // PIECES)),
                    blocks_in.eq(slot >> (config.lanes.bit_length() - 1)),
                    span.eq(Mux(op.values, self.words, key_words)),
                    start.eq(op.row // lanes),
                    group.eq(0),
                    index.eq(0),
                ]
                m.next = "MULTIPLY"
            with m.State("MULTIPLY"):
                m.d.sync += offset.eq(blocks_in * key_words)
                m.next = "OFFSET"
            with m.State("OFFSET"):
                m.d.sync += self.word.eq(op.base + Mux(op.values, tile, offset))
                m.next = "END"
            with m.State("END"):
                m.d.sync += end.eq(self.word + span)
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
                    m.next = "KEY"
            with m.State("KEY"):
                self._key(m, **state, index=index, record=record)
                with m.If(self.o.ready):
                    m.d.sync += index.eq(index + 1)
                    with m.If(index == steps * Mux(eight, 4, 2)):
                        m.next = "NEXT"
            with m.State("READ"):
                for c in range(config.channels):
                    m.d.comb += self.mask[c].eq((start <= c) & (c - start + group < groups))
                m.d.sync += [channel.eq(start), self.part.eq(0)]
                with m.If(self.written):
                    m.d.comb += self.go.eq(1)
                    m.next = "CHANGE"
            with m.State("CHANGE"):
                arrived = Array(self.got)[channel] > self.part
                self._value(m, **state, channel=channel, group=group, arrived=arrived)
                with m.If(self.o.valid & self.o.ready):
                    m.d.sync += self.part.eq(self.part + 1)
                    with m.If(self.part + 1 == self.words):
                        m.d.sync += [self.part.eq(0), channel.eq(channel + 1), group.eq(group + 1)]
                        with m.If(group + 1 == groups):
                            m.next = "SCALE"
                        with m.Elif(channel == config.channels - 1):
                            m.d.sync += [self.word.eq(self.word + op.block_words), start.eq(0)]
                            m.next = "END"
            with m.State("SCALE"):
                at = Signal(ADDR_BITS)
                m.d.comb += at.eq(op.scale_base + 4 * slot)
                self._emit(m, config.channels, at[WORD_SIZE:], record.replicate(16), 0xF << (at[2:6] << 2))
                with m.If(self.o.ready):
                    m.next = "NEXT"
            with m.State("NEXT"):
                m.d.sync += [left.eq(left - 1), slot.eq(slot + 1)]
                with m.If(left == 1):
                    m.next = "DRAIN"
                with m.Else():
                    m.next = "FILL"
            with m.State("DRAIN"), m.If(self.written):
                m.d.comb += self.done.eq(1)
                m.next = "IDLE"
        return m

    def _bad_shape(self, op):
        bad_bits = (op.bits != 4) & (op.bits != 8)
        bad_head = op.head_size[:5].any() | (op.head_size == 0) | (op.head_size > HEAD_MAX)
        bad_row = (op.row % self._config.lanes_per_channel != 0) | (op.row >= self._config.lanes)
        return bad_bits | bad_head | (op.values & bad_row) | (op.count == 0)

    def _emit(self, m, target, word, data, strb, valid=1) -> None:
        m.d.comb += [
            self.o.valid.eq(valid),
            self.o.payload.target.eq(target),
            self.o.payload.addr.eq(word << WORD_SIZE),
            self.o.payload.data.eq(data),
            self.o.payload.strb.eq(strb),
        ]

    def _key(self, m, *, op, slot, codes, eight, index, record) -> None:
        """Write `index` of a K vector: 0 is its scale record, the others its pieces by step and plane."""
        lanes = self._config.lanes_per_channel
        lane = slot % lanes
        target = (slot // lanes) % self._config.channels
        piece = Signal(range(HEAD_MAX // STEP * 4))
        step = Signal(range(HEAD_MAX // STEP))
        m.d.comb += [piece.eq(index - 1), step.eq(Mux(eight, piece // 4, piece // 2))]
        bits = _plane(codes.word_select(step, 8 * STEP), Mux(eight, piece % 4, piece % 2))
        place = piece * lanes + lane
        with m.If(index == 0):
            self._emit(m, target, self.word, record.replicate(WORD_BITS // 32), 0xF << (lane << 2))
        with m.Else():
            strobes = 0xFF << ((place % PIECES) << 3)
            self._emit(m, target, self.word + 1 + place // PIECES, bits.replicate(PIECES), strobes)

    def _value(self, m, *, op, slot, codes, eight, channel, group, arrived) -> None:
        """Word `part` of the tile on `channel`: two bits of each piece's byte change."""
        lanes = self._config.lanes_per_channel
        rows = codes.word_select(group, 8 * lanes)
        old = Array(self.old)[channel]
        pair = slot[:2]
        fresh, strobes = [], []
        half = (slot // STEP) % 2 if 2 * lanes < PIECES else 0
        for q in range(PIECES):
            plane = (self.part * (PIECES // lanes) + q // lanes) % 4
            wanted = _plane(rows.word_select(q % lanes, 8), Mux(eight, plane, plane % 2))
            was = old.word_select(q, 8)
            keep = was & ~(0b11 << (pair << 1))
            fresh.append((keep | (wanted << (pair << 1)))[:8].replicate(8))
            inside = 1 if 2 * lanes >= PIECES else eight | (half == q // (2 * lanes))
            strobes.append(Mux(inside, (1 << self.byte)[:8], 0)[:8])
        self._emit(m, channel, self.word + self.part, Cat(*fresh), Cat(*strobes), arrived)


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
