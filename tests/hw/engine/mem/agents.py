"""Amaranth-simulator side of the memory model and of the vector buffer, for unit tests of the memory units."""

import random

from hw.engine.mem.hbm import MemoryChannel, ReadRequest, WriteRequest


def random_channel(model, size: int, seed: int, number: int = 0) -> MemoryChannel:
    """A channel with random contents."""
    channel = MemoryChannel(model, size=size, number=number)
    channel.contents[:] = random.Random(seed).randbytes(size)
    return channel


def answer_reads(axi, channel):
    """Background bench: an AXI read port on its memory."""

    async def run(ctx):
        cycle = 0
        pins = (axi.arvalid, axi.araddr, axi.arlen, axi.arsize, axi.arburst, axi.arid, axi.rready)
        async for _, _, *request in ctx.tick().sample(*pins):
            out = channel.clock_read(cycle, ReadRequest(*request))
            for name in ("arready", "rvalid", "rlast", "rresp", "rid"):
                ctx.set(getattr(axi, name), getattr(out, name))
            ctx.set(axi.rdata, int.from_bytes(bytes(out.rdata), "little"))
            cycle += 1

    return run


def answer_writes(axi, channel):
    """Background bench: an AXI write port on its memory."""

    async def run(ctx):
        cycle = 0
        address = (axi.awvalid, axi.awaddr, axi.awlen, axi.awsize, axi.awburst, axi.awid, axi.wvalid)
        async for _, _, *request, data, strb, last, ready in ctx.tick().sample(
            *address, axi.wdata, axi.wstrb, axi.wlast, axi.bready
        ):
            data = data.to_bytes(len(axi.wdata) // 8, "little")
            out = channel.clock_write(cycle, WriteRequest(*request, data, strb, last, ready))
            for name in ("awready", "wready", "bvalid", "bresp", "bid"):
                ctx.set(getattr(axi, name), getattr(out, name))
            cycle += 1

    return run


def grant_writes(port, store: dict, source=None, percent: int = 0):
    """Background bench: a vector buffer's write port that refuses at random."""
    source = source or random.Random(0)

    async def run(ctx):
        while True:
            ctx.set(port.rdy, source.random() * 100 >= percent)
            _, _, en, rdy, addr, word = await ctx.tick().sample(port.en, port.rdy, port.addr, port.data)
            if en and rdy:
                store[addr] = word

    return run


def grant_reads(port, store: dict, source=None, percent: int = 0):
    """Background bench: a vector buffer's read port; data lasts one cycle, then turns to garbage."""
    source = source or random.Random(0)

    async def run(ctx):
        while True:
            ctx.set(port.rdy, source.random() * 100 >= percent)
            _, _, en, rdy, addr = await ctx.tick().sample(port.en, port.rdy, port.addr)
            ctx.set(port.data, store.get(addr, 0) if en and rdy else source.getrandbits(len(port.data)))

    return run
