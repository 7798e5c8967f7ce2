"""HBM behind an FPGA: pseudo-channels, and what access patterns leave of their peak.

Per pseudo-channel at `rate` GB/s, for reads of `access_bytes` contiguous bytes each (at most a row):

- refresh: rate * (1 - tRFC / tREFI), which is all that long streams lose
- row cycle: banks * access_bytes / tRC
- four activates: 4 * access_bytes / tFAW
- queue depth: outstanding * access_bytes / latency

Streams of whole rows are bound by refresh, short random reads by the requests outstanding. Bounds of ports and of clock
crossings are the card's (`sim.devices.fpga`).
"""

from __future__ import annotations

from sim.describe.devices import Fpga
from sim.devices.limits import Bandwidth

ROW_BYTES = 1024
BANKS = 16
T_RC_NS = 45.0
T_FAW_NS = 16.0
T_RFC_NS = 260.0
T_REFI_NS = 3900.0
LATENCY_HIT_NS = 107.0
LATENCY_MISS_NS = 138.0
"""Idle read latencies of the U280's HBM (reference/accllm.md, section 3.4); the timings are HBM2's (SIM-HBM)."""


def read_limits(fpga: Fpga, access_bytes: float | None = None) -> Bandwidth:
    """Read bandwidth of all pseudo-channels for accesses of `access_bytes` (default: the engine's bursts)."""
    size = min(access_bytes or fpga.hbm_access_bytes, ROW_BYTES)
    channels = fpga.hbm_channels
    latency = LATENCY_HIT_NS if size >= ROW_BYTES else LATENCY_MISS_NS
    limits = {
        "hbm refresh": fpga.hbm_gb_per_s * (1 - T_RFC_NS / T_REFI_NS),
        "hbm row cycle": channels * BANKS * size / T_RC_NS,
        "hbm tFAW": channels * 4 * size / T_FAW_NS,
        "hbm queue depth": channels * fpga.hbm_outstanding * size / latency,
    }
    return Bandwidth("hbm", limits)
