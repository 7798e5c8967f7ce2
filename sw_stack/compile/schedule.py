"""Predicted cycles of a program: when each instruction starts and ends, unit by unit.

Durations are the closed forms of `hw.timing` (matrix unit) and `hw.engine.sfu.timing` (vector unit), which the RTL is
held against; what they do not cover (memory units) is counted from bytes, bursts and one memory latency. Queues are in
order, tokens pair k-th with k-th, and an instruction can enter its queue only when it was fetched and one of the
queue's places is free. Words of LOAD reach the array as a stream that may run ahead by the depth of its FIFO.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache

from golden.spec.engine import (
    INSTRUCTION_BYTES,
    STEP,
    WORD_BYTES,
    Codes,
    EngineConfig,
    Op,
    StreamFormat,
    Unit,
)
from sw_stack.compile.builder import Instruction
from sw_stack.compile.program import Program

QUEUE_DEPTH = 8
"""Operations that wait in front of a unit (hw/engine/queue.py)."""


@dataclass(frozen=True)
class MemoryTiming:
    """Memory as the schedule sees it: cycles from a request to its first word, words per cycle of a channel."""

    latency_cycles: int = 40
    words_per_cycle: float = 1.0


@dataclass(frozen=True)
class Slot:
    """One executed instruction: cycles [start, end) on its unit; `waited_for` is what held it up last."""

    index: int
    unit: Unit
    note: str
    start: int
    end: int
    waited_for: str


@dataclass
class Schedule:
    """All instructions of a run, and the cycle in which HALT raises the interrupt."""

    slots: list[Slot]
    cycles: int
    busy: dict[Unit, int] = field(default_factory=dict)
    most_tokens: int = 0
    """Greatest number of tokens that one counter holds."""

    def busy_share(self, unit: Unit) -> float:
        """Part of the run in which a unit works."""
        return self.busy.get(unit, 0) / self.cycles

    def stalls(self, unit: Unit) -> dict[str, int]:
        """Idle cycles of a unit by what it waited for."""
        idle: dict[str, int] = defaultdict(int)
        end = 0
        for slot in (s for s in self.slots if s.unit is unit):
            if slot.start > end:
                idle[slot.waited_for] += slot.start - end
            end = max(end, slot.end)
        return dict(idle)


def schedule(
    program: Program, config: EngineConfig, registers: dict[int, int], memory: MemoryTiming | None = None
) -> Schedule:
    """Predict a run of `program` with the given scalar registers."""
    return _Scheduler(config, memory or MemoryTiming()).run(list(program.instructions), registers)


class _Scheduler:
    def __init__(self, config: EngineConfig, memory: MemoryTiming) -> None:
        self.config, self.memory = config, memory
        self.free: dict[Unit, int] = dict.fromkeys(Unit, 0)
        self.starts: dict[Unit, list[int]] = {u: [] for u in Unit}
        self.signals: dict[tuple[Unit, Unit], list[int]] = defaultdict(list)
        self.takes: dict[tuple[Unit, Unit], list[int]] = defaultdict(list)
        self.words = 0.0
        """Cycle in which the last word asked for so far reaches its FIFO."""
        self.records = 0
        """Cycle in which the last quantised K or V vector is out."""
        self.stream: list[tuple[float, float]] = []
        """First and last arrival of each LOAD that MATRIX has not taken."""

    def run(self, instructions: list[Instruction], registers: dict[int, int]) -> Schedule:
        slots: list[Slot] = []
        busy: dict[Unit, int] = dict.fromkeys(Unit, 0)
        fetched = self.memory.latency_cycles
        per_word = WORD_BYTES // INSTRUCTION_BYTES
        for index, instruction in enumerate(instructions):
            unit = instruction.unit
            fetched = max(fetched + (index % per_word == 0), 0)
            if unit is None:
                break
            started = self.starts[unit]
            if len(started) > QUEUE_DEPTH:
                fetched = max(fetched, started[-QUEUE_DEPTH - 1])
            start, why = max((self.free[unit], unit.name.lower()), (fetched, "fetch"))
            for other in (u for u in Unit if instruction.wait >> u & 1):
                pair = (other, unit)
                given = self.signals[pair][len(self.takes[pair])]
                if given > start:
                    start, why = given, other.name.lower()
                self.takes[pair].append(start)
            fields = _with_registers(instruction, registers)
            start, end, why = self._execute(instruction.op, fields, start, why)
            started.append(start)
            busy[unit] += min(end, self.free[unit]) - start
            for other in (u for u in Unit if instruction.signal >> u & 1):
                self.signals[unit, other].append(end)
            slots.append(Slot(index, unit, instruction.note, start, end, why))
        finish = max((s.end for s in slots), default=fetched)
        return Schedule(slots, finish + 1, busy, self._most_tokens())

    def _execute(self, op: Op, f: dict[str, int], start: int, why: str) -> tuple[int, int, str]:
        """(start, end, reason of waiting) and the unit's next free cycle."""
        unit = Unit(op >> 4)
        if op is Op.LOAD:
            words = f["count"] * f["runs"]
            first = max(start + self.memory.latency_cycles, self.words)
            self.words = first + words / self.memory.words_per_cycle
            self.stream.append((first, self.words))
            end = max(start + 1, int(self.words) - self.memory.latency_cycles - self.config.fifo_words)
        elif op is Op.MATRIX:
            first, last = self.stream.pop(0)
            if first > start:
                start, why = int(first), "weights"
            cycles, array = matrix_time(self.config, *_product_key(f))
            end = max(start + cycles, int(last) + cycles - array)
            self.free[unit] = max(start + array, int(last))
            return start, end, why
        elif op in (Op.READ, Op.WRITE):
            beats = -(-f["count"] * 4 * self.config.vector_lanes // WORD_BYTES) * f["vectors"]
            end = start + self.memory.latency_cycles + beats
        elif op in (Op.APPEND_K, Op.APPEND_V):
            end = max(start, self.records) + self._append_cycles(op, f)
        else:
            end = start + vector_time(
                op, self.config.vector_lanes, f["count"], f["vectors"], bool(f.get("fresh", 0))
            )
            if op is Op.KVQUANT:
                self.records = end
        self.free[unit] = end
        return start, end, why

    def _append_cycles(self, op: Op, f: dict[str, int]) -> int:
        """Bursts in order, one memory latency each for the read and the write of a value tile."""
        pieces = f["bits"] // 2 * f["head_size"] // STEP
        if op is Op.APPEND_K:
            return self.memory.latency_cycles + f["count"] * (1 + pieces)
        rows = f["head_size"] // self.config.lanes_per_channel
        return f["count"] * (2 * self.memory.latency_cycles + max(1, rows // self.config.channels) * 2)

    def _most_tokens(self) -> int:
        most = 0
        for pair, given in self.signals.items():
            events = sorted([(t, 1) for t in given] + [(t, -1) for t in self.takes[pair]])
            held = 0
            for _, change in events:
                held += change
                most = max(most, held)
        return most


def _with_registers(instruction: Instruction, registers: dict[int, int]) -> dict[str, int]:
    fields = dict.fromkeys(("count", "addr", "vectors", "bits"), 0) | instruction.values
    for name in ("addr", "count"):
        fields[name] += registers.get(fields.get(f"{name}_reg", 0), 0)
    return fields


def _product_key(f: dict[str, int]) -> tuple[int, ...]:
    names = ("codes", "scaled", "minimum", "offset", "group_steps", "values", "count", "steps", "vectors")
    return (*(f.get(n, 0) for n in names), f.get("vec_rows", 0) if f.get("vec_group", 0) else 0)


@lru_cache(maxsize=4096)
def matrix_time(
    config: EngineConfig, codes: int, scaled: int, minimum: int, offset: int, group_steps: int,
    values: int, count: int, steps: int, vectors: int, rows: int,
) -> tuple[int, int]:  # fmt: skip
    """(cycles to `done`, cycles until the array can take the next product)."""
    from hw.timing import Product, matrix_cycles

    stream = StreamFormat(Codes(codes), bool(scaled), bool(minimum), bool(offset), group_steps)
    blocks, steps = (steps, count) if values else (count, steps)
    groups = rows // config.vector_lanes
    cycles = matrix_cycles(config, Product(stream, blocks, steps, vectors, groups))
    array = blocks * max(steps * vectors, stream.words_per_block(config, steps))
    return cycles, min(array, cycles)


@lru_cache(maxsize=4096)
def vector_time(op: Op, lanes: int, count: int, vectors: int, fresh: bool) -> int:
    """Cycles of a vector instruction, no port stalling."""
    from hw.engine.sfu.timing import instruction_cycles

    return instruction_cycles(op, lanes, count, vectors, fresh=fresh)
