"""Flash at page fidelity: textbook limits in their regimes, the same times as simpy processes, and latencies."""

import random

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.describe.base import load
from sim.describe.devices import Csd, Link, Ssd
from sim.devices.drive import file_read_bandwidth, read_bandwidth
from sim.devices.flash import (
    first_page_us,
    program_load,
    read_limits,
    sense_us,
    sensing,
    transfer_us,
)
from sim.devices.flash_pages import closed_loop, mixed, scattered, stream
from sim.devices.flash_reads import even_read_s, expected_excess, scattered_read_s

DRIVE = load(Csd, "instcsd")
PAGES = 40_000


def drive(**changes):
    return DRIVE.replaced(**changes)


REGIMES = [
    ({}, "flash array"),
    ({"arbitration": "transfer-first"}, "flash array"),
    ({"arbitration": "transfer-first", "dies_per_channel": 16}, "flash array"),
    ({"multi_plane": False}, "flash array"),
    ({"dies_per_channel": 2, "cache_read": True}, "flash array"),
    ({"dies_per_channel": 64}, "flash channel with commands"),
    ({"read_us": 4.0}, "flash channel with commands"),
    ({"dies_per_channel": 64, "command_us": 20.0}, "flash channel with commands"),
    ({"dies_per_channel": 64, "command_us": 0.0}, "flash channel with commands"),
]


@pytest.mark.parametrize(("changes", "binding"), REGIMES)
def test_saturated_reads_meet_the_textbook_limit(changes, binding):
    flash = drive(**changes)
    limits = read_limits(flash)
    if flash.command_us:
        assert limits.binding == binding
    assert stream(flash, PAGES).gb_per_s(flash.page_bytes) == pytest.approx(limits.gb_per_s, rel=0.01)


def test_limits_by_hand():
    # 8 channels, 8 dies, 2 planes of 4 KiB; tx = 4096 B / 1.4 GB/s = 2.926 us.
    tx = 4096 / 1.4e3
    assert read_limits(DRIVE).limits["flash array"] == pytest.approx(
        8 * 8 * 2 * 4.096 / (0.3 + 62.5 + 2 * tx)
    )
    waiting = read_limits(drive(arbitration="transfer-first")).limits["flash array"]
    assert waiting == pytest.approx(8 * 8 * 2 * 4.096 / (0.3 + 62.5 + 8 * 2 * tx))
    assert read_limits(DRIVE).limits["flash channel with commands"] == pytest.approx(
        8 * 2 * 4.096 / (0.3 + 2 * tx)
    )


@pytest.mark.parametrize("arbitration", ["pipelined", "transfer-first"])
@pytest.mark.parametrize("dies", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("page_bytes", [2048, 4096, 16_384, 65_536])
@pytest.mark.parametrize("planes", [1, 4])
def test_both_arbitrations_meet_their_formula_over_dies_and_pages(arbitration, dies, page_bytes, planes):
    flash = drive(
        arbitration=arbitration,
        dies_per_channel=dies,
        page_bytes=page_bytes,
        planes_per_die=planes,
        channels=2,
    )
    tx, size = page_bytes / 1.4e3, 2 * planes * page_bytes / 1e3
    waits = dies if arbitration == "transfer-first" else 1
    array = dies * size / (0.3 + 62.5 + waits * planes * tx)
    limit = min(array, size / (0.3 + planes * tx))
    assert read_limits(flash).gb_per_s == pytest.approx(limit, rel=1e-3)
    assert stream(flash, 2 * dies * planes * 300).gb_per_s(page_bytes) == pytest.approx(limit, rel=0.015)


def test_long_commands_take_dies_out_of_step():
    flash = drive(
        arbitration="transfer-first",
        dies_per_channel=2,
        command_us=20.0,
        read_us=25.0,
        channels=1,
        page_bytes=2048,
    )
    lock_step = 2 * 2 * 2.048 / (20 + 25 + 2 * 2 * transfer_us(flash))
    run = stream(flash, 4_000).gb_per_s(2048)
    assert read_limits(flash).gb_per_s == pytest.approx(run, rel=0.01)
    assert run > 1.04 * lock_step


def test_the_two_arbitrations_differ_by_what_respected_simulators_differ():
    pipelined, waiting = (
        stream(drive(arbitration=a), PAGES).gb_per_s(4096) for a in ("pipelined", "transfer-first")
    )
    assert 1.4 < pipelined / waiting < 1.7


def simpy_stream(flash, pages):
    """The same saturated read with one simpy process per die and the bus as a priority resource."""
    env = simpy.Environment()
    p = flash.planes_per_die
    out = p * transfer_us(flash)
    finished = []

    def die(bus, own):
        held = None
        for _ in range(own):
            if held is None:
                held = bus.request(priority=0)
                yield held
            yield env.timeout(flash.command_us)
            bus.release(held)
            yield env.timeout(flash.read_us)
            held = bus.request(priority=1)
            yield held
            yield env.timeout(out)
        if held is not None:
            bus.release(held)
        finished.append(env.now)

    for _ in range(flash.channels):
        bus = simpy.PriorityResource(env)
        commands = pages // flash.channels // p
        for _die in range(flash.dies_per_channel):
            env.process(die(bus, commands // flash.dies_per_channel))
    env.run()
    return max(finished) * 1e-6


@pytest.mark.parametrize("changes", [{}, {"dies_per_channel": 2}, {"read_us": 6.0}, {"planes_per_die": 1}])
def test_the_page_engine_agrees_with_one_simpy_process_per_die(changes):
    flash = drive(**changes)
    pages = flash.channels * flash.dies_per_channel * flash.planes_per_die * 10
    assert stream(flash, pages).seconds == pytest.approx(simpy_stream(flash, pages), rel=0.002)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"arbitration": "transfer-first"},
        {"arbitration": "transfer-first", "retry_rate": 0.05},
        {"cache_read": True},
    ],
)
@pytest.mark.parametrize("pages", [3_000, 30_000, 200_000])
def test_a_scattered_selection_ends_with_its_fullest_die(changes, pages):
    flash = drive(**changes)
    seconds = [scattered(flash, pages, seed=s).seconds for s in range(4)]
    assert sum(seconds) / 4 == pytest.approx(scattered_read_s(flash, pages), rel=0.05)
    assert min(seconds) > stream(flash, pages).seconds


def test_small_selections_lose_more_to_uneven_dies_than_large_ones():
    sizes = (500, 5_000, 50_000, 500_000)
    rates = [n * DRIVE.page_bytes / scattered_read_s(DRIVE, n) / 1e9 for n in sizes]
    assert rates == sorted(rates)
    assert rates[0] < 0.5 * read_limits(DRIVE).gb_per_s
    assert rates[-1] > 0.95 * read_limits(DRIVE).gb_per_s


def test_expected_excess_matches_the_balls_themselves():
    rng = np.random.default_rng(5)
    for bins, balls in ((8, 400), (64, 6400), (512, 51_200)):
        fullest = rng.multinomial(balls, np.full(bins, 1 / bins), size=400).max(axis=1).mean()
        assert expected_excess(bins, balls) == pytest.approx(fullest / (balls / bins) - 1, rel=0.12)
    assert expected_excess(1, 100) == 0


@pytest.mark.parametrize("varies", [{"retry_rate": 0.003}, {"retry_rate": 0.05}, {"read_spread_us": 6.0}])
@pytest.mark.parametrize("dies", [2, 4, 8, 32])
def test_dies_out_of_step_wait_less_for_each_other(dies, varies):
    """Transfer-first with equal reads is lock-step; whatever makes reads unequal takes part of the waiting away."""
    flash = drive(arbitration="transfer-first", dies_per_channel=dies, channels=1, **varies)
    pages = 600 * dies * flash.planes_per_die
    run = stream(flash, pages, seed=3).gb_per_s(flash.page_bytes)
    assert read_limits(flash).gb_per_s == pytest.approx(run, rel=0.035)
    sense = flash.command_us + sense_us(flash)
    lock_step = dies * 2 * flash.page_bytes / 1e3 / (sense + dies * 2 * transfer_us(flash))
    free = read_limits(flash.replaced(arbitration="pipelined")).gb_per_s
    assert 0.999 * lock_step < read_limits(flash).gb_per_s < free


def test_queue_depth_one_is_one_latency_per_page():
    flash = drive(multi_plane=False)
    run = closed_loop(flash, 500, 1, overhead_us=12.0)
    one = first_page_us(flash) + 12.0
    assert run.seconds == pytest.approx(500 * one * 1e-6)
    assert run.latencies_us == pytest.approx([one] * 500)


def test_latency_spreads_with_queue_depth_and_every_read_completes():
    runs = [closed_loop(DRIVE, 20_000, depth) for depth in (1, 16, 128)]
    assert all(len(r.latencies_us) == 20_000 for r in runs)
    medians = [round(r.percentile_us(0.5), 6) for r in runs]
    tails = [r.percentile_us(0.99) for r in runs]
    assert medians == sorted(medians)
    assert tails[0] < tails[1] < tails[2]
    assert tails[2] > 2 * medians[2]
    rates = [r.gb_per_s(4096) for r in runs]
    assert rates == sorted(rates)


def test_page_types_make_two_latencies_and_retries_a_tail():
    flash = load(Ssd, "970-pro-1tb").replaced(retry_rate=0.02)
    draw = sensing(flash).times_us(random.Random(1))
    seen = [draw() for _ in range(20_000)]
    base = {round(flash.read_us - 6, 3), round(flash.read_us + 6, 3)}
    assert base <= {round(s, 3) for s in seen}
    assert sum(seen) / len(seen) == pytest.approx(flash.read_us * (1 + 0.02 / 0.98), rel=0.01)
    assert max(seen) <= (flash.read_us + 6) * (1 + flash.retry_max)


def test_three_page_types_make_three_latencies():
    flash = load(Ssd, "femu-tlc")
    draw = sensing(flash).times_us(random.Random(1))
    seen = [round(draw(), 3) for _ in range(9_000)]
    assert {n: 2_700 < seen.count(n) < 3_300 for n in set(seen)} == {55.25: True, 80.0: True, 104.75: True}


def test_retries_cost_their_rate_and_what_the_unluckiest_die_adds():
    clean, worn = stream(DRIVE, 100_000), stream(drive(retry_rate=0.003), 100_000, seed=3)
    cost = worn.seconds / clean.seconds - 1
    per_command = 0.003 * DRIVE.read_us / (DRIVE.read_us + DRIVE.command_us + 2 * transfer_us(DRIVE))
    assert per_command < cost < 4 * per_command


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 12), st.integers(1, 4), st.floats(2, 90), st.integers(1, 4000),
    st.sampled_from(["pipelined", "transfer-first"]), st.booleans(),
)  # fmt: skip
def test_no_configuration_beats_its_limits(channels, dies, planes, read_us, pages, arbitration, cache_read):
    flash = drive(
        channels=channels, dies_per_channel=dies, planes_per_die=planes, read_us=read_us, program_us=100.0,
        arbitration=arbitration, cache_read=cache_read,
    )  # fmt: skip
    run = stream(flash, pages)
    assert run.seconds * 1e6 >= first_page_us(flash) - 1e-6
    assert run.gb_per_s(flash.page_bytes) <= read_limits(flash.replaced(arbitration="pipelined")).gb_per_s * (
        1 + 1e-9
    )


def test_the_same_seed_gives_the_same_times():
    worn = drive(retry_rate=0.05)
    assert stream(worn, 5000, seed=7) == stream(worn, 5000, seed=7)
    assert stream(worn, 5000, seed=7) != stream(worn, 5000, seed=8)


def test_every_drive_bandwidth_names_its_limit():
    ssd, link = load(Ssd, "980-pro-2tb"), load(Link, "pcie4-x4")
    assert read_bandwidth(ssd, link).binding == "drive link"
    assert read_bandwidth(ssd, load(Link, "pcie4-x16")).binding == "drive rating"
    assert read_bandwidth(ssd, link, queue_depth=1).binding == "queue depth"
    assert file_read_bandwidth(ssd, link, 25.0).binding == "memory-mapped file"


def test_many_drives_behind_one_uplink_show_the_contention():
    ssd, link = load(Ssd, "980-pro-2tb"), load(Link, "pcie4-x4")
    uplink = load(Link, "pcie3-x16")
    alone = read_bandwidth(ssd, link, count=4)
    shared = read_bandwidth(ssd, link, count=16).under(uplink)
    assert shared.binding == "shared uplink pcie3-x16"
    assert shared.gb_per_s < alone.gb_per_s


@pytest.mark.parametrize("program_us", [65.0, 700.0])
@pytest.mark.parametrize("programs", [800, 8_000])
def test_programs_take_the_place_of_reads_on_the_dies(program_us, programs):
    drive = load(Csd, "instcsd").replaced(program_us=program_us)
    reads = 40_000
    alone, both = mixed(drive, reads, 0), mixed(drive, reads, programs)
    expected = (reads + programs * program_load(drive)) / reads
    assert both.seconds / alone.seconds == pytest.approx(expected, rel=0.06)
    assert both.percentile_us(0.999) > alone.percentile_us(0.999) + 0.5 * program_us


def test_a_mixed_run_without_programs_is_a_stream():
    drive = load(Csd, "instcsd")
    assert mixed(drive, 40_000, 0).seconds == pytest.approx(stream(drive, 40_000).seconds, rel=1e-9)


CHANGES = {
    "dies_per_channel": [1, 2, 4, 8, 16, 32], "channels": [1, 4, 8, 16], "retry_rate": [0.0, 0.003, 0.05],
    "arbitration": ["pipelined", "transfer-first"], "read_spread_us": [0.0, 6.0], "planes_per_die": [1, 2, 4],
    "cache_read": [False, False, True], "page_bytes": [4096, 16_384],
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_small_reads_of_any_drive_take_what_their_pages_take(seed):
    rng, even, selected = random.Random(seed), [], []
    for _ in range(25):
        flash = drive(**{field: rng.choice(values) for field, values in CHANGES.items()})
        pages, drives = int(10 ** rng.uniform(1, 3.5)), rng.choice([1, 2, 4])
        runs = [stream(flash, -(-pages // drives), s).seconds for s in range(4)]
        even.append(even_read_s(flash, pages, drives) / (sum(runs) / 4) - 1)
        runs = [scattered(flash, pages, drives, s).seconds for s in range(12)]
        selected.append(scattered_read_s(flash, pages, drives) / (sum(runs) / 12) - 1)
    for errors, mean, worst in ((even, 0.05, 0.3), (selected, 0.08, 0.3)):
        assert sum(map(abs, errors)) / len(errors) <= mean
        assert max(map(abs, errors)) <= worst
