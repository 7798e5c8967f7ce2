"""The HBM model: idle latencies and efficiencies follow from the timing parameters, in every mode, on every run."""

import random
from dataclasses import replace

import pytest

from golden.spec import KVStrataError
from golden.spec.memory import CHANNEL_BYTES, HbmTiming, MemoryModel
from hw.engine.mem.hbm import MemoryChannel
from tools.bench.mem import model_efficiency, random_efficiency, stream_efficiency

TIMING = HbmTiming()
QUIET = replace(TIMING, t_refi_ps=10**12)
USER_CYCLE_PS = 10**9 / TIMING.user_clock_khz


def timed(**changes):
    return MemoryModel(timing=replace(TIMING, **changes))


def latency_ps(channel, cycle, address):
    return (channel.serve(cycle, address, 32) - cycle) * USER_CYCLE_PS


def test_idle_latency_is_the_measured_one_plus_the_clock_crossing():
    """Page hit 107 ns, closed 122 ns, miss 138 ns at the port; the crossing to 225 MHz adds 18 ns and the rounding
    up to a user cycle less than one."""
    channel = MemoryChannel(MemoryModel(timing=QUIET))
    row_pitch = TIMING.row_bytes * TIMING.bank_groups * TIMING.banks_per_group
    for cycle, address, expected_ns in ((1000, 0, 122), (2000, 0, 107), (3000, row_pitch, 138)):
        found = latency_ps(channel, cycle, address)
        assert 0 <= found - (expected_ns + 18) * 1000 < USER_CYCLE_PS + 1
    stats = channel.stats
    assert (stats.closed, stats.hits, stats.misses) == (1, 1, 1)


def test_streams_lose_what_refresh_takes_and_little_more():
    found = stream_efficiency(MemoryModel())
    assert TIMING.refresh_limit - 0.02 < found <= TIMING.refresh_limit
    assert found == pytest.approx(425 / 460, abs=0.01)  # best rate measured on the board


def test_a_longer_refresh_costs_a_stream_its_share():
    twice = replace(TIMING, t_rfc_ps=2 * TIMING.t_rfc_ps)
    assert stream_efficiency(MemoryModel(timing=twice)) == pytest.approx(
        stream_efficiency(MemoryModel()) - TIMING.t_rfc_ps / TIMING.t_refi_ps, abs=0.005
    )


def test_random_words_reach_a_quarter_to_60_percent():
    assert 0.25 < random_efficiency(MemoryModel()) < 0.60


@pytest.mark.parametrize(
    "worse",
    [
        {"t_rp_ps": 40_000},
        {"t_rcd_ps": 40_000},
        {"t_faw_ps": 40_000},
        {"banks_per_group": 1},
        {"lookahead": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_bank_parameter_bears_on_random_efficiency(worse):
    assert random_efficiency(timed(**worse)) < 0.97 * random_efficiency(MemoryModel())


def test_four_activates_per_window_bound_random_rows():
    """With only tFAW in the way, an access of one row each cannot come faster than four per window."""
    window = replace(QUIET, t_faw_ps=80_000, lookahead=64)
    source = random.Random(3)
    rows = [source.randrange(CHANNEL_BYTES) // 32 * 32 for _ in range(5000)]
    found = model_efficiency(rows, 32, MemoryModel(timing=window))
    bound = 32 * 4 / 80_000 * 1000 / TIMING.peak_gb_per_s
    assert 0.9 * bound < found <= bound * 1.001


def test_reads_between_writes_pay_the_turnaround():
    alternate, alike = MemoryChannel(MemoryModel(timing=QUIET)), MemoryChannel(MemoryModel(timing=QUIET))
    for n in range(64):
        mixed_end = alternate.serve(0, 64 * n, 64, write=bool(n % 2))
        alike_end = alike.serve(0, 64 * n, 64)
    assert mixed_end > 3 * alike_end / 2
    assert alternate.stats.turnarounds == 63


def test_refresh_comes_every_refi_and_channels_are_out_of_phase():
    starts = []
    for number in (0, 16):
        channel = MemoryChannel(MemoryModel(), number=number)
        for cycle in range(0, 40_000, 20):
            channel.serve(cycle, 0, 32)
        starts.append(channel.stats.refreshes)
        assert channel.stats.refreshes == pytest.approx(40_000 * USER_CYCLE_PS / TIMING.t_refi_ps, abs=1)
        assert channel.stats.closed >= channel.stats.refreshes
    one, other = (MemoryChannel(MemoryModel(), number=n) for n in (0, 16))
    assert [one.serve(c, 0, 32) for c in range(0, 2000, 50)] != [
        other.serve(c, 0, 32) for c in range(0, 2000, 50)
    ]


def test_images_are_mapped_and_never_written_back(tmp_path):
    image = tmp_path / "weights.bin"
    image.write_bytes(bytes(range(256)) * 32)
    channel = MemoryChannel(MemoryModel(), size=1 << 20)
    channel.load(image, 4096)
    channel.load(image, 65536 + 10)
    assert bytes(channel.contents[4096 : 4096 + 8192]) == bytes(channel.contents[65546 : 65546 + 8192])
    channel.contents[4096] = 99
    assert image.read_bytes()[0] == 0
    with pytest.raises(KVStrataError, match="does not fit: it ends at byte 1056768 of 1048576"):
        channel.load(image, (1 << 20) - 0)
    with pytest.raises(KVStrataError, match="cannot read memory image .*missing.bin"):
        channel.load(tmp_path / "missing.bin")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MemoryModel("ideal"), "memory mode must be 'hbm', 'fixed' or 'random', not 'ideal'"),
        (lambda: MemoryModel("fixed", 0), "memory latency must be 1 to 10000 cycles, not 0"),
        (lambda: MemoryModel(stall_percent=100), "memory stalls must be 0 to 95 percent, not 100"),
        (lambda: MemoryModel(error_response=1), r"an error response is 2 \(SLVERR\) or 3 \(DECERR\), not 1"),
        (lambda: HbmTiming(t_rp_ps=0), "HBM timing t_rp_ps must be a positive integer, not 0"),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(KVStrataError, match=message):
        make()
