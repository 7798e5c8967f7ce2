"""Timelines that Perfetto (ui.perfetto.dev) and chrome://tracing open: Chrome trace JSON, microseconds."""

from __future__ import annotations

from typing import Any

from sim.result import RunResult


def perfetto(result: RunResult) -> dict[str, Any]:
    """One track per resource and one process per phase (prefill, a decode step half-way through the output).

    Only the first decoder layers are drawn where the step was simulated on a prefix of layers.
    """
    phases = list(dict.fromkeys(s.phase for s in result.timeline))
    events: list[dict[str, Any]] = []
    for pid, phase in enumerate(phases, start=1):
        label = f"{phase}: {result.scheme}, {result.model}, batch {result.batch}"
        events.append({"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": label}})
        tracks = list(dict.fromkeys(s.resource for s in result.timeline if s.phase == phase))
        for tid, track in enumerate(tracks, start=1):
            events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": track}})
        events += _spans(result, phase, pid, {t: i for i, t in enumerate(tracks, start=1)})
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _spans(result: RunResult, phase: str, pid: int, tid: dict[str, int]) -> list[dict[str, Any]]:
    """Flows that overlap on a pipe become async pairs, since slices of one track may only nest."""
    events: list[dict[str, Any]] = []
    for number, span in enumerate(s for s in result.timeline if s.phase == phase):
        where = {"pid": pid, "tid": tid[span.resource], "cat": span.category}
        args = {"layer": span.layer, "category": span.category, "seconds": span.end_s - span.start_s}
        if span.resource.startswith("pipe "):
            name = f"{span.resource}: {span.name}"
            events.append(
                {**where, "ph": "b", "id": number, "name": name, "ts": span.start_s * 1e6, "args": args}
            )
            events.append({**where, "ph": "e", "id": number, "name": name, "ts": span.end_s * 1e6})
        else:
            length = (span.end_s - span.start_s) * 1e6
            events.append(
                {**where, "ph": "X", "name": span.name, "ts": span.start_s * 1e6, "dur": length, "args": args}
            )
    return events
