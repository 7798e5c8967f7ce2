"""Non-dominated points of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def front(rows: Sequence[Mapping[str, Any]], maximise: Mapping[str, bool]) -> list[Mapping[str, Any]]:
    """Rows that no other row beats on every metric; `maximise` maps a metric to whether more is better."""
    keys = [tuple(r[m] if up else -r[m] for m, up in maximise.items()) for r in rows]
    kept: list[Mapping[str, Any]] = []
    best: list[tuple[float, ...]] = []
    # In descending order a point can only be dominated by one that came before it.
    for index in sorted(range(len(rows)), key=lambda i: keys[i], reverse=True):
        key = keys[index]
        if any(all(b >= k for b, k in zip(other, key)) and other != key for other in best):
            continue
        best.append(key)
        kept.append(rows[index])
    return kept
