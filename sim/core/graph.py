"""A phase of work as a graph of tasks on named resources: one description for every fidelity.

Servers do one task at a time in order of request (a GPU stream, an accelerator). Pipes are shared by flows
(sim.core.fabric). `analytic` bounds a graph from below; `execute` runs it on simpy.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

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
    counted: bool = True
    """False for work that takes a pipe's time without moving these bytes over it."""

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
        counted: bool = True,
    ) -> int:
        """Move bytes along pipes; returns the task's number."""
        task = Task(name, category, self.layer, tuple(after), path=tuple(path), size_bytes=size_bytes)
        task.cap_bytes_per_s, task.latency_s, task.counted = cap_bytes_per_s, latency_s, counted
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
    return _Execution(graph, rates).run()


class _Execution:
    """Tasks as callbacks on simpy events: a process per task would cost several events for every one of these."""

    def __init__(self, graph: Graph, rates: Mapping[str, float]) -> None:
        count = len(graph.tasks)
        self._env = simpy.Environment()
        self._fabric = Fabric(self._env, rates)
        self._tasks = graph.tasks
        self._run = Run(graph, [0.0] * count, [0.0] * count, [-1] * count)
        self._missing = [len(t.after) for t in graph.tasks]
        self._dependents: list[list[int]] = [[] for _ in range(count)]
        for number, task in enumerate(graph.tasks):
            for other in task.after:
                self._dependents[other].append(number)
        self._queues: dict[str, deque[int]] = {t.server: deque() for t in graph.tasks if t.server}
        self._serving: dict[str, bool] = dict.fromkeys(self._queues, False)

    def run(self) -> Run:
        for number, task in enumerate(self._tasks):
            if not task.after:
                self._ready(number)
        self._env.run()
        return self._run

    def _ready(self, number: int) -> None:
        """All that the task waits for has ended."""
        task, run = self._tasks[number], self._run
        run.cause[number] = max(task.after, key=run.end_s.__getitem__, default=-1)
        # Until a queued task starts, its start holds when it asked.
        run.start_s[number] = self._env.now
        if task.server:
            if self._serving[task.server]:
                self._queues[task.server].append(number)
            else:
                self._serve(number)
        elif task.latency_s:
            self._after(task.latency_s, number, self._transfer)
        else:
            self._transfer(number)

    def _after(self, seconds: float, number: int, then: Callable[[int], None]) -> None:
        self._env.timeout(seconds).callbacks.append(lambda _: then(number))

    def _transfer(self, number: int) -> None:
        task = self._tasks[number]
        moved = self._fabric.transfer(task.path, task.size_bytes, task.cap_bytes_per_s)
        moved.callbacks.append(lambda _: self._ended(number))

    def _serve(self, number: int) -> None:
        task = self._tasks[number]
        self._serving[task.server] = True
        self._after(task.seconds, number, self._served)

    def _served(self, number: int) -> None:
        server, run, now = self._tasks[number].server, self._run, self._env.now
        self._serving[server] = False
        if self._queues[server]:
            following = self._queues[server].popleft()
            if now > run.start_s[following]:
                run.cause[following] = number
            run.start_s[following] = now
            self._serve(following)
        self._ended(number)

    def _ended(self, number: int) -> None:
        self._run.end_s[number] = self._env.now
        for other in self._dependents[number]:
            self._missing[other] -= 1
            if not self._missing[other]:
                self._ready(other)
