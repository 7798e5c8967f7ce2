"""Credit counters and dependency tokens: nothing lost, doubled or overtaken."""

import random

import pytest

from hw.lib.testing import pauses, put, simulate
from hw.lib.tokens import CreditCounter, TokenNetwork


def test_credits_run_out_and_come_back():
    dut = CreditCounter(2)

    async def run(ctx):
        ctx.set(dut.take.valid, 1)
        await ctx.tick().repeat(2)
        assert ctx.get(dut.available) == 0
        assert not ctx.get(dut.take.ready)
        ctx.set(dut.give, 1)
        await ctx.tick()
        assert ctx.get(dut.available) == 1
        await ctx.tick()
        assert ctx.get(dut.available) == 1
        ctx.set(dut.take.valid, 0)
        await ctx.tick()
        assert ctx.get(dut.available) == 2
        assert not ctx.get(dut.overflow)
        await ctx.tick()
        assert ctx.get(dut.available) == 2
        assert ctx.get(dut.overflow)

    simulate(dut, run)


@pytest.mark.parametrize("seed", range(3))
def test_credit_count_equals_the_model_under_random_traffic(seed):
    dut, source = CreditCounter(3), random.Random(seed)

    async def run(ctx):
        out = 0
        for _ in range(200):
            take, give = source.random() < 0.6, out > 0 and source.random() < 0.5
            ctx.set(dut.take.valid, take)
            ctx.set(dut.give, give)
            granted = take and ctx.get(dut.take.ready)
            assert granted == (take and out < 3)
            out += granted - give
            await ctx.tick()
            assert ctx.get(dut.available) == 3 - out

    simulate(dut, run)


@pytest.mark.parametrize("seed", range(4))
def test_a_consumer_never_overtakes_its_producer(seed):
    """Double buffering: load tells compute that a buffer is full, compute tells load that it is free."""
    dut, load, compute, count = TokenNetwork(2, 2), 0, 1, 40
    loaded, computed = [], []

    async def loader(ctx):
        pause = pauses(seed, 0.4)
        await put(ctx, dut.wait[load], [0, 0])
        for n in range(count):
            await put(ctx, dut.wait[load], [1 << compute] if n >= 2 else [], pause)
            loaded.append(n)
            assert len(loaded) - len(computed) <= 2
            await put(ctx, dut.release[load], [1 << compute], pause)

    async def computer(ctx):
        pause = pauses(seed + 100, 0.4)
        for n in range(count):
            await put(ctx, dut.wait[compute], [1 << load], pause)
            assert len(loaded) > n
            computed.append(n)
            await put(ctx, dut.release[compute], [1 << load], pause)

    simulate(dut, loader, computer)
    assert loaded == computed == list(range(count))


def test_a_wait_takes_all_of_its_tokens_or_none():
    dut = TokenNetwork(3, 4)

    async def run(ctx):
        await put(ctx, dut.release[0], [0b100])
        ctx.set(dut.wait[2].payload, 0b011)
        ctx.set(dut.wait[2].valid, 1)
        await ctx.tick().repeat(3)
        assert not ctx.get(dut.wait[2].ready)
        assert ctx.get(dut.level[0][2]) == 1
        await put(ctx, dut.release[1], [0b100])
        assert ctx.get(dut.wait[2].ready)
        await ctx.tick()
        ctx.set(dut.wait[2].valid, 0)
        assert ctx.get(dut.level[0][2]) == ctx.get(dut.level[1][2]) == 0

    simulate(dut, run)


def test_a_full_counter_stalls_its_producer():
    dut = TokenNetwork(2, 2)

    async def run(ctx):
        await put(ctx, dut.release[0], [0b10, 0b10])
        ctx.set(dut.release[0].payload, 0b11)
        ctx.set(dut.release[0].valid, 1)
        await ctx.tick().repeat(3)
        assert not ctx.get(dut.release[0].ready)
        assert ctx.get(dut.level[0][0]) == 0
        assert ctx.get(dut.level[0][1]) == 2

    simulate(dut, run)


@pytest.mark.usefixtures("unfinished_blocks")
def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="Number of credits must be an integer of at least 1, not 0"):
        CreditCounter(0)
    with pytest.raises(ValueError, match="units of a token network must be an integer of at least 2, not 1"):
        TokenNetwork(1, 1)
    with pytest.raises(
        ValueError, match="Capacity of a token counter must be an integer of at least 1, not 0"
    ):
        TokenNetwork(2, 0)
