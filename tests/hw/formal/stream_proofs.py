"""Properties of the stream library: nothing lost, doubled, reordered or withdrawn, and waiting is bounded."""

from amaranth import Cat, Module, Signal, Value, unsigned
from amaranth.hdl import Assert

from hw.lib.arbiter import StreamArbiter
from hw.lib.gearbox import GearDown, GearUp
from hw.lib.streams import Fork, SkidBuffer, StreamFIFO
from hw.lib.tokens import CreditCounter, TokenNetwork
from tests.hw.formal.harness import Proof, Watch, past, producer, stable

BITS = 4


class QueueProof(Proof):
    """A one-to-one block of `depth` payloads: order, integrity, stability, and `level` where it has one."""

    def __init__(self, dut, depth):
        self.dut, self.depth = dut, depth
        super().__init__({"valid": 1, "payload": BITS, "ready": 1, "pick": 1})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = self.dut
        producer(m, dut.i, self.valid, self.payload)
        m.d.comb += dut.o.ready.eq(self.ready)
        stable(m, dut.o.valid, dut.o.ready, dut.o.payload)
        watch = Watch(m, dut.i, dut.o, self.pick, self.depth)
        self.invariants(m, watch)
        return m

    def invariants(self, m, watch):
        m.d.comb += Assert(self.dut.level == watch.inside)


class SkidProof(QueueProof):
    """The skid buffer for all time: the watched payload is in the register its position says."""

    def __init__(self):
        super().__init__(SkidBuffer(BITS), 2)

    def invariants(self, m, watch):
        dut = self.dut
        m.d.comb += Assert(watch.inside == dut.o.valid + dut._full)
        m.d.comb += Assert(~dut._full | dut.o.valid)
        with m.If(watch.watching & (watch.position == 1)):
            m.d.comb += Assert(dut._held == watch.value)
        self.bounded_latency(m)

    def bounded_latency(self, m):
        """`valid` never waits for `ready`: a payload inside is offered in the next cycle."""
        live, (pushed,) = past(m, self.dut.i.valid & self.dut.i.ready)
        with m.If(live & pushed):
            m.d.comb += Assert(self.dut.o.valid)


class ForkProof(Proof):
    """Each of three consumers takes each payload exactly once, whatever the others do."""

    def __init__(self):
        super().__init__({"valid": 1, "payload": BITS, "ready": 3})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = Fork(BITS, 3)
        producer(m, dut.i, self.valid, self.payload)
        sent = Signal(4)
        m.d.sync += sent.eq(sent + (dut.i.valid & dut.i.ready))
        for index, out in enumerate(dut.o):
            m.d.comb += out.ready.eq(self.ready[index])
            stable(m, out.valid, out.ready, out.payload)
            received = Signal(4, name=f"received_{index}")
            m.d.sync += received.eq(received + (out.valid & out.ready))
            m.d.comb += [
                Assert(received == (sent + dut._taken[index])[:4]),
                Assert(~out.valid | (out.payload == self.payload)),
                Assert(~dut._taken[index] | dut.i.valid),
            ]
        m.d.comb += Assert(~dut._taken.all())
        return m


class ArbiterProof(Proof):
    """One input at a time, its payload unchanged and unswapped until taken, and nobody waits more than one round."""

    count = 3

    def __init__(self):
        super().__init__({"valid": self.count, "payload": self.count * BITS, "ready": 1})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = StreamArbiter(unsigned(BITS), self.count)
        taken = Signal(self.count)
        for index, lane in enumerate(dut.i):
            producer(m, lane, self.valid[index], self.payload.word_select(index, BITS))
            m.d.comb += taken[index].eq(lane.valid & lane.ready)
        m.d.comb += dut.o.ready.eq(self.ready)
        stable(m, dut.o.valid, dut.o.ready, dut.o.payload)
        one_hot = (taken & (taken - 1)[: self.count]) == 0
        m.d.comb += [
            Assert(one_hot),
            Assert(taken.any() == (dut.o.valid & dut.o.ready)),
            Assert(dut.o.valid == self.valid.any()),
        ]
        self.registers(m, dut)
        for index, lane in enumerate(dut.i):
            with m.If(dut.o.valid & (dut.o.payload.source == index)):
                m.d.comb += [Assert(lane.valid), Assert(dut.o.payload.data == lane.payload)]
            with m.If(taken[index]):
                m.d.comb += Assert(dut.o.payload.source == index)
            self.fair(m, dut, index, taken)
        return m

    def registers(self, m, dut):
        last, locked = dut._turn._last, dut._locked
        m.d.comb += [
            Assert((last != 0) & ((last & (last - 1)[: self.count]) == 0)),
            Assert((locked & (locked - 1)[: self.count]) == 0),
            Assert((locked & ~self.valid) == 0),
        ]

    def fair(self, m, dut, index, taken):
        """While an input waits, at most `count` transfers go to others (one may have been locked before)."""
        others = Signal(range(self.count + 3), name=f"others_{index}")
        with m.If(~self.valid[index] | taken[index]):
            m.d.sync += others.eq(0)
        with m.Elif(taken.any()):
            m.d.sync += others.eq(others + 1)
        m.d.comb += Assert(others <= self.count - 1)
        # How often others may still go first is the distance in turn from the last grant: the ranking function.
        for granted in range(self.count):
            distance = (index - granted - 1) % self.count
            with m.If(self.valid[index] & dut._turn._last[granted]):
                m.d.comb += Assert(others + distance <= self.count - 1)
            with m.If(self.valid[index] & dut._locked[granted] & (granted != index)):
                m.d.comb += Assert(others + 1 + distance <= self.count - 1)


class GearProof(Proof):
    """Up by three and down again is a queue: narrow payloads come out in order, none lost or doubled."""

    ratio = 3

    def __init__(self):
        super().__init__({"valid": 1, "payload": BITS, "ready": 1, "pick": 1})

    def elaborate(self, platform):
        m = Module()
        m.submodules.up = up = GearUp(unsigned(BITS), self.ratio)
        m.submodules.down = down = GearDown(unsigned(BITS), self.ratio)
        m.d.comb += [
            Value.cast(down.i.payload).eq(Value.cast(up.o.payload)),
            down.i.valid.eq(up.o.valid),
            up.o.ready.eq(down.i.ready),
            down.o.ready.eq(self.ready),
        ]
        producer(m, up.i, self.valid, self.payload)
        stable(m, up.o.valid, up.o.ready, up.o.payload)
        stable(m, down.o.valid, down.o.ready, down.o.payload)
        watch = Watch(m, up.i, down.o, self.pick, 2 * self.ratio)
        waiting = Signal(range(self.ratio + 1))
        with m.If(up.o.valid):
            m.d.comb += waiting.eq(self.ratio - down._index)
        m.d.comb += [
            Assert(up._index < self.ratio),
            Assert(down._index < self.ratio),
            Assert(up.o.valid | (down._index == 0)),
            Assert(watch.inside == waiting + up._index),
        ]
        self.place(m, up, down, watch, waiting)
        return m

    def place(self, m, up, down, watch, waiting):
        """Where the watched payload must be: the waiting wide one, or the shadow of the next."""
        with m.If(watch.watching & (watch.position < waiting)):
            m.d.comb += Assert(up.o.payload[watch.position + down._index] == watch.value)
        with m.If(watch.watching & (watch.position >= waiting)):
            m.d.comb += Assert(up._shadow[(watch.position - waiting)[:2]] == watch.value)


class CreditProof(Proof):
    """Never more than `limit` out, never a credit invented; giving back what was not taken is flagged."""

    limit = 3

    def __init__(self):
        super().__init__({"valid": 1, "give": 1})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = CreditCounter(self.limit)
        out = Signal(range(self.limit + 1))
        taken = dut.take.valid & dut.take.ready
        m.d.comb += [dut.take.valid.eq(self.valid), dut.give.eq(self.give)]
        with m.If(~(self.give & ~taken & (out == 0))):
            m.d.sync += out.eq(out + taken - self.give)
        m.d.comb += [
            Assert(out <= self.limit),
            Assert(dut.available == self.limit - out),
            Assert(dut.take.ready == (out < self.limit)),
        ]
        live, (spurious,) = past(m, self.give & ~taken & (out == 0))
        with m.If(live & spurious):
            m.d.comb += Assert(dut.overflow)
        return m


class TokenProof(Proof):
    """Counters hold what was released and not yet waited for, in 0 to capacity, under any masks."""

    units, capacity = 2, 2

    def __init__(self):
        masks = self.units * self.units
        super().__init__({"wait": self.units, "waits": masks, "release": self.units, "releases": masks})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = TokenNetwork(self.units, self.capacity)
        for u in range(self.units):
            producer(m, dut.wait[u], self.wait[u], self.waits.word_select(u, self.units))
            producer(m, dut.release[u], self.release[u], self.releases.word_select(u, self.units))
        for u in range(self.units):
            for v in range(self.units):
                self.counter(m, dut, u, v)
            levels = Cat(dut.level[v][u] != 0 for v in range(self.units))
            rooms = Cat(dut.level[u][v] != self.capacity for v in range(self.units))
            m.d.comb += [
                Assert(dut.some[u] == levels),
                Assert(dut.wait[u].ready == ((dut.wait[u].payload & ~levels) == 0)),
                Assert(dut.release[u].ready == ((dut.release[u].payload & ~rooms) == 0)),
            ]
        return m

    def counter(self, m, dut, u, v):
        """Released from u to v less waited for by v on u, counted modulo 16 beside the design."""
        balance = Signal(4, name=f"balance_{u}_{v}")
        pushed = dut.release[u].valid & dut.release[u].ready & dut.release[u].payload[v]
        popped = dut.wait[v].valid & dut.wait[v].ready & dut.wait[v].payload[u]
        m.d.sync += balance.eq(balance + pushed - popped)
        m.d.comb += [Assert(dut.level[u][v] == balance), Assert(balance <= self.capacity)]


class HandoverProof(Proof):
    """Two units that double-buffer by tokens never deadlock and never use a buffer at once.

    Load (unit 0) starts with two free buffers; each needs a token back from compute (unit 1) before reuse. Units take
    any time to start and finish, but not forever: `patience` cycles without progress of anyone is a deadlock.
    """

    def __init__(self):
        super().__init__({"go": 2})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = TokenNetwork(2, 2)
        loaded, computed = Signal(2), Signal(2)  # buffers filled and drained, modulo 4
        free = Signal(2, init=2)  # first uses that need no token
        phase = [Signal(name=f"phase_{u}") for u in range(2)]  # 0: waiting to start, 1: working
        moved = Signal(2)
        for u, other in ((0, 1), (1, 0)):
            needs = (free == 0) if u == 0 else 1
            m.d.comb += [
                dut.wait[u].payload[other].eq(needs),
                dut.wait[u].valid.eq(~phase[u]),
                dut.release[u].payload[other].eq(1),
                dut.release[u].valid.eq(phase[u] & self.go[u]),
            ]
            with m.If(dut.wait[u].valid & dut.wait[u].ready):
                m.d.sync += phase[u].eq(1)
                m.d.comb += moved[u].eq(1)
            with m.If(dut.release[u].valid & dut.release[u].ready):
                m.d.sync += phase[u].eq(0)
                m.d.comb += moved[u].eq(1)
        with m.If(~phase[0] & dut.wait[0].ready & (free != 0)):
            m.d.sync += free.eq(free - 1)
        with m.If(dut.release[0].valid & dut.release[0].ready):
            m.d.sync += loaded.eq(loaded + 1)
        with m.If(dut.release[1].valid & dut.release[1].ready):
            m.d.sync += computed.eq(computed + 1)
        filled = Signal(2)
        m.d.comb += filled.eq(loaded - computed)
        m.d.comb += [
            Assert(filled <= 2),
            # Every buffer is free, filling, full, draining or on its way back: two in all.
            Assert(free + phase[0] + dut.level[0][1] + phase[1] + dut.level[1][0] == 2),
            Assert(filled == dut.level[0][1] + phase[1]),
            Assert(dut.level[0][0] == 0),
            Assert(dut.level[1][1] == 0),
            *(Assert(dut.some[v] == Cat(dut.level[u][v] != 0 for u in range(2))) for v in range(2)),
            # No deadlock: if both units are willing, someone moves in this very cycle.
            Assert(~self.go.all() | moved.any()),
        ]
        return m


class LossySkid(SkidBuffer):
    """A mutant: overwrites the held payload when a third one arrives. Proofs that cannot fail prove nothing."""

    def elaborate(self, platform):
        m = super().elaborate(platform)
        with m.If(self.i.valid & self._full):
            m.d.sync += Value.cast(self._held).eq(self.i.payload ^ 1)
        return m


class LossySkidProof(SkidProof):
    def __init__(self):
        QueueProof.__init__(self, LossySkid(BITS), 2)


class UnlockedArbiterProof(ArbiterProof):
    """A mutant of the environment: payloads may change while they wait, so the output cannot be stable."""

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = StreamArbiter(unsigned(BITS), self.count)
        for index, lane in enumerate(dut.i):
            m.d.comb += [
                lane.valid.eq(self.valid[index]),
                lane.payload.eq(self.payload.word_select(index, BITS)),
            ]
        m.d.comb += dut.o.ready.eq(self.ready)
        stable(m, dut.o.valid, dut.o.ready, dut.o.payload)
        return m


def lut_fifo(depth):
    return QueueProof(StreamFIFO(BITS, depth), depth)


def block_fifo(depth):
    return QueueProof(StreamFIFO(BITS, depth, kind="block"), depth)
