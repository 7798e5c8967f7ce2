"""cocotb tests of a read and a write path together, against the HBM model and against cocotbext-axi's AxiRam."""

import random

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge, with_timeout
from cocotbext.axi import AxiRamRead, AxiRamWrite, AxiReadBus, AxiWriteBus

from golden.spec.memory import MemoryFault, MemoryModel
from hw.engine.mem.address import bursts
from hw.engine.mem.hbm import MemoryChannel
from tests.rtl.mem_agents import ReadAgent, WriteAgent, fill, put, reset
from tests.rtl.mem_duts import ADDR_BITS, BEAT_BYTES, pack

SIZE = 1 << ADDR_BITS
MODELS = {
    "2": MemoryModel("fixed", 2),
    "20": MemoryModel("fixed", 20),
    "random": MemoryModel("random", 50, stall_percent=40),
    "hbm": MemoryModel("hbm"),
}
# Pairs of descriptors with equal beats: straight, scatter, gather, and one that starts off the burst grid.
COPIES = [
    ((0x1000, 90), (0x40000, 90)),
    ((0x3008, 60), (0x50010, 5, (4, 3), (256, 4096))),
    ((0x8000, 3, (5, 4), (64, -1024)), (0x60FF8, 60)),
    ((0x2000, 1), (0x70000, 1)),
]


def addresses(job) -> list[int]:
    return [
        a
        for addr, n in bursts(*job, beat_bytes=BEAT_BYTES)
        for a in range(addr, addr + n * BEAT_BYTES, BEAT_BYTES)
    ]


def expected(image: bytes, copies, strobes: int = 0xFF) -> bytes:
    """The memory after `copies`, one after the other, with byte strobes."""
    memory = bytearray(image)
    for source, target in copies:
        data = [memory[a : a + BEAT_BYTES] for a in addresses(source)]
        for a, beat in zip(addresses(target), data):
            for byte in range(BEAT_BYTES):
                if strobes >> byte & 1:
                    memory[a + byte] = beat[byte]
    return bytes(memory)


async def start(dut) -> None:
    for name in ("source__valid", "target__valid", "abort", "clear"):
        getattr(dut, name).value = 0
    dut.strb.value, dut.region_limit.value = 0xFF, SIZE
    Clock(dut.clk, 10, unit="ns").start()
    await reset(dut)


async def copy(dut, copies, spacing: int = 0) -> None:
    """Run copies, each after the `done` of the one before."""
    for source, target in copies:
        cocotb.start_soon(put(dut, "source", [pack(*source)]))
        await put(dut, "target", [pack(*target)])
        while not int(dut.done.value):
            await RisingEdge(dut.clk)
        await RisingEdge(dut.clk)


def on_model(dut, model: MemoryModel, seed: int = 1):
    channel = MemoryChannel(model, size=SIZE)
    image = fill(channel, seed, SIZE)
    cocotb.start_soon(ReadAgent(dut, "axi_read", channel).run())
    cocotb.start_soon(WriteAgent(dut, "axi_write", channel).run())
    return channel, image


@cocotb.test()
@cocotb.parametrize(model=list(MODELS), strobes=[0xFF, 0x5A], seed=[1, 2])
async def copies_change_exactly_their_bytes(dut, model, strobes, seed):
    channel, image = on_model(dut, MODELS[model], seed)
    await start(dut)
    dut.strb.value = strobes
    await with_timeout(cocotb.start_soon(copy(dut, COPIES)), 400, "us")
    assert bytes(channel.contents) == expected(image, COPIES, strobes)
    assert channel.violation is None
    assert int(dut.read_fault.value) == int(dut.write_fault.value) == 0
    assert channel.stats.bytes_written == sum(len(addresses(t)) for _, t in COPIES) * strobes.bit_count()


def idles(seed: int, percent: int):
    source = random.Random(seed)
    while True:
        yield source.random() * 100 < percent


@cocotb.test()
@cocotb.parametrize(percent=[0, 40], seed=[1, 2])
async def a_third_party_model_agrees(dut, percent, seed):
    """cocotbext-axi's memory knows nothing of this project: it judges the protocol and stores the bytes."""
    image = random.Random(seed).randbytes(SIZE)
    write = AxiRamWrite(AxiWriteBus.from_prefix(dut, "axi_write_"), dut.clk, dut.rst, size=SIZE)
    read = AxiRamRead(AxiReadBus.from_prefix(dut, "axi_read_"), dut.clk, dut.rst, size=SIZE, mem=write.mem)
    write.write(0, image)
    for number, side in enumerate(
        (write.aw_channel, write.w_channel, write.b_channel, read.ar_channel, read.r_channel)
    ):
        side.set_pause_generator(idles(seed * 5 + number, percent))
    await start(dut)
    await with_timeout(cocotb.start_soon(copy(dut, COPIES)), 400, "us")
    assert write.read(0, SIZE) == expected(image, COPIES)


@cocotb.test()
@cocotb.parametrize(response=[2, 3])
async def a_refused_write_is_kept_with_its_burst(dut, response):
    bad = MemoryModel("fixed", 5, error_address=0x40000 + 50 * BEAT_BYTES, error_response=response)
    channel, image = on_model(dut, bad)
    await start(dut)
    cocotb.start_soon(put(dut, "source", [pack(0x1000, 90)]))
    await put(dut, "target", [pack(0x40000, 90)])
    for _ in range(400):
        await RisingEdge(dut.clk)
    assert int(dut.write_fault.value) == (MemoryFault.SLVERR if response == 2 else MemoryFault.DECERR)
    assert int(dut.write_fault_addr.value) == 0x40000 + 48 * BEAT_BYTES
    assert (
        bytes(channel.contents[0x40000 : 0x40000 + 48 * BEAT_BYTES])
        == image[0x1000 : 0x1000 + 48 * BEAT_BYTES]
    )


@cocotb.test()
@cocotb.parametrize(model=["20", "random"], after=[2, 25, 60, 110])
async def an_abort_leaves_whole_beats_and_a_usable_path(dut, model, after):
    channel, image = on_model(dut, MODELS[model])
    await start(dut)
    cocotb.start_soon(put(dut, "source", [pack(0x1000, 300)]))
    await put(dut, "target", [pack(0x40000, 300)])
    for _ in range(after):
        await RisingEdge(dut.clk)
    dut.abort.value = 1
    for _ in range(2000):
        await RisingEdge(dut.clk)
        if int(dut.idle.value):
            break
    else:
        raise AssertionError("the path did not become idle after an abort")
    dut.abort.value = 0
    await RisingEdge(dut.clk)
    assert channel.idle
    whole = expected(image, [((0x1000, 300), (0x40000, 300))])
    for a in addresses((0x40000, 300)):
        assert bytes(channel.contents[a : a + BEAT_BYTES]) in (
            image[a : a + BEAT_BYTES],
            whole[a : a + BEAT_BYTES],
        )
    before = bytes(channel.contents)
    await copy(dut, COPIES)
    assert bytes(channel.contents) == expected(before, COPIES)
    assert channel.violation is None


@cocotb.test()
@cocotb.parametrize(seed=[1, 2])
async def a_reset_in_mid_traffic_leaves_a_usable_path(dut, seed):
    channel, _ = on_model(dut, MODELS["random"], seed)
    await start(dut)
    cocotb.start_soon(put(dut, "source", [pack(0x1000, 300)]))
    await put(dut, "target", [pack(0x40000, 300)])
    for _ in range(70 + 31 * seed):
        await RisingEdge(dut.clk)
    await reset(dut, 1)
    before = bytes(channel.contents)
    await copy(dut, COPIES)
    assert bytes(channel.contents) == expected(before, COPIES)


@cocotb.test()
async def writes_stream_without_a_gap(dut):
    """With a prompt memory a long copy moves a beat in nearly every cycle: what is lost is the start alone."""
    channel, _ = on_model(dut, MODELS["20"])
    await start(dut)
    cocotb.start_soon(put(dut, "source", [pack(0x0, 2000)]))
    await put(dut, "target", [pack(0x40000, 2000)])
    beats, gaps = 0, 0
    while beats < 2000:
        await RisingEdge(dut.clk)
        moved = int(dut.axi_write__wvalid.value) and int(dut.axi_write__wready.value)
        beats += moved
        gaps += beats > 0 and not moved
    assert gaps == 0
