"""Request arrivals: Poisson or a trace file, continuous batching, and latency percentiles.

Step times come from the scheme itself at a grid of batch sizes and contexts, so any scheme can serve. Between two
changes of the running set (an arrival that can start, a sequence that ends) all decode steps are alike and are taken
together, so cost grows with requests, not with tokens. Runs on simpy; a trace file is CSV with the columns arrival_s,
input_tokens, output_tokens.
"""

from __future__ import annotations

import csv
import math
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simpy

from sim import run as runs
from sim.api import bind
from sim.describe.base import CapacityError, ConfigError, text_of
from sim.describe.workload import Workload

CONTEXT_STEPS = 4
"""Contexts at which step times are evaluated; between them they are linear in the cached tokens."""


@dataclass(frozen=True)
class Request:
    """One request."""

    arrival_s: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Served:
    """When a request got its first and its last token."""

    request: Request
    first_s: float
    last_s: float


def poisson(
    rate_per_s: float, count: int, input_tokens: int, output_tokens: int, seed: int = 0
) -> list[Request]:
    """`count` equal requests with exponential gaps."""
    if rate_per_s <= 0 or count < 1:
        raise ConfigError(f"arrivals need rate > 0 and count >= 1, got rate {rate_per_s} and count {count}")
    rng, now, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        now += -math.log(1 - rng.random()) / rate_per_s
        requests.append(Request(now, input_tokens, output_tokens))
    return requests


def trace(path: Path) -> list[Request]:
    """Requests of a trace file, in order of arrival."""
    fields = ("arrival_s", "input_tokens", "output_tokens")
    lines = list(csv.DictReader(text_of(path, "trace").splitlines()))
    requests = []
    for number, line in enumerate(lines, start=2):
        try:
            arrival, prompt, output = (float(line[f]) for f in fields)
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"trace {path} line {number}: needs numbers {', '.join(fields)}, got {dict(line)}"
            ) from None
        if not (0 <= arrival < math.inf and 1 <= prompt < math.inf and 1 <= output < math.inf):
            raise ConfigError(
                f"trace {path} line {number}: tokens must be >= 1 and arrivals >= 0, got {dict(line)}"
            )
        requests.append(Request(arrival, int(prompt), int(output)))
    if not requests:
        raise ConfigError(f"trace {path} holds no request")
    return sorted(requests, key=lambda r: r.arrival_s)


class StepTimes:
    """Prefill and decode times of a scheme by batch and context, bilinear between evaluated points."""

    def __init__(self, scheme: Callable[[Workload], Any], longest: int, input_tokens: int, most: int) -> None:
        self._scheme, self._longest, self._input = scheme, longest, input_tokens
        self.batches = self._feasible(most)
        if not self.batches:
            scheme(self._workload(1))
        self.contexts = [max(1, round(longest * i / CONTEXT_STEPS)) for i in range(CONTEXT_STEPS)]
        self._steps = [[self._decode_s(b, c) for c in self.contexts] for b in self.batches]
        one = scheme(self._workload(1))
        self._prefill_per_token = runs.simulate_phase(one, one.prefill, "flow").seconds / input_tokens

    def _workload(self, batch: int) -> Workload:
        return Workload(batch=batch, input_tokens=self._input, output_tokens=self._longest - self._input)

    def _feasible(self, most: int) -> list[int]:
        """Powers of two (and `most`) up to the largest batch that fits."""
        fitting = []
        for batch in sorted({min(2**i, most) for i in range(most.bit_length() + 1)}):
            try:
                self._scheme(self._workload(batch))
            except CapacityError:
                break
            fitting.append(batch)
        return fitting

    def _decode_s(self, batch: int, context: int) -> float:
        scheme = self._scheme(self._workload(batch))
        return runs.decode_step_s(scheme, context)

    @property
    def largest_batch(self) -> int:
        """Sequences that can run together."""
        return self.batches[-1]

    def prefill_s(self, tokens: int) -> float:
        """Prefill of one request."""
        return self._prefill_per_token * tokens

    def decode_s(self, batch: int, context: float) -> float:
        """One step of `batch` sequences with `context` cached tokens on average."""
        high = min(bisect_left(self.batches, batch), len(self.batches) - 1)
        low = max(0, high - 1)
        near, far = self._at(low, context), self._at(high, context)
        if low == high:
            return near
        share = (batch - self.batches[low]) / (self.batches[high] - self.batches[low])
        return near + (far - near) * share

    def _at(self, row: int, context: float) -> float:
        i = min(max(bisect_left(self.contexts, context), 1), len(self.contexts) - 1)
        x0, x1, y = self.contexts[i - 1], self.contexts[i], self._steps[row]
        return y[i - 1] + (y[i] - y[i - 1]) * (context - x0) / (x1 - x0)


@dataclass
class _Running:
    request: Request
    first_s: float
    done: int = 1


def serve(times: StepTimes, requests: Sequence[Request]) -> list[Served]:
    """Serve `requests` first come first served with continuous batching; prefill takes the machine for itself."""
    env = simpy.Environment()
    served: list[Served] = []
    env.process(_server(env, times, deque(requests), served))
    env.run()
    return served


def _server(
    env: simpy.Environment, times: StepTimes, waiting: deque[Request], served: list[Served]
) -> Generator[simpy.Event, Any, None]:
    running: list[_Running] = []
    while waiting or running:
        if not running and waiting[0].arrival_s > env.now:
            yield env.timeout(waiting[0].arrival_s - env.now)
        if waiting and waiting[0].arrival_s <= env.now and len(running) < times.largest_batch:
            request = waiting.popleft()
            yield env.timeout(times.prefill_s(request.input_tokens))
            running.append(_Running(request, env.now))
        elif running:
            yield from _decode(env, times, waiting, running)
        running = _without_finished(running, served, env.now)


def _decode(
    env: simpy.Environment, times: StepTimes, waiting: deque[Request], running: list[_Running]
) -> Generator[simpy.Event, Any, None]:
    """Steps until the first sequence ends or a waiting request can start."""
    steps = min(r.request.output_tokens - r.done for r in running)
    context = sum(r.request.input_tokens + r.done for r in running) / len(running)
    step_s = times.decode_s(len(running), context + steps / 2)
    if waiting and len(running) < times.largest_batch:
        steps = min(steps, max(1, math.ceil((waiting[0].arrival_s - env.now) / step_s)))
    yield env.timeout(steps * step_s)
    for sequence in running:
        sequence.done += steps


def _without_finished(running: list[_Running], served: list[Served], now: float) -> list[_Running]:
    for sequence in running:
        if sequence.done >= sequence.request.output_tokens:
            served.append(Served(sequence.request, sequence.first_s, now))
    return [r for r in running if r.done < r.request.output_tokens]


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(served: Sequence[Served]) -> dict[str, float]:
    """Throughput, and p50, p95, p99 of time to first token, time per output token and latency."""
    end = max(s.last_s for s in served)
    start = min(s.request.arrival_s for s in served)
    measures = {
        "time_to_first_token_s": [s.first_s - s.request.arrival_s for s in served],
        "time_per_output_token_s": [
            (s.last_s - s.first_s) / max(1, s.request.output_tokens - 1) for s in served
        ],
        "latency_s": [s.last_s - s.request.arrival_s for s in served],
    }
    row = {
        "requests": float(len(served)),
        "tokens_per_s": sum(s.request.output_tokens for s in served) / (end - start),
    }
    for name, values in measures.items():
        row |= {f"{name}.p{round(100 * p)}": percentile(values, p) for p in (0.5, 0.95, 0.99)}
    return row


def serve_on(
    machine: Any,
    model: Any,
    scheme: str,
    requests: Sequence[Request],
    most: int = 256,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Serve requests with a scheme on a machine; `most` bounds the running sequences, `settings` are overrides."""
    longest = max(r.input_tokens + r.output_tokens for r in requests)
    prompt = max(1, round(sum(r.input_tokens for r in requests) / len(requests)))

    def bound(workload: Workload) -> Any:
        return bind(machine, model, scheme, workload, settings)

    return summary(serve(StepTimes(bound, longest, min(prompt, longest - 1), most), requests))
