"""Cycles of the engine's units beside each other, from the RTL's own structure; no constant here is fitted.

What a unit does is a recurrence over its items (bursts, words, steps, row blocks, vectors): an item moves in the first
cycle in which everything that the RTL asks of it holds. Register stages are the classes' own `latency` values where
they have one; the others are named where they are used. Cycle 0 is the first one in which a run's CYCLES counts. A
cycle named here is the one in which a transfer happens; what it changes is visible in the next.

Not modelled: two units on one bank of the vector buffer in one cycle (the compiler gives them different banks), and
which DRAM rows are open. Two masters of one port (LOAD and APPEND, fetcher and DMA) see each other's transfers from
the pass before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from golden.spec.engine import STEP, WORD_BYTES, Codes, EngineConfig, Op, StreamFormat
from golden.spec.formats import ATTN_TILE
from golden.spec.memory import MAX_BURST_BEATS
from hw.engine.decoder import PATTERN_WORDS
from hw.engine.fetch import FIFO_BEATS, PER_WORD
from hw.engine.lane import BANKS, NARROW_BANKS, accumulator_banks
from hw.engine.mem.address import AddressGenerator
from hw.engine.mem.append import AHEAD, HANDOVER
from hw.engine.mem.append_ports import JOBS, PIECES, WordWriter
from hw.engine.mem.channels import BURSTS_AHEAD
from hw.engine.mem.reader import ReadChannel
from hw.engine.mem.striped import BURST_QUEUE
from hw.engine.queue import QUEUE_DEPTH, UnitQueue
from hw.engine.sfu.retire import GroupWriter
from hw.engine.sfu.softmax import DIVIDE_PERIOD, VECTORS_IN_FLIGHT, SoftmaxUnit
from hw.engine.sfu.timing import FIRST_WORD, instruction_cycles
from hw.engine.sfu.unit import SCORES_IN, SETTLE_GROUPS, SETTLE_WORDS
from hw.timing import DRAIN_END, DRAIN_START
from sw_stack.compile.memory import MemoryPort, MemoryTiming

FIFO_OUT = ReadChannel.latency - 1
"""From a beat on the bus to the head of the prefetch FIFO."""
ADDRESS = 1
"""From a burst's transfer into a channel to its address on the bus."""


def bursts(address_words: int, beats: int) -> Iterator[int]:
    """Beats of each burst of a row: cut at multiples of the longest burst."""
    while beats > 0:
        taken = min(beats, MAX_BURST_BEATS - address_words % MAX_BURST_BEATS)
        yield taken
        address_words += taken
        beats -= taken


# --- LOAD and MATRIX ---------------------------------------------------------------------------------------
class _Burst(NamedTuple):
    beats: int
    need: int
    """Words that must have left the FIFO before this burst has room."""


@dataclass
class Job:
    """A LOAD on its way: its bursts and how far they are. `handed`, of the last burst, is the cycle of `done`."""

    start: int
    left: Iterator[_Burst]
    staged: int = -1
    handed: int = -1
    next: _Burst | None = None


class WordStream:
    """LOAD: descriptors to bursts to words in the FIFOs; the array takes them in order."""

    def __init__(self, config: EngineConfig, port: MemoryPort) -> None:
        self._fifo, self._port = config.fifo_words, port
        self._words = 0
        self._arrived: list[int] = []
        self.taken: list[int] = []
        """Cycle in which the decoder took each word."""
        self._requests = [-1] * BURST_QUEUE
        self._answered = [-1] * BURSTS_AHEAD
        """Cycle in which the last word of each burst was on the bus."""
        self._checked = self._handed = -1
        """Cycles in which the latest burst of all passed the region's check and went to the channels' queues."""
        self._jobs: list[Job] = []
        self.free = 0
        """First cycle in which the generator takes another descriptor, as far as it is known."""

    def load(self, start: int, address: int, count: int, runs: int, stride: int) -> Job:
        """Begin a LOAD, in the cycle of its transfer or when the generator is free."""
        job = Job(start, self._cut(address, count, runs, stride))
        job.next = next(job.left, None)
        self._jobs.append(job)
        self._advance()
        return job

    def _cut(self, address: int, count: int, runs: int, stride: int) -> Iterator[_Burst]:
        for run in range(runs):
            for beats in bursts(address + run * stride, count):
                self._words += beats
                yield _Burst(beats, self._words - self._fifo)

    def _advance(self) -> None:
        """Request every burst whose room is known to come."""
        while self._jobs:
            job = self._jobs[0]
            while job.next is not None:
                if job.next.need > len(self.taken):
                    return
                self._request(job, job.next)
                job.next = next(job.left, None)
            self.free = job.staged + 1
            self._jobs.pop(0)

    def _request(self, job: Job, burst: _Burst) -> None:
        """Generator: `staged`, `checked` against the region, handed to every channel's queue, requested."""
        first = job.handed < 0
        if first:
            job.start = max(job.start, self.free)
        job.staged = max((job.start if first else job.staged) + 1, self._checked)
        self._checked = max(job.staged + 1, self._handed)
        job.handed = max(self._checked + AddressGenerator.latency - 2, self._requests[-BURST_QUEUE] + 1)
        self._handed = job.handed
        room = self.taken[burst.need - 1] + 1 if burst.need > 0 else 0
        requested = max(job.handed + 1, self._requests[-1] + 1, room, self._answered[-BURSTS_AHEAD] + 1)
        self._requests.append(requested)
        arrived = self._port.read(requested + ADDRESS, burst.beats)
        self._answered.append(arrived[-1])
        self._arrived += [beat + FIFO_OUT for beat in arrived]

    def take(self, earliest: int) -> int:
        """The array takes the next word in the first cycle from `earliest` in which it is there."""
        cycle = max(earliest, self._arrived[len(self.taken)])
        self.taken.append(cycle)
        if self._jobs and ((burst := self._jobs[0].next) is None or burst.need <= len(self.taken)):
            self._advance()
        return cycle

    @property
    def held(self) -> int:
        """Words that were asked for and not taken, as far as requests are known."""
        return len(self._arrived) - len(self.taken)


class StepWords(NamedTuple):
    """What a step of a row block takes from the stream before it, and what it ends."""

    before: tuple[str, ...]
    """Kinds of the words in front of the step's code words."""
    codes: int
    """Code words that arrive for it."""
    ends_code: bool
    ends_scale: bool
    ends_pattern: bool


@lru_cache(maxsize=256)
def step_words(config: EngineConfig, stream: StreamFormat, steps: int) -> tuple[StepWords, ...]:
    """The word sequence of a row block, step by step."""
    per_word, per_step = stream.steps_per_word(config), stream.words_per_step(config)
    scales, patterns = stream.scale_period(config), stream.pattern_period(config)
    sparse = stream.codes is Codes.S24
    rows = []
    for s in range(steps):
        last = s == steps - 1
        before = ["scale"] if stream.scaled and s % scales == 0 else []
        before += ["part"] * (PATTERN_WORDS - 1) + ["pattern"] if sparse and s % patterns == 0 else []
        rows.append(
            StepWords(
                tuple(before),
                per_step if s % per_word == 0 else 0,
                last or s % per_word == per_word - 1,
                last or s % scales == scales - 1,
                last or s % patterns == patterns - 1,
            )
        )
    return tuple(rows)


@dataclass(frozen=True)
class ArrayOp:
    """A product as the array sees it; `groups`: VB words drained per vector and row block."""

    stream: StreamFormat
    blocks: int
    steps: int
    vectors: int
    groups: int


@dataclass(frozen=True)
class CodesAhead:
    """When the array may take the codes of a counted QUANT: group g in cycle `first + g * interval`."""

    first: int
    interval: int

    @classmethod
    def of(cls, start: int, lanes: int, count: int, fresh: bool) -> CodesAhead:
        """Of a QUANT transferred in cycle `start`: `done` is `SETTLE_GROUPS` behind the last word, and a group counts
        from the cycle behind its write."""
        words, interval = -(-count // lanes), STEP // lanes
        last = (
            start + vector_cycles(Op.QUANT, lanes, count, 1, fresh) - SETTLE_GROUPS + GroupWriter.latency + 1
        )
        return cls(last - words + interval, interval)

    def step(self, number: int, groups: int) -> int:
        """Of the groups that step `number` reads, all steps before it having `groups` each as well."""
        return self.first + (groups * (number + 1) - 1) * self.interval


class Array:
    """MATRIX: decoder, array, two accumulator banks, drain; operations overlap as far as each stage lets them."""

    def __init__(self, config: EngineConfig, words: WordStream) -> None:
        self._config, self._words = config, words
        self._took = -1
        self._room = dict.fromkeys(("scale", "pattern", "code"), 0)
        self._dropped = dict.fromkeys(("scale", "pattern", "code"), 0)
        self._have = dict.fromkeys(("scale", "pattern", "code"), 0)
        self._emitted, self._fired = -1, -1
        self._step_free = 0
        self._drained = [-1] * NARROW_BANKS
        """Last accumulator read of the latest row blocks, oldest first."""
        self._banks = BANKS
        self.free = 0
        """First cycle in which another operation is accepted: the word sequence handles one at a time."""

    def run(self, accepted: int, op: ArrayOp, codes: CodesAhead | None = None) -> int:
        """Cycle of `done` of an operation accepted in a cycle not before `free`; `codes`: when its vector comes."""
        plan = step_words(self._config, op.stream, op.steps)
        outgoing = max(accepted + 2, self._emitted + 2)
        issue = max(accepted + 1, self._fired) + 1
        earliest = accepted + 1
        banks = accumulator_banks(self._config, op.vectors)
        changed, self._banks = banks != self._banks, banks
        for block in range(op.blocks):
            bank = self._drained[-1 if changed and not block else -banks] + 1
            for step, words in enumerate(plan):
                for kind in words.before:
                    self._take(kind, earliest)
                self._step(words, op.stream.scaled, bool(op.stream.codes is Codes.S24), earliest, outgoing)
                coded = codes.step(step, op.stream.codes.step // STEP) if codes and not block else 0
                self._fired = max(self._emitted + 1, self._fired + 1, bank, issue, coded)
                self._step_free = self._fired
                self._fired += op.vectors - 1
                bank = 0
            read = max(self._fired + DRAIN_START, self._drained[-1] + 1) + op.vectors * op.groups - 1
            self._drained = [*self._drained[1:], read]
        self.free = self._took + 1
        return self._drained[-1] + DRAIN_END

    def _take(self, kind: str, earliest: int) -> int:
        """Take a word; the last one of its kind's set moves on when the set in use is dropped."""
        place = "pattern" if kind == "part" else kind
        self._took = self._words.take(max(self._took + 1, earliest, self._room[place]))
        if kind != "part":
            promoted = max(self._took + 1, self._dropped[place])
            self._room[place], self._have[place] = promoted, promoted + 1
        return self._took

    def _step(self, words: StepWords, scaled: bool, sparse: bool, earliest: int, outgoing: int) -> None:
        """Emit a step: chunk by chunk when it takes several words."""
        ready = max(outgoing, self._have["scale"] if scaled else 0, self._have["pattern"] if sparse else 0)
        for chunk in range(max(1, words.codes)):
            if words.codes:
                self._take("code", earliest)
            self._emitted = max(ready, self._have["code"], self._emitted + 1, self._step_free)
            if chunk < words.codes - 1 or words.ends_code:
                self._dropped["code"] = self._emitted
        if words.ends_scale:
            self._dropped["scale"] = self._emitted
        if words.ends_pattern:
            self._dropped["pattern"] = self._emitted


# --- VECTOR and APPEND -------------------------------------------------------------------------------------
@lru_cache(maxsize=4096)
def vector_cycles(op: Op, lanes: int, count: int, vectors: int, fresh: bool) -> int:
    """Cycles from a vector instruction's transfer to its `done`, no port stalling."""
    return instruction_cycles(op, lanes, count, vectors, fresh=fresh)


class Softmaxes:
    """SOFTMAXes behind each other: one is taken as soon as the scores of the one before are in the softmax unit."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._written = [-1] * VECTORS_IN_FLIGHT
        """Cycle in which the scale of each of the latest vectors was written, oldest first."""
        self.next = 0
        """First cycle in which another SOFTMAX is taken."""

    def run(self, start: int, count: int, vectors: int) -> int:
        """Cycle of `done` of a SOFTMAX transferred in cycle `start`."""
        words = -(-count // ATTN_TILE) * (ATTN_TILE // self._lanes)
        begun = start + FIRST_WORD
        for _ in range(vectors):
            begun = max(begun, self._written[0] + 1)
            ended = begun + words - 1
            written = max(
                ended + SoftmaxUnit.vector_latency_of(self._lanes), self._written[-1] + DIVIDE_PERIOD
            )
            self._written = [*self._written[1:], written]
            begun = ended + 1
        self.next = ended + SCORES_IN
        return written + 1 + SETTLE_GROUPS


@dataclass
class Records:
    """KVQUANT's vectors on their way to APPEND: last words as the vector unit would send them alone."""

    ends: list[int] = field(default_factory=list)
    words: int = 0
    late: int = 0
    """Cycles by which the stream has been held up."""
    sent: int = 0
    """Cycle in which the last word so far was taken."""

    @property
    def held(self) -> bool:
        """Whether some vector has been taken: from then on its time is known."""
        return self.sent > 0

    @property
    def done(self) -> int:
        """Cycle of KVQUANT's `done`, from what has been taken so far."""
        return max([self.sent, *(end + self.late for end in self.ends)]) + SETTLE_WORDS

    @classmethod
    def of(cls, start: int, lanes: int, count: int, vectors: int, fresh: bool) -> Records:
        """The vectors of a KVQUANT that starts in cycle `start`."""
        words = -(-count // lanes)

        def end(v: int) -> int:
            """Its scalar, or its place in the last pass behind the first one over all vectors, if there is one."""
            scalar = instruction_cycles(Op.KVQUANT, lanes, count, v + 1, fresh=fresh)
            before = 0 if fresh else vectors
            return (
                start + max(scalar, instruction_cycles(Op.ROPE, lanes, count, before + v + 1)) - SETTLE_WORDS
            )

        return cls([end(v) for v in range(vectors)], words)

    def take(self, ready: int) -> int:
        """Cycle in which the next vector's last word is taken by a unit that is ready for the first from `ready`."""
        end = self.ends.pop(0) + self.late
        self.sent = max(end, ready + self.words - 1, self.sent + self.words)
        self.late += self.sent - end
        return self.sent


PLACED = 6
"""States of a vector before it is read or handed over: PLACE, MULTIPLY, OFFSET, END, COMPARE, RANGE."""
NEXT_BLOCK = 4
"""From a row block's READ to the next one's: END, COMPARE, RANGE, READ."""


@dataclass
class Placed:
    """A vector in the APPEND unit: the words that it writes, and the cycle in which all are answered."""

    start: int = 0
    end: int = 0
    channels: set[int] = field(default_factory=set)
    answered: int = -1

    def shares(self, start: int, end: int, channels: set[int]) -> bool:
        """Whether it writes one of the words [start, end) of these channels."""
        return start < self.end and self.start < end and bool(channels & self.channels)


@dataclass(frozen=True)
class TileRead:
    """A row block of V: when its first words are on the bus, how many of each channel, of which channels."""

    arrived: int
    words: int
    channels: range


class Append:
    """APPEND: `AHEAD` vectors are placed and read behind the one that is written; `JOBS` may wait for answers."""

    def __init__(self, config: EngineConfig, port: MemoryPort, auxiliary: MemoryPort) -> None:
        self._config, self._port, self._auxiliary = config, port, auxiliary
        self.free = 0
        """First cycle in which another operation is taken."""
        self._idle = 0
        """First cycle in which the emitter takes another vector."""
        self._asked = 0
        """First cycle in which the reader takes another row block."""
        self._asked_at = 0
        self._scales = 0
        """First cycle behind the last V scale record's answer."""
        self._begun = [-1] * AHEAD
        """Cycle in which the emitter took each of the latest vectors, oldest first."""
        self._jobs = [Placed() for _ in range(JOBS)]
        """The latest vectors, oldest first."""

    def run(self, start: int, f: dict[str, int], values: bool, records: Records) -> int:
        """Cycle of `done` of an operation transferred in `start`: CHECK, then PLACE."""
        place = start + 2
        for n in range(f["count"]):
            ready, job = place + PLACED, Placed()
            tile = self._tile(ready, f, f["addr"] + n, job) if values else []
            room = max(self._begun[0], self._jobs[0].answered) + 1
            handed = max(ready, self._asked_at + 1 if tile else 0, room)
            begun = max(handed + HANDOVER, self._idle)
            self._begun = [*self._begun[1:], begun]
            taken = records.take(begun + 1)
            answered = self._values(taken, tile) if values else self._key(taken, f, f["addr"] + n)
            job.answered = max(answered, self._jobs[-1].answered + 1)
            self._jobs = [*self._jobs[1:], job]
            place = handed + 1
        self.free = place
        return self._jobs[-1].answered

    def _key(self, taken: int, f: dict[str, int], slot: int) -> int:
        """A scale record and the pieces, one a cycle; the cycle with all answers in."""
        config = self._config
        lane = slot % config.lanes ^ f.get("turn", 0) * config.vector_lanes
        channel = lane // config.lanes_per_channel
        last = taken + 1 + f["head_size"] // STEP * (f["bits"] // 2)
        self._idle = last + 1
        return max(self._answered(at, channel) for at in range(taken + 1, last + 1))

    def _tile(self, ready: int, f: dict[str, int], slot: int, job: Placed) -> list[TileRead]:
        """Row block by row block, each once no vector without all its answers shares a word with it."""
        config, lanes, planes = self._config, self._config.lanes_per_channel, f["bits"] // 2
        tile = max(1, planes * lanes // PIECES)
        groups, channel, reads = f["head_size"] // lanes, f["row"] // lanes, []
        job.start = word = f["base"] + slot // STEP * planes * lanes // PIECES
        while groups:
            here = min(groups, config.channels - channel)
            used = set(range(channel, channel + here))
            clashes = [j.answered + 1 for j in self._jobs if j.shares(word, word + tile, used)]
            at = max([ready, self._asked, *clashes])
            arrived = self._port.read(at + ADDRESS, tile, slice(channel, channel + here))
            reads.append(TileRead(arrived[0], tile, range(channel, channel + here)))
            self._asked_at, self._asked = at, at + tile + 1
            job.channels |= used
            job.end, groups, channel = word + tile, groups - here, 0
            word, ready = word + f["block_words"], at + NEXT_BLOCK
        return reads

    def _values(self, taken: int, tile: list[TileRead]) -> int:
        """Change and write a word a cycle, then the scale record; the cycle with all answers in."""
        last, answered = taken, 0
        for read in tile:
            last = max(last, read.arrived)
            for channel in read.channels:
                for _ in range(read.words):
                    last += 1
                    answered = max(answered, self._answered(last, channel))
        self._idle = last + 2
        # The auxiliary port changes owner in a cycle of its own, unless an answer is still to come.
        sent = last + 1 + (last + 1 + WordWriter.latency >= self._scales) + WordWriter.latency
        answer = self._auxiliary.write(sent)
        self._scales = answer + 1
        return max(answered, answer + WordWriter.answer_latency)

    def _answered(self, written: int, channel: int) -> int:
        """First cycle in which a word, taken in cycle `written`, is seen answered."""
        answer = self._port.write(written + WordWriter.latency, 1, slice(channel, channel + 1))
        return answer + WordWriter.answer_latency


WRITE_GATHER = 3
"""From the descriptor to the first word in the write buffer: VB read, data, queue."""


# --- DMA ----------------------------------------------------------------------------------------------------
class Dma:
    """READ and WRITE between auxiliary memory and the vector buffer."""

    def __init__(self, config: EngineConfig, port: MemoryPort) -> None:
        self._ratio = WORD_BYTES // (4 * config.vector_lanes)
        self._port = port

    def run(self, start: int, f: dict[str, int], write: bool) -> int:
        """Cycle of `done` of an operation transferred in cycle `start`."""
        posted = start + 1
        beats = -(-f["count"] // self._ratio)
        rows = [list(bursts((f["addr"] + v * f["stride"]) // WORD_BYTES, beats)) for v in range(f["vectors"])]
        if write:
            return self._write(posted, rows, f["count"])
        handed, moved = posted + AddressGenerator.latency, 0
        for beats_of in rows:
            left = f["count"]
            for n in beats_of:
                arrived = self._port.read(handed + ADDRESS, n)
                handed += 1
                here = min(left, n * self._ratio)
                left -= here
                first, last = arrived[0], arrived[-1]
                moved = max(moved + here, first + FIFO_OUT + here, last + 1 + FIFO_OUT)
        return moved

    def _write(self, posted: int, rows: list[list[int]], count: int) -> int:
        """A burst starts when all its beats are in the write buffer, the one before has its address taken and sends its
        last beat.

        The port changes owner in a cycle of its own, unless an answer is still to come.
        """
        moved, taken, sent, answered = posted + WRITE_GATHER - 1, 0, 0, -1
        for beats_of in rows:
            left = count
            for beats in beats_of:
                here = min(left, beats * self._ratio)
                left, moved = left - here, moved + here
                address = max(moved + 1, sent, taken + 1) + ADDRESS
                taken = address + (address > answered)
                sent = taken + beats - 1
                answered = self._port.write(sent, beats)
        return answered


# --- instructions -------------------------------------------------------------------------------------------
class Fetch:
    """The fetcher and the dispatcher: an instruction per cycle, in order, into queues of `QUEUE_DEPTH`."""

    def __init__(self, port: MemoryPort) -> None:
        self._port = port
        self._arrived: list[int] = []
        """Cycle in which each word of the program is at the head of the fetcher's FIFO."""
        self._left: list[int] = []
        """Cycle in which each instruction leaves the fetcher."""
        self._requested = -1
        self._moved = 0

    def queued(self, base: int, index: int, starts: list[int]) -> int:
        """First cycle in which instruction `index` is at the head of its unit's empty queue."""
        self._request(base // WORD_BYTES)
        arrived = self._arrived[index // PER_WORD]
        self._left.append(max(arrived, self._moved))
        # The dispatcher decodes in one cycle and holds the instruction until its queue has room.
        self._moved = self._left[-1] + 1
        if len(starts) >= QUEUE_DEPTH:
            self._moved = max(self._moved, starts[-QUEUE_DEPTH] + 1)
        return self._moved + UnitQueue.latency

    def _request(self, base: int) -> None:
        """Ask for every burst that has room: the fetcher reads on, whatever the instructions are."""
        while True:
            word = len(self._arrived)
            beats = MAX_BURST_BEATS - (base + word) % MAX_BURST_BEATS
            left = (word + beats - FIFO_BEATS) * PER_WORD
            if left > len(self._left):
                return
            self._requested = max(self._requested + 1, self._left[left - 1] + 1 if left > 0 else 0)
            arrived = self._port.read(self._requested + ADDRESS, beats)
            self._arrived += [beat + FIFO_OUT for beat in arrived]


@dataclass
class Ports:
    """The masters' ports of one pass: LOAD and APPEND share the channels, fetcher and DMA auxiliary memory.

    `scales`, APPEND's port of auxiliary memory, is taken not to meet the others' reads.
    """

    load: MemoryPort
    append: MemoryPort
    fetch: MemoryPort
    dma: MemoryPort
    scales: MemoryPort

    @classmethod
    def of(cls, memory: MemoryTiming, channels: int, before: Ports | None = None) -> Ports:
        """Ports of a first pass, or of one after another."""
        load, append, fetch, dma = (
            (before.load, before.append, before.fetch, before.dma) if before else (None,) * 4
        )
        return cls(
            MemoryPort(memory, channels, 0, append),
            MemoryPort(memory, channels, 0, load),
            MemoryPort(memory, 1, channels, dma),
            MemoryPort(memory, 1, channels, fetch),
            MemoryPort(memory, 1, channels),
        )
