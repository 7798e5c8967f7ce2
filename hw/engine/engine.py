"""The engine: every unit, the memories between them, the memory ports and the controller."""

from amaranth import Cat, Module, ResetInserter, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import UNITS, WORD_BITS, EngineConfig
from hw.engine.controller import Controller, host_port
from hw.engine.matrix import MatrixUnit
from hw.engine.mem.append import AppendUnit
from hw.engine.mem.axi import ReadMux, axi_read, axi_write
from hw.engine.mem.channels import ADDR_BITS, ChannelReaders
from hw.engine.mem.dma import DmaUnit
from hw.engine.sfu.unit import VectorUnit
from hw.engine.vector_buffer import VectorBuffer
from hw.engine.write_mux import WriteMux
from hw.lib.streams import connect


class Engine(wiring.Component):
    """`axi[c]`, `axi_write[c]`: the weight channels; `aux`, `aux_write`: auxiliary memory; `host`: the registers.

    One 512-bit AXI4 port each, addresses from zero. docs/engine.md is the reference. `started`, `finished`: the
    controller's, for a profile; leave them open on a board.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "host": In(host_port()),
                "interrupt": Out(1),
                "axi": Out(axi_read(ADDR_BITS, WORD_BITS)).array(config.channels),
                "axi_write": Out(axi_write(ADDR_BITS, WORD_BITS)).array(config.channels),
                "aux": Out(axi_read(ADDR_BITS, WORD_BITS)),
                "aux_write": Out(axi_write(ADDR_BITS, WORD_BITS)),
                "started": Out(UNITS),
                "finished": Out(UNITS),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.controller = controller = Controller(config)
        matrix, vector, buffer = MatrixUnit(config), VectorUnit(config), VectorBuffer(config)
        dma, append, load = DmaUnit(config), AppendUnit(config), ChannelReaders(config)
        cleared = ResetInserter(controller.reset)
        m.submodules.matrix, m.submodules.vector = cleared(matrix), cleared(vector)
        m.submodules.dma, m.submodules.append, m.submodules.load = (
            cleared(dma),
            cleared(append),
            cleared(load),
        )
        m.submodules.buffer = buffer
        connect(m, wiring.flipped(self.host), controller.host)
        m.d.comb += [
            self.interrupt.eq(controller.interrupt),
            self.started.eq(controller.started),
            self.finished.eq(controller.finished),
        ]
        self._units(m, controller, matrix, vector, dma, append, load)
        for reader, port in (("drain", matrix.old), ("a", vector.a), ("b", vector.b), ("dma", dma.vb_read)):
            connect(m, port, getattr(buffer, reader))
        for writer, port in (("drain_w", matrix.y), ("y", vector.y), ("dma_w", dma.vb_write)):
            connect(m, port, getattr(buffer, writer))
        connect(m, vector.act, matrix.act)
        connect(m, matrix.collected, vector.collected)
        connect(m, vector.table, matrix.table)
        connect(m, vector.kv, append.kv)
        for c in range(config.channels):
            connect(m, load.words[c], matrix.words[c])
        self._memory(m, controller, dma, append, load)
        aux_read, aux_write = Signal(), Signal()
        m.d.comb += [
            aux_read.eq(self.aux.rvalid & self.aux.rready),
            aux_write.eq(self.aux_write.wvalid & self.aux_write.wready),
            controller.quiet.eq(dma.idle & append.idle & load.idle),
            controller.events.eq(
                Cat(
                    matrix.fired,
                    matrix.no_weights,
                    matrix.no_bank,
                    matrix.taken,
                    aux_read,
                    aux_write,
                )
            ),
            controller.active.eq(
                matrix.fired | matrix.taken | matrix.y.en | vector.y.en | vector.act.en | aux_read | aux_write
            ),
            *(unit.abort.eq(controller.abort) for unit in (dma, append, load)),
        ]
        return m

    @staticmethod
    def _units(m, controller, matrix, vector, dma, append, load):
        for port, unit in (("vector", vector), ("dma", dma), ("append", append), ("load", load)):
            connect(m, getattr(controller, port), unit.unit)
        ours = controller.matrix
        m.d.comb += [
            Value.cast(matrix.op.payload).eq(Value.cast(ours.op.payload)),
            matrix.op.valid.eq(ours.op.valid),
            ours.op.ready.eq(matrix.op.ready),
            ours.done.eq(matrix.done),
            ours.error.eq(matrix.error),
        ]

    def _memory(self, m, controller, dma, append, load):
        """Weights and the append unit share each channel's read port; fetches and DMA reads the auxiliary one."""
        for c in range(self._config.channels):
            self._share(m, f"read_{c}", (load.axi[c], append.axi_read[c]), self.axi[c])
            connect(m, append.axi_write[c], wiring.flipped(self.axi_write[c]))
        self._share(m, "read_aux", (controller.axi, dma.axi_read), self.aux)
        m.submodules.write_aux = mux = WriteMux(ADDR_BITS, WORD_BITS, 2)
        connect(m, append.aux_write, mux.masters[0])
        connect(m, dma.axi_write, mux.masters[1])
        connect(m, mux.port, wiring.flipped(self.aux_write))

    @staticmethod
    def _share(m, name, masters, port):
        m.submodules[name] = mux = ReadMux(ADDR_BITS, WORD_BITS, len(masters))
        for index, master in enumerate(masters):
            connect(m, master, mux.masters[index])
        connect(m, mux.port, wiring.flipped(port))
