"""The RTL device: the same images and programs on the Verilated engine."""

from __future__ import annotations

import numpy as np

from golden.spec import KVStrataError
from golden.spec.engine import INSTRUCTION_BYTES, WORD_BYTES, Error, Op, Reg, State, encode
from golden.spec.memory import MemoryModel
from sw_stack.device.protocol import DeviceFault, RunResult
from sw_stack.pack.image import AUX, Image, channel_file
from sw_stack.rtl.engine import EngineProcess

SCRATCH = 1 << 29
"""Auxiliary bytes above every map: programs and data of `read_vb`."""
SENTENCES = {
    Error.ILLEGAL_INSTRUCTION: "no unit executes this instruction",
    Error.SHAPE: "its shape does not fit the engine",
    Error.ADDRESS: "it leaves its memory or its buffer",
    Error.BUS: "a memory answered with an error",
    Error.WATCHDOG: "nothing moved for the watchdog's time",
    Error.PATTERN: "its weights hold an illegal 2:4 pattern",
    Error.ABORTED: "the host aborted the run",
}


class RtlDevice:
    """Engine over an image directory, simulated cycle by cycle with its memories at any latency (`model`)."""

    name = "rtl"

    def __init__(self, image: Image, model: MemoryModel | None = None, waves: bool = False) -> None:
        self._config = image.map.engine
        self.engine = EngineProcess(self._config, model, waves)
        self._aux_bytes = len(image.aux())
        for channel in range(self._config.channels):
            self.engine.map_channel(channel, image.directory / channel_file(channel))
        self.engine.map_aux(image.directory / AUX)

    def write_aux(self, address: int, data: np.ndarray) -> None:
        """See EngineDevice."""
        self._check(address, len(data))
        self.engine.write_aux(address, data)

    def read_aux(self, address: int, size: int) -> np.ndarray:
        """See EngineDevice."""
        self._check(address, size)
        return self.engine.read_aux(address, size)

    def _check(self, address: int, size: int) -> None:
        if address < 0 or address + size > self._aux_bytes:
            raise KVStrataError(
                f"auxiliary memory has {self._aux_bytes} bytes; got {size} bytes at {address:#x}"
            )

    def run(self, program_word: int, registers: dict[int, int]) -> RunResult:
        """See EngineDevice."""
        result = self.engine.run(program_word, registers)
        if result.state is not State.DONE:
            raise DeviceFault(result.error, result.error_pc, SENTENCES[result.error])
        return RunResult(result.cycles, result.counters)

    def read_vb(self, address: int, elements: int) -> np.ndarray:
        """See EngineDevice: a program that writes the words to scratch memory."""
        words = -(-elements // self._config.vector_lanes)
        program = [
            encode(Op.WRITE, addr=SCRATCH + WORD_BYTES, count=words, vectors=1, dst=address),
            encode(Op.HALT, interrupt=1),
        ]
        raw = b"".join(word.to_bytes(INSTRUCTION_BYTES, "little") for word in program)
        self.engine.write_aux(SCRATCH, np.frombuffer(raw, np.uint8))
        self.run(SCRATCH // WORD_BYTES, {})
        data = self.engine.read_aux(SCRATCH + WORD_BYTES, 4 * words * self._config.vector_lanes)
        return data.view("<i4")[:elements]

    def status(self, register: Reg) -> int:
        """A host register, for debugging."""
        return self.engine.get(register)

    def close(self) -> None:
        """See EngineDevice."""
        self.engine.close()
