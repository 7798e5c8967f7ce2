"""How many beats of a page will pass, before it is read."""

from hw.lib.testing import get, pauses, put, simulate
from hw.storage.nfc.front import PageSize


def test_the_size_of_a_page_is_what_the_golden_layout_passes(raw_pages):
    pages = [raw for raw in raw_pages(3, 400) if raw.legal]
    dut, got = PageSize(), []

    async def ask(ctx):
        await put(
            ctx,
            dut.i,
            [{"ppn": {"page": n}, **raw.descriptor} for n, raw in enumerate(pages)],
            pauses(1, 0.2),
        )

    async def receive(ctx):
        await get(ctx, dut.o, len(pages), pauses(2, 0.3), got)

    simulate(dut, ask, receive)
    assert [int(read.ppn.page) for read in got] == list(range(len(pages)))
    assert [int(read.last_row) for read in got] == [raw.sized["last_row"] for raw in pages]
    assert [int(read.mask) for read in got] == [raw.legal for raw in pages]
    assert {int(read.last_row) for read in got} >= {3, 7, 15, 31, 63, 127}
