"""The timing device: golden results, cycles predicted from closed forms (sw_stack/compile/schedule.py)."""

from __future__ import annotations

from golden.spec.engine import INSTRUCTION_BYTES, WORD_BYTES, Op, Unit, decode
from sw_stack.compile.builder import Instruction
from sw_stack.compile.program import Program
from sw_stack.compile.schedule import MemoryTiming, Schedule, schedule
from sw_stack.device.golden import GoldenDevice
from sw_stack.device.protocol import RunResult
from sw_stack.pack.image import Image


class TimingDevice(GoldenDevice):
    """Predicts each run from the instruction bytes in its memory; `last` is the schedule of the last one."""

    name = "timing"

    def __init__(self, image: Image, memory: MemoryTiming | None = None) -> None:
        super().__init__(image)
        self._memory = memory or MemoryTiming()
        self.last: Schedule | None = None

    def run(self, program_word: int, registers: dict[int, int]) -> RunResult:
        """See EngineDevice."""
        super().run(program_word, registers)
        program = Program("memory", 0, program_word * WORD_BYTES, tuple(self._instructions(program_word)))
        self.last = schedule(program, self.state.config, registers, self._memory)
        counters = {f"{unit.name.lower()}_busy": self.last.busy[unit] for unit in Unit}
        return RunResult(self.last.cycles, counters)

    def _instructions(self, word: int) -> list[Instruction]:
        found: list[Instruction] = []
        at = word * WORD_BYTES
        while not found or found[-1].op is not Op.HALT:
            op, values = decode(int.from_bytes(self.read_aux(at, INSTRUCTION_BYTES).tobytes(), "little"))
            wait, signal = values.pop("wait"), values.pop("signal")
            found.append(Instruction(op, values, op.name, (), (), wait, signal))
            at += INSTRUCTION_BYTES
        return found
