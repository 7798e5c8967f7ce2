"""The Verilated engine as a process: memory images in, runs and counters out, no Python per cycle."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from select import select
from typing import NamedTuple

import numpy as np

from golden.spec import KVStrataError
from golden.spec.engine import Counter, EngineConfig, Error, Reg, State, Unit
from golden.spec.memory import MemoryModel
from sw_stack.device.protocol import DeviceTimeout

WATCHDOG_CYCLES = 20_000
"""Cycles without any progress before the engine gives up: far beyond any memory latency."""
MAX_CYCLES = 2_000_000_000
ANSWER_SECONDS = 3600
"""Time for one command, a run included: far beyond the longest prefill, and an end where a simulation hangs."""


@dataclass(frozen=True)
class EngineRun:
    """A run from start to interrupt: state, error, cycles, counters by name, and bytes on the channels since the
    process started."""

    state: State
    error: Error
    error_pc: int
    cycles: int
    counters: dict[str, int]
    channel_bytes_read: int
    channel_bytes_written: int


class Event(NamedTuple):
    """An operation inside a unit: taken in cycle `start`, `done` in cycle `end`. Cycle 0 is the first that counts."""

    unit: Unit
    start: int
    end: int


def _events(raw: np.ndarray) -> list[Event]:
    """Operations by unit, in order, from records (cycle, units that took one, units that ended one)."""
    found: list[Event] = []
    for unit in Unit:
        starts, ends = (raw[(raw[:, column] >> unit & 1) == 1, 0] for column in (1, 2))
        found += [Event(unit, int(s), int(e)) for s, e in zip(starts, ends)]
    return found


@cache
def engine_program(config: EngineConfig, waves: bool = False) -> Path:
    """The Verilated engine of a configuration with its C++ memories, built once per content; `waves`: one that can
    write waveforms, which is slower."""
    import hw.engine
    from hw.engine.engine import Engine
    from hw.flow.verilator import build_harness
    from hw.flow.verilog import emit

    here = Path(hw.engine.__file__).parent
    design = emit(partial(Engine, config), "engine")
    return build_harness(
        design,
        [here / "engine_harness.cpp"],
        include_dirs=[here / "mem"],
        defines={"KV_CHANNELS": config.channels, "COUNTERS": len(Counter), **({"WAVES": 1} if waves else {})},
        trace=waves,
        registered={
            n for n, (way, _, _) in design.ports.items() if way == "i" and n.startswith(("axi", "aux"))
        },
    )


class EngineProcess:
    """A running simulation. Raises KVStrataError with its sentence when a command fails, DeviceTimeout when
    none comes."""

    def __init__(self, config: EngineConfig, model: MemoryModel | None = None, waves: bool = False) -> None:
        self.config = config
        self._directory = tempfile.TemporaryDirectory()
        text = self._path("memory.txt")
        text.write_text((model or MemoryModel()).to_text())
        self._process = subprocess.Popen(
            [str(engine_program(config, waves)), str(text)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.set(Reg.WATCHDOG, WATCHDOG_CYCLES)

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
        self._directory.cleanup()

    def _path(self, name: str) -> Path:
        return Path(self._directory.name) / name

    def command(self, line: str) -> str:
        """Send one command line of `hw/engine/engine_harness.cpp` and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            if not select([self._process.stdout], [], [], ANSWER_SECONDS)[0]:
                self._process.kill()
                raise DeviceTimeout(
                    f"the engine must answer a command within {ANSWER_SECONDS} s; {line.split()[0]!r} is open"
                )
            answer = self._process.stdout.readline().strip()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise DeviceTimeout(
                f"the engine must answer a command; its simulation ended at {line.split()[0]!r}"
            )
        if answer.startswith("error "):
            raise KVStrataError(f"the engine simulation refused: {answer[6:]}")
        return answer

    def map_channel(self, channel: int, path: Path) -> None:
        """Map a channel's image file; writes of the engine stay private."""
        self.command(f"channel {channel} {path.resolve()}")

    def map_aux(self, path: Path) -> None:
        """Map auxiliary memory's image file, likewise."""
        self.command(f"aux {path.resolve()}")

    def write_aux(self, address: int, data: np.ndarray) -> None:
        """Copy bytes into auxiliary memory."""
        path = self._path("in.bin")
        path.write_bytes(np.ascontiguousarray(data).tobytes())
        self.command(f"write {address} {path}")

    def read_aux(self, address: int, size: int) -> np.ndarray:
        """uint8 [size] of auxiliary memory."""
        path = self._path("out.bin")
        self.command(f"read {address} {size} {path}")
        return np.fromfile(path, np.uint8)

    def read_channel(self, channel: int, address: int, size: int) -> np.ndarray:
        """uint8 [size] of a weight channel from a byte address."""
        path = self._path("out.bin")
        self.command(f"peek {channel} {address} {size} {path}")
        return np.fromfile(path, np.uint8)

    def profile(self, on: bool = True) -> None:
        """Record what units start and end in every run from now on, or stop that."""
        self.command(f"profile {self._path('events.bin')}" if on else "profile")

    def wave(self, first: int, last: int, path: Path) -> None:
        """Write a VCD waveform of cycles [first, last) of the next run; the process must have been made with waves."""
        self.command(f"wave {first} {last} {path.resolve()}")

    def events(self) -> list[Event]:
        """The operations of the last run, unit by unit in order; a profile must have been on."""
        return _events(np.fromfile(self._path("events.bin"), "<i4").reshape(-1, 3))

    def set(self, register: int, value: int) -> None:
        """Write a host register."""
        self.command(f"set {int(register)} {value}")

    def get(self, register: int) -> int:
        """Read a host register."""
        return int(self.command(f"get {int(register)}"))

    def reset(self) -> None:
        """Pulse the reset, whatever goes on; memories keep their contents, registers do not."""
        self.command("reset")
        self.set(Reg.WATCHDOG, WATCHDOG_CYCLES)

    def run(self, program_word: int, registers: dict[int, int], *, abort_at: int | None = None) -> EngineRun:
        """Run a program with the given scalar registers until the interrupt, or abort it in cycle `abort_at`.

        Raises KVStrataError when no interrupt comes or a memory port saw a protocol violation.
        """
        for index, value in registers.items():
            self.set(Reg.SCALAR + index, value)
        order = f"run {program_word} {MAX_CYCLES}" if abort_at is None else f"abort {program_word} {abort_at}"
        answer = json.loads(self.command(order))
        if answer["violation"]:
            raise KVStrataError(f"a memory port broke the AXI protocol: {answer['violation']}")
        if not answer["interrupt"]:
            raise DeviceTimeout(f"the engine raised no interrupt within {answer['waited']} cycles")
        return EngineRun(
            State(answer["state"]),
            Error(answer["error"]),
            answer["error_pc"],
            answer["cycles"],
            {counter.name.lower(): answer["counters"][counter] for counter in Counter},
            answer["bytes_read"],
            answer["bytes_written"],
        )
