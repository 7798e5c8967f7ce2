"""The attention unit of a computational drive: this repository's RTL by its measured cycles, or a published unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from sim import measured
from sim.describe.devices import Csd

UNIT_BLOCKS = ("storage_unit", "attention_head")
"""Calibration tables that describe the unit on dense attention, the most complete first."""
SPARF_BLOCKS = ("storage_unit_sparf", *UNIT_BLOCKS)
"""The same for SparF, whose selections and top-k are in the first one only."""


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


class AttentionUnit(ABC):
    """Unit of one drive. `streams` says whether it works while pages arrive or after they have."""

    streams: bool

    @abstractmethod
    def seconds(self, reads: KvReads, drives: int) -> float:
        """Busy seconds of each drive's unit when `reads` divide evenly over `drives`."""

    def overlapped_seconds(self, reads: KvReads, drives: int) -> float:
        """Busy seconds of work that runs beside the page stream and only shows where it is longer."""
        return 0.0

    @abstractmethod
    def stream_limits(self) -> dict[str, float]:
        """Limits in GB/s that the unit puts on one drive's flash stream."""

    @abstractmethod
    def provenance(self) -> list[dict[str, Any]]:
        """Where the unit's numbers come from."""


class RtlUnit(AttentionUnit):
    """The unit in hw/storage by its measured cycles per byte and per head command, whatever drive it is put in."""

    streams = True

    def __init__(self, csd: Csd, blocks: tuple[str, ...]) -> None:
        self._csd = csd
        self._fit = measured.fit(blocks, "bytes")

    def seconds(self, reads: KvReads, drives: int) -> float:
        cycles = self._fit.cycles(reads.size_bytes / drives, reads.commands / drives)
        return cycles / (self._csd.unit_mhz * 1e6)

    def stream_limits(self) -> dict[str, float]:
        return {}

    def provenance(self) -> list[dict[str, Any]]:
        return [self._fit.provenance()]


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
    return (
        RtlUnit(csd, SPARF_BLOCKS if sparse else UNIT_BLOCKS) if csd.engine == "rtl" else PublishedUnit(csd)
    )
