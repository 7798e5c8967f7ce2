"""Instructions with the regions they read and write; dependency tokens follow from the overlaps.

Units run their queues in order and in parallel to each other, so an instruction waits for each other unit's last
instruction that it depends on (true, anti or output dependence). Tokens count per ordered pair of units: the k-th
signal from U to V pairs with the k-th wait of V on U. An edge that an earlier wait already covers is dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from golden.spec import KVStrataError
from golden.spec.engine import Op, Unit, encode

HALT_UNIT = 0xF


@dataclass(frozen=True)
class Span:
    """Addresses [start, stop) of one space: "vb", "act", "table", "aux", "chan", "kv" (the append stream)."""

    space: str
    start: int
    stop: int


@dataclass
class Instruction:
    """One instruction before encoding. `note` says what it computes, for listings and profiles."""

    op: Op
    values: dict[str, int]
    note: str
    reads: tuple[Span, ...]
    writes: tuple[Span, ...]
    wait: int = 0
    signal: int = 0

    @property
    def follows(self) -> bool:
        """A product that takes the codes of the QUANT before it as they are written, instead of a token."""
        return bool(self.values.get("follows", 0))

    @property
    def unit(self) -> Unit | None:
        """The executing unit; None for HALT, which the fetcher executes."""
        return None if self.op is Op.HALT else Unit(self.op >> 4)

    def word(self) -> int:
        """The 256-bit encoding."""
        return encode(self.op, wait=self.wait, signal=self.signal, **self.values)


@dataclass
class _History:
    """Accesses of one space, newest last: (span, instruction index, is a write)."""

    accesses: list[tuple[Span, int, bool]] = field(default_factory=list)


class Builder:
    """Collects instructions in program order and closes them into a list with tokens."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self._spaces: dict[str, _History] = defaultdict(_History)
        self._edges: list[dict[Unit, int]] = []

    def emit(
        self, op: Op, note: str, reads: Iterable[Span] = (), writes: Iterable[Span] = (), **values: int
    ) -> None:
        """Append an instruction; values are the fields of its layout other than wait and signal."""
        instruction = Instruction(op, values, note, tuple(reads), tuple(writes))
        index = len(self.instructions)
        self.instructions.append(instruction)
        latest: dict[Unit, int] = {}
        for span, write in [(s, False) for s in instruction.reads] + [(s, True) for s in instruction.writes]:
            self._depend(span, write, latest)
        for span, write in [(s, False) for s in instruction.reads] + [(s, True) for s in instruction.writes]:
            self._record(span, index, write)
        if instruction.unit is not None:
            latest.pop(instruction.unit, None)
        self._edges.append(latest)

    def _depend(self, span: Span, write: bool, latest: dict[Unit, int]) -> None:
        for other, index, was_write in self._spaces[span.space].accesses:
            if (write or was_write) and other.start < span.stop and span.start < other.stop:
                unit = self.instructions[index].unit
                assert unit is not None
                latest[unit] = max(latest.get(unit, -1), index)

    def _record(self, span: Span, index: int, write: bool) -> None:
        history = self._spaces[span.space]
        unit = self.instructions[index].unit
        kept = []
        for other, old, was_write in history.accesses:
            inside = span.start <= other.start and other.stop <= span.stop
            same_unit = self.instructions[old].unit is unit
            # A write hides what it covers; a read hides an older read of its own unit.
            if inside and ((write and old != index) or (same_unit and not was_write and not write)):
                continue
            kept.append((other, old, was_write))
        kept.append((span, index, write))
        history.accesses = kept

    def finish(self) -> list[Instruction]:
        """The instructions with wait and signal masks set, ended by HALT with an interrupt."""
        covered: dict[tuple[Unit, Unit], int] = {}
        for index, (instruction, edges) in enumerate(zip(self.instructions, self._edges)):
            consumer = instruction.unit
            assert consumer is not None
            for producer, source in edges.items():
                if source <= covered.get((producer, consumer), -1):
                    continue
                covered[producer, consumer] = source
                if instruction.follows and self.instructions[source].values.get("counted", 0):
                    continue
                instruction.wait |= 1 << producer
                signaller = self.instructions[source]
                if signaller.signal >> consumer & 1:
                    raise KVStrataError(
                        f"instruction {source} would signal {consumer.name} twice, again for {index}"
                    )
                signaller.signal |= 1 << consumer
        halt = Instruction(Op.HALT, {"interrupt": 1}, "end", (), ())
        return [*self.instructions, halt]
