"""A schedule, predicted or measured on the RTL, as a timeline: Chrome trace events, one track per unit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from golden.spec import KVStrataError
from golden.spec.engine import Unit
from sw_stack.compile.memory import MemoryTiming
from sw_stack.compile.program import Program, step_registers
from sw_stack.compile.schedule import Schedule, Slot, busy_cycles, schedule
from sw_stack.device.rtl import RtlDevice
from sw_stack.pack.image import Image
from sw_stack.rtl.engine import Event
from sw_stack.runtime.machine import memory_model


def measured(program: Program, events: Sequence[Event], cycles: int) -> Schedule:
    """The run that an RTL profile shows; an operation was held up last by its unit, a token's giver, or the fetch."""
    left = {unit: [e for e in events if e.unit is unit][::-1] for unit in Unit}
    free = dict.fromkeys(Unit, 0)
    given: dict[tuple[Unit, Unit], list[int]] = defaultdict(list)
    slots = []
    for index, instruction in enumerate(program.instructions):
        unit = instruction.unit
        if unit is None:
            break
        event = left[unit].pop()
        causes = [(free[unit], unit.name.lower())]
        causes += [(given[u, unit].pop(0), u.name.lower()) for u in Unit if instruction.wait >> u & 1]
        latest, why = max(causes)
        why = why if latest + FETCH_SLACK >= event.start else "fetch"
        slots.append(Slot(index, unit, instruction.op, instruction.note, event.start, event.end + 1, why))
        free[unit] = event.end + 1
        for u in (u for u in Unit if instruction.signal >> u & 1):
            given[unit, u].append(event.end + 1)
    return Schedule(slots, cycles, busy_cycles(slots))


def window(text: str) -> tuple[int, int]:
    """`first:last` as cycles; KVStrataError for anything else."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise KVStrataError(f"a window of cycles is first:last with first below last; got {text!r}")
    return int(first), int(last)


def run_profile(
    image: Image,
    program: Program,
    position: int,
    device: str,
    memory: str,
    wave: tuple[int, int] | None,
    path: Path,
) -> Schedule:
    """A pass of `program` from slot `position` on, predicted (timing) or measured (rtl), there with a waveform."""
    registers = {int(r): v for r, v in step_registers(image.map, position, max(1, program.tokens)).items()}
    model = memory_model(memory)
    if device == "timing":
        return schedule(program, image.map.engine, registers, MemoryTiming.of(model))
    if device != "rtl":
        raise KVStrataError(f"a profile comes from device timing or rtl; got {device!r}")
    rtl = RtlDevice(image, model, wave is not None)
    try:
        rtl.write_aux(program.base, program.encoded())
        rtl.engine.profile()
        if wave is not None:
            rtl.engine.wave(*wave, path)
        cycles = rtl.run(program.word, registers).cycles
        return measured(program, rtl.engine.events(), cycles)
    finally:
        rtl.close()


FETCH_SLACK = 2
"""Cycles that an operation may start behind its last token before its instruction counts as late."""


def timeline(result: Schedule, clock_mhz: float, name: str) -> dict[str, Any]:
    """Events in microseconds of the engine's clock; arguments hold cycles and what an instruction waited for."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": name}}
    ]
    for unit in Unit:
        track = {"ph": "M", "pid": 1, "tid": int(unit) + 1, "name": "thread_name"}
        events.append({**track, "args": {"name": unit.name.lower()}})
    for slot in result.slots:
        events.append(
            {
                "ph": "X",
                "pid": 1,
                "tid": int(slot.unit) + 1,
                "name": slot.note,
                "ts": slot.start / clock_mhz,
                "dur": (slot.end - slot.start) / clock_mhz,
                "args": {
                    "instruction": slot.index,
                    "cycle": slot.start,
                    "cycles": slot.end - slot.start,
                    "waited_for": slot.waited_for,
                },
            }
        )
    return {"displayTimeUnit": "ns", "traceEvents": events}
