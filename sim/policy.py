"""The best FlexGen policy: batch and percentages by search, as FlexGen's users do it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sim.api import bind, evaluate, split_overrides, tuned
from sim.describe.base import CapacityError
from sim.describe.machine import Machine, load_machine
from sim.describe.model import Model, load_model
from sim.describe.workload import Tuning, Workload
from sim.result import RunResult

BLOCKS = (1, 4)
"""Parts per block: one part, or a block whose working memory is a quarter."""
PERCENTS = (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)
WEIGHTS = (0.0, 20.0, 40.0, 60.0, 100.0)
"""Percentages between which whole tensors move."""


def best_policy(
    machine: str | Machine,
    model: str | Model,
    scheme: str = "flexgen-ssd",
    batches: Iterable[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    workload: Workload | None = None,
    tuning: Tuning | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunResult:
    """Highest throughput over batches, block sizes, where weights and KV lie, and who attends to KV off the GPU.

    Bounds prune the search: analytic throughput is never below flow, so a policy whose bound is worse than the best
    found is skipped. Raises CapacityError where nothing fits.
    """
    devices, framework, asked = split_overrides(overrides or {})
    base, knobs = (workload or Workload()).replaced(**asked), tuned(tuning or Tuning(), framework)
    described, shape = (
        load_machine(machine, devices),
        model if isinstance(model, Model) else load_model(model),
    )
    best: RunResult | None = None
    refused: CapacityError | None = None
    for batch in batches:
        work = base.replaced(batch=batch)
        for change in _policies(scheme, batch):
            chosen = knobs.replaced(**change)
            try:
                policy = bind(described, shape, scheme, work, tuning=chosen)
            except CapacityError as error:
                refused = error
                continue
            if best is None or evaluate(policy, "analytic", detail=False).tokens_per_s > best.tokens_per_s:
                found = evaluate(policy)
                best = max(best or found, found, key=lambda r: r.tokens_per_s)
    if best is None:
        raise refused or CapacityError(f"scheme {scheme}: no batch was given to search")
    return best


def _policies(scheme: str, batch: int) -> Iterator[dict[str, Any]]:
    """Settings to try: what the GPU does not hold is in host memory, or on the drives, and attended to by the GPU or
    by the CPU."""
    tiers = (100.0,) if scheme == "flexgen-dram" else (0.0, 100.0)
    for parts, weights, kv in itertools.product(BLOCKS, WEIGHTS, PERCENTS):
        for in_host, on_cpu in itertools.product(tiers, (False, True)):
            if parts > batch or (kv == 100 and (on_cpu or in_host != tiers[0])):
                continue
            yield {
                "gpu_batches": parts,
                "weights_gpu_percent": weights,
                "kv_gpu_percent": kv,
                "kv_host_percent": in_host / 100 * (100 - kv),
                "cpu_attention": on_cpu,
            }
