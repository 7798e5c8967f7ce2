"""Typed memories: contents, byte enables, read latency, and the sizes that no device holds."""

import pytest
from amaranth import signed, unsigned
from amaranth.lib import data

from hw.lib.memories import TypedMemory, bram36_count, uram_count
from hw.lib.testing import simulate


async def write(ctx, dut, addr, value, enable=None):
    ctx.set(dut.w.addr, addr)
    ctx.set(dut.w.data, value)
    ctx.set(dut.w.en, (1 << len(dut.w.en)) - 1 if enable is None else enable)
    await ctx.tick()
    ctx.set(dut.w.en, 0)


async def read(ctx, dut, addr, port=0):
    ctx.set(dut.r[port].addr, addr)
    ctx.set(dut.r[port].en, 1)
    if dut.latency:
        await ctx.tick().repeat(dut.latency)
    ctx.set(dut.r[port].en, 0)
    return ctx.get(dut.r[port].data)


@pytest.mark.parametrize("asynchronous_read", [False, True])
def test_rows_come_back_typed_after_the_stated_latency(asynchronous_read):
    row = data.StructLayout({"code": signed(6), "live": 1})
    dut = TypedMemory(row, 12, read_ports=2, asynchronous_read=asynchronous_read)
    rows = [{"code": n - 6, "live": n % 2} for n in range(12)]

    async def run(ctx):
        for addr, value in enumerate(rows):
            await write(ctx, dut, addr, value)
        for port in range(2):
            assert [await read(ctx, dut, addr, port) for addr in range(12)] == [row.const(r) for r in rows]

    simulate(dut, run)


def test_byte_enables_leave_other_bytes_alone():
    dut = TypedMemory(data.ArrayLayout(unsigned(8), 4), 4, granularity=1)

    async def run(ctx):
        await write(ctx, dut, 2, [1, 2, 3, 4])
        await write(ctx, dut, 2, [9, 9, 9, 9], enable=0b0101)
        assert list(await read(ctx, dut, 2)) == [9, 2, 9, 4]

    simulate(dut, run)


def test_a_registered_read_sees_old_data_and_holds_without_enable():
    dut = TypedMemory(unsigned(8), 4, init=[10, 11, 12, 13])

    async def run(ctx):
        ctx.set(dut.r[0].addr, 1)
        ctx.set(dut.r[0].en, 1)
        await write(ctx, dut, 1, 99)
        assert ctx.get(dut.r[0].data) == 11
        await ctx.tick()
        assert ctx.get(dut.r[0].data) == 99
        ctx.set(dut.r[0].en, 0)
        ctx.set(dut.r[0].addr, 3)
        await ctx.tick()
        assert ctx.get(dut.r[0].data) == 99

    simulate(dut, run)


@pytest.mark.usefixtures("unfinished_blocks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "at least one bit and one row, not 0 x 8 bit"),
        ({"depth": 513, "asynchronous_read": True}, "at most 512 deep, but the memory is 513 x 8 bit"),
        ({"depth": 1 << 26}, "A memory fits the device's .* bit of RAM, but 67108864 x 8 bit are 536870912"),
        ({"depth": 8, "granularity": 4}, "Write enables of block RAM cover 8 or 9 bit each, not 4"),
        (
            {"depth": 8, "ram_style": "huge"},
            "RAM style must be 'block', 'ultra' or 'distributed', not 'huge'",
        ),
        (
            {"depth": 8, "ram_style": "ultra", "init": [1]},
            "A URAM has no initial contents, but 1 rows are given",
        ),
        ({"depth": 8, "read_ports": 0}, "A memory has at least one read port, not 0"),
    ],
)
def test_a_memory_that_no_device_holds_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TypedMemory(unsigned(8), **arguments)


def test_block_counts_use_the_best_aspect_ratio():
    assert bram36_count(72, 512) == 1
    assert bram36_count(256, 512) == 4
    assert bram36_count(8, 4096) == 1
    assert bram36_count(36, 1025) == 2
    assert uram_count(256, 4096) == 4
    assert uram_count(8, 4097) == 2
