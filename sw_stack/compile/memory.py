"""The memory as a prediction sees it: latencies, a rate, refreshes and turnarounds of the simulated model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from golden.spec import KVStrataError
from golden.spec.engine import WORD_BYTES
from golden.spec.memory import HbmTiming, MemoryModel

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


class Transfer(NamedTuple):
    """A burst on some channels: a read's address or a write's last beat was transferred in cycle `at`."""

    at: int
    beats: int
    channels: slice
    write: bool


class MemoryPort:
    """One master's view of channels: transfers are answered in the order in which they came, at the bus's rate.

    `first` is the number of the first channel, by which refreshes are staggered; a run starts with the memory.
    `others`: what another master asked of the same channels in an earlier pass of the prediction.
    """

    def __init__(
        self, memory: MemoryTiming, channels: int, first: int = 0, others: Sequence[Transfer] = ()
    ) -> None:
        self.memory = memory
        self._interval = 1 / memory.bus_words_per_cycle
        self.own: list[Transfer] = []
        self._all = sorted(others, key=attrgetter("at"))
        """Both masters', in order; where the next one stands among them depends on when it comes."""
        self._free = [np.zeros((2, channels))]
        """[2, channels] before each of these, as far as known: the earliest next beat read and answer of a write."""
        if memory.refresh:
            numbers = np.arange(first, first + channels) % REFRESH_PHASES + 1
            self._due = memory.refresh.period_cycles * numbers / REFRESH_PHASES

    def read(self, accepted: int, beats: int, channels: slice = slice(None)) -> np.ndarray:
        """Cycle of each beat, of the latest of the channels; `accepted` is the address's transfer.

        Calls need not be in that order.
        """
        return self._add(Transfer(accepted, beats, channels, write=False))

    def write(self, sent: int, beats: int = 1, channels: slice = slice(None)) -> float:
        """Cycle of the answer to a write whose last beat is transferred in cycle `sent`, of the latest channel."""
        if self.memory.turnaround is None:
            return sent + self.memory.write_latency_cycles
        return float(self._add(Transfer(sent, beats, channels, write=True))[-1])

    def _add(self, transfer: Transfer) -> np.ndarray:
        place = bisect_right(self._all, transfer.at, key=attrgetter("at"))
        del self._free[place + 1 :]
        while len(self._free) <= place:
            self._free.append(self._serve(self._all[len(self._free) - 1], self._free[-1])[1])
        self.own.append(transfer)
        self._all.insert(place, transfer)
        answered, free = self._serve(transfer, self._free[place])
        self._free.append(free)
        return answered

    def _serve(self, transfer: Transfer, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cycle of each beat, and what is free behind it."""
        refresh, turn = self.memory.refresh, self.memory.turnaround
        at, beats, channels, write = transfer
        delay = 0.0
        if refresh:
            delay = refresh.write_cycles if write else refresh.read_cycles
        latency = self.memory.write_latency_cycles if write else self.memory.latency_cycles
        before = free[int(write), channels]
        answered, end = self._transfer(np.maximum(before, at + latency), before, beats, channels, delay)
        free = free.copy()
        free[int(write), channels] = end
        if turn:
            free[int(not write), channels] = (
                end - self._interval + (turn.to_read_cycles if write else turn.to_write_cycles)
            )
        return answered, free

    def _transfer(
        self, start: np.ndarray, free: np.ndarray, beats: int, channels: slice, delay: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cycle of each beat of the latest channel, and per channel the cycle behind the last one.

        `delay`: from a column, which is what a refresh holds up, to its beat.
        """
        steps = np.arange(beats) * self._interval
        refresh = self.memory.refresh
        if not refresh:
            return start.max() + steps, start + beats * self._interval
        period, blocked, drain = refresh.period_cycles, refresh.blocked_cycles, refresh.drain_cycles
        due = self._due[channels] + delay
        passed = np.floor((start - due) / period)
        latest = due + passed * period
        before = free - self._interval
        opens = np.where(before < latest, np.maximum(latest, before + drain), latest)
        start = np.where(passed >= 0, np.maximum(start, opens + blocked), start)
        coming = np.where(passed >= 0, latest + period, due)
        if (start + steps[-1] < coming).all():
            return start.max() + steps, start + beats * self._interval
        fit = np.ceil((coming - start) / self._interval)
        opens = np.maximum(coming, start + (fit - 1) * self._interval + drain)
        jump = np.maximum(0, opens + blocked - start - fit * self._interval)
        times = start[:, None] + steps + np.where(np.arange(beats) >= fit[:, None], jump[:, None], 0)
        return times.max(axis=0), times[:, -1] + self._interval
