"""NVMe drives on their links: flash, interface rating, link, queue depth and host software, whichever binds."""

from __future__ import annotations

import math

from sim.describe.devices import Link, Ssd
from sim.devices.flash import SHORT_BYTES, first_page_us, program_limits, read_limits, short_read_limits
from sim.devices.flash_pages import PageRun, closed_loop
from sim.devices.limits import Bandwidth


def io_latency_us(ssd: Ssd, link: Link, kib: float | None = None) -> float:
    """Latency of one read of `kib` (default: the reader's IO size) on an idle drive, submission to completion."""
    size = (kib or ssd.io_kib) * 1024
    moved = size / (link.payload_gb_per_s * 1e3)
    return firmware_us(ssd, size) + first_page_us(ssd, size) + link.latency_us + moved + host_us(ssd, size)


def firmware_us(ssd: Ssd, size_bytes: float) -> float:
    """Time of the controller's firmware on one read."""
    long = ssd.firmware_long_us if size_bytes > SHORT_BYTES else None
    return ssd.firmware_read_us if long is None else long


def host_us(ssd: Ssd, size_bytes: float) -> float:
    """Time of the host's software on one IO: per IO and per byte."""
    return ssd.host_us_per_io + ssd.host_us_per_mib * size_bytes / 2**20


def read_bandwidth(ssd: Ssd, link: Link, queue_depth: int | None = None, count: int = 1) -> Bandwidth:
    """Read rate of `count` drives over their links, asynchronous IO with `queue_depth` outstanding."""
    depth = queue_depth or ssd.queue_depth
    size_gb = ssd.io_kib * 1024 / 1e9
    limits = {
        **read_limits(ssd).limits,
        "drive rating": ssd.read_gb_per_s,
        "drive link": link.payload_gb_per_s,
        "queue depth": depth * size_gb / (io_latency_us(ssd, link) * 1e-6),
        "host software": _per_thread(ssd, ssd.io_kib),
    }
    return Bandwidth(f"{ssd.name} read x{count}", {k: v * count for k, v in limits.items()})


def _per_thread(ssd: Ssd, kib: float) -> float:
    """GB/s that one thread's software submits and completes."""
    software_us = host_us(ssd, kib * 1024)
    return kib * 1.024 / software_us if software_us else math.inf


def random_read_bandwidth(ssd: Ssd, link: Link, kib: float, depth: int, threads: int = 1) -> Bandwidth:
    """Random reads of `kib` with `depth` outstanding from each of `threads` threads, every limit."""
    size = kib * 1024
    limits = {
        **short_read_limits(ssd, size).limits,
        "drive rating": ssd.read_gb_per_s,
        "drive link": link.payload_gb_per_s,
        "queue depth": threads * depth * size / (io_latency_us(ssd, link, kib) * 1e3),
        "host software": threads * _per_thread(ssd, kib),
    }
    if ssd.read_kiops:
        limits["drive rating of short reads"] = ssd.read_kiops * size / 1e6
    return Bandwidth(f"{ssd.name} random read", limits)


def random_reads(
    ssd: Ssd, link: Link, kib: float, depth: int, threads: int = 1, reads: int = 20_000, seed: int = 0
) -> PageRun:
    """The same page by page: every command, sense and data-out, for latency distributions. What host, controller and
    link take per read, the slowest of them, is a server before the flash; their other times are latency."""
    per_io = max(
        1e3 / ssd.read_kiops if ssd.read_kiops else 0.0,
        host_us(ssd, kib * 1024) / threads,
        kib * 1.024 / min(ssd.read_gb_per_s, link.payload_gb_per_s),
    )
    rest = io_latency_us(ssd, link, kib) - first_page_us(ssd, kib * 1024) - per_io
    return closed_loop(ssd, reads, depth * threads, max(rest, 0.0), seed, math.ceil(kib * 1024), per_io)


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
