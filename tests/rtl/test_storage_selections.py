"""SparF through the whole unit on selections that scatter and that cluster: same bits, different traffic."""

import math

import numpy as np
import pytest

from golden.spec.storage import Status, tokens_per_page
from sw_stack.rtl.storage import UnitConfig, run
from tests.rtl.storage_workloads import bound_cycles, dense, golden, pages_touched, workload

pytestmark = pytest.mark.rtl
SMALL = UnitConfig(channels=2, lanes=1, max_tokens=1024)


def measure(heads, tokens, config, *, clustered, seed=5, **flash):
    """Runs SparF jobs; returns (share of token pages touched, pages, cycles, jobs, cache)."""
    cache, jobs, data = workload(seed, heads, tokens, clustered=clustered, channels=config.channels)
    traces = [golden(job, *kv) for job, kv in zip(jobs, data)]
    pages = [pages_touched(job, trace, cache.m) for job, trace in zip(jobs, traces)]
    result = run(cache, jobs, config, **flash)
    for number, trace in enumerate(traces):
        done = result.completions[number]
        assert done.status == Status.OK
        assert np.array_equal(done.output.view(np.uint16), trace.output.view(np.uint16)), (
            f"head {number} differs"
        )
    total = sum(map(sum, pages))
    assert result.counters["pages"] == total, "the unit reads the pages that golden touches, and no other"
    share = sum(token for _, token in pages) / (2 * heads * tokens / tokens_per_page(128))
    return share, total, result.cycles, jobs, cache


def scattered_share(heads, tokens, window=16):
    """Share of token pages that tokens / 8 selected ones touch when all outside the window lie at random; its spread.

    The window fills one page by itself, which leaves fewer tokens to scatter than the 88 % of an endless context.
    """
    page = tokens_per_page(128)
    others, chosen = tokens - window, tokens // 8 - window
    touched = 1 - math.comb(others - page, chosen) / math.comb(others, chosen)
    pages = tokens // page
    share = (window // page + (pages - window // page) * touched) / pages
    return share, math.sqrt(touched * (1 - touched) / (heads * pages))


def check_traffic(heads, tokens, config, **flash):
    """Returns the two ratios of cycles to the streaming time of the touched pages: clustered, random."""
    shares, ratios, cycles = [], [], []
    for clustered in (True, False):
        share, pages, taken, *_ = measure(heads, tokens, config, clustered=clustered, **flash)
        bound = bound_cycles(pages, config.channels)
        assert taken >= bound
        shares.append(share)
        ratios.append(taken / bound)
        cycles.append(taken)
    expected, spread = scattered_share(heads, tokens)
    assert abs(shares[1] - expected) < 3 * spread, "random touches nearly 88 % of the token pages"
    assert shares[0] < 0.35
    assert cycles[0] < cycles[1]
    return ratios


@pytest.mark.slow
def test_both_kinds_are_exact_and_cost_their_pages():
    check_traffic(4, 1024, SMALL, read_ns=5000)


@pytest.mark.slow
def test_sixteen_heads_of_4k_on_the_published_drive():
    clustered, scattered = check_traffic(16, 4096, UnitConfig())
    assert scattered < 1.07, "the array time of both rounds hides behind other heads"
    assert clustered < 1.35


@pytest.mark.slow
def test_scattered_selections_gain_little_over_dense():
    config = UnitConfig()
    _, pages, cycles, jobs, cache = measure(8, 4096, config, clustered=False)
    every = run(cache, dense(jobs), config)
    gain, fewer_pages = every.cycles / cycles, every.counters["pages"] / pages
    assert fewer_pages < 1.4
    assert 0.85 < gain / fewer_pages < 1.05, "what the pages allow, less what two rounds cost"
