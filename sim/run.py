"""From graphs to metrics: layers and steps are sampled and integrated, so that cost does not grow with tokens.

Decoder layers are alike, so a step is simulated on a prefix of them and continued at its steady period; the step time
is a smooth function of the cached tokens, so it is evaluated at Gauss-Legendre nodes of the growing context. Tests hold
both against simulating every layer and every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from sim.core.graph import SETUP, Graph, Run, analytic, demand_s, execute
from sim.result import Span
from sim.schemes.base import Scheme

LAYERS_SIMULATED = 6
PERIOD_LAYERS = 2
"""The steady period is a mean over this many layers: prefetching may alternate between two."""
STEPS_SIMULATED = 7
Build = Callable[[Graph, int], None]


@dataclass
class Phase:
    """One prefill or one decode step over all layers: seconds, by category, busy seconds and bytes by resource."""

    seconds: float
    by_category: dict[str, float]
    busy_s: dict[str, float]
    pipe_bytes: dict[str, float]
    run: Run


@dataclass
class Sampled:
    """Decode steps at sampled contexts with weights that sum to one."""

    contexts: list[int]
    weights: list[float]
    steps: list[Phase] = field(default_factory=list)

    def mean(self, of: Callable[[Phase], float]) -> float:
        """Weighted mean over steps."""
        return sum(w * of(s) for w, s in zip(self.weights, self.steps))

    def mean_of(self, of: Callable[[Phase], dict[str, float]]) -> dict[str, float]:
        """Weighted mean of a dictionary over steps."""
        names = dict.fromkeys(n for s in self.steps for n in of(s))
        return {n: self.mean(lambda s, n=n: of(s).get(n, 0.0)) for n in names}  # type: ignore[misc]


def simulate_phase(scheme: Scheme, build: Build, fidelity: str, all_layers: bool = False) -> Phase:
    """Simulate one phase; `build(graph, layers)` describes it."""
    layers = scheme.model.layers
    prefix = layers if all_layers else min(layers, LAYERS_SIMULATED)
    graph = Graph()
    build(graph, prefix)
    rates = _page_rates(scheme, graph) if fidelity == "page" else scheme.pipes
    run = (analytic if fidelity == "analytic" else execute)(graph, rates)
    rest = layers - prefix
    scale = layers / prefix
    busy = _by_layer(graph, lambda g: demand_s(g, rates), scale)
    pipe_bytes = _by_layer(graph, _pipe_bytes, scale)
    seconds, by_category = _continued(run, prefix, rest)
    floor = max(busy.values(), default=0.0)
    if fidelity == "flow":
        floor = max(floor, _continued(analytic(graph, rates), prefix, rest)[0])
    if seconds < floor:
        # Without contention a graph ends early, and a continued period may be a hair short: bounds hold nonetheless.
        slack, seconds = floor / seconds, floor
        by_category = {c: v * slack for c, v in by_category.items()}
    return Phase(seconds, by_category, busy, pipe_bytes, run)


def _page_rates(scheme: Scheme, graph: Graph) -> dict[str, float]:
    """Give every flash transfer the time that its pages take on the page engine; equal transfers are simulated once."""
    rates = dict(scheme.pipes)
    known: dict[tuple[str, float], float | None] = {}
    for pipe in scheme.pipes:
        caps = []
        for task in (t for t in graph.tasks if pipe in t.path and t.size_bytes > 0 and t.counted):
            key = (pipe, task.size_bytes)
            seconds = known[key] if key in known else known.setdefault(key, scheme.page_seconds(*key))
            if seconds is not None:
                task.latency_s = 0.0
                task.cap_bytes_per_s = task.size_bytes / seconds
                caps.append(task.cap_bytes_per_s)
        # Programs beside the reads have what these leave of the flash, at both fidelities.
        rates[pipe] = max([rates[pipe], *caps])
    return rates


def _by_layer(graph: Graph, measure: Callable[[Graph], dict[str, float]], scale: float) -> dict[str, float]:
    """A measure over all layers: tasks of layers count `scale` times."""
    inside = measure(Graph([t for t in graph.tasks if t.layer != SETUP]))
    outside = measure(Graph([t for t in graph.tasks if t.layer == SETUP]))
    return {n: inside.get(n, 0.0) * scale + outside.get(n, 0.0) for n in {**inside, **outside}}


def _pipe_bytes(graph: Graph) -> dict[str, float]:
    moved: dict[str, float] = {}
    for task in (t for t in graph.tasks if t.counted):
        for pipe in task.path:
            moved[pipe] = moved.get(pipe, 0.0) + task.size_bytes
    return moved


def _continued(run: Run, prefix: int, rest: int) -> tuple[float, dict[str, float]]:
    """Makespan and its attribution along the critical path, `rest` more layers added at the steady period."""
    segments = run.critical()
    tasks = run.graph.tasks
    total = _attribute(segments, tasks, 0.0, math.inf)
    seconds = run.makespan_s
    if rest > 0:
        first, last = run.layer_end_s(prefix - 2 - PERIOD_LAYERS), run.layer_end_s(prefix - 2)
        periods = rest / PERIOD_LAYERS
        for category, value in _attribute(segments, tasks, first, last).items():
            total[category] = total.get(category, 0.0) + periods * value
        seconds += periods * (last - first)
    return seconds, total


def _attribute(
    segments: list[tuple[float, float, int]], tasks: list, low: float, high: float
) -> dict[str, float]:
    shares: dict[str, float] = {}
    for start, end, task in segments:
        inside = min(end, high) - max(start, low)
        if inside > 0:
            category = tasks[task].category
            shares[category] = shares.get(category, 0.0) + inside
    return shares


def sampled_decode(
    scheme: Scheme, fidelity: str, every_step: bool = False, all_layers: bool = False
) -> Sampled:
    """Decode steps over the growing context, sampled (or every one, to measure the error of sampling)."""
    first, count = scheme.workload.input_tokens, scheme.workload.output_tokens
    plan = _every(first, count) if every_step or count <= STEPS_SIMULATED else _nodes(first, count)
    for context in plan.contexts:
        build = partial(_decode_at, scheme, context)
        plan.steps.append(simulate_phase(scheme, build, fidelity, all_layers))
    return plan


def _decode_at(scheme: Scheme, context: int, graph: Graph, layers: int) -> None:
    scheme.decode(graph, context, layers)


def _every(first: int, count: int) -> Sampled:
    return Sampled(list(range(first, first + count)), [1 / count] * count)


def _nodes(first: int, count: int) -> Sampled:
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(STEPS_SIMULATED)
    contexts = [first + round((count - 1) * (x + 1) / 2) for x in nodes.tolist()]
    return Sampled(contexts, (weights / 2).tolist())


def spans(phase: str, run: Run) -> list[Span]:
    """Timeline of a run: one span per task and resource."""
    found = []
    for task, start, end in zip(run.graph.tasks, run.start_s, run.end_s):
        resources = [task.server] if task.server else [f"pipe {p}" for p in task.path]
        for resource in resources:
            common = {"phase": phase, "resource": resource, "name": task.name, "category": task.category}
            found.append(Span(**common, layer=task.layer, start_s=start, end_s=end))
    return found


def decode_step_s(scheme: Scheme, context: int, fidelity: str = "flow") -> float:
    """Seconds of one decode step of the whole batch at `context` cached tokens."""
    return simulate_phase(scheme, partial(_decode_at, scheme, context), fidelity).seconds
