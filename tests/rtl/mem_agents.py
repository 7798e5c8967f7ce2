"""cocotb side of the memory model: one agent per AXI port, driven by `hw.engine.mem.hbm.MemoryChannel`."""

import random

from cocotb.triggers import RisingEdge

from hw.engine.mem.hbm import MemoryChannel, ReadRequest, WriteRequest

READ_PINS = ("arready", "rvalid", "rlast", "rresp", "rid")
WRITE_PINS = ("awready", "wready", "bvalid", "bresp", "bid")


def fill(channel: MemoryChannel, seed: int, size: int) -> bytes:
    """Random contents of the first `size` bytes; returns them."""
    image = random.Random(seed).randbytes(size)
    channel.contents[:size] = image
    return image


class ReadAgent:
    """Answers the read master whose pins start with `prefix`; `early_last` breaks the protocol on purpose."""

    def __init__(self, dut, prefix: str, channel: MemoryChannel):
        self.dut, self.channel, self.cycle, self.early_last = dut, channel, 0, False
        self.pin = {name: getattr(dut, f"{prefix}__{name}") for name in (*READ_PINS, "rdata")}
        masters = ("arvalid", "araddr", "arlen", "arsize", "arburst", "arid", "rready")
        self.master = [getattr(dut, f"{prefix}__{name}") for name in masters]
        self.data_bytes = len(self.pin["rdata"]) // 8

    async def run(self) -> None:
        while True:
            await RisingEdge(self.dut.clk)
            if int(self.dut.rst.value):
                self.channel.reset()
                self.pin["rvalid"].value = self.pin["arready"].value = 0
                continue
            request = ReadRequest(*(int(signal.value) for signal in self.master))
            pins = self.channel.clock_read(self.cycle, request)
            self.cycle += 1
            for name in READ_PINS:
                self.pin[name].value = getattr(pins, name)
            if self.early_last and pins.rvalid:
                self.pin["rlast"].value = 1
            if pins.rvalid:
                self.pin["rdata"].value = int.from_bytes(bytes(pins.rdata[: self.data_bytes]), "little")


class WriteAgent:
    """Takes what the write master whose pins start with `prefix` writes."""

    def __init__(self, dut, prefix: str, channel: MemoryChannel):
        self.dut, self.channel, self.cycle = dut, channel, 0
        self.pin = {name: getattr(dut, f"{prefix}__{name}") for name in WRITE_PINS}
        masters = ("awvalid", "awaddr", "awlen", "awsize", "awburst", "awid", "wvalid")
        self.address = [getattr(dut, f"{prefix}__{name}") for name in masters]
        self.data, self.strb, self.last, self.bready = (
            getattr(dut, f"{prefix}__{name}") for name in ("wdata", "wstrb", "wlast", "bready")
        )

    async def run(self) -> None:
        while True:
            await RisingEdge(self.dut.clk)
            if int(self.dut.rst.value):
                self.channel.reset()
                self.pin["awready"].value = self.pin["wready"].value = self.pin["bvalid"].value = 0
                continue
            data = int(self.data.value).to_bytes(len(self.data) // 8, "little")
            request = WriteRequest(
                *(int(signal.value) for signal in self.address),
                data,
                int(self.strb.value),
                int(self.last.value),
                int(self.bready.value),
            )
            pins = self.channel.clock_write(self.cycle, request)
            self.cycle += 1
            for name in WRITE_PINS:
                self.pin[name].value = getattr(pins, name)


def pause_source(seed: int, percent: int):
    """Zero, or 1 to 6 idle cycles with `percent` probability."""
    source = random.Random(seed)
    return lambda: source.randint(1, 6) if source.random() * 100 < percent else 0


async def put(dut, prefix: str, payloads, pause=lambda: 0) -> None:
    """Send payloads (integers) into the input stream at `prefix`."""
    valid, ready, payload = (getattr(dut, f"{prefix}__{name}") for name in ("valid", "ready", "payload"))
    for item in payloads:
        for _ in range(pause()):
            await RisingEdge(dut.clk)
        valid.value, payload.value = 1, item
        await RisingEdge(dut.clk)
        while not int(ready.value):
            await RisingEdge(dut.clk)
        valid.value = 0


async def get(dut, prefix: str, count: int, out: list, pause=lambda: 0) -> None:
    """Take `count` payloads from the output stream at `prefix` into `out`."""
    valid, ready, payload = (getattr(dut, f"{prefix}__{name}") for name in ("valid", "ready", "payload"))
    while len(out) < count:
        for _ in range(pause()):
            await RisingEdge(dut.clk)
        ready.value = 1
        await RisingEdge(dut.clk)
        while not int(valid.value):
            await RisingEdge(dut.clk)
        out.append(int(payload.value))
        ready.value = 0


async def reset(dut, cycles: int = 3) -> None:
    """Pulse the synchronous reset."""
    dut.rst.value = 1
    for _ in range(cycles):
        await RisingEdge(dut.clk)
    dut.rst.value = 0
