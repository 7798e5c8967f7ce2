"""The whole unit up to 32K tokens: head sizes, grouped queries, lengths at page, group and block boundaries."""

from dataclasses import replace

import numpy as np
import pytest

from golden.spec.storage import Status
from golden.storage import attention
from hw.storage.topk.timing import digits_used, select_cycles
from sw_stack.rtl import selections
from sw_stack.rtl.storage import Cache, Job, UnitConfig, run

pytestmark = [pytest.mark.rtl, pytest.mark.slow]
LONG = UnitConfig(channels=8, lanes=2, max_tokens=32768)


def assert_golden(result, number, job, k, v):
    if job.mean is None:
        want = attention.dense(job.q, k, v)
    else:
        want = attention.sparf(job.q, k, v, job.mean, r=job.r, top=job.k, window=job.window).output
    done = result.completions[number]
    assert done.status == Status.OK
    np.testing.assert_array_equal(
        done.output.view(np.uint16), want.view(np.uint16), err_msg=f"{job.tokens} tokens"
    )


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize(
    ("head_size", "m", "lengths"),
    [
        (64, 8, (4095, 4097, 8193, 16400, 32767, 32768)),
        (128, 2, (4095, 4097, 8193, 16400, 32767, 32768)),
    ],
)
def test_dense_and_sparf_up_to_32k(head_size, m, lengths, queries):
    """Dense jobs and SparF jobs take turns."""
    rng = np.random.default_rng(head_size + queries)
    cache, jobs, data = Cache(head_size, m=m), [], []
    for number, tokens in enumerate(lengths):
        k, v = (rng.normal(size=(tokens, head_size)).astype(np.float16) for _ in range(2))
        q = (rng.normal(size=(queries, head_size)) * 2).astype(np.float16)
        cache.add(number, 0, k, v)
        job = Job(number, 0, q, tokens)
        if number % 2:
            mean = v.mean(0, dtype=np.float32).astype(np.float16)
            job = replace(job, r=16, k=tokens // 8, window=64, mean=mean)
        jobs.append(job)
        data.append((k, v))
    result = run(cache, jobs, LONG)
    for number, (job, (k, v)) in enumerate(zip(jobs, data)):
        assert_golden(result, number, job, k, v)


def test_argtopk_adds_what_the_closed_form_says_to_a_step_of_32k():
    """A lone step at S = 32K takes longer by the time of the selection, and by no more than a tenth."""
    batch = selections.batch(np.random.default_rng(3), 1, 32768, clustered=True)
    result = run(batch.cache, batch.jobs, LONG)
    (job,) = batch.jobs
    np.testing.assert_array_equal(
        result.completions[0].output.view(np.uint16), batch.traces[0].output.view(np.uint16)
    )
    keys = [int(key) + (1 << 31) for key in batch.traces[0].scores]
    added = select_cycles(job.tokens, digits_used(keys, job.k, window=job.window))
    assert added < 0.1 * result.cycles
