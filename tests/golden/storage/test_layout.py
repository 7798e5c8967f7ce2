"""Page formats: inverse, every entry once, selections, what the filter passes, bytes touched."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden.spec import KVStrataError
from golden.spec.storage import PAGE_BYTES, PPN, PageKind, tokens_per_channel_page, tokens_per_page
from golden.storage.layout import (
    AppendOrder,
    Geometry,
    PageMark,
    channel_marks,
    filtered,
    filtered_beats,
    marked,
    pack,
    place,
    token_marks,
    traffic,
    unpack,
)

kinds = st.sampled_from(
    [(PageKind.K_TOKEN, 0), (PageKind.V_TOKEN, 0), *((PageKind.K_CHANNEL, m) for m in (2, 4, 8))]
)
head_sizes = st.sampled_from([64, 128])


def numbered(tokens, dh):
    """A head whose every element differs, as 16-bit patterns (distinct below 512 tokens x 128)."""
    return (np.arange(tokens * dh, dtype=np.int64) % 65535 + 1).astype(np.uint16).reshape(tokens, dh)


@given(kinds, head_sizes, st.integers(1, 1100))
@settings(max_examples=80, deadline=None)
def test_unpack_inverts_pack_and_padding_is_zero(kind_m, dh, tokens):
    kind, m = kind_m
    x = numbered(tokens, dh)
    pages = pack(kind, x, m)
    assert (unpack(kind, pages, tokens, dh, m) == x).all()
    assert np.count_nonzero(pages) == x.size
    assert sorted(pages[pages != 0]) == sorted(x.ravel())


@pytest.mark.parametrize("dh", [64, 128])
def test_positions_are_those_of_the_specification(dh):
    x = numbered(300, dh)
    span = tokens_per_page(dh)
    k, v = pack(PageKind.K_TOKEN, x), pack(PageKind.V_TOKEN, x)
    for token, c in ((0, 0), (17, 5), (299, dh - 1), (31, 63)):
        t = token % span
        assert k[token // span, t * dh + c] == x[token, c]
        assert v[token // span, (t // 16) * 16 * dh + c * 16 + t % 16] == x[token, c]
        for m in (2, 4, 8):
            row = tokens_per_channel_page(m)
            page = pack(PageKind.K_CHANNEL, x, m)[token // row * (dh // m) + c // m]
            assert page[c % m * row + token % row] == x[token, c]


@st.composite
def selections(draw):
    tokens, dh = draw(st.integers(1, 600)), draw(head_sizes)
    kind, m = draw(kinds)
    limit = dh if kind is PageKind.K_CHANNEL else tokens
    chosen = sorted(draw(st.sets(st.integers(0, limit - 1), max_size=40)))
    return kind, m, dh, tokens, chosen


@given(selections())
@settings(max_examples=150, deadline=None)
def test_marks_cover_the_selection_once_and_touch_no_other_page(case):
    kind, m, dh, tokens, chosen = case
    if kind is PageKind.K_CHANNEL:
        marks = channel_marks(chosen, tokens, dh, m)
        blocks, groups = -(-tokens // tokens_per_channel_page(m)), dh // m
        found = [
            (mark.index // groups, mark.index % groups * m + bit)
            for mark in marks
            for bit in marked(mark.mask)
        ]
        assert found == [(block, channel) for block in range(blocks) for channel in chosen]
        entry_bytes = len(chosen) * blocks * PAGE_BYTES // m
    else:
        marks = token_marks(kind, chosen, tokens, dh)
        found = [mark.index * tokens_per_page(dh) + bit for mark in marks for bit in marked(mark.mask)]
        assert found == chosen
        entry_bytes = len(chosen) * dh * 2
    assert all(mark.mask for mark in marks)
    assert [mark.index for mark in marks] == sorted({mark.index for mark in marks})
    touched = traffic(marks, dh, m)
    assert (touched.pages, touched.page_bytes, touched.entry_bytes) == (
        len(marks),
        4096 * len(marks),
        entry_bytes,
    )


@given(selections())
@settings(max_examples=100, deadline=None)
def test_the_filter_passes_marked_entries_and_nothing_else(case):
    kind, m, dh, tokens, chosen = case
    x = numbered(tokens, dh)
    pages = pack(kind, x, m)
    marks = channel_marks(chosen, tokens, dh, m) if m else token_marks(kind, chosen, tokens, dh)
    for mark in marks:
        beats = filtered(mark, pages[mark.index], dh, m)
        assert beats.shape == (filtered_beats(mark, dh, m), 16)
        if kind is PageKind.K_CHANNEL:
            block, group = divmod(mark.index, dh // m)
            row = tokens_per_channel_page(m)
            wanted = [x[block * row : (block + 1) * row, group * m + c] for c in marked(mark.mask)]
            assert sorted(beats[beats != 0]) == sorted(np.concatenate(wanted))
        else:
            first = mark.index * tokens_per_page(dh)
            wanted = [x[first + t] for t in marked(mark.mask)]
            assert sorted(beats[beats != 0]) == sorted(np.concatenate(wanted))


def test_a_page_without_marks_passes_nothing():
    page = np.ones(2048, np.uint16)
    for kind, m in ((PageKind.K_TOKEN, 0), (PageKind.V_TOKEN, 0), (PageKind.K_CHANNEL, 4)):
        assert filtered(PageMark(kind, 0, 0), page, 128, m).shape == (0, 16)
        assert filtered_beats(PageMark(kind, 0, 0), 128, m) == 0


def test_a_random_eighth_of_the_tokens_touches_88_percent_of_the_pages():
    """1 - C(16-wide page misses all) = 1 - (7/8)^16 = 0.882; clustered selections touch far fewer."""
    rng = np.random.default_rng(7)
    tokens, dh = 32768, 128
    chosen = sorted(rng.choice(tokens, tokens // 8, replace=False))
    share = len(token_marks(PageKind.K_TOKEN, chosen, tokens, dh)) / (tokens // 16)
    assert abs(share - (1 - (7 / 8) ** 16)) < 0.02


def slots(kind, index, head=0, *, groups=64, channels=8, arrays=32):
    """(channel, array) of each page."""
    where = place(kind, head, np.asarray(index), groups=groups, channels=channels, arrays=arrays)
    return list(zip(*(part.tolist() for part in where)))


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_placing_fills_all_arrays_alike(channels, arrays, head):
    """K and V of a head put the same number of pages on every array, whatever the device."""
    half = max(1, channels // 2)
    count = half * channels * arrays  # rows of 2 * half pages
    tokens = [
        slot
        for kind in (PageKind.K_TOKEN, PageKind.V_TOKEN)
        for slot in slots(kind, np.arange(count), head, channels=channels, arrays=arrays)
    ]
    assert Counter(tokens).keys() == {(c, a) for c in range(channels) for a in range(arrays)}
    assert set(Counter(tokens).values()) == {2 * half}


@given(st.integers(0, 63), st.integers(0, 100), st.sampled_from([16, 32, 64]))
@settings(max_examples=40, deadline=None)
def test_what_is_read_together_lies_on_all_channels_and_one_array(run, head, groups):
    run_pages = np.arange(4 * run, 4 * run + 4)
    row = slots(PageKind.K_TOKEN, run_pages, head) + slots(PageKind.V_TOKEN, run_pages, head)
    assert {channel for channel, _ in row} == set(range(8))
    assert len({array for _, array in row}) == 1
    one_group = slots(PageKind.K_CHANNEL, np.arange(8) * groups + run % groups, head, groups=groups)
    assert {channel for channel, _ in one_group} == set(range(8))
    assert len({array for _, array in one_group[:4]}) == 1


def test_an_array_fills_block_by_block_and_then_refuses():
    order = AppendOrder(Geometry(2, 2, 2, blocks=2, pages=2))
    taken = [order.take(1, 3) for _ in range(4)]
    assert [(t["block"], t["page"]) for t in taken] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(t["channel"], t["die"], t["plane"]) for t in taken} == {(1, 1, 1)}
    assert len({PPN.pack(t) for t in taken}) == 4
    with pytest.raises(KVStrataError, match="array 3 of channel 1 is full"):
        order.take(1, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pack(PageKind.K_TOKEN, np.zeros((4, 96), np.float16)),
            "head size must be one of .*, not 96",
        ),
        (lambda: pack(PageKind.K_TOKEN, np.zeros((4, 64), np.float32)), "16-bit elements, not float32"),
        (
            lambda: pack(PageKind.K_CHANNEL, np.zeros((4, 64), np.float16), 3),
            "channels per page must be one of .*, not 3",
        ),
        (
            lambda: unpack(PageKind.K_TOKEN, np.zeros((2, 2048), np.uint16), 16, 128),
            r"16 tokens .* take \[1, 2048\]",
        ),
        (lambda: token_marks(PageKind.K_TOKEN, [3, 3], 16, 128), "ascending and distinct"),
        (lambda: token_marks(PageKind.K_TOKEN, [16], 16, 128), r"selected tokens lie in 0\.\.15, not 16"),
        (lambda: channel_marks([-1], 16, 128, 4), r"selected channels lie in 0\.\.127, not -1"),
        (lambda: channel_marks([1], 16, 128, 0), "channels per page must be one of .*, not 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(KVStrataError, match=message):
        call()
