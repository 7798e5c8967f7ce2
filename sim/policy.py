"""The best FlexGen policy: batch and percentages by search, as FlexGen's users do it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from sim.api import simulate
from sim.describe.base import CapacityError
from sim.describe.machine import Machine
from sim.describe.model import Model
from sim.describe.workload import Tuning, Workload
from sim.result import RunResult

BLOCKS = (1, 4)
"""Parts per block: one part, or a block whose working memory is a quarter."""
PERCENTS = (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)


def best_policy(
    machine: str | Machine,
    model: str | Model,
    scheme: str = "flexgen-ssd",
    batches: Iterable[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    workload: Workload | None = None,
    tuning: Tuning | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunResult:
    """Highest throughput over batches, block sizes, and weights and KV percentages on the GPU.

    Bounds prune the search: analytic throughput is never below flow, so a policy whose bound is worse than the best
    found is skipped. Raises CapacityError where nothing fits.
    """
    base, knobs = workload or Workload(), tuning or Tuning()
    best: RunResult | None = None
    refused: CapacityError | None = None
    for batch in batches:
        work = base.replaced(batch=batch)
        for parts, weights, kv in itertools.product(BLOCKS, PERCENTS, PERCENTS):
            if parts > batch:
                continue
            chosen = knobs.replaced(gpu_batches=parts, weights_gpu_percent=weights, kv_gpu_percent=kv)
            try:
                bound = simulate(machine, model, scheme, work, "analytic", overrides, chosen)
            except CapacityError as error:
                refused = error
                continue
            if best is None or bound.tokens_per_s > best.tokens_per_s:
                found = simulate(machine, model, scheme, work, "flow", overrides, chosen)
                best = max(best or found, found, key=lambda r: r.tokens_per_s)
    if best is None:
        raise refused or CapacityError(f"scheme {scheme}: no batch was given to search")
    return best
