"""Batches of attention jobs through the whole in-storage unit's RTL, with the KV cache on the flash model.

`Cache` lays K and V of many (sequence, KV head) pairs out on the flash with the golden layout; the tokens of the last,
unfinished pages stay in the group buffer, as on the drive. `run` executes jobs and returns what the unit completed.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from golden.spec import KVStrataError
from golden.spec.storage import (
    ATTEND,
    BEAT_ELEMENTS,
    CONFIG,
    COUNTERS,
    PAGE_BYTES,
    PPN,
    Mode,
    PageKind,
    Status,
    tokens_per_channel_page,
    tokens_per_page,
)
from golden.storage.fp import F16
from golden.storage.layout import AppendOrder, Geometry, pack, place

_KEY_BITS = {"kind": 2, "kv_head": 8, "sequence": 12, "index": 17}


@dataclass(frozen=True)
class UnitConfig:
    """The hardware: flash channels, query lanes per kernel, longest SparF sequence."""

    channels: int = 8
    lanes: int = 1
    max_tokens: int = 4096


@dataclass
class Cache:
    """K and V of a batch on flash. `m`: channels per channel-indexed page.

    `tail_in_dram`: unfinished pages are in the group buffer, as on the drive; else they are on flash, padded.
    """

    head_size: int
    m: int = 4
    geometry: Geometry = field(default_factory=Geometry)
    tail_in_dram: bool = True

    def __post_init__(self) -> None:
        self.flash: dict[int, bytes] = {}
        self.dram: dict[int, bytes] = {}
        self.maps: dict[int, tuple[int, int]] = {}
        self.failing: list[int] = []
        self._append = AppendOrder(self.geometry)
        self._heads = 0

    def add(self, sequence: int, kv_head: int, k: F16, v: F16) -> None:
        """Write one KV head, page after page."""
        tokens = len(k)
        for kind, x in ((PageKind.K_TOKEN, k), (PageKind.V_TOKEN, v), (PageKind.K_CHANNEL, k)):
            pages = pack(kind, x.view(np.uint16), self.m)
            if kind is PageKind.K_CHANNEL:
                full = tokens // tokens_per_channel_page(self.m) * (self.head_size // self.m)
            else:
                full = tokens // tokens_per_page(self.head_size)
            for index, page in enumerate(pages):
                key = request_key(kind=kind, kv_head=kv_head, sequence=sequence, index=index)
                content = page.astype("<u2").tobytes()
                if self.tail_in_dram and index >= full:
                    self.maps[key] = (len(self.dram), 1)
                    self.dram[len(self.dram)] = content
                else:
                    number = self._program(kind, index)
                    self.maps[key] = (number, 0)
                    self.flash[number] = content
        self._heads += 1

    def _program(self, kind: PageKind, index: int) -> int:
        """The physical page that a page of the newest head goes to."""
        g, groups = self.geometry, self.head_size // self.m
        where = place(kind, self._heads, index, groups=groups, channels=g.channels, arrays=g.arrays)
        return PPN.pack(self._append.take(*map(int, where)))

    def page_of(self, **fields: int) -> int:
        """Where a page lies: kind, kv_head, sequence, index."""
        return self.maps[request_key(**fields)][0]


def request_key(**fields: int) -> int:
    """The firmware's map key: the low fields of PAGE_REQUEST."""
    key, at = 0, 0
    for name, bits in _KEY_BITS.items():
        key |= int(fields[name]) << at
        at += bits
    return key


@dataclass(frozen=True)
class Job:
    """One attend command: q [G, dh], S; with `r` SparF, its k, window and v-bar [dh]."""

    sequence: int
    kv_head: int
    q: F16
    tokens: int
    r: int = 0
    k: int = 0
    window: int = 0
    mean: F16 | None = None

    def record(self, command_id: int) -> dict[str, int]:
        """Fields of the command."""
        return {
            "command_id": command_id,
            "mode": Mode.SPARF if self.mean is not None else Mode.DENSE,
            "sequence": self.sequence,
            "kv_head": self.kv_head,
            "tokens": self.tokens,
            "r": self.r,
            "k": self.k,
            "window": self.window,
        }

    def operands(self) -> NDArray[np.uint16]:
        """16-bit patterns in the order of the operand beats."""
        rows = [self.q.view(np.uint16).ravel()]
        if self.mean is not None:
            rows.append(self.mean.view(np.uint16))
        return np.concatenate(rows)


@dataclass(frozen=True)
class Completion:
    """What came back for one command; `cycle` counts from the first command."""

    cycle: int
    status: Status
    field: int
    index: int
    output: F16 | None
    maximum: NDArray[np.int64]
    """Softmax maximum of each query, whole log2 units; 0 where there is no output."""
    sum: NDArray[np.int64]
    """Softmax sum of each query, 2^-40."""


@dataclass(frozen=True)
class BatchRun:
    """Completions by command number, cycles from the first command to the last completion, counters, config answers.

    `reads`: per channel (the last is the group buffer), the physical pages in the order of asking.
    """

    completions: dict[int, Completion]
    cycles: int
    counters: dict[str, int]
    config_status: list[tuple[Status, int]]
    reads: dict[int, list[int]]


@lru_cache(maxsize=4)
def unit_program(config: UnitConfig) -> Path:
    """The Verilated unit; built once and cached by content."""
    from hw.flow.verilator import build_harness
    from hw.flow.verilog import emit
    from hw.storage import unit

    if config.channels not in (1, 2, 4, 8):
        raise KVStrataError(f"the simulation has 1, 2, 4 or 8 flash channels, not {config.channels}")
    here = Path(unit.__file__).parent
    recipe = partial(unit.AttentionUnit, config.channels, config.lanes, max_tokens=config.max_tokens)
    design = emit(recipe, "unit")
    return build_harness(
        design, [here / "harness" / "unit.cpp"], include_dirs=[here], defines={"PORTS": config.channels + 1}
    )


def _image(pages: Mapping[int, bytes], failing: Sequence[int]) -> bytes:
    head = struct.pack("<7sBII", b"KVFLASH", 1, len(pages), len(failing))
    body = b"".join(struct.pack("<I", number) + page for number, page in pages.items())
    assert all(len(page) == PAGE_BYTES for page in pages.values())
    return head + body + struct.pack(f"<{len(failing)}I", *failing)


def config_record(cache: Cache, group_queries: int, kv_heads: int = 255) -> dict[str, int]:
    """The config command for a cache."""
    geometry = cache.geometry
    return {
        "wide_head": int(cache.head_size == 128),
        "m_log2": cache.m.bit_length() - 1,
        "group_queries": group_queries,
        "kv_heads": kv_heads,
        "channels": geometry.channels,
        "dies": geometry.dies,
        "blocks": geometry.blocks,
        "pages": geometry.pages,
    }


@dataclass(frozen=True)
class Step:
    """Something the host does: `config` fields, a `job` (whose command fields `overrides` may spoil), an abort so many
    cycles later, or, once so many cycles have passed, a reset of everything, which loses the commands in the unit."""

    config: Mapping[str, int] | None = None
    job: Job | None = None
    overrides: Mapping[str, int] = field(default_factory=dict)
    abort_after: int | None = None
    reset_after: int | None = None


def _script(steps: Sequence[Step]) -> bytes:
    blobs, configured, command_id = [], False, 0
    for step in steps:
        if step.config is not None:
            blobs.append(struct.pack("<II", 0, 0) + CONFIG.pack(step.config).to_bytes(16, "little"))
            configured = True
        elif step.abort_after is not None:
            blobs.append(struct.pack("<II", 2, step.abort_after) + bytes(16))
        elif step.reset_after is not None:
            blobs.append(struct.pack("<II", 3, step.reset_after) + bytes(16))
            configured = False
        elif step.job is not None:
            operands = step.job.operands() if configured else np.zeros(0, np.uint16)
            record = {**step.job.record(command_id), **step.overrides}
            blobs.append(struct.pack("<II", 1, len(operands) // BEAT_ELEMENTS))
            blobs.append(ATTEND.pack(record).to_bytes(16, "little") + operands.astype("<u2").tobytes())
            command_id += 1
    return b"".join(blobs)


def run_steps(cache: Cache, steps: Sequence[Step], config: UnitConfig, **parameters: int) -> BatchRun:
    """Play host steps against the unit. Commands are numbered in order of their steps.

    `parameters`: FlashParams fields, and pause_out, pause_map, map_latency, pause_seed (see harness/unit.cpp).
    Raises KVStrataError if a command never completes.
    """
    from hw.storage.timing import RESET_CYCLES

    program = unit_program(config)
    parameters = {"reset_cycles": RESET_CYCLES, **parameters}
    jobs = [step.job for step in steps if step.job is not None]
    with tempfile.TemporaryDirectory() as work:
        files = {name: Path(work) / name for name in ("script", "flash", "dram", "map", "results")}
        files["script"].write_bytes(_script(steps))
        files["flash"].write_bytes(_image(cache.flash, cache.failing))
        # the unit reads the group buffer as one more channel
        buffer = PPN.pack({"channel": config.channels})
        files["dram"].write_bytes(_image({number | buffer: page for number, page in cache.dram.items()}, []))
        files["map"].write_bytes(
            b"".join(struct.pack("<QII", key, page, dram) for key, (page, dram) in cache.maps.items())
        )
        words = [f"{name}={value}" for name, value in parameters.items()]
        result = subprocess.run(
            [program, *files.values(), *words], capture_output=True, text=True, check=False
        )
        lines = files["results"].read_text().splitlines() if files["results"].exists() else []
    run = _parse(lines, jobs)
    if result.returncode:
        raise KVStrataError(
            f"every one of {len(jobs)} commands must complete, but only {len(run.completions)} did "
            f"({result.stderr.strip() or 'no more progress'})"
        )
    return run


def _parse(lines: Sequence[str], jobs: Sequence[Job]) -> BatchRun:
    outputs = {n: np.zeros(job.q.shape, np.uint16) for n, job in enumerate(jobs)}
    states = {n: np.zeros((2, len(job.q)), np.int64) for n, job in enumerate(jobs)}
    filled = dict.fromkeys(outputs, 0)
    completions, cycles, counters, config_status = {}, 0, {}, []
    reads: dict[int, list[int]] = defaultdict(list)
    for line in lines:
        kind, *rest = line.split()
        values = [int(x) for x in rest]
        if kind == "o":
            _, number, query, element, bits = values
            outputs[number][query, element] = bits
            filled[number] += 1
        elif kind == "m":
            number, query, maximum, total = values
            states[number][:, query] = maximum, total
        elif kind == "c":
            cycle, number, _, _, status, bad_field, index = values
            whole = filled[number] == outputs[number].size
            if whole != (status == Status.OK):
                raise KVStrataError(
                    f"a command gives its whole output or a fault, but command {number} ended with "
                    f"status {Status(status).name} after {filled[number]} elements"
                )
            output = outputs[number].view(np.float16) if whole else None
            completions[number] = Completion(cycle, Status(status), bad_field, index, output, *states[number])
            cycles = max(cycles, cycle + 1)
        elif kind == "k":
            counters = dict(zip(COUNTERS, values))
        elif kind == "s":
            config_status.append((Status(values[0]), values[1]))
        elif kind == "r":
            reads[values[0]].append(values[1])
    return BatchRun(completions, cycles, counters, config_status, dict(reads))


def run(cache: Cache, jobs: Sequence[Job], config: UnitConfig | None = None, **parameters: int) -> BatchRun:
    """Configure the unit for the cache and run the jobs as one batch."""
    config = config or UnitConfig(lanes=max(len(job.q) for job in jobs))
    steps = [Step(config=config_record(cache, len(jobs[0].q))), *(Step(job=job) for job in jobs)]
    return run_steps(cache, steps, config, **parameters)
