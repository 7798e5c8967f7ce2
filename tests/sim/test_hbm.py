"""HBM limits in their regimes, and which of them an FPGA preset meets."""

import pytest

from sim.describe.base import load
from sim.describe.devices import Fpga
from sim.devices.fpga import memory_bandwidth
from sim.devices.hbm import measure, read_limits

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


@pytest.mark.parametrize(
    ("access", "outstanding", "changes", "binding", "least"),
    [
        (1024, 32, {}, "hbm refresh", 0.97),
        (64, 4, {}, "hbm queue depth", 0.9),
        (64, 16, {}, "hbm queue depth", 0.85),
        (64, 64, {"hbm_t_faw_ns": 40.0}, "hbm tFAW", 0.95),
        (32, 64, {}, "hbm tFAW", 0.95),
        (64, 64, {"hbm_t_rc_ns": 600.0}, "hbm row cycle", 0.65),
        (1024, 32, {"hbm_t_rfc_ns": 1300.0}, "hbm refresh", 0.95),
    ],
)
def test_the_banks_meet_each_limit_in_its_regime(access, outstanding, changes, binding, least):
    card = U280.replaced(**changes) if changes else U280
    limits = read_limits(card, access, outstanding)
    assert limits.binding == binding
    reached = measure(card, access, outstanding, sequential=False, requests=4_000)
    assert least * limits.gb_per_s <= reached <= 1.005 * limits.gb_per_s


def test_streams_of_short_reads_activate_a_row_once():
    slow = U280.replaced(hbm_t_faw_ns=64.0)
    stream, scattered = (measure(slow, 64, 32, sequential, requests=4_000) for sequential in (True, False))
    assert stream > 0.9 * U280.hbm_gb_per_s
    assert scattered < 0.5 * stream
