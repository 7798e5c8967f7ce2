"""What every engine device does, whatever executes it: a backend is a class with these methods.

Host software writes auxiliary memory and scalar registers, starts a program and waits; Python never runs per
cycle. All devices open the same image directory and execute the same instruction bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from golden.spec import KVStrataError
from golden.spec.engine import Error


@dataclass(frozen=True)
class RunResult:
    """One run from start to interrupt. `cycles` is 0 on a device without time."""

    cycles: int = 0
    counters: dict[str, int] = field(default_factory=dict)


class DeviceFault(KVStrataError):
    """The engine stopped with an error code; `code` and `instruction` say which and where."""

    def __init__(self, code: Error, instruction: int, what: str) -> None:
        self.code, self.instruction = code, instruction
        super().__init__(f"the engine stopped at instruction {instruction} ({code.name.lower()}): {what}")


class DeviceTimeout(KVStrataError):
    """A device gave no answer within its limit: an engine no interrupt, a drive no completion."""


class EngineDevice(Protocol):
    """An engine with its memories. Errors: DeviceFault, DeviceTimeout; the device accepts another run afterwards."""

    name: str

    def write_aux(self, address: int, data: np.ndarray) -> None:
        """Copy bytes uint8[n] into auxiliary memory; KVStrataError outside it."""
        ...

    def read_aux(self, address: int, size: int) -> np.ndarray:
        """uint8[size] of auxiliary memory; KVStrataError outside it."""
        ...

    def run(self, program_word: int, registers: dict[int, int]) -> RunResult:
        """Execute from a 64-byte word of auxiliary memory with the given scalar registers until HALT."""
        ...

    def read_vb(self, address: int, elements: int) -> np.ndarray:
        """int32[elements] of the vector buffer from VB word `address`: for lockstep and debugging."""
        ...

    def close(self) -> None:
        """Release processes and files."""
        ...
