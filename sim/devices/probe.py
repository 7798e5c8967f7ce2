"""One device on its own: what it reaches under a named access pattern, which limit binds, and what every limit is.

The numbers that a data sheet or another simulator gives: reads and writes of a drive by size and depth, HBM by access
size, links, and GPU kernels against a table of measured ones.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sim.describe.base import ConfigError, did_you_mean, load
from sim.describe.devices import Csd, Fpga, Gpu, Link, Ssd
from sim.devices import gpu as kernels
from sim.devices import gpu_attention, hbm
from sim.devices.drive import random_read_bandwidth, random_reads, read_bandwidth, write_bandwidth
from sim.devices.flash import overwrite_amplification, read_limits, reclaim_s
from sim.devices.gpu_check import errors
from sim.devices.limits import Bandwidth

KINDS = ("ssd", "csd", "fpga", "gpu", "link")
HBM_SIZES = (32, 64, 128, 256, 512, 1024)
GEMM_SHAPES = ((1, 4096, 12288), (64, 4096, 12288), (2048, 4096, 12288), (8192, 8192, 8192))
Row = dict[str, Any]


def probe(
    kind: str,
    name: str,
    changes: dict[str, Any],
    kib: float = 4.0,
    depth: int = 32,
    threads: int = 1,
    profile: Path | None = None,
) -> list[Row]:
    """Rows {what, value, unit, binding, note} of one device; `changes` replaces fields of its preset.

    Raises ConfigError for an unknown kind, preset or field.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"a device is one of {', '.join(KINDS)}, got {kind!r}{did_you_mean(kind, list(KINDS))}"
        )
    if not 0 < kib < math.inf or depth < 1 or threads < 1:
        raise ConfigError(f"size, depth and threads must be positive, got {kib:g} KiB, {depth} and {threads}")
    if kind in ("ssd", "csd"):
        drive = load(Csd if kind == "csd" else Ssd, name)
        return _drive(drive.replaced(**changes) if changes else drive, kib, depth, threads)
    if kind == "fpga":
        card = load(Fpga, name)
        return _hbm(card.replaced(**changes) if changes else card, depth)
    if kind == "gpu":
        gpu = load(Gpu, name)
        return _gpu(gpu.replaced(**changes) if changes else gpu, profile)
    link = load(Link, name)
    link = link.replaced(**changes) if changes else link
    return [_row("line rate", link.raw_gb_per_s, "GB/s"), _row("payload", link.payload_gb_per_s, "GB/s")]


def _row(what: str, value: float, unit: str, binding: str = "", note: str = "") -> Row:
    return {"what": what, "value": value, "unit": unit, "binding": binding, "note": note}


def _bound(what: str, bandwidth: Bandwidth) -> Row:
    listed = ", ".join(f"{k} {v:.4g}" for k, v in sorted(bandwidth.limits.items(), key=lambda item: item[1]))
    return _row(what, bandwidth.gb_per_s, "GB/s", bandwidth.binding, listed)


def _drive(drive: Ssd, kib: float, depth: int, threads: int) -> list[Row]:
    link = load(Link, drive.link)
    short = random_read_bandwidth(drive, link, kib, depth, threads)
    run = random_reads(drive, link, kib, depth, threads)
    size, pattern = kib * 1024, f"random read, {kib:g} KiB, depth {depth} x {threads}"
    reads = len(run.latencies_us)
    rows = [
        _bound("flash read inside the drive", read_limits(drive)),
        _bound("sequential read", read_bandwidth(drive, link)),
        _bound("sequential write", write_bandwidth(drive, link)),
        _bound(pattern, short),
        _row(f"{pattern}: bound", short.bytes_per_s / size / 1e3, "kIOPS", short.binding),
        _row(f"{pattern}: page by page", reads / run.seconds / 1e3, "kIOPS"),
    ]
    rows += [
        _row(f"{pattern}: latency p{100 * p:g}", run.percentile_us(p), "us") for p in (0.5, 0.95, 0.99, 0.999)
    ]
    rows.append(
        _row(
            "write amplification, random overwrites of a full drive",
            overwrite_amplification(drive),
            "x",
            note="appended data: 1",
        )
    )
    full = drive.capacity_gb * 1e9
    rows.append(_row("erase of all blocks of an idle drive", reclaim_s(drive, full), "s"))
    rows.append(_row("life at full write rate", _life_days(drive, link), "days", "P/E cycles"))
    return rows


def _life_days(drive: Ssd, link: Link) -> float:
    return drive.capacity_gb * drive.pe_cycles / write_bandwidth(drive, link).gb_per_s / 86_400


def _hbm(card: Fpga, depth: int) -> list[Row]:
    rows = [
        _row("idle read, row open", card.hbm_hit_ns, "ns"),
        _row("idle read, bank closed", card.hbm_closed_ns, "ns"),
        _row("idle read, another row open", card.hbm_miss_ns, "ns"),
    ]
    for size in HBM_SIZES:
        limits = hbm.read_limits(card, size, depth)
        rows.append(_bound(f"random reads of {size} B, {depth} outstanding per channel", limits))
        for sequential in (False, True):
            reached = hbm.measure(card, size, depth, sequential, requests=5_000)
            what = f"{'sequential' if sequential else 'random'} reads of {size} B, bank by bank"
            rows.append(_row(what, reached, "GB/s", note=f"{100 * reached / card.hbm_gb_per_s:.1f}% of peak"))
    return rows


def _gpu(gpu: Gpu, profile: Path | None) -> list[Row]:
    if profile:
        return [
            _row(f"{what}: mean absolute error", 100 * sum(map(abs, e)) / len(e), "%", note=_spread(e))
            for what, e in errors(profile, gpu).items()
        ]
    rows = []
    for m, k, n in GEMM_SHAPES:
        kernel = kernels.gemm(gpu, m, k, n)
        rate = 2 * m * k * n / kernel.seconds / 1e12
        rows.append(
            _row(f"product {m} x {k} x {n}", 1e6 * kernel.seconds, "us", kernel.bound, f"{rate:.4g} TFLOP/s")
        )
    for batch, tokens in ((1, 4096), (64, 1024)):
        kernel = gpu_attention.decode(gpu, batch, tokens, 32, 32, 128)
        what = f"decode attention, batch {batch}, {tokens} tokens, 32 heads of 128"
        rows.append(_row(what, 1e6 * kernel.seconds, "us", kernel.bound))
    return rows


def _spread(signed: list[float]) -> str:
    return f"{len(signed)} rows, {100 * min(signed):+.0f}% to {100 * max(signed):+.0f}%"
