"""HBM behind an FPGA: pseudo-channels, and what access patterns leave of their peak.

Per pseudo-channel at `rate` GB/s, for reads of `access_bytes` contiguous bytes each (at most a row):

- refresh: rate * (1 - tRFC / tREFI), which is all that long streams lose
- row cycle: banks * access_bytes / tRC
- four activates: 4 * access_bytes / tFAW
- queue depth: outstanding * access_bytes / latency

Streams of whole rows are bound by refresh, short random reads by the requests outstanding. Bounds of ports and of clock
crossings are the card's (`sim.devices.fpga`). `measure` runs requests over the banks of one pseudo-channel, bank by
bank, and must stay below these limits and meet them in their regimes.
"""

from __future__ import annotations

import random
from collections import deque

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
    return Bandwidth("hbm", limits)


def measure(
    fpga: Fpga, access_bytes: int, outstanding: int, sequential: bool, requests: int = 20_000, seed: int = 0
) -> float:
    """GB/s of all pseudo-channels, from every activate, burst and refresh of one of them.

    Reads of `access_bytes` (at most a row), `outstanding` at a time: `sequential` walks rows from bank to bank and
    reads an open row without activating it, else every read is in a random row of a random bank. The controller serves
    the waiting read that can start first; refresh stops all banks for tRFC every tREFI.
    """
    rate = fpga.hbm_gb_per_s / fpga.hbm_channels
    size = min(access_bytes, fpga.hbm_row_bytes)
    burst, per_row = size / rate, fpga.hbm_row_bytes // size
    to_data = fpga.hbm_miss_ns - fpga.hbm_hit_ns
    # Idle latency less activate and burst: what the controller and the way back add to every read.
    way = max(fpga.hbm_hit_ns - burst, 0.0)
    rng = random.Random(seed)
    free = [0.0] * fpga.hbm_banks
    opened = [-1] * fpga.hbm_banks
    activates: deque[float] = deque([-1e9] * 4, maxlen=4)
    bus, ends, issued = 0.0, deque([0.0] * outstanding), 0
    waiting: list[tuple[float, int, int]] = []
    refresh = fpga.hbm_t_refi_ns
    for _ in range(requests):
        while issued < requests and len(waiting) < outstanding and ends:
            row = issued // per_row
            bank = row % fpga.hbm_banks if sequential else int(rng.random() * fpga.hbm_banks)
            waiting.append((ends.popleft(), bank, row if sequential else -1))
            issued += 1
        best, start, hit = 0, float("inf"), False
        for index, (came, bank, row) in enumerate(waiting):
            opens = row >= 0 and opened[bank] == row
            begin = came if opens else max(came, free[bank], activates[0] + fpga.hbm_t_faw_ns)
            if begin < start:
                best, start, hit = index, begin, opens
        if max(bus, start + (0.0 if hit else to_data)) + burst > refresh:
            awake = refresh + fpga.hbm_t_rfc_ns
            start, hit, bus = max(start, awake), False, max(bus, awake)
            free = [max(f, awake) for f in free]
            opened = [-1] * fpga.hbm_banks
            refresh += fpga.hbm_t_refi_ns
        _, bank, row = waiting.pop(best)
        if not hit:
            activates.append(start)
            free[bank], opened[bank] = start + fpga.hbm_t_rc_ns, row
        bus = max(bus, start + (0.0 if hit else to_data)) + burst
        ends.append(bus + way)
    return fpga.hbm_channels * requests * size / max(ends)
