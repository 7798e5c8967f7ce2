"""The matrix unit with flat ports, for a C++ harness that plays memory channels and vector buffer."""

from amaranth import Module, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import SIDE_BITS, STEP, WORD_BITS, EngineConfig
from hw.engine.interfaces import GROUP_ADDR, TABLE_ADDR, VB_ADDR, MatrixOp, OutputScale
from hw.engine.matrix import MatrixUnit


class MatVecCore(wiring.Component):
    """`MatrixUnit(config)` as wide vectors: channel c of `words` from bit `512 * c`, streams as valid, ready, payload.

    Timing and meaning are the matrix unit's; `hw/engine/core_harness.cpp` is its driver.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "op": In(MatrixOp),
                "op_valid": In(1),
                "op_ready": Out(1),
                "done": Out(1),
                "error": Out(4),
                "words": In(WORD_BITS * config.channels),
                "words_valid": In(config.channels),
                "words_ready": Out(config.channels),
                "act_en": In(1),
                "act_addr": In(GROUP_ADDR),
                "act_codes": In(8 * STEP),
                "act_side": In(SIDE_BITS),
                "act_counted": In(1),
                "table_en": In(1),
                "table_addr": In(TABLE_ADDR),
                "table_entry": In(OutputScale),
                "y_en": Out(1),
                "y_addr": Out(VB_ADDR),
                "y_data": Out(32 * config.vector_lanes),
                "old_en": Out(1),
                "old_addr": Out(VB_ADDR),
                "old_data": In(32 * config.vector_lanes),
                "fired": Out(1),
                "taken": Out(1),
                "no_weights": Out(1),
                "no_bank": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.unit = unit = MatrixUnit(self._config)
        m.d.comb += [
            Value.cast(unit.op.payload).eq(Value.cast(self.op)),
            unit.op.valid.eq(self.op_valid),
            self.op_ready.eq(unit.op.ready),
            unit.act.en.eq(self.act_en),
            unit.act.counted.eq(self.act_counted),
            unit.act.addr.eq(self.act_addr),
            unit.act.codes.eq(self.act_codes),
            Value.cast(unit.act.side).eq(self.act_side),
            unit.table.en.eq(self.table_en),
            unit.table.addr.eq(self.table_addr),
            Value.cast(unit.table.entry).eq(Value.cast(self.table_entry)),
            self.y_en.eq(unit.y.en),
            self.y_addr.eq(unit.y.addr),
            self.y_data.eq(unit.y.data),
            unit.y.rdy.eq(1),
            self.old_en.eq(unit.old.en),
            self.old_addr.eq(unit.old.addr),
            unit.old.data.eq(self.old_data),
            unit.old.rdy.eq(1),
        ]
        for c, words in enumerate(unit.words):
            m.d.comb += [
                words.payload.eq(self.words.word_select(c, WORD_BITS)),
                words.valid.eq(self.words_valid[c]),
                self.words_ready[c].eq(words.ready),
            ]
        for name in ("done", "error", "fired", "taken", "no_weights", "no_bank"):
            m.d.comb += getattr(self, name).eq(getattr(unit, name))
        return m
