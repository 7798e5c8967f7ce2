"""The whole in-storage unit as Verilog: cache on the flash model, jobs in, outputs compared to golden bit by bit."""

from dataclasses import replace

import numpy as np
import pytest

from golden.spec import KVStrataError
from golden.spec.storage import ATTEND, CONFIG, PPN, PageKind, Status
from golden.storage import attention
from golden.storage.layout import Geometry
from sw_stack.rtl.storage import Cache, Job, Step, UnitConfig, config_record, run, run_steps

pytestmark = pytest.mark.rtl
SMALL = UnitConfig(channels=2, lanes=1, max_tokens=1024)
FAST = {"read_ns": 2000}
_ATTEND = [name for name, _ in ATTEND.fields]
_CONFIG = [name for name, _ in CONFIG.fields]


def batch(seed, lengths, head_size, *, m=4, sparse=False, tail_in_dram=True, queries=1):
    """A cache with one KV head per length, and a job on each."""
    rng = np.random.default_rng(seed)
    # Fewer dies than a page number can name, so that one lies outside.
    cache = Cache(head_size, m=m, geometry=Geometry(channels=2, dies=8), tail_in_dram=tail_in_dram)
    jobs, data = [], []
    for index, tokens in enumerate(lengths):
        k, v = (rng.normal(size=(tokens, head_size)).astype(np.float16) for _ in range(2))
        q = (rng.normal(size=(queries, head_size)) * rng.choice([0.5, 3.0])).astype(np.float16)
        cache.add(index, index % 3, k, v)
        job = Job(index, index % 3, q, tokens)
        if sparse:
            mean = v.mean(0, dtype=np.float32).astype(np.float16)
            top = max(1, int(tokens * rng.choice([0.125, 0.3, 1.0])))
            window = int(rng.integers(0, top + 1))
            job = replace(job, r=int(rng.choice([1, 16, head_size])), k=top, window=window, mean=mean)
        jobs.append(job)
        data.append((k, v))
    return cache, jobs, data


def expected(job, k, v):
    if job.mean is None:
        return attention.dense(job.q, k, v)
    return attention.sparf(job.q, k, v, job.mean, r=job.r, top=job.k, window=job.window).output


def assert_done(result, number, job, k, v):
    done = result.completions[number]
    assert done.status == Status.OK, f"command {number} ended with {done.status.name}"
    got, want = done.output.view(np.uint16), expected(job, k, v).view(np.uint16)
    wrong = np.argwhere(got != want)
    assert not len(wrong), (
        f"command {number}: first of {len(wrong)} differing elements is {wrong[0]}: "
        f"{got[tuple(wrong[0])]:#x}, expected {want[tuple(wrong[0])]:#x}"
    )


def assert_all(result, jobs, data):
    for number, (job, (k, v)) in enumerate(zip(jobs, data)):
        assert_done(result, number, job, k, v)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("seed", [0, 1])
def test_dense_batch(head_size, seed):
    lengths = [1, 16, 17, 32, 33, 63, 200, 129, 5, 64, 31]
    cache, jobs, data = batch(seed, lengths, head_size, tail_in_dram=seed == 0)
    assert_all(run(cache, jobs, SMALL, **FAST, pause_out=30 * seed, pause_map=50 * seed), jobs, data)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(("seed", "m"), [(0, 2), (1, 4), (2, 8)])
def test_sparf_batch(head_size, seed, m):
    lengths = [1, 16, 17, 300, 33, 512, 256, 513, 100]
    cache, jobs, data = batch(seed, lengths, head_size, m=m, sparse=True, tail_in_dram=seed != 1)
    assert_all(run(cache, jobs, SMALL, **FAST, pause_out=20 * seed, map_latency=400 * seed + 1), jobs, data)


def test_dense_and_sparf_in_one_batch():
    cache, jobs, data = batch(7, [90, 260, 40, 300, 64, 128, 200], 64, sparse=True)
    jobs = [replace(job, mean=None) if number % 3 == 0 else job for number, job in enumerate(jobs)]
    assert_all(run(cache, jobs, SMALL, **FAST), jobs, data)


def test_flash_latency_and_read_retries_change_no_bit():
    cache, jobs, data = batch(8, [200, 150, 90], 64, sparse=True)
    for read_ns in (0, 50_000):
        result = run(cache, jobs, SMALL, read_ns=read_ns, retry_per_million=200_000, retry_max=3)
        assert_all(result, jobs, data)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_failing_page_ends_its_own_job_only(sparse):
    cache, jobs, data = batch(3, [100, 300, 80, 200], 64, sparse=sparse)
    jobs = [replace(job, r=16, k=40, window=4) if sparse else job for job in jobs]
    cache.failing.append(cache.page_of(kind=PageKind.K_TOKEN, kv_head=1, sequence=1, index=8))
    jobs[1] = replace(jobs[1], window=jobs[1].k)  # reads the last tokens, whatever the scores
    result = run(cache, jobs, SMALL, **FAST)
    assert (result.completions[1].status, result.completions[1].index) == (Status.UNCORRECTABLE_PAGE, 8)
    assert result.completions[1].output is None
    for number in (0, 2, 3):
        assert_done(result, number, jobs[number], *data[number])


def test_a_failing_page_of_the_approximate_pass_ends_its_job():
    cache, jobs, data = batch(4, [300, 300, 512], 64, sparse=True, tail_in_dram=False)
    jobs = [replace(job, r=64, k=40, window=4) for job in jobs]
    cache.failing.append(cache.page_of(kind=PageKind.K_CHANNEL, kv_head=1, sequence=1, index=3))
    result = run(cache, jobs, SMALL, **FAST)
    assert (result.completions[1].status, result.completions[1].index) == (Status.UNCORRECTABLE_PAGE, 3)
    for number in (0, 2):
        assert_done(result, number, jobs[number], *data[number])


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ("unmapped", Status.UNMAPPED_PAGE),
        ("channel", Status.OUTSIDE_DEVICE),
        ("die", Status.OUTSIDE_DEVICE),
        ("block", Status.OUTSIDE_DEVICE),
        ("page", Status.OUTSIDE_DEVICE),
    ],
)
def test_a_bad_descriptor_ends_its_own_job_only(change, status):
    cache, jobs, data = batch(5, [100, 120, 80], 64)
    (key,) = [
        k
        for k, (ppn, dram) in cache.maps.items()
        if not dram and ppn == cache.page_of(kind=PageKind.V_TOKEN, kv_head=1, sequence=1, index=2)
    ]
    if change == "unmapped":
        del cache.maps[key]
    else:
        fields = PPN.unpack(cache.maps[key][0])
        limit = getattr(cache.geometry, f"{change}s")
        cache.maps[key] = (PPN.pack({**fields, change: limit}), 0)
    result = run(cache, jobs, SMALL, **FAST)
    assert (result.completions[1].status, result.completions[1].index) == (status, 2)
    for number in (0, 2):
        assert_done(result, number, jobs[number], *data[number])


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"kv_head": 3}, "kv_head"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 1025}, "tokens"),
        ({"r": 65}, "r"),
        ({"r": 0}, "r"),
        ({"k": 101}, "k"),
        ({"k": 0}, "k"),
        ({"k": 4, "window": 5}, "window"),
    ],
)
def test_a_bad_command_is_refused_with_its_field(overrides, field):
    cache, jobs, data = batch(6, [100, 100, 50], 64, sparse=True)
    jobs = [replace(job, r=16, k=20, window=4) for job in jobs]
    steps = [Step(config=config_record(cache, 1, kv_heads=3))]
    steps += [Step(job=job, overrides=overrides if number == 1 else {}) for number, job in enumerate(jobs)]
    result = run_steps(cache, steps, SMALL, **FAST)
    assert (result.completions[1].status, result.completions[1].field) == (
        Status.BAD_FIELD,
        _ATTEND.index(field),
    )
    for number in (0, 2):
        assert_done(result, number, jobs[number], *data[number])


def test_config_is_needed_checked_and_refused_while_busy():
    cache, jobs, data = batch(9, [100], 64)
    good = config_record(cache, 1)
    bad = [{**good, "group_queries": 2}, {**good, "channels": 3}, {**good, "m_log2": 0}, {**good, "dies": 17}]
    steps = [
        Step(job=jobs[0]),
        *(Step(config=c) for c in bad),
        Step(config=good),
        Step(job=jobs[0]),
        Step(config=good),
    ]
    result = run_steps(cache, steps, SMALL, **FAST)
    assert result.completions[0].status == Status.NOT_CONFIGURED
    assert_done(result, 1, jobs[0], *data[0])
    fields = [_CONFIG.index(name) for name in ("group_queries", "channels", "m_log2", "dies")]
    wanted = [*((Status.BAD_FIELD, field) for field in fields), (Status.OK, 0), (Status.BUSY, 0)]
    assert result.config_status == wanted


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("after", [0, 3000, 9000])
def test_abort_completes_everything_and_the_unit_goes_on(sparse, after):
    cache, jobs, data = batch(10, [300, 200, 250, 100], 64, sparse=sparse)
    steps = [Step(config=config_record(cache, 1)), *(Step(job=job) for job in jobs[:3])]
    steps += [Step(abort_after=after), Step(job=jobs[3])]
    result = run_steps(cache, steps, SMALL, read_ns=5000)
    for number, job in enumerate(jobs[:3]):
        if result.completions[number].status == Status.OK:
            assert_done(result, number, job, *data[number])
        else:
            assert result.completions[number].status == Status.ABORTED
    if after == 0:
        assert result.completions[2].status == Status.ABORTED


@pytest.mark.parametrize("sparse", [False, True])
def test_an_abort_withdraws_no_request_that_the_firmware_has_not_taken(sparse):
    """The simulation stops at a request that leaves or changes before it is taken."""
    cache, jobs, data = batch(10, [300, 200, 100], 64, sparse=sparse)
    steps = [Step(config=config_record(cache, 1)), *(Step(job=job) for job in jobs[:2])]
    for after in range(700, 760, 6):
        result = run_steps(
            cache, [*steps, Step(abort_after=after), Step(job=jobs[2])], SMALL, **FAST, pause_map=97
        )
        assert Status.ABORTED in {result.completions[number].status for number in range(2)}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("after", [0, 700, 2500, pytest.param(5000, marks=pytest.mark.slow), 9000])
def test_a_reset_in_mid_traffic_leaves_nothing_behind(sparse, after):
    cache, jobs, data = batch(14, [300, 500, 250, 400, 100], 64, sparse=sparse)
    config = Step(config=config_record(cache, 1))
    steps = [config, *(Step(job=job) for job in jobs), Step(reset_after=after)]
    steps += [config, *(Step(job=job) for job in reversed(jobs))]
    result = run_steps(cache, steps, SMALL, read_ns=5000)
    assert not set(range(5)) <= set(result.completions), "the reset must come while jobs are under way"
    for number, job in enumerate(reversed(jobs)):
        assert_done(result, 5 + number, job, *data[4 - number])


def adversarial(number, q, k, v):
    """NaN, infinity and saturated values where they have hurt softmaxes and selections before."""
    tokens = len(k)
    if number == 0:
        k[tokens // 2, 3] = np.nan
    elif number == 1:
        v[7, 5], v[tokens - 1, 9] = np.inf, np.nan
    elif number == 2:
        q[0, 9] = np.inf
    elif number == 3:
        k[:, 0], q[:, 0] = -np.inf, 1
    elif number == 4:
        k[1:, 0], q[:, 0] = -np.inf, 1
    elif number == 5:
        q[0] = np.nan
    elif number == 6:
        q[0], k[3:20] = 0, 6e-8
    else:
        q *= np.float16(200)
        k *= np.float16(500)
        v[::2], v[1::2] = 60000, -60000
    return q, k, v


@pytest.mark.parametrize("sparse", [False, True])
def test_special_values_are_those_of_golden(sparse):
    rng, head_size = np.random.default_rng(15), 64
    cache, jobs, data = Cache(head_size, geometry=Geometry(channels=2)), [], []
    with np.errstate(all="ignore"):
        for number in range(8):
            tokens = 60 + 33 * number
            k, v = (rng.normal(size=(tokens, head_size)).astype(np.float16) for _ in range(2))
            q = (rng.normal(size=(1, head_size)) * 2).astype(np.float16)
            q, k, v = adversarial(number, q, k, v)
            cache.add(number, 0, k, v)
            job = Job(number, 0, q, tokens)
            if sparse:
                mean = v.mean(0, dtype=np.float32).astype(np.float16)
                job = replace(job, r=16, k=tokens // 4, window=4, mean=mean)
            jobs.append(job)
            data.append((k, v))
        assert_all(run(cache, jobs, SMALL, **FAST), jobs, data)


def test_counters_add_up():
    cache, jobs, data = batch(11, [64, 128], 64)
    counters = run(cache, jobs, SMALL, **FAST).counters
    assert counters["pages"] == counters["requests"] == 2 * (2 + 4)
    assert counters["beats"] == 2 * (64 + 128) * 64 // 16
    assert counters["failed_jobs"] == 0


def test_simulations_exist_for_some_channel_counts():
    cache, jobs, _ = batch(12, [16], 64)
    with pytest.raises(KVStrataError, match="1, 2, 4 or 8 flash channels, not 3"):
        run(cache, jobs, UnitConfig(channels=3))
