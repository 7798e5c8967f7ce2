"""The golden device: executes the instruction stream on the memory images with golden/ops.py, unit by unit.

It keeps the engine's architectural state and nothing else: channels, auxiliary memory, vector buffer, A8 buffer,
scale table, the stream from LOAD to MATRIX and the one from KVQUANT to APPEND, and the dependency tokens. Each
unit's queue runs in order; which unit goes next is a parameter, so that a program whose tokens are too weak shows
different bits under another order, and one that deadlocks is reported.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import numpy as np

from golden.spec import KVStrataError
from golden.spec.engine import INSTRUCTION_BYTES, REGISTERS, WORD_BYTES, Error, Op, Unit, decode
from sw_stack.device import units
from sw_stack.device.protocol import DeviceFault, RunResult
from sw_stack.device.state import EngineState
from sw_stack.pack.image import Image

Fields = dict[str, int]
TOKEN_LIMIT = 127
"""A dependency counter holds this many tokens; a unit that would give one more waits."""


@dataclass
class _Queued:
    pc: int
    op: Op
    fields: Fields


class GoldenDevice:
    """Functional engine over an image directory, or over memories as they are.

    `seed` None executes in program order; a number picks ready units at random.
    """

    name = "golden"

    def __init__(self, image: Image | EngineState, seed: int | None = None) -> None:
        self.state = image if isinstance(image, EngineState) else EngineState.from_image(image)
        self._random = None if seed is None else random.Random(seed)

    # --- host side
    def write_aux(self, address: int, data: np.ndarray) -> None:
        """See EngineDevice."""
        self._aux(address, len(data))[:] = data

    def read_aux(self, address: int, size: int) -> np.ndarray:
        """See EngineDevice."""
        return self._aux(address, size).copy()

    def _aux(self, address: int, size: int) -> np.ndarray:
        if address < 0 or address + size > len(self.state.aux):
            raise KVStrataError(
                f"auxiliary memory has {len(self.state.aux)} bytes; got {size} bytes at {address:#x}"
            )
        return self.state.aux[address : address + size]

    def read_vb(self, address: int, elements: int) -> np.ndarray:
        """See EngineDevice."""
        start = address * self.state.config.vector_lanes
        return self.state.vb[start : start + elements].astype(np.int32)

    def close(self) -> None:
        """Nothing to release."""

    # --- execution
    def run(self, program_word: int, registers: dict[int, int]) -> RunResult:
        """See EngineDevice. Raises DeviceFault, also for a deadlock (WATCHDOG)."""
        values = [0] * REGISTERS
        for index, value in registers.items():
            values[index] = value
        self.state.start_run()
        queues = self._fetch(program_word, values)
        tokens = [[0] * len(Unit) for _ in Unit]
        while any(queues):
            ready = [u for u in Unit if queues[u] and self._ready(queues[u][0], tokens, u)]
            if not ready:
                first = min(q[0].pc for q in queues if q)
                raise DeviceFault(Error.WATCHDOG, first, "every unit waits for a token that nobody will give")
            unit = self._choose(ready, queues)
            item = queues[unit].popleft()
            for source in Unit:
                tokens[source][unit] -= item.fields["wait"] >> source & 1
            try:
                units.execute(self.state, item.op, item.fields)
            except units.UnitError as error:
                raise DeviceFault(error.code, item.pc, str(error)) from error
            for target in Unit:
                tokens[unit][target] += item.fields["signal"] >> target & 1
        if left := sum(map(sum, tokens)):
            raise DeviceFault(Error.SHAPE, 0, f"{left} tokens were never taken")
        if left := self.state.counted:
            raise DeviceFault(Error.SHAPE, 0, f"{left} groups of codes were counted for no product")
        return RunResult()

    def _fetch(self, word: int, registers: list[int]) -> list[deque[_Queued]]:
        queues: list[deque[_Queued]] = [deque() for _ in Unit]
        pc = 0
        while True:
            at = word * WORD_BYTES + pc * INSTRUCTION_BYTES
            raw = self._aux(at, INSTRUCTION_BYTES)
            try:
                op, fields = decode(int.from_bytes(raw.tobytes(), "little"))
            except KVStrataError as error:
                raise DeviceFault(Error.ILLEGAL_INSTRUCTION, pc, str(error)) from error
            if op is Op.HALT:
                return queues
            for name, register in (("addr", fields["addr_reg"]), ("count", fields["count_reg"])):
                if register:
                    fields[name] += registers[register]
            if op is Op.SOFTMAX:
                fields["sinks_live"] = registers[fields["sinks_reg"]]
            queues[Unit(op >> 4)].append(_Queued(pc, op, fields))
            pc += 1

    def _ready(self, item: _Queued, tokens: list[list[int]], unit: Unit) -> bool:
        wants = (source for source in Unit if item.fields["wait"] >> source & 1)
        if not all(tokens[source][unit] for source in wants):
            return False
        gives = (target for target in Unit if item.fields["signal"] >> target & 1)
        if any(tokens[unit][target] >= TOKEN_LIMIT for target in gives):
            return False
        return units.inputs_ready(self.state, item.op, item.fields)

    def _choose(self, ready: list[Unit], queues: list[deque[_Queued]]) -> Unit:
        if self._random is not None:
            return self._random.choice(ready)
        return min(ready, key=lambda u: queues[u][0].pc)
