"""The attention unit of a computational drive: this repository's RTL by its measured cycles, or a published unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from golden.spec.storage import PAGE_BYTES
from sim import measured
from sim.describe.devices import Csd
from sim.devices.storage_unit import ECC_US, QUICK_READ_US, FlashBehind, Selection, sparf_cycles

UNIT_BLOCKS = ("storage_unit", "attention_head")
"""Calibration tables that describe the unit on dense attention, the most complete first."""
SPARF_BLOCK = "storage_unit_sparf"
"""The table that holds the cycles of the unit's blocks, from which SparF follows page by page."""


@dataclass(frozen=True)
class KvReads:
    """What one layer's decode attention asks of all drives together.

    `commands` counts (sequence, KV head) pairs; `dot_flops` and `softmax_values` are for units whose compute is
    described by rates rather than by measured cycles.
    """

    size_bytes: float
    commands: int
    dot_flops: float
    softmax_values: float
    tokens: float = 0.0
    """Cached tokens per sequence that lie on flash."""
    selection: Selection | None = None
    """What SparF reads of each KV head; None for dense attention."""


class AttentionUnit(ABC):
    """Unit of one drive. `streams` says whether it works while pages arrive or after they have."""

    streams: bool

    @abstractmethod
    def seconds(self, reads: KvReads, drives: int) -> float:
        """Busy seconds of each drive's unit when `reads` divide evenly over `drives`."""

    def overlapped_seconds(self, reads: KvReads, drives: int) -> float:
        """Busy seconds of work that runs beside the page stream and only shows where it is longer."""
        return 0.0

    def reading_seconds(self, reads: KvReads, drives: int) -> float:
        """Seconds that the unit's reads take in the order in which it asks for them, where that is known."""
        return 0.0

    @abstractmethod
    def stream_limits(self) -> dict[str, float]:
        """Limits in GB/s that the unit puts on one drive's flash stream."""

    @abstractmethod
    def provenance(self) -> list[dict[str, Any]]:
        """Where the unit's numbers come from."""


class RtlUnit(AttentionUnit):
    """Dense attention in the unit of hw/storage by its measured cycles per byte and per head command."""

    streams = True

    def __init__(self, csd: Csd) -> None:
        self._csd = csd
        self._fit = measured.fit(UNIT_BLOCKS, "bytes")

    def seconds(self, reads: KvReads, drives: int) -> float:
        cycles = self._fit.cycles(reads.size_bytes / drives, reads.commands / drives)
        return cycles / (self._csd.unit_mhz * 1e6)

    def stream_limits(self) -> dict[str, float]:
        return {}

    def provenance(self) -> list[dict[str, Any]]:
        return [self._fit.provenance()]


class SparfUnit(AttentionUnit):
    """SparF in the unit of hw/storage, page by page (`sim.devices.storage_unit`).

    `seconds` is the unit behind the drive's channels with an array that answers at once, `reading_seconds` the same
    with the drive's own array: channels give pages in the order in which the unit asks for them.
    """

    streams = True

    def __init__(self, csd: Csd) -> None:
        self._csd = csd
        self._times = measured.unit_times(SPARF_BLOCK)

    def seconds(self, reads: KvReads, drives: int) -> float:
        return self._seconds(reads, drives, QUICK_READ_US)

    def reading_seconds(self, reads: KvReads, drives: int) -> float:
        return self._seconds(reads, drives, self._csd.read_us)

    def _seconds(self, reads: KvReads, drives: int, read_us: float) -> float:
        assert reads.selection is not None, "dense reads come to RtlUnit"
        csd, mhz = self._csd, self._csd.unit_mhz
        arrays = csd.dies_per_channel * csd.planes_per_die
        read, command, ecc = (round(us * mhz) for us in (read_us, csd.command_us, ECC_US))
        page = PAGE_BYTES * mhz / csd.channel_gb_per_s / 1e3
        flash = FlashBehind(csd.channels, arrays, read, command, ecc, page)
        jobs = reads.commands / drives
        return sparf_cycles(reads.selection, reads.tokens, jobs, flash, self._times.times) / (mhz * 1e6)

    def stream_limits(self) -> dict[str, float]:
        return {}

    def provenance(self) -> list[dict[str, Any]]:
        return [self._times.provenance()]


class PublishedUnit(AttentionUnit):
    """A unit known by its published rates: per-channel filter, GeMV units and softmax units.

    The published breakdown shows products beside page reads, so they add; it shows no softmax, so that is hidden.
    """

    streams = False

    def __init__(self, csd: Csd) -> None:
        self._csd = csd

    def seconds(self, reads: KvReads, drives: int) -> float:
        csd = self._csd
        return reads.dot_flops / (csd.gemv_units * csd.gemv_gflops * 1e9) / drives

    def overlapped_seconds(self, reads: KvReads, drives: int) -> float:
        """Softmax runs while V pages stream."""
        csd = self._csd
        return reads.softmax_values / 2048 * csd.softmax_us_per_2048 * 1e-6 / csd.softmax_units / drives

    def stream_limits(self) -> dict[str, float]:
        return {"page filters": self._csd.channels * self._csd.filter_gb_per_s}

    def provenance(self) -> list[dict[str, Any]]:
        return []


def attention_unit(csd: Csd, sparse: bool = False) -> AttentionUnit:
    """The unit that a drive's description names, for dense attention or for SparF."""
    if csd.engine == "published":
        return PublishedUnit(csd)
    return SparfUnit(csd) if sparse else RtlUnit(csd)
