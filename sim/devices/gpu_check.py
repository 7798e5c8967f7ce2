"""The GPU model against a table of measured kernels (columns as in sim/data/gpu_ops_a100.csv)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from sim.describe.base import ConfigError, listed, load, text_of
from sim.describe.devices import Gpu
from sim.devices import gpu as kernels
from sim.devices import gpu_attention

MEASURED = Path(__file__).resolve().parents[1] / "data" / "gpu_ops_a100.csv"
Row = Mapping[str, str]
PLANS_FOR_THE_CACHE = "FlashAttention"
"""Kernels whose rows' source names this plan their split of a paged cache for all of it, not for what it holds."""
ALIASES = {"a100": "a100-80", "4090": "rtx-4090", "3090": "rtx-3090", "v100": "v100-32", "rtxa6000": "a6000"}
"""Names of devices in published profiles -> presets, where they are no preset's name."""


def predicted_ms(
    gpu: Gpu,
    row: Row,
    planned: float | None = None,
    constants: gpu_attention.Constants = gpu_attention.FITTED,
) -> float:
    """Modelled time of one measured row; `planned` as in gpu_attention.decode."""
    n = {k: int(float(v)) for k, v in row.items() if v and v.replace(".", "", 1).isdigit()}
    if row["op"] == "attn_decode":
        shape = (n["batch"], n["kv_len"], n["q_heads"], n["kv_heads"], n["head_dim"])
        kernel = gpu_attention.decode(gpu, *shape, planned, constants)
    elif row["op"] == "attn_prefill":
        chunk = (n["batch"], n["q_len"], n["kv_len"], n["q_heads"], n["head_dim"])
        kernel = gpu_attention.prefill(gpu, *chunk, constants)
    else:
        kernel = kernels.gemm(gpu, n["M_tokens"], n["K"], n["N"])
    return 1e3 * kernel.seconds


def planned_tokens(rows: Iterable[Row]) -> dict[str, float]:
    """Cache length for which a profile's decode kernels were planned, by the source of its rows: its longest row,
    where its kernels plan so."""
    longest: dict[str, float] = {}
    for row in rows:
        source = row.get("source") or ""
        if PLANS_FOR_THE_CACHE in source and row.get("op") == "attn_decode" and row.get("kv_len"):
            longest[source] = max(longest.get(source, 0.0), float(row["kv_len"]))
    return longest


def preset_of(device: str) -> str | None:
    """Preset of a device by its name in a profile: "A100", "rtx4090", "H100_PCIe"."""
    plain = "".join(c for c in device.lower() if c.isalnum())
    return ALIASES.get(plain) or next((n for n in listed("gpu") if n.replace("-", "") == plain), None)


def errors(path: Path = MEASURED, gpu: Gpu | None = None) -> dict[str, list[float]]:
    """Signed relative error per row, by device and operator ("a100 qkv_proj"); `gpu` stands for every device named.

    Raises ConfigError for a file that cannot be read, a device that has no preset, or a row without its columns.
    """
    rows = list(csv.DictReader(text_of(path, "profile").splitlines()))
    if not rows:
        raise ConfigError(f"profile {path} holds no row")
    found: dict[str, list[float]] = {}
    planned = planned_tokens(rows)
    for number, row in enumerate(rows, start=2):
        device = (row.get("device") or "").lower()
        preset = preset_of(device)
        if gpu is None and preset is None:
            known = ", ".join(listed("gpu"))
            raise ConfigError(f"{path.name}: no preset for device {device!r}; known: {known}")
        try:
            modelled = predicted_ms(gpu or load(Gpu, str(preset)), row, planned.get(row.get("source") or ""))
            relative = modelled / float(row["median_ms"]) - 1
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            raise ConfigError(
                f"{path.name} line {number}: needs op, median_ms and the sizes of its operator, got {dict(row)}"
            ) from None
        found.setdefault(f"{device} {row['op']}", []).append(relative)
    return found
