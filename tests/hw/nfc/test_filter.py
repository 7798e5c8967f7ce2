"""The page filter against the golden layout: marks, failures, framing, full channel rate, stalls, reset, mutations."""

import pytest
from amaranth.hdl import ResetInserter, Signal

from golden.spec.storage import PageKind
from hw.lib.testing import assert_stable, get, no_pause, pauses, put, simulate
from hw.storage.nfc import filter as filter_module
from hw.storage.nfc import gate, ring
from hw.storage.nfc.filter import META, PageFilter
from hw.storage.nfc.ring import PageRing
from hw.storage.nfc.timing import filter_cycles
from tests.hw.mutants import mutant


def run(dut, pages, *, page=no_pause, desc=no_pause, out=no_pause, events=None, limit=20):
    """Filtered beats of `pages`; `events` collects the cycles of transfers."""
    expected = [beat for raw in pages for beat in raw.expected]
    got = []

    async def descriptors(ctx):
        await put(ctx, dut.desc, [raw.descriptor for raw in pages], desc)

    async def channel(ctx):
        for raw in pages:
            await put(ctx, dut.i, raw.beats, page)
        await ctx.tick().repeat(filter_cycles(0, 1) + 2)

    async def receive(ctx):
        for _ in expected:
            (beat,) = await get(ctx, dut.o, 1, out)
            got.append({name: int(getattr(beat, name)) for name in expected[0]})

    async def monitor(ctx):
        cycle = 0
        async for _, _, *values in ctx.tick().sample(dut.i.valid, dut.i.ready, dut.o.valid, dut.o.ready):
            cycle += 1
            assert cycle < limit * 512 * len(pages), "beats are missing"
            for name, valid, ready in (("i", *values[:2]), ("o", *values[2:])):
                if valid and ready and events is not None:
                    events.setdefault(name, []).append(cycle)

    async def stable(ctx):
        await assert_stable(ctx, dut.o)

    simulate(dut, descriptors, channel, receive, monitors=[monitor, stable])
    return got, expected


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_equals_golden_for_any_marks_at_one_beat_per_cycle(raw_pages, seed):
    events = {}
    got, expected = run(PageFilter(), raw_pages(seed, 14), events=events)
    assert got == expected
    assert events["i"] == list(range(events["i"][0], events["i"][0] + 14 * 512))


def test_equals_golden_under_stalls(raw_pages):
    stalls = {"page": pauses(1, 0.1), "desc": pauses(2, 0.5, 900), "out": pauses(3, 0.7, 9)}
    got, expected = run(PageFilter(ring_pages=2), raw_pages(11, 8), **stalls)
    assert got == expected


def test_a_filtered_page_has_no_bubbles_and_cycles_follow_the_closed_form(raw_pages):
    for seed in range(4):
        pages = raw_pages(seed + 20, 2)
        events = {}
        run(PageFilter(), pages, events=events)
        last = len(pages[-1].expected)
        if last:
            assert events["o"][-1] - events["i"][0] + 1 == filter_cycles(2, last)
            assert events["o"][-last:] == list(range(events["o"][-1] - last + 1, events["o"][-1] + 1))


@pytest.mark.parametrize("broken", ["short", "long", "headless"])
def test_a_page_of_the_wrong_length_fails_and_the_next_one_is_whole(raw_pages, broken):
    victim, witness = raw_pages(3, 2, fail=0)
    dut, got = PageFilter(), []
    beats = list(victim.beats)
    if broken == "short":
        beats = [*beats[:99], {**beats[99], "last": 1, "fail": 0}]
    elif broken == "long":
        beats = [{**beat, "last": 0} for beat in beats] + [{**beats[7], "last": 1, "fail": 0}]
    else:
        beats[0] = {**beats[0], "first": 0}
    descriptor = {**victim.descriptor, "mask": 0xFFFFFFFF}

    async def descriptors(ctx):
        await put(ctx, dut.desc, [descriptor, {**witness.descriptor, "kind": 0, "mask": 3, "wide_head": 1}])

    async def channel(ctx):
        await put(ctx, dut.i, beats)
        await put(ctx, dut.i, witness.beats)

    async def receive(ctx):
        got.extend(await get(ctx, dut.o, 1 + 16))

    simulate(dut, descriptors, channel, receive)
    assert [int(beat.fail) for beat in got] == [1] + [0] * 16
    assert (int(got[0].first), int(got[0].last), int(got[0].data)) == (1, 1, 0)
    content = b"".join(int(beat.data).to_bytes(32, "little") for beat in got[1:])
    assert content == witness.content[:512]


@pytest.mark.parametrize("cycles", [5, 300, 700, 1100])
def test_a_reset_in_mid_traffic_leaves_nothing_behind(raw_pages, cycles):
    pages, after = raw_pages(40, 3, fail=0), raw_pages(cycles, 2)
    dut, reset, got = PageFilter(), Signal(), []
    expected = [beat for raw in after for beat in raw.expected]

    async def bench(ctx):
        beats = [beat for raw in pages for beat in raw.beats]
        ctx.set(dut.desc.valid, 1)
        ctx.set(dut.i.valid, 1)
        for n in range(cycles):
            ctx.set(dut.desc.payload, {**pages[0].descriptor, "mask": 0xFFFF})
            ctx.set(dut.i.payload, beats[n])
            await ctx.tick()
        ctx.set(dut.desc.valid, 0)
        ctx.set(dut.i.valid, 0)
        ctx.set(reset, 1)
        await ctx.tick()
        ctx.set(reset, 0)
        for raw in after:
            await put(ctx, dut.desc, [raw.descriptor])
            await put(ctx, dut.i, raw.beats)
        await ctx.tick().repeat(150)

    async def receive(ctx):
        await ctx.tick().repeat(cycles + 1)
        for _ in expected:
            (beat,) = await get(ctx, dut.o, 1)
            got.append({name: int(getattr(beat, name)) for name in expected[0]})

    simulate(ResetInserter(reset)(dut), bench, receive)
    assert got == expected


MUTATIONS = {
    "another token's mark": (gate, "desc.mask.bit_select(entry, 1)", "desc.mask.bit_select(entry ^ 1, 1)"),
    "V entries are not zeroed": (gate, "judged.data & elements", "judged.data"),
    "second group of V takes the first one's marks": (gate, "~current.wide_head & count[-1]", "0"),
    "m is ignored": (gate, "m_log2 == 2, beat", "m_log2 == 1, beat"),
    "failing pages keep their rows": (ring, "m.d.sync += head.eq(start)", "m.d.sync += start.eq(after)"),
    "failing pages show their data": (
        ring,
        "Mux(read.fail, 0, Value.cast(rows.r[0].data))",
        "Value.cast(rows.r[0].data)",
    ),
    "a page loses its last beat": (ring, "(index + 1 == stand.rows)", "(index + 2 == stand.rows)"),
    "unwanted failures are reported": (ring, "write.end & write.wanted", "write.end"),
}


def one_of_each(pages):
    """A failing page, an unwanted failing page, then a partly marked page of every kind and shape."""
    chosen = {}
    for raw in pages:
        beats = len(raw.expected)
        if raw.fail:
            chosen.setdefault(("fail", beats), raw)
        elif 0 < beats < 128 or raw.kind is PageKind.V_TOKEN and raw.mask.bit_count() in range(2, 9):
            chosen.setdefault((raw.kind, raw.m or raw.dh), raw)
    assert len(chosen) == 9
    return sorted(chosen.values(), key=lambda raw: not raw.fail)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_turn_the_comparison_red(raw_pages, name, monkeypatch):
    module, old, new = MUTATIONS[name]
    block = "EntryGate" if module is gate else "PageRing"
    monkeypatch.setattr(filter_module, block, getattr(mutant(module, old, new), block))
    got = []
    try:
        got, expected = run(PageFilter(), one_of_each(raw_pages(60, 200, fail=0.5)), limit=2)
    except AssertionError:  # a mutant may also lose beats or break the stream rules
        return
    assert got != expected


@pytest.mark.parametrize(
    ("depth", "slots", "message"),
    [(100, 32, "power of two, not 100"), (4, 32, "at least 8, not 4"), (512, 2, "at least 8, not 2")],
)
@pytest.mark.usefixtures("unfinished_blocks")
def test_bad_rings_are_named(depth, slots, message):
    with pytest.raises(ValueError, match=message):
        PageRing(64, 4, depth, slots, META)


def test_kinds_are_those_of_the_specification():
    assert [kind.value for kind in PageKind] == [0, 1, 2]
