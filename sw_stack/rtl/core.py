"""Jobs for the Verilated matrix unit: activations, operations and weight words in, vector words and counters out."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np

from golden.spec import KVStrataError
from golden.spec.engine import FIELDS, WORD_BYTES, EngineConfig, Op

HARNESS = Path("hw/engine/core_harness.cpp")


@dataclass
class CoreJob:
    """What a run of `MatVecCore` starts from.

    acts: (first group, int8 [n, 32], side records uint64 [n]) blocks; table: entry -> (pre, mult, post); operations:
    field dictionaries of MATRIX; words: uint8 [channels, n, 64]; vector_buffer: int32 [words, vector_lanes]; gap:
    chance in 256 that an idle channel waits another cycle.
    """

    config: EngineConfig
    words: np.ndarray
    operations: Sequence[dict[str, int]]
    vector_buffer: np.ndarray
    acts: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    table: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    gap: int = 0
    seed: int = 1
    max_cycles: int = 50_000_000


@dataclass(frozen=True)
class CoreResult:
    """Cycles from the first accepted operation to the last `done`, counters, and the vector buffer after it."""

    cycles: int
    words: int
    word_span: int
    """Cycles from the first word taken to the last."""
    fired: int
    no_weights: int
    no_bank: int
    error: int
    simulated: int
    vector_buffer: np.ndarray

    @property
    def beat_fraction(self) -> float:
        """Share of cycles between first and last word in which a word was taken."""
        return self.words / self.word_span


@cache
def core_program(config: EngineConfig) -> Path:
    """The Verilated `MatVecCore` of a configuration, built once per content."""
    from hw.engine.core import MatVecCore
    from hw.flow.verilator import build_harness
    from hw.flow.verilog import emit

    root = Path(__file__).resolve().parents[2]
    defines = {
        "CHANNELS": config.channels,
        "VECTOR_LANES": config.vector_lanes,
        "OP_BYTES": _op_bytes(),
    }
    return build_harness(emit(partial(MatVecCore, config), "MatVecCore"), [root / HARNESS], defines=defines)


def _op_bytes() -> int:
    return 4 * -(-sum(width for _, width in _op_fields()) // 32)


def _op_fields() -> list[tuple[str, int]]:
    """Fields of the decoded operation, in the order of `hw.engine.interfaces.MatrixOp`."""
    names = {"count": "blocks"}
    return [(names.get(name, name), width) for name, width in FIELDS[Op.MATRIX]]


def _pack_operation(values: dict[str, int]) -> bytes:
    word, position = 0, 0
    for name, width in _op_fields():
        value = values.get(name, 0)
        if not 0 <= value < 1 << width:
            raise KVStrataError(f"field {name} of a matrix operation holds {width} bits, not {value}")
        word |= value << position
        position += width
    return word.to_bytes(_op_bytes(), "little")


def table_entry(pre: int, mult: int, post: int) -> int:
    """Bits of `hw.engine.interfaces.OutputScale`."""
    return pre | mult << 6 | post << 23


def group_sides(codes: np.ndarray) -> np.ndarray:
    """uint64 [n]: sidecars of quantised activations int8 [n, 32]: the sum of the codes, signed 52 bits."""
    return codes.astype(np.int64).sum(1).astype(np.uint64) & np.uint64((1 << 52) - 1)


def run_core(job: CoreJob) -> CoreResult:
    """Run a job on the Verilated core; KVStrataError if it does not finish or the core reports an error."""
    program = core_program(job.config)
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "job", Path(directory) / "result"
        source.write_bytes(_job_bytes(job))
        done = subprocess.run([program, source, target], capture_output=True, text=True, check=False)
        if done.returncode:
            raise KVStrataError(f"the Verilated matrix unit stopped: {done.stderr.strip()}")
        raw = target.read_bytes()
    head = struct.unpack_from("<9Q", raw)
    cycles, words, span, fired, no_weights, no_bank, finished, error, simulated = head
    buffer = np.frombuffer(raw, "<i4", offset=72).reshape(job.vector_buffer.shape)
    if not error and finished < len(job.operations):
        raise KVStrataError(
            f"the matrix unit finished {finished} of {len(job.operations)} operations in {simulated} cycles"
        )
    return CoreResult(cycles, words, span, fired, no_weights, no_bank, error, simulated, buffer)


def _job_bytes(job: CoreJob) -> bytes:
    parts = [struct.pack("<4I", job.max_cycles, job.gap, job.seed, len(job.vector_buffer))]
    groups = [(first + i, codes[i], sides[i]) for first, codes, sides in job.acts for i in range(len(codes))]
    parts.append(struct.pack("<I", len(groups)))
    for address, codes, side in groups:
        parts.append(
            struct.pack("<I", address) + codes.astype(np.int8).tobytes() + struct.pack("<Q", int(side))
        )
    parts.append(struct.pack("<I", len(job.table)))
    for entry, scale in job.table.items():
        parts.append(struct.pack("<2I", entry, table_entry(*scale)))
    parts.append(struct.pack("<I", len(job.operations)))
    parts += [_pack_operation(operation) for operation in job.operations]
    parts.append(struct.pack("<I", job.words.shape[1]))
    assert job.words.shape[0] == job.config.channels
    assert job.words.shape[2] == WORD_BYTES
    parts += [np.ascontiguousarray(job.words, np.uint8).tobytes(), job.vector_buffer.astype("<i4").tobytes()]
    return b"".join(parts)
