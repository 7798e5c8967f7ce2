"""Bulk transfers that share bandwidth: max-min fair flows over paths of pipes, on simpy.

A pipe is anything with a rate: one direction of a link, a drive's flash, a DRAM. A flow crosses all pipes of its path
at once and may have a ceiling of its own (a queue depth, a software copy). Whenever a flow starts or ends, rates are
divided anew by progressive filling; between those instants nothing is simulated, so cost does not grow with bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import simpy

EPSILON_BYTES = 1e-3
"""A flow with less left than this is done: far below one bus beat, far above float noise."""


@dataclass(slots=True, eq=False)
class _Flow:
    left_bytes: float
    path: Sequence[str]
    cap_bytes_per_s: float
    done: simpy.Event
    rate: float = 0.0


class Fabric:
    """Pipes by name with their rates in bytes/s. `transfer` returns an event that fires when the last byte is out."""

    def __init__(self, env: simpy.Environment, rates: Mapping[str, float]) -> None:
        self._env, self._rates = env, rates
        self._flows: list[_Flow] = []
        self._updated_s = 0.0
        self._version = 0

    def transfer(
        self, path: Sequence[str], size_bytes: float, cap_bytes_per_s: float = math.inf
    ) -> simpy.Event:
        """Move `size_bytes` along `path`, never faster than `cap_bytes_per_s`."""
        done = self._env.event()
        if size_bytes <= EPSILON_BYTES:
            return done.succeed()
        self._advance()
        self._flows.append(_Flow(size_bytes, path, cap_bytes_per_s, done))
        self._replan()
        return done

    def _advance(self) -> None:
        elapsed = self._env.now - self._updated_s
        self._updated_s = self._env.now
        for flow in self._flows:
            flow.left_bytes -= flow.rate * elapsed

    def _replan(self) -> None:
        share_out(self._flows, self._rates)
        self._version += 1
        if self._flows:
            soonest = min(f.left_bytes / f.rate for f in self._flows)
            wake = self._env.timeout(max(soonest, 0.0), self._version)
            wake.callbacks.append(self._wake)

    def _wake(self, event: simpy.Event) -> None:
        if event.value != self._version:
            return
        self._advance()
        # A rate of r bytes/s resolves no finer than r times the clock's float spacing.
        grain = math.ulp(self._env.now) * 4
        finished = [f for f in self._flows if f.left_bytes <= EPSILON_BYTES + f.rate * grain]
        self._flows = [f for f in self._flows if f not in finished]
        for flow in finished:
            flow.done.succeed()
        self._replan()


def share_out(flows: Sequence[_Flow], rates: Mapping[str, float]) -> None:
    """Set each flow's rate to its max-min fair share: fill all equally until a pipe or a ceiling binds, and repeat."""
    if len(flows) == 1:
        only = flows[0]
        only.rate = min([rates[p] for p in only.path] + [only.cap_bytes_per_s])
        return
    left = {p: rates[p] for f in flows for p in f.path}
    open_flows = list(flows)
    while open_flows:
        users: dict[str, int] = {}
        for flow in open_flows:
            for pipe in flow.path:
                users[pipe] = users.get(pipe, 0) + 1
        fair = min((left[p] / n for p, n in users.items()), default=math.inf)
        level = min(fair, min(f.cap_bytes_per_s for f in open_flows))
        bound = {p for p, n in users.items() if left[p] / n <= level * (1 + 1e-12)}
        settled = [f for f in open_flows if f.cap_bytes_per_s <= level or bound.intersection(f.path)]
        for flow in settled:
            flow.rate = level
            for pipe in flow.path:
                left[pipe] = max(left[pipe] - level, 0.0)
        open_flows = [f for f in open_flows if f not in settled]
