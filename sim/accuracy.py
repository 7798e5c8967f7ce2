"""Accuracy of what a scheme computes, looked up in measurements of the golden models (`make accuracy`).

The table is build/accuracy/accuracy.parquet, measured on SmolLM2-135M: a proxy for larger models under the same
formats and policy, and reported as that. A combination that has not been measured has no accuracy, not a guess.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from sim.describe.base import ConfigError

METRIC = "accuracy_top1"
COLUMNS = ("weights", "activations", "kv", "policy", "context", "top1_agreement")


@lru_cache(maxsize=4)
def _table(path: Path) -> dict[str, tuple[int, float]]:
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (FileNotFoundError, pl.exceptions.PolarsError):
        raise ConfigError(
            f"accuracy table {path} cannot be read: run `make accuracy` to measure it"
        ) from None
    if missing := [c for c in COLUMNS if c not in frame.columns]:
        raise ConfigError(f"accuracy table {path} lacks the column {missing[0]}: run `make accuracy`")
    best: dict[str, tuple[int, float]] = {}
    for weights, activations, kv, policy, context, top1 in frame.select(COLUMNS).iter_rows():
        # Recipes of one format ("w2s24 sparsegpt") differ in how codes were found: the best one counts.
        key = f"{weights.split()[0]}/{activations}/{kv}/{policy}"
        best[key] = max(best.get(key, (0, 0.0)), (context, top1))
    return best


def top1(numerics: str, path: Path) -> float | None:
    """Top-1 agreement with the float model at the longest context measured; None where nothing was."""
    found = _table(path).get(numerics)
    return found[1] if found else None
