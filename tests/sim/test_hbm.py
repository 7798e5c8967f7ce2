"""HBM limits in their regimes, and which of them an FPGA preset meets."""

import pytest

from sim.describe.base import load
from sim.describe.devices import Fpga
from sim.devices.fpga import memory_bandwidth
from sim.devices.hbm import read_limits

U280 = load(Fpga, "u280")


def test_streams_lose_only_refresh():
    limits = read_limits(U280)
    assert limits.binding == "hbm refresh"
    # Published: 425 of 460 GB/s measured at best.
    assert limits.gb_per_s == pytest.approx(425, rel=0.02)


def test_short_random_reads_reach_a_quarter_to_sixty_percent():
    limits = read_limits(U280, 64)
    assert limits.binding == "hbm queue depth"
    assert 0.25 <= limits.gb_per_s / U280.hbm_gb_per_s <= 0.60


def test_one_outstanding_read_is_one_latency():
    alone = read_limits(U280.replaced(hbm_outstanding=1, hbm_channels=1), 64)
    assert alone.gb_per_s == pytest.approx(64 / 138)


def test_bandwidth_never_falls_with_longer_accesses():
    rates = [read_limits(U280, 2**n).gb_per_s for n in range(5, 11)]
    assert rates == sorted(rates)


def test_the_port_trap_of_256_bit_ports_at_225_mhz_binds():
    narrow = memory_bandwidth(U280.replaced(port_bytes_per_cycle=1024.0))
    assert narrow.binding == "hbm ports at the engine clock"
    assert narrow.gb_per_s == pytest.approx(230.4)
    assert memory_bandwidth(U280).binding == "hbm share reached on the board"
