"""Attention heads through the in-storage kernel's RTL: arrays in, output, cycles and the flash bound out.

Arrays are float16: q [G, dh], k and v [S, dh]; see docs/formats-storage.md for what the kernel computes.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from golden.spec import KVStrataError
from golden.spec.storage import BEAT_ELEMENTS, ELEMENT_BYTES, GROUP_TOKENS
from golden.storage.attention import check_shapes
from golden.storage.fp import F16

BEAT_FILE_BYTES = 64


@dataclass(frozen=True)
class KernelConfig:
    """One kernel behind the published drive's channels. `lanes`: queries served at once."""

    lanes: int = 1
    clock_mhz: float = 285.0
    channels: int = 8
    channel_gb_per_s: float = 1.4

    @property
    def flash_bytes_per_cycle(self) -> float:
        """Aggregate rate of the flash channels."""
        return self.channels * self.channel_gb_per_s * 1e3 / self.clock_mhz

    @property
    def bytes_per_cycle(self) -> float:
        """What one kernel on its own can be given: its port's beat, or the channels where they are slower.

        The published drive's channels give 39.3, more than the 32 of one port; the unit has two kernels, and what both
        together make of the channels is the whole unit's number (calibration table `storage_unit`).
        """
        return min(BEAT_ELEMENTS * ELEMENT_BYTES, self.flash_bytes_per_cycle)


@dataclass(frozen=True)
class HeadRun:
    """Output [G, dh], cycles on the RTL, and the least cycles in which the K and V bytes can enter the kernel."""

    output: F16
    cycles: int
    bound_cycles: float


class BeatWriter:
    """Packs kernel beats as the hardware's payload, from the layout that the hardware itself declares."""

    def __init__(self) -> None:
        from hw.storage.kernel import BEAT, HEAD, Op

        self._offsets = {name: field.offset for name, field in BEAT if name != "data"}
        self._op = {name: op.value for name, op in Op.__members__.items()}
        self._head = {name: field.offset for name, field in HEAD}
        self._rows: list[NDArray[np.uint8]] = []

    def beats(self, op: str, elements: NDArray, *, mask: int = 0, index: int = 0, flag: bool = False) -> None:
        """A block: elements as 16-bit patterns [n, 16]; `first` and `last` mark its ends."""
        n = len(elements)
        rows = np.zeros((n, BEAT_FILE_BYTES), np.uint8)
        rows[:, : BEAT_ELEMENTS * ELEMENT_BYTES] = np.ascontiguousarray(elements, "<u2").view(np.uint8)
        control = self._control(op=self._op[op], mask=mask, index=index, flag=int(flag))
        words = np.full(n, control, np.uint64)
        words[0] |= np.uint64(self._control(first=1))
        words[-1] |= np.uint64(self._control(last=1))
        rows[:, 32:40] = words.astype("<u8").view(np.uint8).reshape(n, 8)
        self._rows.append(rows)

    def start(self, **fields: int) -> None:
        """A START beat with the fields of HEAD."""
        elements = np.zeros((1, BEAT_ELEMENTS), np.uint16)
        elements[0, 0] = sum(value << self._head[name] for name, value in fields.items())
        self.beats("START", elements)

    def _control(self, **fields: int) -> int:
        return sum(value << (self._offsets[name] - 16 * BEAT_ELEMENTS) for name, value in fields.items())

    def dense_head(self, q: F16, k: F16, v: F16) -> None:
        """All beats of one head, K one group ahead of V."""
        head_size = q.shape[1]
        self.start(wide=int(head_size == 128), queries=len(q) - 1)
        for index, row in enumerate(q):
            self.beats("QUERY", row.view(np.uint16).reshape(-1, BEAT_ELEMENTS), index=index)
        groups = -(-len(k) // GROUP_TOKENS)
        for group in range(groups + 1):
            if group < groups:
                self.key_block(k, group)
            if group:
                self.value_block(v, group - 1, last=group == groups)

    def key_block(self, k: F16, group: int) -> None:
        """K of one group."""
        rows = k[group * GROUP_TOKENS : (group + 1) * GROUP_TOKENS]
        self.beats("K", rows.view(np.uint16).reshape(-1, BEAT_ELEMENTS), mask=(1 << len(rows)) - 1)

    def value_block(self, v: F16, group: int, *, last: bool) -> None:
        """V of one group, a dimension per beat."""
        rows = v[group * GROUP_TOKENS : (group + 1) * GROUP_TOKENS]
        columns = np.zeros((v.shape[1], GROUP_TOKENS), np.uint16)
        columns[:, : len(rows)] = rows.view(np.uint16).T
        self.beats("V", columns, mask=(1 << len(rows)) - 1, flag=last)

    def tobytes(self) -> bytes:
        """Everything written so far."""
        return np.concatenate(self._rows).tobytes()


@lru_cache(maxsize=4)
def kernel_program(lanes: int) -> Path:
    """The Verilated kernel as a program; built once and cached by content."""
    from hw.flow.verilator import build_harness
    from hw.flow.verilog import emit
    from hw.storage import kernel

    source = Path(kernel.__file__).parent / "harness" / "kernel.cpp"
    return build_harness(emit(partial(kernel.AttentionKernel, lanes), "kernel"), [source])


def run_beats(
    beats: BeatWriter, outputs: int, lanes: int, *, seed: int = 0, pause_in: int = 0, pause_out: int = 0
) -> tuple[NDArray[np.uint32], int]:
    """Output words and cycles of a beat stream; pauses in percent of cycles on both sides.

    Raises KVStrataError if the kernel stops before it has given `outputs` elements.
    """
    program = kernel_program(lanes)
    with tempfile.TemporaryDirectory() as work:
        source, target = Path(work) / "beats", Path(work) / "outputs"
        source.write_bytes(beats.tobytes())
        arguments = [str(n) for n in (outputs, seed, pause_in, pause_out)]
        result = subprocess.run(
            [program, source, target, *arguments], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise KVStrataError(
                f"the attention kernel must give {outputs} output elements, but it stopped after "
                f"{target.stat().st_size // 4 if target.exists() else 0}"
            )
        return np.fromfile(target, "<u4"), int(result.stdout.split()[0])


def run_heads(
    heads: Sequence[tuple[F16, F16, F16]],
    config: KernelConfig | None = None,
    *,
    seed: int = 0,
    pause_in: int = 0,
    pause_out: int = 0,
) -> tuple[list[F16], int]:
    """Dense attention of several heads, one after the other through one kernel: outputs and cycles of all."""
    config = config or KernelConfig(lanes=max(len(q) for q, _, _ in heads))
    beats = BeatWriter()
    for q, k, v in heads:
        check_shapes(q, k, v)
        if len(q) > config.lanes:
            raise KVStrataError(
                f"the kernel serves {config.lanes} queries of a KV head at once, not {len(q)}"
            )
        beats.dense_head(q, k, v)
    count = sum(q.size for q, _, _ in heads)
    words, cycles = run_beats(beats, count, config.lanes, seed=seed, pause_in=pause_in, pause_out=pause_out)
    patterns = (words & 0xFFFF).astype(np.uint16).view(np.float16)
    outputs, at = [], 0
    for q, _, _ in heads:
        outputs.append(patterns[at : at + q.size].reshape(q.shape))
        at += q.size
    return outputs, cycles


def run_head(q: F16, k: F16, v: F16, config: KernelConfig | None = None) -> HeadRun:
    """Dense attention of one KV head's queries on the RTL; its bound is `KernelConfig.bytes_per_cycle`."""
    config = config or KernelConfig(lanes=len(q))
    (output,), cycles = run_heads([(q, k, v)], config)
    return HeadRun(output, cycles, (k.size + v.size) * ELEMENT_BYTES / config.bytes_per_cycle)
