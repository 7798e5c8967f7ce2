"""Devices of a machine: GPU, host, link, drive, computational drive and FPGA card.

Units are in the names; sizes and rates are decimal (1 GB = 1e9 bytes). A validator refuses values that no such device
has, because the commonest error is a unit: gigabits for gigabytes, milliseconds for microseconds.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from sim.describe.base import Count, Described, NonNegative, Positive, Share, assumed

FLASH = "SIM-FLASH"


class Gpu(Described):
    """A GPU: roofline ceilings, and what its kernels reach of them (sim.devices.gpu)."""

    kind: ClassVar[str] = "gpu"
    memory_gb: Positive
    hbm_gb_per_s: Positive
    fp16_tflops: Positive
    sm_count: Count
    boost_mhz: Positive
    tdp_w: Positive
    idle_w: NonNegative
    price_usd: Positive
    peer_gb_per_s: NonNegative = assumed(0.0, "no GPU links: peers meet on the host's PCIe")
    bandwidth_share: Share = assumed(0.85, "SIM-GPU-BW")
    tensor_share: Share = assumed(0.78, "SIM-GPU-TENSOR")
    attention_share: Share | None = assumed(None, "that of matrix products")
    kernel_floor_us: NonNegative = assumed(7.0, "SIM-GPU-FLOOR")
    reserved_gb: NonNegative = assumed(1.5, "SIM-GPU-RESERVED")

    @model_validator(mode="after")
    def _plausible(self) -> Self:
        if self.hbm_gb_per_s > 20_000:
            raise ValueError(f"hbm_gb_per_s must be below 20000 (is it in Gb/s?), got {self.hbm_gb_per_s}")
        if self.fp16_tflops > 10_000:
            raise ValueError(f"fp16_tflops must be below 10000 (is it in GFLOPS?), got {self.fp16_tflops}")
        if not 64 <= self.flops_per_clock <= 32_768:
            raise ValueError(
                "fp16_tflops over sm_count and boost_mhz must lie in 64..32768 FLOP per SM and clock "
                f"(is boost_mhz in GHz?), got {self.flops_per_clock:.4g}"
            )
        if self.idle_w >= self.tdp_w:
            raise ValueError(f"idle_w must be below tdp_w = {self.tdp_w}, got {self.idle_w}")
        return self

    @property
    def flops_per_clock(self) -> float:
        """Peak of an SM: FLOP per clock at the clock that the data sheet's peak assumes."""
        return self.fp16_tflops * 1e6 / (self.sm_count * self.boost_mhz)


class Host(Described):
    """CPU and DRAM of a server."""

    kind: ClassVar[str] = "host"
    dram_gb: Positive
    dram_gb_per_s: Positive
    cpu_gflops: Positive
    idle_w: NonNegative
    tdp_w: Positive
    price_usd: Positive
    reserved_gb: NonNegative = assumed(6.0, "SIM-HOST-RESERVED")
    stream_share: Share = assumed(0.75, "SIM-HOST-STREAM")
    pageable_copy_gb_per_s: Positive = assumed(11.0, "SIM-PAGEABLE")
    swap_fault_us: NonNegative = assumed(35.0, "SIM-SWAP-FAULT")
    swap_out_gb_per_s: Positive = assumed(1.0, "SIM-SWAP-OUT")
    swap_cluster_kib: Positive = assumed(32.0, "SIM-SWAP-CLUSTER")

    @model_validator(mode="after")
    def _plausible(self) -> Self:
        if self.dram_gb_per_s > 2_000:
            raise ValueError(f"dram_gb_per_s must be below 2000 (is it in Gb/s?), got {self.dram_gb_per_s}")
        return self


GT_PER_S = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}


class Link(Described):
    """A PCIe link, duplex: payload rate per direction from lanes, generation, encoding and packet overhead."""

    kind: ClassVar[str] = "link"
    generation: Literal[1, 2, 3, 4, 5, 6]
    lanes: Literal[1, 2, 4, 8, 16]
    max_payload_bytes: Count = assumed(256, "SIM-LINK-MPS")
    header_bytes: Count = assumed(24, "SIM-LINK-TLP")
    flow_share: Share = assumed(0.92, "SIM-LINK-DLLP")
    latency_us: NonNegative = assumed(1.0, "SIM-LINK-LATENCY")

    @property
    def raw_gb_per_s(self) -> float:
        """Bytes on the wire per direction after line encoding."""
        encoding = 0.8 if self.generation <= 2 else 128 / 130
        return GT_PER_S[self.generation] * self.lanes * encoding / 8

    @property
    def payload_gb_per_s(self) -> float:
        """Payload per direction: TLP headers and data-link packets taken off."""
        packets = self.max_payload_bytes / (self.max_payload_bytes + self.header_bytes)
        return self.raw_gb_per_s * packets * self.flow_share


class Flash(Described):
    """Flash behind the channels of a drive; sim.devices.flash gives the limits and the page engine."""

    channels: Count
    dies_per_channel: Count
    planes_per_die: Count
    page_bytes: Count
    pages_per_block: Count
    channel_gb_per_s: Positive
    read_us: Positive
    read_spread_us: NonNegative = assumed(0.0, FLASH)
    page_types: Literal[2, 3, 4] = assumed(2, FLASH)
    short_read_us: Positive | None = assumed(None, "4 KiB are sensed as long as a page")
    program_us: Positive
    erase_us: Positive
    capacity_gb: Positive
    pe_cycles: Count
    command_us: NonNegative = assumed(0.3, "reference: ONFI command and address about 0.3 us per page read")
    arbitration: Literal["pipelined", "transfer-first"] = assumed("pipelined", "SIM-FLASH-ARB")
    cache_read: bool = assumed(False, "SIM-FLASH-CACHE")
    multi_plane: bool = assumed(True, "SIM-FLASH-PLANES")
    independent_planes: bool = assumed(False, "SIM-FLASH-INDEPENDENT")
    codeword_bytes: Count = assumed(4096, "SIM-FLASH-CODEWORD")
    spare_share: Share = assumed(0.07, "SIM-FLASH-SPARE", gt=0, lt=1)
    retry_rate: Share = assumed(0.0, FLASH)
    retry_max: int = assumed(5, "InstInfer: worst read retry 5", ge=0)

    @model_validator(mode="after")
    def _plausible_flash(self) -> Self:
        if self.channel_gb_per_s > 10:
            raise ValueError(
                f"channel_gb_per_s must be below 10 (is it in Gb/s or MB/s?), got {self.channel_gb_per_s}"
            )
        if not 0.5 <= self.read_us <= 5_000:
            raise ValueError(f"read_us must lie in 0.5..5000 (microseconds), got {self.read_us}")
        short = self.short_read_us or self.read_us
        if not 0.5 <= short <= self.read_us or self.read_spread_us >= short:
            raise ValueError(
                "read_spread_us < short_read_us <= read_us must hold, "
                f"got {self.read_spread_us}, {short} and {self.read_us}"
            )
        if self.program_us < self.read_us or self.erase_us < self.program_us:
            raise ValueError(
                f"read_us <= program_us <= erase_us must hold, got {self.read_us}, {self.program_us}, {self.erase_us}"
            )
        return self


class Ssd(Flash):
    """An NVMe drive as its host sees it: flash, controller, link and the software stack above it."""

    kind: ClassVar[str] = "ssd"
    unsourced: ClassVar[frozenset[str]] = Described.unsourced | {"link"}
    link: str
    read_gb_per_s: Positive
    write_gb_per_s: Positive
    firmware_read_us: NonNegative
    firmware_long_us: NonNegative | None = assumed(None, "as for short reads")
    active_w: Positive
    idle_w: NonNegative
    price_usd: Positive
    queue_depth: Count = assumed(32, "SIM-NVME-QD")
    io_kib: Positive = assumed(128.0, "SIM-NVME-IO")
    host_us_per_io: NonNegative = assumed(8.0, "SIM-NVME-HOST")
    host_us_per_mib: NonNegative = assumed(0.0, "direct IO: no copy on the host")
    read_kiops: Positive | None = assumed(None, "no rating of short reads: flash and link bind")

    @model_validator(mode="after")
    def _plausible_ssd(self) -> Self:
        for field in ("read_gb_per_s", "write_gb_per_s"):
            if getattr(self, field) > 32:
                raise ValueError(
                    f"{field} must be below 32 (is it in Gb/s or MB/s?), got {getattr(self, field)}"
                )
        return self


class Csd(Ssd):
    """A computational drive: an NVMe drive with an attention unit behind its flash channels.

    `engine` says whose unit: "rtl" uses cycles measured on this repository's RTL, "published" the rates of a paper.
    """

    kind: ClassVar[str] = "csd"
    engine: Literal["rtl", "published"] = assumed("rtl", "measured: sim/calibration")
    unit_mhz: Positive
    buffer_gb: Positive
    command_host_us: NonNegative = assumed(8.0, "SIM-CSD-CMD")
    gemv_gflops: Positive = assumed(12.7, "InstInfer Table I, real column")
    gemv_units: Count = assumed(4, "SIM-CSD-GEMV")
    softmax_us_per_2048: Positive = assumed(164.0, "InstInfer Table I, read as one 2048-value softmax")
    softmax_units: Count = assumed(8, "SIM-CSD-SOFTMAX")
    filter_gb_per_s: Positive = assumed(1.85, "InstInfer Table I, real column, per flash controller")
    p2p: bool = assumed(True, "InstInfer: DMA between drive and GPU memory")
    channels_per_page: Count = assumed(2, "SIM-SPARF-M")
    token_clusters_per_page: Positive = assumed(3.6, "SIM-SPARF-LOCALITY")


class Fpga(Described):
    """An FPGA card with the engine: HBM, clock and compute envelope."""

    kind: ClassVar[str] = "fpga"
    engine: Literal["rtl", "published"] = assumed("rtl", "measured: sim/calibration")
    clock_mhz: Positive
    hbm_gb: Positive
    hbm_gb_per_s: Positive
    hbm_share: Share
    hbm_channels: Count = assumed(32, "SIM-HBM")
    hbm_banks: Count = assumed(16, "SIM-HBM")
    hbm_row_bytes: Count = assumed(1024, "SIM-HBM")
    hbm_t_rc_ns: Positive = assumed(45.0, "SIM-HBM")
    hbm_t_faw_ns: Positive = assumed(16.0, "SIM-HBM")
    hbm_t_rfc_ns: NonNegative = assumed(260.0, "SIM-HBM")
    hbm_t_refi_ns: Positive = assumed(3900.0, "SIM-HBM")
    hbm_hit_ns: Positive = assumed(107.0, "benchmarks of a U280's HBM at 450 MHz: idle latency, page hit")
    hbm_closed_ns: Positive = assumed(
        122.0, "benchmarks of a U280's HBM at 450 MHz: idle latency, bank closed"
    )
    hbm_miss_ns: Positive = assumed(138.0, "benchmarks of a U280's HBM at 450 MHz: idle latency, page miss")
    hbm_access_bytes: Count = assumed(1024, "SIM-HBM-ACCESS")
    hbm_outstanding: Count = assumed(16, "SIM-HBM-QD")
    port_bytes_per_cycle: Positive
    macs_per_cycle: Positive
    weight_format: Literal["w8", "w4", "w2", "w2s24"]
    weight_bits: Positive | None = None
    head_format: Literal["w8", "w4", "w2", "w2s24"] = assumed("w8", "SIM-FPGA-HEAD")
    kv_format: Literal["kv4", "kv8"]
    sink_tokens: int = assumed(0, "dense attention", ge=0)
    window_tokens: int = assumed(0, "dense attention", ge=0)
    kv_bits: Positive | None = None
    mac_share: Share = assumed(0.9, "SIM-FPGA-MAC")
    host_us_per_token: NonNegative = assumed(20.0, "SIM-FPGA-HOST")
    lut_used: Count
    static_w: NonNegative = assumed(3.2, "SIM-FPGA-POWER")
    hbm_pj_per_bit: NonNegative = assumed(5.5, "SIM-HBM-ENERGY")
    mw_per_klut_at_225mhz: NonNegative = assumed(30.0, "SIM-FPGA-POWER")
    price_usd: Positive

    @model_validator(mode="after")
    def _plausible(self) -> Self:
        if not 10 <= self.clock_mhz <= 1500:
            raise ValueError(f"clock_mhz must lie in 10..1500, got {self.clock_mhz}")
        if self.hbm_gb_per_s > 5_000:
            raise ValueError(f"hbm_gb_per_s must be below 5000 (is it in Gb/s?), got {self.hbm_gb_per_s}")
        if not self.hbm_hit_ns <= self.hbm_closed_ns <= self.hbm_miss_ns:
            raise ValueError(
                "hbm_hit_ns <= hbm_closed_ns <= hbm_miss_ns must hold, "
                f"got {self.hbm_hit_ns}, {self.hbm_closed_ns} and {self.hbm_miss_ns}"
            )
        if self.hbm_t_rfc_ns >= self.hbm_t_refi_ns:
            raise ValueError(
                f"hbm_t_rfc_ns must be below hbm_t_refi_ns = {self.hbm_t_refi_ns}, got {self.hbm_t_rfc_ns}"
            )
        return self
