"""A phase of work as a graph of tasks on named resources: one description for every fidelity.

Servers do one task at a time in order of request (a GPU stream, an accelerator). Pipes are shared by flows
(sim.core.fabric). `analytic` bounds a graph from below; `execute` runs it on simpy.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import simpy

from sim.core.fabric import Fabric

SETUP = -1
"""Layer number of tasks outside the decoder layers."""


@dataclass(slots=True)
class Task:
    """One unit of work: seconds on a server, or bytes along a path, after `after` and a fixed latency."""

    name: str
    category: str
    layer: int
    after: tuple[int, ...]
    server: str = ""
    seconds: float = 0.0
    path: tuple[str, ...] = ()
    size_bytes: float = 0.0
    cap_bytes_per_s: float = math.inf
    latency_s: float = 0.0

    def alone_s(self, rates: Mapping[str, float]) -> float:
        """Duration without contention."""
        if self.server:
            return self.seconds
        rate = min([rates[p] for p in self.path] + [self.cap_bytes_per_s])
        return self.latency_s + self.size_bytes / rate


@dataclass
class Graph:
    """Tasks in creation order; a task may only depend on earlier ones. `layer` tags tasks created next."""

    tasks: list[Task] = field(default_factory=list)
    layer: int = SETUP

    def work(self, name: str, category: str, server: str, seconds: float, after: Iterable[int] = ()) -> int:
        """Occupy `server` for `seconds`; returns the task's number."""
        return self._add(Task(name, category, self.layer, tuple(after), server=server, seconds=seconds))

    def move(
        self,
        name: str,
        category: str,
        path: Iterable[str],
        size_bytes: float,
        after: Iterable[int] = (),
        cap_bytes_per_s: float = math.inf,
        latency_s: float = 0.0,
    ) -> int:
        """Move bytes along pipes; returns the task's number."""
        task = Task(name, category, self.layer, tuple(after), path=tuple(path), size_bytes=size_bytes)
        task.cap_bytes_per_s, task.latency_s = cap_bytes_per_s, latency_s
        return self._add(task)

    def _add(self, task: Task) -> int:
        self.tasks.append(task)
        return len(self.tasks) - 1


@dataclass
class Run:
    """Start, end and cause per task. The cause is the task whose end let it start, -1 at the beginning."""

    graph: Graph
    start_s: list[float]
    end_s: list[float]
    cause: list[int]

    @property
    def makespan_s(self) -> float:
        """Time at which the last task ends."""
        return max(self.end_s, default=0.0)

    def layer_end_s(self, layer: int) -> float:
        """Time at which the last task of a layer ends."""
        return max(e for t, e in zip(self.graph.tasks, self.end_s) if t.layer == layer)

    def critical(self) -> list[tuple[float, float, int]]:
        """Segments (from, to, task) that cover [0, makespan] backwards along causes, in time order."""
        segments: list[tuple[float, float, int]] = []
        if not self.end_s:
            return segments
        now = self.makespan_s
        task = self.end_s.index(now)
        while task >= 0:
            segments.append((self.start_s[task], now, task))
            now = self.start_s[task]
            task = self.cause[task]
        return segments[::-1]


def demand_s(graph: Graph, rates: Mapping[str, float]) -> dict[str, float]:
    """Busy seconds that a graph asks of each resource."""
    busy: dict[str, float] = {}
    for task in graph.tasks:
        if task.server:
            busy[task.server] = busy.get(task.server, 0.0) + task.seconds
        for pipe in task.path:
            busy[pipe] = busy.get(pipe, 0.0) + task.size_bytes / rates[pipe]
    return busy


def analytic(graph: Graph, rates: Mapping[str, float]) -> Run:
    """Every task as early as its dependencies allow, without contention: no schedule is faster than this, and none
    is faster than the busiest resource (`demand_s`)."""
    run = Run(graph, [], [], [])
    for task in graph.tasks:
        cause = max(task.after, key=lambda i: run.end_s[i], default=-1)
        start = run.end_s[cause] if cause >= 0 else 0.0
        run.start_s.append(start)
        run.cause.append(cause)
        run.end_s.append(start + task.alone_s(rates))
    return run


def execute(graph: Graph, rates: Mapping[str, float]) -> Run:
    """Run the graph on simpy with first-come servers and fairly shared pipes."""
    env = simpy.Environment()
    fabric = Fabric(env, rates)
    names = {t.server for t in graph.tasks if t.server}
    servers = {n: simpy.Resource(env) for n in sorted(names)}
    last: dict[str, int] = dict.fromkeys(names, -1)
    count = len(graph.tasks)
    run = Run(graph, [0.0] * count, [0.0] * count, [-1] * count)
    done: list[Any] = []
    for number, task in enumerate(graph.tasks):
        done.append(env.process(_perform(env, fabric, servers, last, run, done, number, task)))
    env.run()
    return run


def _perform(
    env: simpy.Environment,
    fabric: Fabric,
    servers: Mapping[str, simpy.Resource],
    last: dict[str, int],
    run: Run,
    done: list[Any],
    number: int,
    task: Task,
) -> Generator[simpy.Event, Any, None]:
    for other in task.after:
        if not done[other].processed:
            yield done[other]
    run.cause[number] = max(task.after, key=lambda i: run.end_s[i], default=-1)
    if task.server:
        asked = env.now
        with servers[task.server].request() as turn:
            yield turn
            if env.now > asked:
                run.cause[number] = last[task.server]
            run.start_s[number] = env.now
            yield env.timeout(task.seconds)
            last[task.server] = number
    else:
        run.start_s[number] = env.now
        if task.latency_s:
            yield env.timeout(task.latency_s)
        yield fabric.transfer(task.path, task.size_bytes, task.cap_bytes_per_s)
    run.end_s[number] = env.now
