"""The GPU model against a table of measured kernels (columns as in sim/data/gpu_ops_a100.csv)."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from sim.describe.base import load
from sim.describe.devices import Gpu
from sim.devices import gpu as kernels

MEASURED = Path(__file__).resolve().parents[1] / "data" / "gpu_ops_a100.csv"


def predicted_ms(gpu: Gpu, row: Mapping[str, str]) -> float:
    """Modelled time of one measured row."""
    n = {k: int(float(v)) for k, v in row.items() if v and v.replace(".", "", 1).isdigit()}
    if row["op"] == "attn_decode":
        kernel = kernels.attention_decode(
            gpu, n["batch"], n["kv_len"], n["q_heads"], n["kv_heads"], n["head_dim"]
        )
    elif row["op"] == "attn_prefill":
        kernel = kernels.attention_prefill(
            gpu, n["batch"], n["q_len"], n["kv_len"], n["q_heads"], n["head_dim"]
        )
    else:
        kernel = kernels.gemm(gpu, n["M_tokens"], n["K"], n["N"])
    return 1e3 * kernel.seconds


def errors(path: Path = MEASURED, gpu: str = "a100-80") -> dict[str, list[float]]:
    """Signed relative error per row, by operator."""
    device = load(Gpu, gpu)
    found: dict[str, list[float]] = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        found.setdefault(row["op"], []).append(predicted_ms(device, row) / float(row["median_ms"]) - 1)
    return found
