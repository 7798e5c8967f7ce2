"""From 64-byte words to weight steps: one control for all channels, a register datapath per channel.

The channels' words are taken together (each channel has a deep prefetch FIFO in front, so a late channel delays the
others only when its FIFO runs dry). The order of words is `golden.spec.engine.StreamFormat`.
"""

import itertools

from amaranth import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import STEP, WORD_BITS, Codes, EngineConfig
from hw.engine.array import BLOCK, WHOLE
from hw.engine.interfaces import word_stream
from hw.lib.shared import place
from hw.lib.streams import StreamFIFO, connect

PATTERN_WORDS = 3
PLANES = 4


class StreamOp(data.Struct):
    """What the decoder needs of a matrix instruction."""

    codes: 2
    scaled: 1
    minimum: 1
    group_steps: 4
    blocks: 16
    steps: 16


class ChannelControl(data.Struct):
    """One cycle's work of every channel: `take_*` capture the word, `next_*` promote what was captured."""

    take_scale: 1
    take_pattern: 1
    pattern: 2
    take_code: 1
    next_scale: 1
    scale_place: 5
    next_pattern: 1
    pattern_place: 4
    next_code: 1
    emit: 1
    codes: 2
    minimum: 1
    chunk: 2


def step_signature(lanes: int) -> wiring.Signature:
    """A channel's weight step. `planes[pair][p][h]` is `LanePair.planes[p][h]` of two lanes, `patterns[j]` bit j of all
    2:4 patterns; `scale` and `minimum` are the lanes' fp16 records."""
    return wiring.Signature(
        {
            "planes": Out(WHOLE).array(lanes // 2, PLANES, STEP // BLOCK),
            "patterns": Out(lanes * STEP // 2).array(PATTERN_WORDS),
            "scale": Out(16).array(lanes),
            "minimum": Out(16).array(lanes),
        }
    )


class ChannelPlanes(wiring.Component):
    """Registers of one channel: captured words, the word in use, the assembled step."""

    def __init__(self, lanes: int):
        self._lanes = lanes
        super().__init__(
            {
                "word": In(WORD_BITS),
                "control": In(ChannelControl),
                "step": Out(step_signature(lanes)),
                "illegal": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        self._codes(m)
        self._patterns(m)
        self._scales(m)
        return m

    def _codes(self, m):
        """A word holds `per_word` planes; `chunk` planes of it at a time enter the step, and the others move down."""
        c, plane = self.control, self._lanes * STEP * 2
        per_word = WORD_BITS // plane
        waiting = Signal(WORD_BITS, reset_less=True)
        with m.If(c.take_code):
            m.d.sync += waiting.eq(self.word)
        counts = {Codes.U8: 4, Codes.U4: 2, Codes.U2: 1, Codes.S24: 1}
        loads, clears = [], []
        for p in range(PLANES):
            # A plane comes at one place of a word in every format that has it; the others clear it. Two plain controls,
            # so that synthesis uses the registers' enable and reset and no LUT per bit.
            loads.append(Signal(name=f"loads_{p}"))
            clears.append(Signal(name=f"clears_{p}"))
            for codes, count in counts.items():
                if p < count:
                    taken = min(count, per_word)
                    with m.If((c.codes == codes) & (c.chunk == p // taken)):
                        m.d.comb += loads[p].eq(c.emit)
                else:
                    with m.If(c.codes == codes):
                        m.d.comb += clears[p].eq(c.emit)
        for pair, h in itertools.product(range(self._lanes // 2), range(STEP // BLOCK)):
            current = [
                Signal(WHOLE, name=f"current_{pair}_{h}_{p}", reset_less=True) for p in range(per_word)
            ]
            for p, (load, clear) in enumerate(zip(loads, clears)):
                register = self.step.planes[pair][p][h]
                with m.If(clear):
                    m.d.sync += register.eq(0)
                with m.Elif(load):
                    m.d.sync += register.eq(current[p % min(per_word, PLANES)])
            for p, register in enumerate(current):
                rows = waiting.word_select(p, plane).word_select(pair, 4 * STEP)
                with m.If(c.next_code):
                    m.d.sync += register.eq(Cat(rows.word_select(2 * r + h, 2 * BLOCK) for r in range(2)))
                with m.Elif(c.emit), m.Switch(c.codes):
                    for codes, count in counts.items():
                        if p + count < per_word:
                            with m.Case(codes):
                                m.d.sync += register.eq(current[p + count])

    def _patterns(self, m):
        """The word in use holds the patterns of several steps; `step` chooses by place, nothing is shifted."""
        c, width, chosen = self.control, self._lanes * STEP // 2, []
        for bit in range(PATTERN_WORDS):
            waiting, current = (
                Signal(WORD_BITS, name=f"waiting_{bit}", reset_less=True),
                Signal(WORD_BITS, name=f"current_{bit}", reset_less=True),
            )
            with m.If(c.take_pattern & (c.pattern == bit)):
                m.d.sync += waiting.eq(self.word)
            place = current.word_select(c.pattern_place[: (WORD_BITS // width - 1).bit_length()], width)
            with m.If(c.emit & (c.codes == Codes.S24)):
                m.d.sync += self.step.patterns[bit].eq(place)
            with m.If(c.next_pattern):
                m.d.sync += current.eq(waiting)
            chosen.append(place)
        m.d.comb += self.illegal.eq(c.emit & (c.codes == Codes.S24) & (chosen[1] & chosen[2]).any())

    def _scales(self, m):
        c, lanes = self.control, self._lanes
        waiting, current = Signal(WORD_BITS, reset_less=True), Signal(WORD_BITS, reset_less=True)
        with m.If(c.take_scale):
            m.d.sync += waiting.eq(self.word)
        pairs, singles = WORD_BITS // (32 * lanes), WORD_BITS // (16 * lanes)
        pair = current.word_select(c.scale_place[: (pairs - 1).bit_length()], 32 * lanes)
        single = current.word_select(c.scale_place[: (singles - 1).bit_length()], 16 * lanes)
        with m.If(c.emit):
            for lane in range(lanes):
                both = pair[32 * lane :][:32]
                m.d.sync += [
                    self.step.scale[lane].eq(Mux(c.minimum, both[:16], single[16 * lane :][:16])),
                    self.step.minimum[lane].eq(Mux(c.minimum, both[16:], 0)),
                ]
        with m.If(c.next_scale):
            m.d.sync += current.eq(waiting)


def _format_constants(m, config: EngineConfig, op, name: str):
    """(steps per code word, words per step, steps per scale word) of an operation's format."""
    lanes = config.lanes_per_channel
    per_word = WORD_BITS // (lanes * STEP * 2)
    steps_per_word, words_per_step = Signal(3, name=f"{name}_steps"), Signal(3, name=f"{name}_words")
    with m.Switch(op.codes):
        for codes, planes in ((Codes.U8, 4), (Codes.U4, 2)):
            with m.Case(codes):
                m.d.comb += [
                    steps_per_word.eq(max(1, per_word // planes)),
                    words_per_step.eq(max(1, planes // per_word)),
                ]
        with m.Default():
            m.d.comb += [steps_per_word.eq(per_word), words_per_step.eq(1)]
    pairs, singles = WORD_BITS // (32 * lanes), WORD_BITS // (16 * lanes)
    return steps_per_word, words_per_step, Mux(op.minimum, op.group_steps * pairs, op.group_steps * singles)


class Incoming(wiring.Component):
    """Says of which kind the next word of the channels is: scale, pattern or code word.

    `take` moves one word on. Operations are accepted while none is in progress (one idle cycle between operations).
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "op": In(stream.Signature(StreamOp)),
                "busy": Out(1),
                "take": In(1),
                "scale": Out(1),
                "pattern": Out(1),
                "code": Out(1),
                "index": Out(2),
            }
        )

    def elaborate(self, platform):
        m = Module()
        op = Signal(StreamOp)
        per_word, words, scale_period = _format_constants(m, self._config, op, "format")
        pattern_period = WORD_BITS // (self._config.lanes_per_channel * STEP // 2)
        done, block = Signal(16), Signal(16)
        scale_left, pattern_left = Signal(8), Signal(6)
        need_scale, need_pattern = Signal(), Signal()
        end = Signal()
        m.d.comb += [
            need_scale.eq(op.scaled & (scale_left == 0)),
            need_pattern.eq((op.codes == Codes.S24) & (pattern_left == 0)),
            self.scale.eq(self.busy & need_scale),
            self.pattern.eq(self.busy & ~need_scale & need_pattern),
            self.code.eq(self.busy & ~need_scale & ~need_pattern),
            end.eq(done + per_word >= op.steps),
            self.op.ready.eq(~self.busy),
        ]
        with m.If(self.op.valid & self.op.ready):
            m.d.sync += [Value.cast(op).eq(Value.cast(self.op.payload)), self.busy.eq(1)]
            m.d.sync += [x.eq(0) for x in (done, block, scale_left, pattern_left, self.index)]
        with m.If(self.take & self.scale):
            m.d.sync += scale_left.eq(scale_period)
        with m.If(self.take & self.pattern):
            m.d.sync += self.index.eq(self.index + 1)
            with m.If(self.index == PATTERN_WORDS - 1):
                m.d.sync += [pattern_left.eq(pattern_period), self.index.eq(0)]
        with m.If(self.take & self.code):
            m.d.sync += self.index.eq(self.index + 1)
            with m.If(self.index == words - 1):
                m.d.sync += [
                    self.index.eq(0),
                    done.eq(done + per_word),
                    scale_left.eq(scale_left - Mux(op.scaled, per_word, 0)),
                    pattern_left.eq(pattern_left - Mux(op.codes == Codes.S24, per_word, 0)),
                ]
                with m.If(end):
                    m.d.sync += [x.eq(0) for x in (done, scale_left, pattern_left)]
                    m.d.sync += [block.eq(block + 1), self.busy.eq(block != op.blocks - 1)]
        return m


class Outgoing(wiring.Component):
    """Counts emitted steps: where code, pattern and scale words end for the chunk at hand, and which group of the scale
    word (`scale_place`) and which step of the pattern words (`pattern_place`) it is."""

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "op": In(stream.Signature(StreamOp)),
                "emit": In(1),
                "current": Out(StreamOp),
                "busy": Out(1),
                "chunk": Out(2),
                "complete": Out(1),
                "scale_place": Out(5),
                "pattern_place": Out(4),
                "scale_end": Out(1),
                "pattern_end": Out(1),
                "code_end": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        op = self.current
        per_word, words, scale_period = _format_constants(m, self._config, op, "format")
        pattern_period = WORD_BITS // (self._config.lanes_per_channel * STEP // 2)
        step, block = Signal(16), Signal(16)
        code, pattern, group, scale = Signal(3), Signal(6), Signal(4), Signal(8)
        last, group_end = Signal(), Signal()
        m.d.comb += [
            last.eq(step == op.steps - 1),
            self.complete.eq(self.chunk == words - 1),
            group_end.eq(group == op.group_steps - 1),
            self.pattern_place.eq(pattern),
            self.scale_end.eq(last | (scale == scale_period - 1)),
            self.pattern_end.eq(last | (pattern == pattern_period - 1)),
            self.code_end.eq(~self.complete | last | (code == per_word - 1)),
            self.op.ready.eq(~self.busy),
        ]
        with m.If(self.emit):
            m.d.sync += self.chunk.eq(Mux(self.complete, 0, self.chunk + 1))
            with m.If(self.complete):
                m.d.sync += [
                    step.eq(Mux(last, 0, step + 1)),
                    code.eq(Mux(self.code_end, 0, code + 1)),
                    pattern.eq(Mux(self.pattern_end, 0, pattern + 1)),
                    group.eq(Mux(group_end | last, 0, group + 1)),
                    self.scale_place.eq(Mux(self.scale_end, 0, self.scale_place + group_end)),
                    scale.eq(Mux(self.scale_end, 0, scale + 1)),
                ]
                with m.If(last):
                    m.d.sync += [block.eq(block + 1), self.busy.eq(block != op.blocks - 1)]
        with m.If(self.op.valid & self.op.ready):
            m.d.sync += [Value.cast(op).eq(Value.cast(self.op.payload)), self.busy.eq(1)]
            m.d.sync += [
                x.eq(0) for x in (step, block, code, pattern, group, scale, self.scale_place, self.chunk)
            ]
        return m


class Decoder(wiring.Component):
    """Weight steps of every channel, in the order of the operations.

    `op`: operations, buffered; `words[c]`: 64-byte words; `step`: valid while all channels hold a step (`steps[c]`),
    until `step.ready`. At most one step and one word per cycle; words are taken as long as there is room, so scale
    and pattern words cost memory beats but no array cycle unless memory is the limit. `taken` is high in a cycle that
    takes a word.

    `latency`: cycles from the transfer of the last word of a step to the step, when nothing is in front of it.
    """

    latency = 3

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "op": In(stream.Signature(StreamOp)),
                "words": In(word_stream()).array(config.channels),
                "step": Out(stream.Signature(0)),
                "steps": Out(step_signature(config.lanes_per_channel)).array(config.channels),
                "taken": Out(1),
                "wanted": Out(1),
                "illegal": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.incoming = incoming = Incoming(self._config)
        m.submodules.outgoing = outgoing = Outgoing(self._config)
        m.submodules.ops = ops = StreamFIFO(StreamOp, 2)
        connect(m, ops.o, outgoing.op)
        both = Signal()
        m.d.comb += [
            both.eq(self.op.valid & incoming.op.ready & ops.i.ready),
            self.op.ready.eq(both),
            incoming.op.valid.eq(both),
            ops.i.valid.eq(both),
            Value.cast(incoming.op.payload).eq(Value.cast(self.op.payload)),
            Value.cast(ops.i.payload).eq(Value.cast(self.op.payload)),
        ]
        control, illegal = Signal(ChannelControl), []
        lanes = self._config.lanes_per_channel
        for c in range(self._config.channels):
            planes = place(
                m, platform, f"channel_{c}", f"channel_planes_{lanes}", lambda: ChannelPlanes(lanes)
            )
            m.d.comb += [
                planes.word.eq(self.words[c].payload),
                Value.cast(planes.control).eq(Value.cast(control)),
            ]
            connect(m, planes.step, wiring.flipped(self.steps[c]))
            illegal.append(planes.illegal)
        m.d.sync += self.illegal.eq(Cat(illegal).any())
        self._flow(m, control, incoming, outgoing)
        return m

    def _flow(self, m, control, incoming, outgoing):
        """Each kind of word has a waiting and a current place; a step needs the current words of its kinds."""
        op = outgoing.current
        needs = {"scale": op.scaled, "pattern": op.codes == Codes.S24, "code": 1}
        kinds = {
            "scale": (incoming.scale, outgoing.scale_end & outgoing.complete),
            "pattern": (
                incoming.pattern & (incoming.index == PATTERN_WORDS - 1),
                outgoing.pattern_end & outgoing.complete,
            ),
            "code": (incoming.code, outgoing.code_end),
        }
        emit, room, ready = Signal(), Const(0), Const(1)
        for kind, (arrives, ends) in kinds.items():
            have, full = Signal(name=f"have_{kind}"), Signal(name=f"full_{kind}")
            drop, promote = Signal(name=f"drop_{kind}"), Signal(name=f"promote_{kind}")
            m.d.comb += [
                drop.eq(emit & needs[kind] & ends),
                promote.eq(full & (~have | drop)),
                control[f"next_{kind}"].eq(promote),
            ]
            with m.If(promote):
                m.d.sync += [have.eq(1), full.eq(0)]
            with m.Elif(drop):
                m.d.sync += have.eq(0)
            with m.If(self.taken & arrives):
                m.d.sync += full.eq(1)
            ready = ready & (have | ~needs[kind])
            room = room | (getattr(incoming, kind) & (~full | promote))
        m.d.comb += [
            emit.eq(outgoing.busy & ready & (~self.step.valid | self.step.ready)),
            outgoing.emit.eq(emit),
            self.wanted.eq(room),
            self.taken.eq(room & Cat(w.valid for w in self.words).all()),
            incoming.take.eq(self.taken),
            *(w.ready.eq(self.taken) for w in self.words),
            control.take_scale.eq(self.taken & incoming.scale),
            control.take_pattern.eq(self.taken & incoming.pattern),
            control.take_code.eq(self.taken & incoming.code),
            control.pattern.eq(incoming.index),
            control.emit.eq(emit),
            control.codes.eq(op.codes),
            control.minimum.eq(op.minimum),
            control.chunk.eq(outgoing.chunk),
            control.scale_place.eq(outgoing.scale_place),
            control.pattern_place.eq(outgoing.pattern_place),
        ]
        with m.If(emit & outgoing.complete):
            m.d.sync += self.step.valid.eq(1)
        with m.Elif(self.step.ready):
            m.d.sync += self.step.valid.eq(0)
