"""Address generator: exactly the bursts of the descriptor, none outside its region, at the stated pace."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden.spec.memory import AXI_BOUNDARY_BYTES, MemoryFault
from hw.engine.mem.address import AddressGenerator, bursts
from hw.lib.testing import get, no_pause, pauses, put, simulate

BEAT_BYTES = 64
ADDR_BITS = 20
MAX_BURST = 16


def generator(levels=2):
    return AddressGenerator(addr_bits=ADDR_BITS, data_bits=8 * BEAT_BYTES, levels=levels, max_burst=MAX_BURST)


def descriptor(addr, beats, counts=(1, 1), strides=(0, 0)):
    return {
        "addr": addr,
        "beats": beats,
        "counts": list(counts),
        "strides": [s % (1 << ADDR_BITS) for s in strides],
    }


def expected(job):
    strides = [s - (1 << ADDR_BITS) if s >> (ADDR_BITS - 1) else s for s in job["strides"]]
    return list(
        bursts(job["addr"], job["beats"], job["counts"], strides, beat_bytes=BEAT_BYTES, max_burst=MAX_BURST)
    )


def run(jobs, *, limit=1 << ADDR_BITS, base=0, pause=no_pause, wait=None):
    """Feed descriptors and return ([(address, beats, last)], fault code, fault address)."""
    dut = generator()
    total = sum(len(expected(job)) for job in jobs)
    taken, fault = [], []

    async def feed(ctx):
        ctx.set(dut.region_base, base)
        ctx.set(dut.region_limit, limit)
        await put(ctx, dut.i, jobs)

    async def take(ctx):
        await get(ctx, dut.o, total, pause, taken)

    async def observe(ctx):
        for _ in range(wait):
            ctx.set(dut.o.ready, 1)
            _, _, valid, payload = await ctx.tick().sample(dut.o.valid, dut.o.payload)
            if valid:
                taken.append(payload)
        fault.append((ctx.get(dut.fault.code), ctx.get(dut.fault.addr)))

    simulate(dut, *((feed, take) if wait is None else (observe,)), monitors=[] if wait is None else [feed])
    return [(b.addr, b.len + 1, b.last) for b in taken], *(fault or [(MemoryFault.NONE, 0)])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda word, beats, counts, strides: descriptor(
                word * BEAT_BYTES, beats, counts, [s * BEAT_BYTES for s in strides]
            ),
            st.integers(4000, 8000),
            st.integers(1, 70),
            st.tuples(st.integers(1, 4), st.integers(1, 3)),
            st.tuples(st.integers(-200, 200), st.integers(-500, 500)),
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 1000),
)
def test_bursts_are_those_of_the_descriptors(jobs, seed):
    got, _ = run(jobs, pause=pauses(seed, 0.3))
    want = [expected(job) for job in jobs]
    assert [(addr, beats) for addr, beats, _ in got] == [burst for job in want for burst in job]
    lasts = [position for position, (_, _, last) in enumerate(got) if last]
    ends = [sum(map(len, want[: n + 1])) - 1 for n in range(len(jobs))]
    assert lasts == ends


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 14), st.integers(1, 300))
def test_reference_bursts_cover_each_beat_once_and_never_cross_4_kb(word, beats):
    found = list(bursts(word * BEAT_BYTES, beats, beat_bytes=BEAT_BYTES))
    covered = [addr + n * BEAT_BYTES for addr, count in found for n in range(count)]
    assert covered == [(word + n) * BEAT_BYTES for n in range(beats)]
    for addr, count in found:
        assert addr // AXI_BOUNDARY_BYTES == (addr + count * BEAT_BYTES - 1) // AXI_BOUNDARY_BYTES


def test_pace_is_as_stated():
    """First burst after `latency`, one per cycle, next descriptor after `cycles`."""
    dut, arrivals = generator(), []
    jobs = [descriptor(0, 40), descriptor(4096, 16)]

    async def feed(ctx):
        ctx.set(dut.region_limit, 1 << ADDR_BITS)
        await put(ctx, dut.i, jobs)

    async def take(ctx):
        ctx.set(dut.o.ready, 1)
        for cycle in range(12):
            _, _, valid = await ctx.tick().sample(dut.o.valid)
            if valid:
                arrivals.append(cycle)

    simulate(dut, feed, take)
    first, second = dut.latency, dut.cycles(3) + dut.latency
    assert arrivals == [first, first + 1, first + 2, second]


@pytest.mark.parametrize(
    ("job", "code", "addr", "issued"),
    [
        (descriptor(32, 4), MemoryFault.UNALIGNED, 32, 0),
        (descriptor(64, 4, (2, 1), (32, 0)), MemoryFault.UNALIGNED, 64, 0),
        (descriptor(64, 0), MemoryFault.EMPTY, 64, 0),
        (descriptor(64, 4, (1, 0)), MemoryFault.EMPTY, 64, 0),
        (descriptor(0, 4), MemoryFault.OUT_OF_REGION, 0, 0),
        (descriptor(8192 - 1024, 17), MemoryFault.OUT_OF_REGION, 8192, 1),
        (descriptor(4096, 4, (3, 1), (-1024, 0)), MemoryFault.OUT_OF_REGION, 3072, 1),
        (descriptor(8192 - 64, 1, (2, 1), (64, 0)), MemoryFault.OUT_OF_REGION, 8192, 1),
    ],
)
def test_a_violation_stops_before_its_address_leaves(job, code, addr, issued):
    got, fault = run([job], base=4096, limit=8192, wait=40)
    assert fault == (code, addr)
    assert len(got) == issued
    assert all(a >= 4096 and a + n * BEAT_BYTES <= 8192 for a, n, _ in got)


@pytest.mark.parametrize(
    "job",
    [
        descriptor((1 << ADDR_BITS) - 1024, 32),
        descriptor((1 << ADDR_BITS) - 1024, 16, (2, 1), (1024, 0)),
        descriptor(0, 16, (2, 1), (-1024, 0)),
    ],
)
def test_the_address_space_does_not_wrap(job):
    got, (code, _) = run([job], wait=40)
    assert code == MemoryFault.OUT_OF_REGION
    assert len(got) == 1


def test_clear_and_abort_make_it_usable_again():
    dut, taken = generator(), []

    async def bench(ctx):
        ctx.set(dut.region_limit, 1 << ADDR_BITS)
        await put(ctx, dut.i, [descriptor(32, 1)])
        await ctx.tick()
        assert ctx.get(dut.fault.code) == MemoryFault.UNALIGNED
        assert not ctx.get(dut.i.ready)
        ctx.set(dut.clear, 1)
        await ctx.tick()
        ctx.set(dut.clear, 0)
        await put(ctx, dut.i, [descriptor(0, 1000)])
        await ctx.tick().repeat(5)
        assert ctx.get(dut.busy)
        ctx.set(dut.abort, 1)
        await ctx.tick().repeat(dut.latency)
        ctx.set(dut.abort, 0)
        assert not ctx.get(dut.busy)
        await put(ctx, dut.i, [descriptor(4096, 3)])
        taken.extend(await get(ctx, dut.o, 1))

    simulate(dut, bench)
    assert [(b.addr, b.len) for b in taken] == [(4096, 2)]


@pytest.mark.usefixtures("unfinished_blocks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"max_burst": 12},
            "Bursts of 512 bit are a power of two of 2 to 64 beats, not 12: .* cross 4096 bytes",
        ),
        ({"max_burst": 128}, "power of two of 2 to 64 beats, not 128"),
        ({"levels": 0}, "Loops of an address generator must be an integer of at least 1, not 0"),
        ({"addr_bits": 40}, "Address bits of a channel are at most 32, not 40"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AddressGenerator(**({"addr_bits": 20, "data_bits": 512} | arguments))
