"""NVMe drives on their links: flash, interface rating, link, queue depth and host software, whichever binds."""

from __future__ import annotations

import math

from sim.describe.devices import Link, Ssd
from sim.devices.flash import first_page_us, program_limits, read_limits
from sim.devices.limits import Bandwidth


def io_latency_us(ssd: Ssd, link: Link, kib: float | None = None) -> float:
    """Latency of one read of `kib` (default: the reader's IO size) on an idle drive, submission to completion."""
    size = (kib or ssd.io_kib) * 1024
    moved = size / (link.payload_gb_per_s * 1e3)
    return ssd.firmware_read_us + first_page_us(ssd) + link.latency_us + moved + ssd.host_us_per_io


def read_bandwidth(ssd: Ssd, link: Link, queue_depth: int | None = None, count: int = 1) -> Bandwidth:
    """Read rate of `count` drives over their links, asynchronous IO with `queue_depth` outstanding."""
    depth = queue_depth or ssd.queue_depth
    size_gb = ssd.io_kib * 1024 / 1e9
    limits = {
        **read_limits(ssd).limits,
        "drive rating": ssd.read_gb_per_s,
        "drive link": link.payload_gb_per_s,
        "queue depth": depth * size_gb / (io_latency_us(ssd, link) * 1e-6),
        "host software": size_gb / (ssd.host_us_per_io * 1e-6) if ssd.host_us_per_io else math.inf,
    }
    return Bandwidth(f"{ssd.name} read x{count}", {k: v * count for k, v in limits.items()})


def write_bandwidth(ssd: Ssd, link: Link, count: int = 1) -> Bandwidth:
    """Write rate of `count` drives over their links."""
    limits = {
        **program_limits(ssd).limits,
        "drive rating": ssd.write_gb_per_s,
        "drive link": link.payload_gb_per_s,
    }
    return Bandwidth(f"{ssd.name} write x{count}", {k: v * count for k, v in limits.items()})


def file_read_bandwidth(
    ssd: Ssd, link: Link, page_cache_us: float, count: int = 1, threads: int = 1
) -> Bandwidth:
    """Read rate through a memory-mapped file: one read-ahead window at a time and thread, whatever drives could do.

    `page_cache_us` is the kernel and copy time per window, during which the thread has no further read outstanding.
    """
    window_us = io_latency_us(ssd, link) + page_cache_us
    drives = read_bandwidth(ssd, link, count=count)
    mapped = {"memory-mapped file": threads * ssd.io_kib * 1024 / (window_us * 1e3)}
    return Bandwidth(f"{ssd.name} file read x{count}", {**drives.limits, **mapped})
