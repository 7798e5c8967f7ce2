"""The flash model: two implementations that agree, its rates against closed forms, its faults."""

import os
import random
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from golden.spec import KVStrataError
from golden.spec.storage import PAGE_BYTES, PPN
from golden.storage.layout import Geometry
from hw.storage.flash_model import ERASED, Command, FlashChannel, FlashParams, Grant, page_fault, write_image

HEADERS = Path(__file__).parents[3] / "hw" / "storage"
FAST = FlashParams(read_ns=2000, command_ns=100, ecc_ns=50, dies=4, planes=2)


def play(params, pages, commands, cycles, grants=None, failing=frozenset()):
    """(cycle, data, first, last, fail, slot, kernel) of every beat; `grants` are given per cycle, without them at once.

    Commands are pages, or pages and their kernels.
    """
    rest = [c if isinstance(c, Command) else Command(c) for c in commands]
    if grants is None:
        grants = {0: [Grant(n % 16, command.kernel) for n, command in enumerate(rest)]}
    channel, trace = FlashChannel(params, pages, failing), []
    for now in range(cycles):
        if beat := channel.offer():
            trace.append((now, *beat))
        command = rest.pop(0) if rest and channel.command_ready else None
        channel.tick(command, grants.get(now, ()))
    return trace


def in_turn(count, geometry):
    """Pages of one channel whose arrays take turns without a shift between sweeps: the textbook's steady state."""
    arrays = geometry.dies * geometry.planes
    places = (
        {
            "page": n // arrays,
            "die": n % arrays // geometry.planes,
            "plane": n % geometry.planes,
            "block": 0,
            "channel": 0,
        }
        for n in range(count)
    )
    return [PPN.pack(place) for place in places]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("flash") / "flash_trace"
    source = Path(__file__).with_name("flash_trace.cpp")
    compiler = os.environ.get("CXX", "g++")
    assert shutil.which(compiler), "a C++ compiler is needed"
    subprocess.run([compiler, "-std=c++20", "-O1", f"-I{HEADERS}", str(source), "-o", str(out)], check=True)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_both_models_give_the_same_beats_in_the_same_cycles(program, tmp_path, seed):
    rng = random.Random(seed)
    params = replace(
        FAST,
        cache_read=seed & 1,
        independent_planes=seed >> 1,
        queue=rng.randint(2, 9),
        retry_per_million=300_000,
        fail_per_million=100_000,
        seed=seed,
    )
    places = [{"die": rng.randrange(4), "plane": rng.randrange(2), "page": n} for n in range(12)]
    commands = [Command(PPN.pack(place), rng.randrange(2)) for place in places]
    pages = {command.ppn: rng.randbytes(PAGE_BYTES) for command in commands[:-1]}
    failing = frozenset([commands[3].ppn])
    write_image(tmp_path / "image", pages, failing)
    times = sorted(rng.randrange(6000) for _ in commands)
    grants = {}
    for slot, (now, kernel) in enumerate(zip(times, rng.sample([c.kernel for c in commands], 12))):
        grants.setdefault(now, []).append(Grant(slot, kernel))
    expected = play(params, pages, commands, 20_000, grants, failing)
    words = [
        str(tmp_path / "image"),
        "20000",
        *params.arguments(),
        "--",
        *(f"{command.ppn},{command.kernel}" for command in commands),
        "--",
        *(f"{now},{grant.kernel},{grant.slot}" for now, given in grants.items() for grant in given),
    ]
    out = subprocess.run([program, *words], check=True, capture_output=True, text=True).stdout
    assert [tuple(map(int, line.split())) for line in out.splitlines()] == expected
    assert sum(beat[3] for beat in expected) == 12
    assert [beat[5] for beat in expected if beat[2]] != list(range(12))


def test_beats_carry_the_pages_in_order_and_unwritten_pages_read_erased():
    pages = {PPN.pack({"die": 1}): bytes(range(256)) * 16}
    trace = play(FAST, pages, [PPN.pack({"die": 1}), PPN.pack({"die": 0})], 3000)
    content = b"".join(data.to_bytes(8, "little") for _, data, *_ in trace)
    assert content == bytes(range(256)) * 16 + ERASED
    assert [n for n, beat in enumerate(trace) if beat[2]] == [0, 512]
    assert [n for n, beat in enumerate(trace) if beat[3]] == [511, 1023]


def test_a_page_moves_once_it_is_granted_and_kernels_are_granted_in_their_own_order():
    commands = [Command(PPN.pack({"die": n}), n % 2) for n in range(4)]
    grants = {2000: [Grant(7, 1), Grant(3, 0)], 6000: [Grant(8, 1)], 9000: [Grant(4, 0)]}
    trace = play(FAST, {}, commands, 12_000, grants)
    starts = [(beat[0], beat[5], beat[6]) for beat in trace if beat[2]]
    assert [start[1:] for start in starts] == [(3, 0), (7, 1), (8, 1), (4, 0)]
    assert starts[0][0] >= 2000
    assert starts[2][0] >= 6000
    assert starts[3][0] >= 9000


def test_a_page_that_is_ready_passes_older_ones_that_are_not():
    """Three pages of one die are sensed one after the other; those of other dies do not wait for them."""
    dies = [0, 0, 0, 1, 2]
    commands = [Command(PPN.pack({"die": die, "page": n})) for n, die in enumerate(dies)]
    trace = play(replace(FAST, read_ns=6000), {}, commands, 12_000)
    assert [beat[5] for beat in trace if beat[2]] == [0, 3, 4, 1, 2]


def test_a_failing_page_takes_every_retry_and_says_so_in_its_last_beat():
    ppn = PPN.pack({"die": 1})
    good, bad = play(FAST, {}, [ppn], 9000), play(FAST, {}, [ppn], 9000, failing=frozenset([ppn]))
    assert [beat[4] for beat in bad] == [0] * 511 + [1]
    assert bad[0][0] - good[0][0] == FAST.retry_max * FAST.cycles(FAST.read_ns)
    assert bad[100][1] != good[100][1]


def test_faults_belong_to_pages_and_occur_as_often_as_asked():
    params = replace(FAST, retry_per_million=200_000, fail_per_million=50_000)
    faults = [page_fault(params, ppn) for ppn in range(4000)]
    assert abs(sum(fail for _, fail in faults) / 4000 - 0.05) < 0.02
    assert abs(sum(retries > 0 and not fail for retries, fail in faults) / 4000 - 0.19) < 0.03
    assert {retries for retries, fail in faults if not fail} == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("arrays", "reached"),
    [
        ({"dies": 4, "planes": 1}, 0.23),  # four dies that sense one page each: a fifth of the bus
        ({"dies": 4, "planes": 1, "cache_read": 0}, 0.22),
        ({"dies": 8, "planes": 4, "independent_planes": 0}, 0.47),
        ({"dies": 16, "planes": 4, "independent_planes": 0}, 0.94),
        ({"dies": 8, "planes": 4}, 1.0),  # 32 arrays hide 50 us
        ({}, 1.0),
        ({"dies": 4, "planes": 1, "read_ns": 4000}, 1.0),  # low-latency flash needs four
    ],
)
def test_which_assumptions_make_the_channel_rate(arrays, reached):
    params = replace(FlashParams(), **arrays)
    geometry = Geometry(1, params.dies, params.planes if params.independent_planes else 1, 64, 256)
    trace = play(params, {}, in_turn(160, geometry), 100_000 if reached == 1.0 else 330_000)
    starts = [beat[0] for beat in trace if beat[2]]
    first, rounds = params.arrays, len(starts) // params.arrays - 2
    last = first + rounds * params.arrays
    rate = PAGE_BYTES * (last - first) / (starts[last] - starts[first]) * params.clock_mhz
    assert rate <= params.sustained_mb_per_s * 1.001
    assert rate == pytest.approx(params.sustained_mb_per_s, rel=0.02)
    assert rate / params.channel_mb_per_s == pytest.approx(reached, abs=0.01)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dies", 0, "dies must be an integer of at least 1, not 0"),
        ("read_ns", -5, "read_ns must be an integer of at least 0, not -5"),
        ("queue", 1.5, "queue must be an integer of at least 1, not 1.5"),
        ("channel_mb_per_s", 2400, "2280 MB/s at 285 MHz, not 2400"),
    ],
)
def test_bad_parameters_are_named(field, value, message):
    with pytest.raises(KVStrataError, match=message):
        FlashParams(**{**asdict(FlashParams()), field: value})


def test_an_image_refuses_short_pages_and_leaves_nothing(tmp_path):
    with pytest.raises(KVStrataError, match="4096 bytes; page 0x5 has 3"):
        write_image(tmp_path / "image", {5: b"abc"})
    assert not list(tmp_path.iterdir())


def test_a_truncated_image_is_refused(program, tmp_path):
    write_image(tmp_path / "image", {5: bytes(PAGE_BYTES)})
    (tmp_path / "short").write_bytes((tmp_path / "image").read_bytes()[:-1])
    result = subprocess.run(
        [program, tmp_path / "short", "1", "1"], capture_output=True, text=True, check=False
    )
    assert result.returncode
    assert "is truncated" in result.stderr
