"""Typed streams: the strict `connect`, FIFO, register slice, fork and join.

All blocks follow the four transfer rules of Amaranth's stream guide: a transfer happens in a cycle where
`valid` and `ready` are both high; once `valid` is high, it and the payload hold until the transfer; `valid`
never waits for `ready`; `ready` may depend on `valid`.

Every block has a `latency`: clock cycles from the input transfer to the first cycle in which the output
is valid, when the block is empty and nothing stalls. Every block moves one payload per cycle when neither
side stalls.
"""

from weakref import WeakKeyDictionary

from amaranth import Cat, Const, Module, Mux, Shape, ShapeLike, Signal, Value
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.lib.memories import check_memory

_driven_inputs: WeakKeyDictionary[Module, dict[int, Value]] = WeakKeyDictionary()


def canonical_shape(shape: ShapeLike) -> object:
    """A comparable form of a shape: layouts field by field, all others by width and sign.

    A `data.Struct` class equals its identical layout, and `8` equals `unsigned(8)`, but `signed(8)` differs
    from both and a structure differs from plain bits of its width.
    """
    if isinstance(shape, data.Layout) or (
        isinstance(shape, type) and issubclass(shape, data.Struct | data.Union)
    ):
        layout = data.Layout.cast(shape)
        return tuple((name, field.offset, canonical_shape(field.shape)) for name, field in layout)
    cast = Shape.cast(shape)
    return cast.width, cast.signed


def _port_shapes(interface: object) -> dict[tuple, tuple[ShapeLike, wiring.Flow]]:
    members = interface.signature.members.flatten()
    return {path: (member.shape, member.flow) for path, member in members if member.is_port}


def _claim_inputs(m: Module, interface: object) -> None:
    """Record the input ports of `interface` as driven by `m`; a second driver would win silently."""
    driven = _driven_inputs.setdefault(m, {})
    for path, member, value in interface.signature.flatten(interface):
        signal = Value.cast(value)
        if member.flow is not In or isinstance(signal, Const):
            continue
        if id(signal) in driven:
            raise wiring.ConnectionError(
                f"An input has one driver, but {'.'.join(map(str, path))} of {interface!r} is connected "
                f"twice in one module; fan a stream out through Fork"
            )
        driven[id(signal)] = signal


def connect(m: Module, a: object, b: object) -> None:
    """Connect two interfaces whose port shapes are equal, layouts and signedness included.

    Amaranth's own `connect` accepts signed for unsigned, a structure for plain bits of its width, and two
    consumers of one stream in two calls; all three are errors here.

    Raises `amaranth.lib.wiring.ConnectionError`.
    """
    shapes_b = _port_shapes(b)
    for path, (shape, _) in _port_shapes(a).items():
        other = shapes_b.get(path, (shape, None))[0]
        if canonical_shape(shape) != canonical_shape(other):
            raise wiring.ConnectionError(
                f"Connected ports have one shape, but {'.'.join(map(str, path))} is {shape!r} "
                f"on one side and {other!r} on the other"
            )
    wiring.connect(m, a, b)
    _claim_inputs(m, a)
    _claim_inputs(m, b)


def check_count(name: str, value: object, minimum: int) -> int:
    """Return `value` if it is an integer of at least `minimum`, else raise ValueError with a sentence."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, not {value!r}")
    return value


class StreamFIFO(wiring.Component):
    """First-in first-out queue of typed payloads.

    `kind="lut"` reads a LUT memory combinationally (latency 1); `kind="block"` has the registered read that
    block RAM needs (latency 2, depth at least 3, below which it moves a payload every other cycle only).
    `level` counts the payloads inside.

    Raises ValueError for a depth below the least full-rate one, or for a memory that no device holds.
    """

    def __init__(self, shape: ShapeLike, depth: int, *, kind: str = "lut"):
        if kind not in ("lut", "block"):
            raise ValueError(f"FIFO kind must be 'lut' or 'block', not {kind!r}")
        check_count(f"Depth of a full-rate {kind} FIFO", depth, 2 if kind == "lut" else 3)
        check_memory(Shape.cast(shape).width, depth, asynchronous_read=kind == "lut")
        self._shape = shape
        self._depth = depth
        self._kind = kind
        super().__init__(
            {
                "i": In(stream.Signature(shape)),
                "o": Out(stream.Signature(shape)),
                "level": Out(range(depth + 1)),
            }
        )

    @property
    def depth(self) -> int:
        """Payloads that the queue holds."""
        return self._depth

    @property
    def latency(self) -> int:
        """Cycles from the input transfer to a valid output, of an empty queue."""
        return 1 if self._kind == "lut" else 2

    def elaborate(self, platform):
        m = Module()
        inner = fifo.SyncFIFO if self._kind == "lut" else fifo.SyncFIFOBuffered
        m.submodules.queue = queue = inner(width=Shape.cast(self._shape).width, depth=self._depth)
        m.d.comb += [
            queue.w_data.eq(self.i.payload),
            queue.w_en.eq(self.i.valid),
            self.i.ready.eq(queue.w_rdy),
            Value.cast(self.o.payload).eq(queue.r_data),
            self.o.valid.eq(queue.r_rdy),
            queue.r_en.eq(self.o.ready),
            self.level.eq(queue.level),
        ]
        return m


class SkidBuffer(wiring.Component):
    """Full register slice: `valid`, payload and `ready` all leave from registers; holds two payloads."""

    latency = 1
    depth = 2

    def __init__(self, shape: ShapeLike):
        self._held = Signal(shape)
        self._full = Signal()
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform):
        m = Module()
        held, full = self._held, self._full
        m.d.comb += self.i.ready.eq(~full)
        with m.If(~self.o.valid | self.o.ready):
            m.d.sync += [
                Value.cast(self.o.payload).eq(Mux(full, held, self.i.payload)),
                self.o.valid.eq(self.i.valid | full),
                full.eq(0),
            ]
        with m.Elif(self.i.valid & ~full):
            m.d.sync += [Value.cast(held).eq(self.i.payload), full.eq(1)]
        return m


class PipeStage(wiring.Component):
    """Forward register slice: `valid` and payload leave from registers, `ready` is combinational."""

    latency = 1
    depth = 1

    def __init__(self, shape: ShapeLike):
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.i.ready.eq(~self.o.valid | self.o.ready)
        with m.If(self.i.ready):
            m.d.sync += [
                Value.cast(self.o.payload).eq(self.i.payload),
                self.o.valid.eq(self.i.valid),
            ]
        return m


class Fork(wiring.Component):
    """One producer, `count` consumers: each takes each payload exactly once, in its own time.

    The input is accepted in the cycle in which the last consumer takes the payload.
    """

    latency = 0

    def __init__(self, shape: ShapeLike, count: int):
        check_count("Number of consumers of a fork", count, 2)
        self._count = count
        self._taken = Signal(count)
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape)).array(count)})

    def elaborate(self, platform):
        m = Module()
        taken = self._taken
        done = Signal(self._count)
        for index, out in enumerate(self.o):
            m.d.comb += [
                Value.cast(out.payload).eq(self.i.payload),
                out.valid.eq(self.i.valid & ~taken[index]),
                done[index].eq(taken[index] | out.ready),
            ]
        m.d.comb += self.i.ready.eq(done.all())
        with m.If(self.i.valid):
            m.d.sync += taken.eq(Mux(done.all(), 0, done))
        return m


class Join(wiring.Component):
    """`count` producers of one shape, one consumer: takes one payload of each together, as an array."""

    latency = 0

    def __init__(self, shape: ShapeLike, count: int):
        check_count("Number of producers of a join", count, 1)
        joined = data.ArrayLayout(shape, count)
        super().__init__({"i": In(stream.Signature(shape)).array(count), "o": Out(stream.Signature(joined))})

    def elaborate(self, platform):
        m = Module()
        all_valid = Signal()
        m.d.comb += all_valid.eq(Cat(lane.valid for lane in self.i).all())
        m.d.comb += self.o.valid.eq(all_valid)
        for index, lane in enumerate(self.i):
            m.d.comb += [
                self.o.payload[index].eq(lane.payload),
                lane.ready.eq(all_valid & self.o.ready),
            ]
        return m
