"""The memory as a prediction sees it: latencies and a rate, from the model that the simulation runs against."""

from __future__ import annotations

from dataclasses import dataclass

from golden.spec import KVStrataError
from golden.spec.engine import WORD_BYTES
from golden.spec.memory import HbmTiming, MemoryModel

PS_KHZ = 1_000_000_000
"""Picoseconds times kilohertz that make a cycle."""


@dataclass(frozen=True)
class MemoryTiming:
    """Cycles from an accepted address to the first beat, from a word's data to its answer, and words per cycle."""

    latency_cycles: int = 20
    words_per_cycle: float = 1.0
    write_latency_cycles: int = 0
    """0: as for reads."""

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
        return cls(_cycles(read + beat + t.return_ps, t), words, _cycles(write + beat + t.return_ps, t))


def _cycles(time_ps: int, timing: HbmTiming) -> int:
    return -(-time_ps * timing.user_clock_khz // PS_KHZ)
