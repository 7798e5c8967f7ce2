"""Devices on their own: known drives under known access patterns, the page engine below its limits, bad input."""

import math
import random

import pytest

from sim.describe.base import ConfigError, listed, load
from sim.describe.devices import Gpu, Link, Ssd
from sim.devices.drive import random_read_bandwidth, random_reads
from sim.devices.flash import overwrite_amplification
from sim.devices.flash_pages import closed_loop
from sim.devices.probe import probe


def kiops(drive, depth, threads=1, kib=4.0):
    ssd = load(Ssd, drive)
    link = load(Link, ssd.link)
    run = random_reads(ssd, link, kib, depth, threads, reads=6_000)
    bound = random_read_bandwidth(ssd, link, kib, depth, threads)
    reached = len(run.latencies_us) / run.seconds / 1e3
    assert reached <= 1.01 * bound.gb_per_s * 1e6 / (kib * 1024)
    return reached, bound.binding


def test_published_random_reads_of_a_consumer_drive():
    # Published: about a million reads of 4 KiB per second at high depth, 50-80 us for one alone.
    assert kiops("980-pro-2tb", 32, 16) == (pytest.approx(1000, rel=0.05), "drive rating of short reads")
    alone, binding = kiops("980-pro-2tb", 1)
    assert 1e3 / 80 <= alone <= 1e3 / 50
    assert binding == "queue depth"


@pytest.mark.parametrize(
    ("drive", "kib", "microseconds"),
    [
        # Firmware, array, codewords on the bus, command; published parameters of the models that respected
        # simulators hold.
        ("970-pro-1tb", 4, 21.5 + 35.76 + 4096 / 800 + 0.3),
        ("970-pro-1tb", 32, 30.49 + 36.013 + 32_768 / 800 + 0.3),
        ("zn540", 4, 20 + 50 + 4096 / 450 + 0.3),
        ("zn540", 32, 13 + 58 + 32_768 / 450 + 0.3),
        ("zns-prototype", 4, 32.15 + 25.485 + 4096 / 800 + 0.3),
        ("zns-prototype", 64, 32.15 + 40.95 + 65_536 / 800 + 0.3),
        ("femu", 4, 40 + 4096 / 10_000),
    ],
)
def test_a_read_alone_takes_what_its_parts_take(drive, kib, microseconds):
    ssd = load(Ssd, drive).replaced(host_us_per_io=0.0, read_spread_us=0.0)
    link = load(Link, ssd.link)
    alone = random_reads(ssd, link, kib, 1, reads=50).percentile_us(0.5)
    assert alone == pytest.approx(microseconds + 1.0 + kib * 1.024 / link.payload_gb_per_s)


@pytest.mark.parametrize("drive", listed("ssd"))
@pytest.mark.parametrize("arbitration", ["pipelined", "transfer-first"])
def test_random_reads_stay_below_their_limits_and_grow_with_depth(drive, arbitration):
    ssd = load(Ssd, drive).replaced(arbitration=arbitration)
    link, rates = load(Link, ssd.link), []
    for depth in (1, 4, 16, 64):
        run = random_reads(ssd, link, 4.0, depth, threads=16, reads=16_000)
        rates.append(len(run.latencies_us) / run.seconds * 4096)
        assert rates[-1] <= 1.01 * random_read_bandwidth(ssd, link, 4.0, depth, 16).bytes_per_s
    assert all(after >= 0.97 * before for before, after in zip(rates, rates[1:]))


def test_one_thread_is_bound_by_its_software():
    reached, binding = kiops("znand-class", 64)
    assert binding == "host software"
    assert reached == pytest.approx(125, rel=0.02)


def test_planes_that_read_on_their_own_multiply_short_reads():
    together = load(Ssd, "980-pro-2tb").replaced(independent_planes=False)
    apart = together.replaced(independent_planes=True)
    slow, fast = (closed_loop(d, 8_000, 512, size_bytes=4096).seconds for d in (together, apart))
    assert 1.5 < slow / fast <= 4


def test_a_short_read_moves_codewords_not_pages():
    drive = load(Ssd, "980-pro-2tb").replaced(independent_planes=False)
    short, whole = (closed_loop(drive, 1, 1, size_bytes=n).seconds for n in (4096, 16384))
    assert (whole - short) * 1e6 == pytest.approx(12_288 / 1.2e3)
    assert closed_loop(drive, 1, 1, size_bytes=100).seconds == short


def test_a_read_of_many_pages_ends_with_its_last():
    drive = load(Ssd, "970-pro-1tb").replaced(read_spread_us=0.0)
    one, eight = (closed_loop(drive, 1, 1, size_bytes=n * 32_768) for n in (1, 8))
    # Eight pages lie on eight channels.
    assert eight.seconds == one.seconds
    assert eight.pages == 8
    nine = closed_loop(drive, 1, 1, size_bytes=9 * 32_768)
    assert one.seconds < nine.seconds < 2 * one.seconds


@pytest.mark.parametrize(
    "spare", [pytest.param(0.07, marks=pytest.mark.slow), pytest.param(0.15, marks=pytest.mark.slow), 0.28]
)
def test_cleaning_blocks_by_age_copies_what_the_formula_says(spare):
    drive = load(Ssd, "980-pro-2tb").replaced(spare_share=spare)
    blocks, pages = 400, 64
    logical = int(blocks * pages * (1 - spare))
    valid, where, order, rng = [0] * blocks, [0] * logical, list(range(blocks)), random.Random(0)
    held = [[] for _ in range(blocks)]
    written = asked = 0
    for page in range(logical):
        where[page] = page // pages
        held[page // pages].append(page)
        valid[page // pages] += 1
    used = math.ceil(logical / pages)
    full, empty, current = order[:used], order[used + 1 :], order[used]

    def program(page):
        nonlocal current, written
        if len(held[current]) == pages:
            full.append(current)
            current = empty.pop()
        where[page] = current
        held[current].append(page)
        written += 1

    for step in range(12 * logical):
        if step == 6 * logical:
            written = asked = 0
        program(rng.randrange(logical))
        asked += 1
        while len(empty) < 2:
            victim = full.pop(0)
            kept = [p for p in set(held[victim]) if where[p] == victim]
            held[victim] = []
            empty.insert(0, victim)
            for page in kept:
                program(page)
    # The free blocks of so small a drive take from its reserve.
    reserve = load(Ssd, "980-pro-2tb").replaced(spare_share=1 - logical / ((blocks - 2.5) * pages))
    low, high = overwrite_amplification(drive), overwrite_amplification(reserve)
    assert 0.95 * low <= written / asked <= 1.1 * high


def test_a_profile_is_compared_with_any_gpu(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("device,op,M_tokens,K,N,median_ms\nh100,mlp_up_proj,1,4096,22016,0.08\n")
    rows = {r["what"]: r["value"] for r in probe("gpu", "h100", {}, profile=path)}
    assert rows["h100 mlp_up_proj: mean absolute error"] < 20
    faster = load(Gpu, "h100").bandwidth_share
    assert probe("gpu", "h100", {"bandwidth_share": faster / 2}, profile=path)[0]["value"] > 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("disk", "x", {}), "a device is one of ssd, csd, fpga, gpu, link, got 'disk'"),
        (("ssd", "980-pro", {}), "did you mean 980-pro-2tb"),
        (("ssd", "980-pro-2tb", {"chanels": 3}), "did you mean channels"),
        (("ssd", "980-pro-2tb", {}, 0.0), "size, depth and threads must be positive, got 0 KiB"),
        (("fpga", "u280", {"hbm_t_rfc_ns": 5e3}), "hbm_t_rfc_ns must be below hbm_t_refi_ns"),
    ],
)
def test_bad_requests_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        probe(*arguments)


def test_a_profile_without_its_columns_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("device,op,M_tokens\nh100,qkv_proj,4\n")
    with pytest.raises(ConfigError, match=r"rows.csv line 2: needs op, median_ms"):
        probe("gpu", "h100", {}, profile=path)
