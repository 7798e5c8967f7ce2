"""HBM limits in their regimes, and which of them an FPGA preset meets."""

import pytest

from sim.describe.base import load
from sim.describe.devices import Fpga
from sim.devices.fpga import memory_bandwidth
from sim.devices.hbm import activate_ns, measure, read_limits

U280 = load(Fpga, "u280")


def test_streams_lose_only_refresh():
    limits = read_limits(U280)
    assert limits.binding == "hbm refresh"
    # Published: 425 of 460 GB/s measured at best.
    assert limits.gb_per_s == pytest.approx(425, rel=0.02)


@pytest.mark.parametrize("depth", [9, 16, 32, 64, 256])
def test_short_random_reads_reach_a_quarter_to_sixty_percent(depth):
    limits = read_limits(U280, 64, depth)
    assert limits.binding == ("hbm queue depth" if depth < 16 else "hbm bank conflicts")
    assert 0.25 <= limits.gb_per_s / U280.hbm_gb_per_s <= 0.60
    reached = measure(U280, 64, depth, sequential=False, requests=4_000)
    assert 0.25 <= reached / U280.hbm_gb_per_s <= 0.60


def test_streams_reach_ninety_to_ninety_two_percent():
    for size, depth in ((64, 32), (256, 16), (1024, 8)):
        reached = measure(U280, size, depth, sequential=True) / U280.hbm_gb_per_s
        assert 0.90 <= reached <= 0.935


def test_idle_latency_is_that_of_an_open_row_a_closed_bank_or_another_row():
    quiet = U280.replaced(hbm_t_refi_ns=1e9)
    size = U280.hbm_row_bytes // 16

    def alone(requests):
        rate = measure(quiet, size, 1, sequential=True, requests=requests) / quiet.hbm_channels
        return requests * size / rate

    # The first read opens its row; the fifteen behind it find it open.
    assert alone(1) == pytest.approx(122)
    assert alone(16) - alone(15) == pytest.approx(107)
    # Bank 0 comes again after 16 rows, with another row open.
    assert alone(16 * 16 + 1) - alone(16 * 16) == pytest.approx(138)


def test_activates_wait_for_their_bank_and_for_the_fourth_before():
    assert activate_ns(1, 45.0, 16.0) == pytest.approx(45, rel=0.01)
    assert activate_ns(4096, 45.0, 16.0) == pytest.approx(4, rel=0.02)
    assert 4 < activate_ns(16, 45.0, 16.0) < 12


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
        (64, 8, {}, "hbm queue depth", 0.85),
        (64, 16, {}, "hbm bank conflicts", 0.75),
        (64, 64, {}, "hbm bank conflicts", 0.95),
        (64, 64, {"hbm_t_faw_ns": 40.0}, "hbm bank conflicts", 0.95),
        (1024, 64, {"hbm_t_faw_ns": 400.0}, "hbm tFAW", 0.95),
        (1024, 64, {"hbm_t_rc_ns": 2_000.0}, "hbm row cycle", 0.3),
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
