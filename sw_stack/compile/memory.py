"""The memory as a prediction sees it: latencies, a rate, refreshes and turnarounds of the simulated model."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from golden.spec import KVStrataError
from golden.spec.engine import WORD_BYTES
from golden.spec.memory import MAX_BURST_BEATS, HbmTiming, MemoryModel
from hw.flow.cxx import shared_library

SOURCE = Path(__file__).with_name("memory_port.cpp")
REFRESH_PHASES = 32
"""`Channel` in hw/engine/mem/hbm_model.h staggers the first refresh by channel number."""
PS_KHZ = 1_000_000_000
"""Picoseconds times kilohertz that make a cycle."""


@dataclass(frozen=True)
class Refresh:
    """All-bank refreshes of a channel, in cycles: from one to the next, and no column from one's start on."""

    period_cycles: float
    blocked_cycles: float
    """Precharge, refresh and activate."""
    drain_cycles: float
    """From the last column to the start of a refresh that has been due."""
    read_cycles: float
    """From a column to its first beat."""
    write_cycles: float
    """From a column to the answer."""


@dataclass(frozen=True)
class Turnaround:
    """What a change of direction costs a channel's data bus, in cycles."""

    to_write_cycles: float
    """From the last beat read to the first answer of a write right behind it."""
    to_read_cycles: float
    """From a write's answer to the first beat of a read right behind it."""


@dataclass(frozen=True)
class MemoryTiming:
    """Cycles from an accepted address to the first beat, from a word's data to its answer, and words per cycle."""

    latency_cycles: int = 20
    bus_words_per_cycle: float = 1.0
    """Between refreshes."""
    write_latency_cycles: int = 0
    """0: as for reads."""
    refresh: Refresh | None = None
    turnaround: Turnaround | None = None
    """None: reads and writes do not see each other."""

    def __post_init__(self) -> None:
        if self.latency_cycles < 1:
            raise KVStrataError(f"a memory latency is at least 1 cycle; got {self.latency_cycles}")
        if not self.write_latency_cycles:
            object.__setattr__(self, "write_latency_cycles", self.latency_cycles)

    @classmethod
    def of(cls, model: MemoryModel) -> MemoryTiming:
        """Of a simulated memory. HBM: a closed row's read, an open row's write, the data bus, its refreshes and turns.

        KVStrataError for a random memory: nothing predicts it.
        """
        if model.mode == "random":
            raise KVStrataError("a random memory has no predicted cycles; take fixed or hbm")
        if model.mode == "fixed":
            return cls(model.latency_cycles)
        t = model.timing
        ccd = t.t_ccd_s_ck * t.t_ck_ps
        beat = WORD_BYTES // t.access_bytes * ccd
        read, write = t.t_cl_ps + beat + t.return_ps, t.t_cwl_ps + beat + t.return_ps
        refresh = Refresh(
            _cycles(t.t_refi_ps, t),
            _cycles(t.t_rp_ps + t.t_rfc_ps + t.t_rcd_ps, t),
            _cycles(t.t_cl_ps + ccd, t),
            _cycles(read, t),
            _cycles(write, t),
        )
        turnaround = Turnaround(
            # Column to column: CL, a burst and two clocks less CWL; CWL, a burst and tWTR.
            _cycles(t.t_cl_ps + ccd + 2 * t.t_ck_ps - t.t_cwl_ps + write - read, t),
            _cycles(t.t_cwl_ps + ccd + t.t_wtr_s_ps + read - write, t),
        )
        words = min(1.0, t.peak_gb_per_s * 1e6 / t.user_clock_khz / WORD_BYTES)
        latency = -int(-_cycles(t.t_rcd_ps + read, t) // 1)
        return cls(latency, words, -int(-_cycles(write, t) // 1), refresh, turnaround)

    @property
    def words_per_cycle(self) -> float:
        """Of a long stream."""
        if self.refresh is None:
            return self.bus_words_per_cycle
        lost = self.refresh.blocked_cycles + self.refresh.drain_cycles
        return self.bus_words_per_cycle * (1 - lost / self.refresh.period_cycles)


def _cycles(time_ps: int, timing: HbmTiming) -> float:
    return time_ps * timing.user_clock_khz / PS_KHZ


class _Timing(ctypes.Structure):
    """`Timing` of memory_port.cpp."""

    _fields_ = [
        (name, ctypes.c_double if count == 1 else ctypes.c_double * count)
        for name, count in (
            ("interval", 1), ("latency", 2), ("period", 1), ("blocked", 1), ("drain", 1), ("column", 2), ("turn", 2),
        )
    ]  # fmt: skip

    @classmethod
    def of(cls, memory: MemoryTiming) -> _Timing:
        refresh, turn = memory.refresh or Refresh(0, 0, 0, 0, 0), memory.turnaround or Turnaround(-1, -1)
        return cls(
            1 / memory.bus_words_per_cycle,
            (memory.latency_cycles, memory.write_latency_cycles),
            refresh.period_cycles,
            refresh.blocked_cycles,
            refresh.drain_cycles,
            (refresh.read_cycles, refresh.write_cycles),
            (turn.to_write_cycles, turn.to_read_cycles),
        )


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = shared_library("memory_port", "the memory's prediction", SOURCE)
    handle, integer, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.kv_port_new.restype = handle
    library.kv_port_new.argtypes = [
        ctypes.POINTER(_Timing), ctypes.POINTER(ctypes.c_double), ctypes.c_int, handle,
    ]  # fmt: skip
    library.kv_port_delete.restype, library.kv_port_delete.argtypes = None, [handle]
    library.kv_port_add.restype = None
    library.kv_port_add.argtypes = [handle, i64, *[integer] * 4, ctypes.POINTER(i64)]
    return library


class MemoryPort:
    """One master's view of channels: transfers are answered in the order in which they came, at the bus's rate.

    `first` is the number of the first channel, by which refreshes are staggered; a run starts with the memory.
    `others`: another master of the same channels in an earlier pass of the prediction, whose transfers are served here.
    A change of direction costs its turnaround, and a refresh holds up the columns behind it.
    """

    def __init__(
        self, memory: MemoryTiming, channels: int, first: int = 0, others: MemoryPort | None = None
    ) -> None:
        self._memory, self._channels, self._library = memory, channels, _library()
        period = memory.refresh.period_cycles if memory.refresh else 0
        due = [period * (n % REFRESH_PHASES + 1) / REFRESH_PHASES for n in range(first, first + channels)]
        self._handle: int | None = self._library.kv_port_new(
            _Timing.of(memory), (ctypes.c_double * channels)(*due), channels, others and others._handle
        )
        self._answered = (ctypes.c_int64 * MAX_BURST_BEATS)()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.kv_port_delete(self._handle)
            self._handle = None

    def read(self, accepted: int, beats: int, channels: slice = slice(None)) -> list[int]:
        """Cycle of each beat, of the latest of the channels; `accepted` is the cycle of the address's transfer.

        Calls need not be in that order.
        """
        return self._add(accepted, beats, channels, write=False)

    def write(self, sent: int, beats: int = 1, channels: slice = slice(None)) -> int:
        """Cycle of the answer to a write whose last beat is transferred in cycle `sent`, of the latest channel."""
        if self._memory.turnaround is None:
            return sent + self._memory.write_latency_cycles
        return self._add(sent, beats, channels, write=True)[-1]

    def _add(self, at: int, beats: int, channels: slice, write: bool) -> list[int]:
        if beats > MAX_BURST_BEATS:
            raise KVStrataError(f"a burst has at most {MAX_BURST_BEATS} beats; got {beats}")
        start, stop, _ = channels.indices(self._channels)
        self._library.kv_port_add(self._handle, at, beats, start, stop, write, self._answered)
        return self._answered[:beats]
