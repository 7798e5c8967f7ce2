"""Predicted cycles of a program: when each instruction starts and ends, unit by unit.

The units' own times are `sw_stack.compile.cycles`; this module fetches, queues and pairs tokens as the controller does.
Queues are in order, tokens pair k-th with k-th, an instruction leaves the fetcher one per cycle and waits there while
its unit's queue is full, and a unit works on at most `IN_FLIGHT` operations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from golden.spec.engine import Codes, EngineConfig, Op, StreamFormat, Unit
from sw_stack.compile.builder import Instruction
from sw_stack.compile.memory import MemoryTiming
from sw_stack.compile.program import Program

if TYPE_CHECKING:
    from sw_stack.compile.cycles import ArrayOp, Ports


PASSES = 32
"""Predictions at most until masters of one memory port agree on each other's transfers."""


@dataclass(frozen=True)
class Slot:
    """One executed instruction: cycles [start, end) on its unit; `waited_for` is what held it up last."""

    index: int
    unit: Unit
    op: Op
    note: str
    start: int
    end: int
    waited_for: str


@dataclass
class Schedule:
    """All instructions of a run, and the CYCLES that the controller counts until HALT raises the interrupt."""

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
    from sw_stack.compile.cycles import Ports

    timing = memory or MemoryTiming()
    ports = Ports.of(timing, config.channels)
    last = _Scheduler(config, ports).run(program, registers)
    for _ in range(PASSES - 1):
        ports = Ports.of(timing, config.channels, ports)
        before, last = last, _Scheduler(config, ports).run(program, registers)
        if last.cycles == before.cycles:
            break
    return last


class _Scheduler:
    def __init__(self, config: EngineConfig, ports: Ports) -> None:
        from sw_stack.compile import cycles

        self.config = config
        self.words = cycles.WordStream(config, ports.load)
        self.array = cycles.Array(config, self.words)
        self.append = cycles.Append(config, ports.append, ports.scales)
        self.dma = cycles.Dma(config, ports.dma)
        self.records = cycles.Records()
        self.softmaxes = cycles.Softmaxes(config.vector_lanes)
        self.scores_last = False
        """Whether the vector unit's latest instruction is a SOFTMAX that exports nothing."""
        self.codes: cycles.CodesAhead | None = None
        self.fetch = cycles.Fetch(ports.fetch)
        self.jobs: list[cycles.Job] = []
        self.starts: dict[Unit, list[int]] = {u: [] for u in Unit}
        self.ends: dict[Unit, list[int]] = {u: [] for u in Unit}
        self.signals: dict[tuple[Unit, Unit], list[int]] = defaultdict(list)
        self.takes: dict[tuple[Unit, Unit], list[int]] = defaultdict(list)

    def run(self, program: Program, registers: dict[int, int]) -> Schedule:
        slots: list[Slot] = []
        order: list[int] = []
        for index, instruction in enumerate(program.instructions):
            unit = instruction.unit
            if unit is None:
                break
            queued = self.fetch.queued(program.base, index, self.starts[unit])
            start, why = self._ready(instruction, unit, queued)
            start, why = self._tokens(instruction, unit, start, why)
            fields = _with_registers(instruction, registers)
            done = self._execute(instruction.op, fields, start)
            if unit is Unit.VECTOR:
                self.scores_last = instruction.op is Op.SOFTMAX and not fields.get("export", 0)
            self.starts[unit].append(start)
            self.ends[unit].append(done)
            slots.append(Slot(index, unit, instruction.op, instruction.note, start, done + 1, why))
            order.append(len(self.ends[unit]) - 1)
            for other in (u for u in Unit if instruction.signal >> u & 1):
                self.signals[unit, other].append(len(self.ends[unit]) - 1)
        slots = [self._final(s, n) for s, n in zip(slots, order)]
        return Schedule(slots, self._end(slots, program), busy_cycles(slots), self._most_tokens())

    def _ready(self, instruction: Instruction, unit: Unit, queued: int) -> tuple[int, str]:
        """First cycle in which the unit takes another operation, and what it waits for until then."""
        from hw.engine.queue import IN_FLIGHT

        ends = self.ends[unit]
        if unit is Unit.LOAD:
            free = self.words.free
        elif unit is Unit.MATRIX:
            free = self.array.free
        elif unit is Unit.APPEND:
            free = self.append.free
        elif instruction.op is Op.SOFTMAX and self.scores_last:
            free = self.softmaxes.next
        else:
            free = self._done(unit, -1) + 1 if ends else 0
        if len(ends) >= IN_FLIGHT:
            free = max(free, self._done(unit, -IN_FLIGHT) + 1)
        return max((free, unit.name.lower()), (queued, "fetch"))

    def _done(self, unit: Unit, index: int) -> int:
        """`done` of a unit's operation: a LOAD waits for room, the vector unit's last one may still send records."""
        if unit is Unit.LOAD:
            return self.jobs[index].handed
        if unit is Unit.VECTOR and index in (-1, len(self.ends[unit]) - 1) and self.records.held:
            self.ends[unit][-1] = max(self.ends[unit][-1], self.records.done)
        return self.ends[unit][index]

    def _final(self, slot: Slot, index: int) -> Slot:
        """A slot with what later instructions decided: a LOAD's room, the consumer of a KVQUANT."""
        start = self.jobs[index].start if slot.unit is Unit.LOAD else slot.start
        return replace(slot, start=start, end=self._done(slot.unit, index) + 1)

    def _tokens(self, instruction: Instruction, unit: Unit, start: int, why: str) -> tuple[int, str]:
        for other in (u for u in Unit if instruction.wait >> u & 1):
            pair = (other, unit)
            given = self._done(other, self.signals[pair][len(self.takes[pair])]) + 1
            if given > start:
                start, why = given, other.name.lower()
            self.takes[pair].append(start)
        return start, why

    def _execute(self, op: Op, f: dict[str, int], start: int) -> int:
        """Cycle of `done`."""
        from sw_stack.compile import cycles

        if op is Op.LOAD:
            self.jobs.append(self.words.load(start, f["addr"], f["count"], f["runs"], f["stride"]))
            return start
        if op is Op.MATRIX:
            return self.array.run(start, _array_op(self.config, f), self.codes if f.get("follows") else None)
        if op in (Op.READ, Op.WRITE):
            return self.dma.run(start, f, op is Op.WRITE)
        if op in (Op.APPEND_K, Op.APPEND_V):
            return self.append.run(start, f, op is Op.APPEND_V, self.records)
        lanes = self.config.vector_lanes
        fresh = bool(f.get("fresh", 0))
        if op is Op.SOFTMAX:
            return self.softmaxes.run(start, f["count"], f["vectors"])
        if f.get("counted"):
            self.codes = cycles.CodesAhead.of(start, lanes, f["count"], fresh)
        if op is Op.KVQUANT:
            self.records = cycles.Records.of(start, lanes, f["count"], f["vectors"], fresh)
        return start + cycles.vector_cycles(op, lanes, f["count"], f["vectors"], fresh)

    def _end(self, slots: list[Slot], program: Program) -> int:
        """HALT acts in the cycle in which it is fetched and every queue is seen empty; that cycle counts."""
        from hw.engine.queue import UnitQueue

        halted = self.fetch.queued(program.base, len(slots), []) - UnitQueue.latency
        return max([halted, *(self._done(u, len(e) - 1) + 1 for u, e in self.ends.items() if e)]) + 1

    def _most_tokens(self) -> int:
        most = 0
        for (unit, other), given in self.signals.items():
            events = sorted(
                [(self._done(unit, i) + 1, 1) for i in given] + [(t, -1) for t in self.takes[unit, other]]
            )
            held = 0
            for _, change in events:
                held += change
                most = max(most, held)
        return most


def busy_cycles(slots: Sequence[Slot]) -> dict[Unit, int]:
    """Cycles in which a unit holds an operation."""
    busy: dict[Unit, int] = dict.fromkeys(Unit, 0)
    until: dict[Unit, int] = dict.fromkeys(Unit, 0)
    for slot in slots:
        busy[slot.unit] += max(0, slot.end - max(slot.start, until[slot.unit]))
        until[slot.unit] = max(until[slot.unit], slot.end)
    return busy


def _with_registers(instruction: Instruction, registers: dict[int, int]) -> dict[str, int]:
    fields = dict.fromkeys(("count", "addr", "vectors", "bits", "stride"), 0) | instruction.values
    for name in ("addr", "count"):
        fields[name] += registers.get(fields.get(f"{name}_reg", 0), 0)
    return fields


def _array_op(config: EngineConfig, f: dict[str, int]) -> ArrayOp:
    from sw_stack.compile.cycles import ArrayOp

    scaled, minimum, offset = (bool(f.get(name, 0)) for name in ("scaled", "minimum", "offset"))
    stream = StreamFormat(Codes(f.get("codes", 0)), scaled, minimum, offset, f.get("group_steps", 0))
    blocks, steps = (f["steps"], f["count"]) if f.get("values", 0) else (f["count"], f["steps"])
    rows = f.get("vec_rows", 0) if f.get("vec_group", 0) else config.lanes
    return ArrayOp(stream, blocks, steps, f["vectors"], rows // config.vector_lanes)
