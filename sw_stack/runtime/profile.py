"""A schedule as a timeline: Chrome trace events, one track per unit."""

from __future__ import annotations

from typing import Any

from golden.spec.engine import Unit
from sw_stack.compile.schedule import Schedule


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
