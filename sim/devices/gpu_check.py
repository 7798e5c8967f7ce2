"""The GPU model against a table of measured kernels (columns as in sim/data/gpu_ops_a100.csv)."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from sim.describe.base import ConfigError, load
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


PRESETS = {
    "a100": "a100-80",
    "h100": "h100",
    "a40": "a40",
    "a6000": "a6000",
    "t4": "t4",
    "rtx4090": "rtx-4090",
}
"""Device names of published profiles -> presets."""


def errors(path: Path = MEASURED) -> dict[str, list[float]]:
    """Signed relative error per row, by device and operator ("a100 qkv_proj").

    Raises ConfigError for a device that has no preset.
    """
    found: dict[str, list[float]] = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        device = row["device"].lower()
        if device not in PRESETS:
            raise ConfigError(f"{path.name}: no preset for device {device!r}; known: {', '.join(PRESETS)}")
        error = predicted_ms(load(Gpu, PRESETS[device]), row) / float(row["median_ms"]) - 1
        found.setdefault(f"{device} {row['op']}", []).append(error)
    return found
