"""Drawn SparF selections: the pages of a job are those that the layout and the filter give for its tokens."""

import numpy as np
import pytest

from golden.spec.storage import GROUP_TOKENS, PageKind, tokens_per_channel_page
from golden.storage.layout import filtered_beats, place, token_marks
from sim.devices.storage_unit import FlashBehind, Selection, _job

FLASH = FlashBehind(channels=8, arrays=32, read=142, command=86, ecc=285, page=833.8)


def drawn(selection, tokens, heads=4):
    rng = np.random.default_rng(1)
    return [_job(selection, tokens, head, FLASH, rng) for head in range(heads)]


@pytest.mark.parametrize(("head_size", "m", "run_groups"), [(128, 2, 1), (64, 4, 4), (128, 8, 2), (64, 2, 1)])
def test_a_drawn_job_reads_what_the_filter_passes_of_its_selection(head_size, m, run_groups):
    tokens, r = 1000, 16
    selection = Selection(head_size, r, m, share=0.125, page_share=0.5, run_groups=run_groups)
    for head, job in enumerate(drawn(selection, tokens)):
        assert len(job.rows) == 63
        assert sum(job.rows) == 125
        chosen = [GROUP_TOKENS * group + i for group, n in enumerate(job.rows) for i in range(n)]
        where = {"groups": head_size // m, "channels": 8, "arrays": 32}
        for kind, pages in ((PageKind.K_TOKEN, 1), (PageKind.V_TOKEN, 2)):
            marks = token_marks(kind, chosen, 63 * GROUP_TOKENS, head_size)
            assert [entry[0] for entry in job.exact] == [mark.index for mark in marks]
            for entry, mark in zip(job.exact, marks, strict=True):
                channel, array = place(kind, head, mark.index, **where)
                page = entry[pages]
                assert (page.channel, page.array) == (channel, array)
                assert page.beats == filtered_beats(mark, head_size)
        rows = tokens_per_channel_page(m) // GROUP_TOKENS
        assert len(job.blocks) == -(-tokens // tokens_per_channel_page(m))
        for block in job.blocks:
            assert len(block) == len(job.groups) <= r
            assert sum(page.beats for page in block) == r * rows


def test_runs_touch_neighbouring_pages_and_a_share_bounds_them():
    def groups(selection):
        return [[i for i, n in enumerate(job.rows) if n] for job in drawn(selection, 4096, 8)]

    runs, scattered = (groups(Selection(128, 16, 2, 0.125, 0.2, run_groups=n)) for n in (4, 1))
    for found in (*runs, *scattered):
        assert len(found) == round(0.2 * 256)
    neighbours = [
        sum(b - a == 1 for job in found for a, b in zip(job, job[1:])) for found in (runs, scattered)
    ]
    assert neighbours[0] > 2 * neighbours[1]
