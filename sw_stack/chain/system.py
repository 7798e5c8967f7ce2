"""Last link: the system model, driven by the cycles that were measured on the RTL."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from golden.spec import KVStrataError

if TYPE_CHECKING:
    from sim.result import RunResult

MACHINE = "reference"
MODELS = ("opt-13b", "llama-2-7b")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COMPARED_BATCH = 64
"""The batch of InstInfer's headline comparison (reproduced in docs/reproduction.md)."""
INPUT_TOKENS = 1024
OUTPUT_TOKENS = 1024


def sweep(
    machine: str = MACHINE, progress: Callable[[str], None] = lambda _: None
) -> tuple[list[RunResult], list[dict[str, Any]]]:
    """Every scheme on every model over `BATCHES`; what cannot run comes back as a refusal with its reason."""
    from sim.api import scheme_names, simulate
    from sim.describe.workload import Workload

    results: list[RunResult] = []
    refused: list[dict[str, Any]] = []
    for model in MODELS:
        for scheme in scheme_names():
            progress(f"{model} by {scheme}")
            for batch in BATCHES:
                workload = Workload(batch=batch, input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS)
                try:
                    results.append(simulate(machine, model, scheme, workload))
                except KVStrataError as error:
                    refused.append({"model": model, "scheme": scheme, "batch": batch, "reason": str(error)})
                    break  # what a batch exceeds, a larger one exceeds too
    return results, refused


def compared(results: list[RunResult]) -> list[RunResult]:
    """Each model and scheme at `COMPARED_BATCH`, or at the largest batch that it can run; fastest first."""
    chosen: dict[tuple[str, str], RunResult] = {}
    for result in sorted(results, key=lambda r: r.batch):
        if result.batch <= COMPARED_BATCH:
            chosen[result.model, result.scheme] = result
    order = {name: index for index, name in enumerate(dict.fromkeys(r.model for r in results))}
    return sorted(chosen.values(), key=lambda r: (order[r.model], -r.tokens_per_s))


def used_assumptions(results: list[RunResult]) -> list[dict[str, Any]]:
    """Every value with its source that entered any of the results, once each."""
    rows = {(row["device"], row["field"]): row for result in results for row in result.assumptions}
    return [rows[key] for key in sorted(rows)]
