"""The joined flash side on two small channels: order per kernel, turns between kernels, dropped pages, full queues."""

import itertools
from dataclasses import replace

import pytest

from golden.spec.storage import PPN
from hw.lib.testing import get, put, simulate
from hw.storage.flash_model import Command, FlashChannel, FlashParams, Grant
from hw.storage.nfc.front import FlashFront

PARAMS = FlashParams(read_ns=1000, command_ns=10, ecc_ns=10, channel_mb_per_s=2280, queue=2)


def run(front, pages, channel_of, after):
    """Beats per kernel and the order in which channels were given pages; commands are taken `after` cycles on."""
    contents, reads = {}, []
    expected = [[], []]
    for n, raw in enumerate(pages):
        place = {"channel": channel_of(n), "die": n % 8, "page": n}
        contents[PPN.pack(place)] = raw.content
        reads.append({"ppn": place, **raw.descriptor})
        expected[raw.tag >> 7] += raw.expected
    got, commanded = [[], []], []

    async def request(ctx):
        await put(ctx, front.read, reads)

    async def channels(ctx):
        models = [FlashChannel(PARAMS, contents) for _ in front.command]
        for cycle in itertools.count():
            offers = [model.offer() for model in models]
            for beat, command, offer, model in zip(front.beat, front.command, offers, models):
                ctx.set(command.ready, cycle >= after and model.command_ready)
                ctx.set(beat.valid, offer is not None)
                if offer:
                    ctx.set(beat.payload, offer._asdict())
            values = [x for c in front.command for x in (c.valid, c.ready, c.payload)]
            grants = [x for channel in front.grant for grant in channel for x in (grant.valid, grant.payload)]
            _, _, *sampled = await ctx.tick().sample(*values, *grants)
            named = sampled[len(values) :]
            for n, model in enumerate(models):
                valid, space, read = sampled[3 * n : 3 * n + 3]
                moved = None
                if valid and space:
                    place = {name: getattr(read.ppn, name) for name, _ in PPN.fields}
                    moved = Command(PPN.pack(place), int(read.kernel))
                    commanded.append(int(read.ppn.page))
                given = [named[4 * n + 2 * k : 4 * n + 2 * k + 2] for k in range(2)]
                model.tick(moved, [Grant(int(slot), k) for k, (valid, slot) in enumerate(given) if valid])

    def kernel(n):
        async def take(ctx):
            for beat in expected[n]:
                (out,) = await get(ctx, front.page[n], 1)
                got[n].append({name: int(getattr(out, name)) for name in beat})

        return take

    simulate(front, request, kernel(0), kernel(1), monitors=[channels])
    return got, expected, commanded


def test_each_kernel_gets_its_marked_pages_in_order(raw_pages):
    # marks of entries that a page does not have are dropped on the way
    pages = [
        replace(raw, tag=raw.tag | (n // 3 % 2) << 7, mask=raw.legal)
        for n, raw in enumerate(raw_pages(5, 12, fail=0))
    ]
    got, expected, commanded = run(FlashFront(2, 2, outstanding=8), pages, lambda n: n * 7 % 3 % 2, after=1)
    assert got == expected
    assert sorted(commanded) == [n for n, raw in enumerate(pages) if raw.expected]


@pytest.mark.slow
def test_a_long_run_for_one_kernel_does_not_starve_the_other(raw_pages):
    raw = next(raw for raw in raw_pages(1, 30, fail=0) if len(raw.expected) == 128)
    pages = [replace(raw, tag=n | (n >= 8) << 7, mask=raw.legal) for n in range(12)]
    got, expected, commanded = run(FlashFront(2, 2, outstanding=3), pages, lambda n: 0, after=60)
    assert got == expected
    # Three reads fill the channel's queue, four wait in front of it; from then on the kernels take turns.
    assert commanded == [0, 1, 2, 3, 4, 5, 6, 8, 7, 9, 10, 11]
