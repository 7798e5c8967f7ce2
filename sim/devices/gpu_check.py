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
    "a100-40": "a100-40",
    "a100-80": "a100-80",
    "rtx-4090": "rtx-4090",
    "4090": "rtx-4090",
}
"""Device names of published profiles -> presets."""


def errors(path: Path = MEASURED, gpu: Gpu | None = None) -> dict[str, list[float]]:
    """Signed relative error per row, by device and operator ("a100 qkv_proj"); `gpu` stands for every device named.

    Raises ConfigError for a file that cannot be read, a device that has no preset, or a row without its columns.
    """
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be read ({error.strerror})") from None
    found: dict[str, list[float]] = {}
    for number, row in enumerate(rows, start=2):
        device = row.get("device", "").lower()
        if gpu is None and device not in PRESETS:
            raise ConfigError(f"{path.name}: no preset for device {device!r}; known: {', '.join(PRESETS)}")
        try:
            relative = predicted_ms(gpu or load(Gpu, PRESETS[device]), row) / float(row["median_ms"]) - 1
        except (KeyError, ValueError, ZeroDivisionError):
            raise ConfigError(
                f"{path.name} line {number}: needs op, median_ms and the sizes of its operator, got {dict(row)}"
            ) from None
        found.setdefault(f"{device} {row['op']}", []).append(relative)
    return found
