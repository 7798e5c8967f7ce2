"""The memory as a prediction sees it: latencies and a rate, from the model that the simulation runs against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from golden.spec import KVStrataError
from golden.spec.engine import WORD_BYTES
from golden.spec.memory import HbmTiming, MemoryModel

REFRESH_PHASES = 32
"""`Channel` in hw/engine/mem/hbm_model.h staggers the first refresh by channel number."""
PS_KHZ = 1_000_000_000
"""Picoseconds times kilohertz that make a cycle."""


@dataclass(frozen=True)
class MemoryTiming:
    """Cycles from an accepted address to the first beat, from a word's data to its answer, and words per cycle."""

    latency_cycles: int = 20
    words_per_cycle: float = 1.0
    write_latency_cycles: int = 0
    """0: as for reads."""
    refresh_cycles: int = 0
    """Cycles of a refresh, in which a channel answers nothing; 0 without refresh."""
    refresh_period_cycles: int = 1
    refresh_phases: int = 1
    """Channels refresh one after the other, a period over so many apart."""

    def __post_init__(self) -> None:
        if self.latency_cycles < 1:
            raise KVStrataError(f"a memory latency is at least 1 cycle; got {self.latency_cycles}")
        if not self.write_latency_cycles:
            object.__setattr__(self, "write_latency_cycles", self.latency_cycles)

    @classmethod
    def of(cls, model: MemoryModel) -> MemoryTiming:
        """Of a simulated memory. HBM: a closed row's read, an open row's write, the data bus less refresh.

        KVStrataError for a random memory: nothing predicts it.
        """
        if model.mode == "random":
            raise KVStrataError("a random memory has no predicted cycles; take fixed or hbm")
        if model.mode == "fixed":
            return cls(model.latency_cycles)
        t = model.timing
        beat = WORD_BYTES // t.access_bytes * t.t_ccd_s_ck * t.t_ck_ps
        read, write = t.t_rcd_ps + t.t_cl_ps, t.t_cwl_ps
        words = min(1.0, t.peak_gb_per_s * t.refresh_limit * 1e6 / t.user_clock_khz / WORD_BYTES)
        return cls(
            _cycles(read + beat + t.return_ps, t),
            words,
            _cycles(write + beat + t.return_ps, t),
            _cycles(t.t_rp_ps + t.t_rfc_ps, t),
            _cycles(t.t_refi_ps, t),
            REFRESH_PHASES,
        )

    def refresh_wait(self, channels: int, cycle: int) -> int:
        """Cycles that an access to the first `channels` channels at once waits for the last of their refreshes.

        Where in its refreshes a memory stands when a run starts is not known beforehand; the first is taken to be due a
        whole period after it.
        """
        waits = _refresh_waits(self.refresh_period_cycles, self.refresh_cycles, self.refresh_phases, channels)
        return waits[cycle % self.refresh_period_cycles]


def _cycles(time_ps: int, timing: HbmTiming) -> int:
    return -(-time_ps * timing.user_clock_khz // PS_KHZ)


@lru_cache(maxsize=64)
def _refresh_waits(period: int, length: int, phases: int, channels: int) -> list[int]:
    """By cycle of the period."""
    starts = [period * (n % phases + 1) // phases for n in range(channels)]
    return [max(max(0, length - (t - s) % period) for s in starts) for t in range(period)]
