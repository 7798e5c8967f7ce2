"""Drawn batches: their pages against the traffic of a selection, and long batches against followed ones."""

import pytest

from golden.spec.storage import channel_pages, token_pages
from golden.storage.batch import Batch, FlashTimes, UnitTimes
from golden.storage.batch_shapes import PROBED, Shape, batch_cycles, typical_jobs
from hw.storage.timing import unit_times

TIMES = UnitTimes(**unit_times())
SLOW = FlashTimes(14250, 86, 285, 833.8)


@pytest.mark.parametrize(("m", "head_size", "run_tokens"), [(2, 128, 0), (4, 64, 64), (8, 128, 16)])
def test_a_drawn_job_reads_what_its_selection_touches(m, head_size, run_tokens):
    shape = Shape(1000, head_size, r=16, k=125, m=m, window=40, run_tokens=run_tokens)
    for job in typical_jobs(shape, 4):
        assert sum(job.rows) == 125
        assert len(job.rows) == 63
        pages = [page for block in job.blocks for page in block]
        rows = 2048 // m // 16
        assert sum(page.beats for page in pages) == 16 * rows * len(job.blocks)
        assert len(pages) <= channel_pages(1000, head_size, m)
        assert sum(k.beats for _, k, _ in job.exact) == 125 * head_size // 16


def test_a_dense_job_reads_every_page_and_channels_share_them():
    (job,) = typical_jobs(Shape(4096), 1)
    assert len(job.exact) == token_pages(4096, 128)
    loads = [0] * 8
    for _, key, value in job.exact:
        loads[key.channel] += 1
        loads[value.channel] += 1
    assert loads == [64] * 8


def test_runs_touch_fewer_pages_than_scattered_tokens():
    runs, scattered = (
        sum(len(job.exact) for job in typical_jobs(Shape(4096, r=16, k=512, window=64, run_tokens=n), 8))
        for n in (64, 0)
    )
    assert runs < 8 * 40
    assert 8 * 200 < scattered <= 8 * 256


@pytest.mark.parametrize(
    "shape",
    [Shape(512), Shape(2048, r=16, k=256, window=64, run_tokens=64), Shape(1024, r=8, k=128, m=4)],
)
def test_long_batches_go_on_as_their_followed_jobs(shape):
    heads = 2 * PROBED
    followed = Batch(TIMES, SLOW, head_size=128, channels=8, m=shape.m).cycles(typical_jobs(shape, heads))
    assert batch_cycles(shape, heads, TIMES, SLOW) == pytest.approx(followed, rel=0.03)
