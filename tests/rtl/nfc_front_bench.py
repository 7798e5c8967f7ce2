"""cocotb: the flash side behind eight modelled channels; both kernels' page streams against the golden layout."""

import os
import random
from dataclasses import replace

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge

from golden.spec.storage import PAGE_BEAT, PPN, PageKind
from golden.storage.layout import AppendOrder, Geometry, place
from hw.storage.flash_model import Command, FlashChannel, FlashParams, Grant, page_fault
from hw.storage.nfc.timing import stream_bound_cycles
from tests.hw.nfc.conftest import random_pages

CHANNELS, KERNELS = 8, 2
READ_SHIFTS = {"ppn": 0, "kind": 32, "wide_head": 34, "m_log2": 35, "mask": 37, "tag": 69}
PARAMS = FlashParams(read_ns=6000, retry_per_million=50_000, fail_per_million=30_000, seed=3)


class Traffic:
    """Pages spread over the device, their reads in order, and what each kernel must see."""

    def __init__(self, seed, count, params=PARAMS, mask=None):
        rng = random.Random(seed)
        geometry = Geometry(CHANNELS, params.dies, params.planes, 64, 256)
        order = AppendOrder(geometry)
        self.params, self.contents, self.reads, self.expected = params, {}, [], [[] for _ in range(KERNELS)]
        for n, raw in enumerate(random_pages(seed, count)):
            if mask:
                kind, index = PageKind(n % 2), n // 2
                where = place(kind, 0, index, groups=32, channels=CHANNELS, arrays=geometry.arrays)
            else:
                where = rng.randrange(CHANNELS), rng.randrange(geometry.arrays)
            ppn = PPN.pack(order.take(*map(int, where)))
            kernel = rng.randrange(KERNELS)
            fail = page_fault(params, ppn)[1]
            raw = replace(raw, mask=mask or raw.mask, fail=fail, tag=kernel << 7 | n & 127)
            legal = replace(raw, mask=raw.legal)
            self.contents[ppn] = raw.content
            fields = {"ppn": ppn, **raw.descriptor}
            self.reads.append(sum(int(fields[name]) << at for name, at in READ_SHIFTS.items()))
            self.expected[kernel] += [PAGE_BEAT.pack(beat) for beat in legal.expected]


async def reset(dut):
    dut.rst.value = 1
    for port in ("read__valid", *(f"page__{n}__ready" for n in range(KERNELS))):
        getattr(dut, port).value = 0
    for n in range(CHANNELS):
        getattr(dut, f"command__{n}__ready").value = 0
        getattr(dut, f"beat__{n}__valid").value = 0
    await RisingEdge(dut.clk)
    await RisingEdge(dut.clk)
    dut.rst.value = 0


async def channel(dut, index, flash):
    """Drive one channel from the model."""

    def command(name):
        return getattr(dut, f"command__{index}__{name}")

    def beat(name):
        return getattr(dut, f"beat__{index}__{name}")

    while True:
        offered, space = flash.offer(), flash.command_ready
        beat("valid").value = offered is not None
        if offered:
            beat("payload").value = (
                offered.data
                | offered.first << 64
                | offered.last << 65
                | offered.fail << 66
                | offered.slot << 67
                | offered.kernel << 71
            )
        command("ready").value = space
        await RisingEdge(dut.clk)
        moved = space and int(command("valid").value)
        read = int(command("payload").value)
        flash.tick(Command(read & 0xFFFFFFFF, read >> 32) if moved else None, granted(dut, index))


def granted(dut, index):
    """Grants that the unit gives a channel in this cycle."""
    ports = [f"grant__{index}__{kernel}__" for kernel in range(KERNELS)]
    return [
        Grant(int(getattr(dut, port + "payload").value), kernel)
        for kernel, port in enumerate(ports)
        if int(getattr(dut, port + "valid").value)
    ]


async def requests(dut, reads, rng, pause):
    for read in reads:
        while rng.random() < pause:
            await RisingEdge(dut.clk)
        dut.read__payload.value = read
        dut.read__valid.value = 1
        await RisingEdge(dut.clk)
        while not int(dut.read__ready.value):
            await RisingEdge(dut.clk)
        dut.read__valid.value = 0


async def kernel(dut, index, expected, rng, pause):
    ready_port, valid, payload = (
        getattr(dut, f"page__{index}__{name}") for name in ("ready", "valid", "payload")
    )
    for n, want in enumerate(expected):
        while True:
            ready = rng.random() >= pause
            ready_port.value = ready
            await RisingEdge(dut.clk)
            if ready and int(valid.value):
                break
        got = int(payload.value)
        assert got == want, (
            f"kernel {index}, beat {n}: got {PAGE_BEAT.unpack(got)}, expected {PAGE_BEAT.unpack(want)}"
        )
    ready_port.value = 1


async def count_cycles(dut, shared):
    while True:
        await RisingEdge(dut.clk)
        shared["cycles"] += 1


def start(dut, traffic, rng, pause=0.0):
    """Start everything; returns (tasks that end, tasks that do not, flash channels, counter)."""
    shared = {"cycles": 0}
    flashes = [FlashChannel(traffic.params, traffic.contents) for _ in range(CHANNELS)]
    background = [cocotb.start_soon(channel(dut, n, flash)) for n, flash in enumerate(flashes)]
    background.append(cocotb.start_soon(count_cycles(dut, shared)))
    tasks = [cocotb.start_soon(requests(dut, traffic.reads, rng, pause))]
    tasks += [cocotb.start_soon(kernel(dut, n, traffic.expected[n], rng, pause)) for n in range(KERNELS)]
    return tasks, background, flashes, shared


async def play(dut, traffic, rng, pause=0.0):
    """Run `traffic` to its end; returns the cycles it took and the pages each channel delivered."""
    tasks, background, flashes, shared = start(dut, traffic, rng, pause)
    for task in tasks:
        await task
    for task in background:
        task.cancel()
    return shared["cycles"], [flash.delivered for flash in flashes]


@cocotb.test(timeout_time=20, timeout_unit="ms")
@cocotb.parametrize(pause=[0.0, 0.5], seed=[int(n) for n in os.environ.get("FRONT_SEEDS", "1").split()])
async def pages_arrive_filtered_and_in_order(dut, pause, seed):
    Clock(dut.clk, 10, unit="ns").start()
    await reset(dut)
    traffic = Traffic(seed, 60)
    assert sum(map(len, traffic.expected)) > 500
    await play(dut, traffic, random.Random(seed), pause)


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def fully_marked_pages_stream_at_the_rate_of_the_channels(dut):
    Clock(dut.clk, 10, unit="ns").start()
    await reset(dut)
    params = FlashParams(read_ns=6000)
    cycles, delivered = await play(dut, Traffic(7, 160, params, mask=0xFFFFFFFF), random.Random(7))
    assert delivered == [20] * 8
    fill = params.cycles(params.command_ns) + params.cycles(params.read_ns) + params.cycles(params.ecc_ns)
    bound = fill + stream_bound_cycles(delivered)
    # After the last raw beat, eight pages of 128 beats may leave through one kernel.
    assert bound <= cycles <= bound + 8 * 128 + 40, f"{cycles} cycles against {bound:.0f}"


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def a_reset_in_mid_traffic_leaves_nothing_behind(dut):
    Clock(dut.clk, 10, unit="ns").start()
    await reset(dut)
    tasks, background, *_ = start(dut, Traffic(21, 40), random.Random(9), 0.2)
    for _ in range(5000):
        await RisingEdge(dut.clk)
    for task in (*tasks, *background):
        task.cancel()
    await reset(dut)
    await play(dut, Traffic(22, 30), random.Random(10))
