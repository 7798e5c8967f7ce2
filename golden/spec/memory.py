"""Contract of the engine's memory system: fault codes, AXI constants, and the HBM that it is measured against.

The timing parameters are physical and sourced; docs/assumptions.d/memory.toml gives ranges and effects. The RTL
knows none of them: it sees AXI4 and must give the same bits at any latency.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

from golden.spec import KVStrataError

AXI_BOUNDARY_BYTES = 4096
"""No AXI4 burst crosses a multiple of this."""
MAX_BURST_BEATS = 16
"""Longest burst that the masters issue: the HBM ports of UltraScale+ are AXI3, whose limit is 16 beats."""
CHANNEL_BYTES = 1 << 28
"""Capacity of one HBM pseudo-channel of the U280: 8 GB over 32 of them."""
CHANNEL_ADDR_BITS = 28


class MemoryFault(IntEnum):
    """Why a memory master stopped; the first fault is kept until it is cleared."""

    NONE = 0
    UNALIGNED = 1
    """An address or stride of a descriptor is no multiple of the beat."""
    OUT_OF_REGION = 2
    """A burst would leave [region_base, region_limit)."""
    EMPTY = 3
    """A descriptor asks for no beats, or a loop of it for no turns."""
    SLVERR = 4
    """The memory answered a burst with SLVERR."""
    DECERR = 5
    """The memory answered a burst with DECERR: no device at that address."""
    PROTOCOL = 6
    """The memory marked the wrong beat as the last of a burst."""

    @property
    def sentence(self) -> str:
        """What to tell a user."""
        return _SENTENCES[self]


_SENTENCES = {
    MemoryFault.NONE: "no fault",
    MemoryFault.UNALIGNED: "addresses and strides must be multiples of the memory beat",
    MemoryFault.OUT_OF_REGION: "a burst must stay inside the region of its buffer",
    MemoryFault.EMPTY: "a transfer must have at least one beat in every loop",
    MemoryFault.SLVERR: "the memory refused the burst (SLVERR)",
    MemoryFault.DECERR: "no memory answers at this address (DECERR)",
    MemoryFault.PROTOCOL: "the memory broke the AXI protocol: a burst's last beat came early or late",
}


@dataclass(frozen=True)
class HbmTiming:
    """One HBM2 pseudo-channel behind its controller, as user logic sees it. Times in ps unless named otherwise.

    `return_ps` is everything between an idle controller and the user that is no DRAM timing: AXI switch, controller
    and PHY pipelines, and the crossing to the user clock.

    Sources: JESD235 and the public HBM2 configurations of DRAM simulators for the DRAM's own timings; latencies
    measured on a U280 (hit 107 ns, closed 122 ns, miss 138 ns at 450 MHz) for tRCD, tRP and the rest of the path.
    """

    user_clock_khz: int = 225_000
    t_ck_ps: int = 1113
    """16 B per clock = 14.375 GB/s: 64 bit, double data rate."""
    bank_groups: int = 4
    banks_per_group: int = 4
    row_bytes: int = 1024
    access_bytes: int = 32
    """One burst of four transfers."""
    t_ccd_s_ck: int = 2
    t_ccd_l_ck: int = 4
    t_cl_ps: int = 14_000
    t_cwl_ps: int = 4_000
    t_rcd_ps: int = 15_000
    t_rp_ps: int = 16_000
    t_ras_ps: int = 34_000
    t_rrd_s_ps: int = 4_000
    t_rrd_l_ps: int = 6_000
    t_faw_ps: int = 16_000
    t_rtp_ps: int = 5_000
    t_wr_ps: int = 16_000
    t_wtr_s_ps: int = 6_000
    t_wtr_l_ps: int = 8_000
    t_refi_ps: int = 3_900_000
    t_rfc_ps: int = 260_000
    return_ps: int = 107_000 - 14_000 - 2_226 + 18_000
    """Measured page-hit latency less CAS latency and burst, plus four cycles of clock crossing at 225 MHz."""
    lookahead: int = 32
    """Accesses whose rows may be opened ahead of the one on the data bus."""
    max_bursts: int = 64
    """Bursts that a port accepts before it lowers its ready."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise KVStrataError(f"HBM timing {field.name} must be a positive integer, not {value!r}")

    @property
    def peak_gb_per_s(self) -> float:
        """Peak rate of the data bus of one pseudo-channel."""
        return self.access_bytes / (self.t_ccd_s_ck * self.t_ck_ps) * 1000

    @property
    def refresh_limit(self) -> float:
        """Fraction of time that refresh leaves: the ceiling of any stream."""
        return 1 - self.t_rfc_ps / self.t_refi_ps


@dataclass(frozen=True)
class MemoryModel:
    """How the simulated memory behaves: `mode` "hbm", "fixed" or "random".

    `fixed` answers each burst `latency_cycles` after its address and then one beat per cycle; `random` draws that
    latency per burst from 1 to `latency_cycles`, and idles every channel at random with `stall_percent`, by `seed`.
    """

    mode: str = "hbm"
    latency_cycles: int = 20
    stall_percent: int = 0
    seed: int = 1
    error_address: int = -1
    """A burst that covers this byte address is answered with `error_response`; -1 for none."""
    error_response: int = 2
    """2 for SLVERR, 3 for DECERR."""
    timing: HbmTiming = HbmTiming()

    def __post_init__(self) -> None:
        if self.mode not in ("hbm", "fixed", "random"):
            raise KVStrataError(f"memory mode must be 'hbm', 'fixed' or 'random', not {self.mode!r}")
        if not 1 <= self.latency_cycles <= 10_000:
            raise KVStrataError(f"memory latency must be 1 to 10000 cycles, not {self.latency_cycles!r}")
        if not 0 <= self.stall_percent <= 95:
            raise KVStrataError(f"memory stalls must be 0 to 95 percent, not {self.stall_percent!r}")
        if self.error_response not in (2, 3):
            raise KVStrataError(f"an error response is 2 (SLVERR) or 3 (DECERR), not {self.error_response!r}")

    def to_text(self) -> str:
        """Lines `name value` for the C++ model, which has no defaults of its own."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "timing"}
        timing = {f.name: getattr(self.timing, f.name) for f in fields(self.timing)}
        return "".join(f"{name} {value}\n" for name, value in (own | timing).items())
