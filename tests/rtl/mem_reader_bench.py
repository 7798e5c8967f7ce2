"""cocotb tests of the striped reader against the HBM model: data, order, faults, abort, reset, pace."""

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge, with_timeout

from golden.spec.memory import MemoryFault, MemoryModel
from hw.engine.mem.address import bursts
from hw.engine.mem.hbm import MemoryChannel
from hw.engine.mem.striped import StripedReader
from tests.rtl.mem_agents import ReadAgent, fill, get, pause_source, put, reset
from tests.rtl.mem_duts import ADDR_BITS, BEAT_BYTES, CHANNELS, pack

SIZE = 1 << ADDR_BITS
MODELS = {
    "2": MemoryModel("fixed", 2),
    "20": MemoryModel("fixed", 20),
    "random": MemoryModel("random", 60, stall_percent=30),
    "hbm": MemoryModel("hbm"),
}
JOBS = [
    (0x1000, 100, (1, 1), (0, 0)),
    (0x4008, 1, (5, 3), (4096, -8)),
    (0x8000 - 24, 7, (3, 2), (256, 0x2000)),
    (0x0, 33, (2, 1), (0, 0)),
]


class Bench:
    """The design with an agent per channel."""

    def __init__(self, dut, model: MemoryModel, seed: int):
        self.dut = dut
        self.memory = [MemoryChannel(model, size=SIZE, number=n) for n in range(CHANNELS)]
        self.images = [fill(channel, seed * 10 + n, SIZE) for n, channel in enumerate(self.memory)]
        self.agents = [ReadAgent(dut, f"axi__{n}", channel) for n, channel in enumerate(self.memory)]

    async def start(self) -> None:
        dut = self.dut
        for name in ("i__valid", "abort", "clear", *(f"o__{n}__ready" for n in range(CHANNELS))):
            getattr(dut, name).value = 0
        dut.region_base.value, dut.region_limit.value = 0, SIZE
        Clock(dut.clk, 10, unit="ns").start()
        self.tasks = [cocotb.start_soon(agent.run()) for agent in self.agents]
        await reset(dut)

    def words(self, channel: int, jobs=JOBS) -> list[int]:
        """The beats that `jobs` deliver on `channel`."""
        image = self.images[channel]
        return [
            int.from_bytes(image[a : a + BEAT_BYTES], "little")
            for job in jobs
            for addr, count in bursts(*job, beat_bytes=BEAT_BYTES)
            for a in range(addr, addr + count * BEAT_BYTES, BEAT_BYTES)
        ]

    async def transfer(self, jobs=JOBS, seed: int = 0, stall: int = 0) -> None:
        """Run `jobs` with stalling consumers and compare every beat of every channel."""
        outs: list[list[int]] = [[] for _ in range(CHANNELS)]
        tasks = [
            cocotb.start_soon(put(self.dut, "i", [pack(*job) for job in jobs], pause_source(seed, stall)))
        ]
        for n in range(CHANNELS):
            taking = get(
                self.dut, f"o__{n}", len(self.words(n, jobs)), outs[n], pause_source(seed + n, stall)
            )
            tasks.append(cocotb.start_soon(taking))
        for task in tasks:
            await with_timeout(task, 300, "us")
        for n in range(CHANNELS):
            got, want = outs[n], self.words(n, jobs)
            first = next((k for k, (g, w) in enumerate(zip(got, want)) if g != w), None)
            assert got == want, f"channel {n}, beat {first}: got {got[first]:#x}, expected {want[first]:#x}"
        self.check_protocol()

    def check_protocol(self) -> None:
        for n, channel in enumerate(self.memory):
            assert channel.violation is None, f"channel {n}: {channel.violation}"

    async def until(self, signal, limit: int = 2000) -> None:
        for _ in range(limit):
            await RisingEdge(self.dut.clk)
            if int(signal.value):
                return
        raise AssertionError(f"{signal._name} stayed low for {limit} cycles")

    async def pulse(self, signal) -> None:
        signal.value = 1
        await RisingEdge(self.dut.clk)
        signal.value = 0
        await RisingEdge(self.dut.clk)


@cocotb.test()
@cocotb.parametrize(model=list(MODELS), stall=[0, 40], seed=[1, 2])
async def every_beat_of_every_channel_arrives_in_order(dut, model, stall, seed):
    bench = Bench(dut, MODELS[model], seed)
    await bench.start()
    await bench.transfer(seed=seed, stall=stall)
    await bench.until(dut.idle)
    assert int(dut.fault.value) == 0
    assert int(dut.beats.value) == len(bench.words(0))


@cocotb.test()
@cocotb.parametrize(seed=[1, 2, 3])
async def a_reset_in_mid_traffic_leaves_no_trace(dut, seed):
    bench = Bench(dut, MODELS["random"], seed)
    await bench.start()
    await put(dut, "i", [pack(*JOBS[0])])
    takers = [cocotb.start_soon(get(dut, f"o__{n}", 90, [], pause_source(seed, 50))) for n in range(CHANNELS)]
    for _ in range(60 + 7 * seed):
        await RisingEdge(dut.clk)
    assert not any(channel.idle for channel in bench.memory)
    for n, taker in enumerate(takers):
        taker.cancel()
        getattr(dut, f"o__{n}__ready").value = 0
    await reset(dut, 1)
    await bench.transfer(seed=seed, stall=20)


@cocotb.test()
@cocotb.parametrize(model=["20", "random"], after=[3, 9, 30, 61])
async def an_abort_drains_what_is_in_flight_and_work_goes_on(dut, model, after):
    bench = Bench(dut, MODELS[model], 1)
    await bench.start()
    await put(dut, "i", [pack(0x1000, 500)])
    dut.o__1__ready.value = 1  # one channel runs ahead, so that the fork is caught half way
    for _ in range(after):
        await RisingEdge(dut.clk)
    dut.o__1__ready.value = 0
    dut.abort.value = 1
    await bench.until(dut.idle)
    dut.abort.value = 0
    await RisingEdge(dut.clk)
    assert all(channel.idle for channel in bench.memory)
    await bench.transfer()


@cocotb.test()
@cocotb.parametrize(response=[2, 3])
async def an_error_answer_is_kept_with_its_burst_and_channel(dut, response):
    bench = Bench(dut, MODELS["20"], 1)
    bad = MemoryModel("fixed", 20, error_address=0x1000 + 40 * BEAT_BYTES, error_response=response)
    bench.memory[2] = MemoryChannel(bad, size=SIZE)
    bench.agents[2].channel = bench.memory[2]
    await bench.start()
    await put(dut, "i", [pack(*JOBS[0])])
    for n in range(CHANNELS):
        getattr(dut, f"o__{n}__ready").value = 1
    for _ in range(400):
        await RisingEdge(dut.clk)
    code = MemoryFault.SLVERR if response == 2 else MemoryFault.DECERR
    assert int(dut.fault.value) == code | (0x1000 + 32 * BEAT_BYTES) << 3
    assert int(dut.fault_channel.value) == 2
    for n in range(CHANNELS):
        getattr(dut, f"o__{n}__ready").value = 0
    dut.abort.value = 1
    await bench.until(dut.idle)
    dut.abort.value = 0  # at once: what idle promises is all that may be relied on
    await bench.pulse(dut.clear)
    assert int(dut.fault.value) == 0
    bench.agents[2].channel = bench.memory[2] = MemoryChannel(MODELS["20"], size=SIZE)
    bench.memory[2].contents[:] = bench.images[2]
    await bench.transfer()


@cocotb.test()
async def a_wrong_last_beat_is_a_protocol_fault(dut):
    bench = Bench(dut, MODELS["20"], 1)
    await bench.start()
    bench.agents[1].early_last = True
    await put(dut, "i", [pack(0x2000, 16)])
    for _ in range(60):
        await RisingEdge(dut.clk)
    assert int(dut.fault.value) & 7 == MemoryFault.PROTOCOL
    assert int(dut.fault_channel.value) == 1


@cocotb.test()
async def an_address_outside_its_region_never_reaches_the_memory(dut):
    bench = Bench(dut, MODELS["2"], 1)
    await bench.start()
    dut.region_limit.value = 0x1000 + 20 * BEAT_BYTES
    await put(dut, "i", [pack(0x1000, 100)])
    for _ in range(60):
        await RisingEdge(dut.clk)
    assert int(dut.fault.value) == MemoryFault.OUT_OF_REGION | (0x1000 + 16 * BEAT_BYTES) << 3
    assert [channel.stats.read_bursts for channel in bench.memory] == [1] * CHANNELS


@cocotb.test()
@cocotb.parametrize(latency=[1, 2, 20, 40])
async def the_pace_is_as_stated(dut, latency):
    bench = Bench(dut, MemoryModel("fixed", latency), 1)
    await bench.start()
    dut.o__0__ready.value = 1
    for n in range(CHANNELS):
        getattr(dut, f"o__{n}__ready").value = 1
    beats = 200
    await put(dut, "i", [pack(0, beats)])
    # The descriptor's transfer was at the edge that has just passed, which ended cycle 0.
    cycle, taken = 0, []
    while len(taken) < beats:
        await RisingEdge(dut.clk)
        cycle += 1
        if int(dut.o__0__valid.value):
            taken.append(cycle)
    assert taken[0] == StripedReader.first_beat(latency)
    assert taken[-1] == taken[0] + beats - 1
    assert taken[-1] == StripedReader.cycles(beats, latency)
    assert int(dut.starved.value) >= latency
