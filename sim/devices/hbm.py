"""HBM behind an FPGA: pseudo-channels, and what access patterns leave of their peak.

Per pseudo-channel at `rate` GB/s, for reads of `access_bytes` contiguous bytes each (at most a row):

- refresh: rate * (1 - tRFC / tREFI), which is all that long streams lose
- row cycle: banks * access_bytes / tRC
- four activates: 4 * access_bytes / tFAW
- bank conflicts: access_bytes / the mean time between activates of random banks in order (`activate_ns`)
- queue depth: outstanding * access_bytes / latency

Streams of whole rows are bound by refresh, short random reads by the requests outstanding or by conflicts. Bounds of
ports and of clock crossings are the card's (`sim.devices.fpga`). `measure` runs requests over the banks of one
pseudo-channel, bank by bank, and must stay below these limits and meet them in their regimes.
"""

from __future__ import annotations

import random
from collections import deque
from functools import lru_cache

from sim.describe.devices import Fpga
from sim.devices.limits import Bandwidth


def read_limits(fpga: Fpga, access_bytes: float | None = None, outstanding: int | None = None) -> Bandwidth:
    """Read bandwidth of all pseudo-channels for accesses of `access_bytes` (default: the engine's bursts)."""
    size = min(access_bytes or fpga.hbm_access_bytes, fpga.hbm_row_bytes)
    channels, depth = fpga.hbm_channels, outstanding or fpga.hbm_outstanding
    latency = fpga.hbm_hit_ns if size >= fpga.hbm_row_bytes else fpga.hbm_miss_ns
    awake = 1 - fpga.hbm_t_rfc_ns / fpga.hbm_t_refi_ns
    limits = {
        "hbm refresh": fpga.hbm_gb_per_s * awake,
        "hbm row cycle": channels * fpga.hbm_banks * size / fpga.hbm_t_rc_ns * awake,
        "hbm tFAW": channels * 4 * size / fpga.hbm_t_faw_ns * awake,
        "hbm queue depth": channels * depth * size / latency,
    }
    if size < fpga.hbm_row_bytes:
        between = activate_ns(fpga.hbm_banks, fpga.hbm_t_rc_ns, fpga.hbm_t_faw_ns)
        # A refresh hides the row cycles that run when it begins.
        conflicting = min(1.0, awake + fpga.hbm_t_rc_ns / fpga.hbm_t_refi_ns)
        limits["hbm bank conflicts"] = channels * size / between * conflicting
    return Bandwidth("hbm", limits)


@lru_cache(maxsize=64)
def activate_ns(banks: int, t_rc_ns: float, t_faw_ns: float) -> float:
    """Mean time between activates of rows in uniformly random banks, one after the other in order of arrival.

    Each waits for its bank (tRC) and for the fourth before it (tFAW); no closed form is known, so they are run.
    """
    rng, rows = random.Random(0), _Rows(banks, t_rc_ns, t_faw_ns)
    for _ in range(20_000):
        rows.activate(int(rng.random() * banks), 0.0)
    return rows.last / 20_000


class _Rows:
    """Banks of a pseudo-channel: when each may be activated again, and the row that it holds open."""

    def __init__(self, banks: int, t_rc_ns: float, t_faw_ns: float) -> None:
        self.free, self.opened = [0.0] * banks, [CLOSED] * banks
        self._recent = deque([-1e9] * 4, maxlen=4)
        self._t_rc, self._t_faw, self.last = t_rc_ns, t_faw_ns, 0.0

    def earliest(self, bank: int, at: float) -> float:
        """When a row of the bank may be activated, wanted `at`."""
        return max(at, self.free[bank], self._recent[0] + self._t_faw)

    def activate(self, bank: int, at: float, row: int = 0) -> float:
        """Activate a row as early as its bank and the activates before it allow, and say when."""
        self.last = self.earliest(bank, at)
        self._recent.append(self.last)
        self.free[bank], self.opened[bank] = self.last + self._t_rc, row
        return self.last

    def refresh(self, until: float) -> None:
        """All banks are closed, and idle until then."""
        self.free = [max(f, until) for f in self.free]
        self.opened = [CLOSED] * len(self.free)


CLOSED, SOME_ROW = -2, -1
"""States of a bank: no row open, or one that no later read wants."""


def measure(
    fpga: Fpga, access_bytes: int, outstanding: int, sequential: bool, requests: int = 20_000, seed: int = 0
) -> float:
    """GB/s of all pseudo-channels, from every activate, burst and refresh of one of them.

    Reads of `access_bytes` (at most a row), `outstanding` at a time: `sequential` walks rows from bank to bank and
    reads an open row without activating it, else every read is in a random row of a random bank. Rows are activated
    ahead of the data bus, and answers come in order, as at an AXI port. Refresh stops all banks for tRFC every tREFI
    and closes them.
    """
    burst = min(access_bytes, fpga.hbm_row_bytes) * fpga.hbm_channels / fpga.hbm_gb_per_s
    size, per_row = burst * fpga.hbm_gb_per_s / fpga.hbm_channels, max(1, fpga.hbm_row_bytes // access_bytes)
    # Idle latency less activate and burst: what the controller and the way back add to every read.
    way = max(fpga.hbm_hit_ns - burst, 0.0)
    rng, rows = random.Random(seed), _Rows(fpga.hbm_banks, fpga.hbm_t_rc_ns, fpga.hbm_t_faw_ns)
    bus, ends, refresh = 0.0, deque([0.0] * outstanding), fpga.hbm_t_refi_ns
    for number in range(requests):
        row = number // per_row if sequential else SOME_ROW
        bank = row % fpga.hbm_banks if sequential else int(rng.random() * fpga.hbm_banks)
        at = ends.popleft()
        hit = sequential and rows.opened[bank] == row
        to_data = _to_data_ns(fpga, rows.opened[bank], hit)
        if max(bus, (at if hit else rows.earliest(bank, at)) + to_data) + burst > refresh:
            awake = refresh + fpga.hbm_t_rfc_ns
            at, bus, hit = max(at, awake), max(bus, awake), False
            rows.refresh(awake)
            to_data, refresh = _to_data_ns(fpga, CLOSED, hit), refresh + fpga.hbm_t_refi_ns
        start = at if hit else rows.activate(bank, at, row)
        bus = max(bus, start + to_data) + burst
        ends.append(bus + way)
    return fpga.hbm_channels * requests * size / max(ends)


def _to_data_ns(fpga: Fpga, opened: int, hit: bool) -> float:
    """What a read waits for its row beside the latency of an open one."""
    if hit:
        return 0.0
    return (fpga.hbm_closed_ns if opened == CLOSED else fpga.hbm_miss_ns) - fpga.hbm_hit_ns
