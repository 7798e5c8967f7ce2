"""The closed form of a whole batch against the RTL: within 3 %."""

import numpy as np
import pytest

from golden.storage import attention, batch
from golden.storage.layout import Geometry
from sw_stack.rtl import selections
from sw_stack.rtl.batch_cycles import expected_cycles, flash_times, unit_model
from sw_stack.rtl.storage import Cache, Job, UnitConfig, run

pytestmark = pytest.mark.rtl
SMALL, DRIVE = (
    UnitConfig(channels=2, lanes=1, max_tokens=1024),
    UnitConfig(channels=8, lanes=1, max_tokens=4096),
)
TOLERANCE = 0.03


def batch_of(seed, heads, tokens, head_size, config, *, r=0, k=0, m=2):
    """(cache, jobs, traces) on random K and V; SparF with `r`."""
    rng = np.random.default_rng(seed)
    cache = Cache(head_size, m=m, tail_in_dram=False, geometry=Geometry(channels=config.channels))
    jobs, traces = [], []
    for head in range(heads):
        q, key, value = (rng.standard_normal((n, head_size)).astype(np.float16) for n in (1, tokens, tokens))
        cache.add(0, head, key, value)
        mean = value.mean(0, dtype=np.float32).astype(np.float16) if r else None
        jobs.append(Job(0, head, q, tokens, r, k, min(16, k), mean))
        if r:
            traces.append(attention.sparf(q, key, value, mean, r=r, top=k, window=min(16, k)))
    return cache, jobs, traces


def check(cache, jobs, traces, config, **flash):
    measured = run(cache, jobs, config, **flash).cycles
    expected = expected_cycles(cache, jobs, traces, channels=config.channels, **flash)
    assert abs(expected / measured - 1) <= TOLERANCE, f"{expected:.0f} cycles expected, {measured} measured"


@pytest.mark.parametrize(
    ("heads", "tokens", "head_size", "r", "read_ns"),
    [
        (1, 300, 128, 0, 500),
        pytest.param(5, 500, 64, 0, 5000, marks=pytest.mark.slow),
        pytest.param(3, 512, 128, 16, 500, marks=pytest.mark.slow),
        (6, 1000, 64, 8, 5000),
    ],
)
def test_small_batches_take_the_expected_time(heads, tokens, head_size, r, read_ns):
    made = batch_of(heads, heads, tokens, head_size, SMALL, r=r, k=tokens // 8 if r else 0, m=4)
    check(*made, SMALL, read_ns=read_ns)


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(
    ("heads", "tokens", "read_ns"),
    [(1, 16, 500), (1, 1000, 500), (2, 256, 50_000), (3, 256, 500), (5, 300, 500), (8, 256, 500)]
    + [(9, 500, 5000), (8, 1000, 50_000), (17, 130, 500), (4, 4096, 50_000)],
)
def test_dense_batches_take_the_expected_time(head_size, heads, tokens, read_ns):
    check(*batch_of(tokens, heads, tokens, head_size, DRIVE), DRIVE, read_ns=read_ns)


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(
    ("heads", "tokens", "r", "k", "m", "read_ns"),
    [(1, 4096, 16, 512, 2, 500), (2, 512, 16, 64, 2, 500), (9, 1024, 32, 100, 8, 5000)]
    + [(12, 1024, 8, 128, 4, 50_000), (16, 700, 48, 350, 2, 500), (10, 3000, 1, 16, 8, 500)],
)
def test_sparf_batches_take_the_expected_time(head_size, heads, tokens, r, k, m, read_ns):
    check(*batch_of(tokens, heads, tokens, head_size, DRIVE, r=r, k=k, m=m), DRIVE, read_ns=read_ns)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "tokens", "read_ns"), [(16, 4096, 500), (12, 4096, 50_000), (16, 2048, 5000)]
)
def test_clustered_selections_take_the_expected_time(heads, tokens, read_ns):
    made = selections.batch(np.random.default_rng(heads), heads, tokens, clustered=True)
    check(made.cache, made.jobs, made.traces, DRIVE, read_ns=read_ns)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "read_ns"), [(2048, 500), (2048, 50_000), (7, 50_000)])
def test_scattered_selections_take_the_expected_time(seed, read_ns):
    """Pages enough to fill the ledgers, so that one kernel's hold up the other's."""
    check(*batch_of(seed, 12, 2048, 128, DRIVE, r=8, k=256, m=4), DRIVE, read_ns=read_ns)


def test_the_closed_form_refuses_mixed_batches():
    jobs = [batch.BatchJob(16, []), batch.BatchJob(16, [], [[]])]
    with pytest.raises(ValueError, match="all dense or all SparF"):
        batch.Batch(unit_model(), flash_times(), head_size=64, channels=1).cycles(jobs)
