"""The cycle tables that the system model reads (`make calibrate`): every row is a run of Verilated RTL, or comes from
the recurrences that tests hold against such runs where the table says so.

A table is {"spec_version", "block", "config", "clock_mhz", "rows"} and "method" if it is not the RTL itself; a row
holds name, shape, cycles, bound_cycles (what the block's ports or the flash channels allow) and bytes. Cycles are
deterministic, so that a test can run a row again and demand equality. The in-storage unit's table of SparF also holds
"times", the cycles of its blocks (`golden.storage.batch.UnitTimes`): with them the system model runs the recurrence
that tests hold to the RTL, so its rows say beside the RTL's cycles what the recurrence gives for the same pages
(recurrence_cycles).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden.spec import SPEC_VERSION, KVStrataError

DIRECTORY = Path(__file__).resolve().parents[2] / "sim" / "calibration"


@dataclass(frozen=True)
class Table:
    """A block's measured shapes: `rows()` runs the RTL and yields them one by one."""

    block: str
    config: str
    clock_mhz: float
    rows: Callable[[], Iterable[dict[str, Any]]]
    engines: tuple[str, ...] = ("tiny", "small")
    """Engine configurations whose RTL check measures this table again; the others would build it for that alone."""
    method: str = ""
    """How the cycles came about, where not by running the RTL."""
    times: Callable[[], dict[str, int]] | None = None
    """The times of the block's parts, where a recurrence starts from them."""

    @property
    def path(self) -> Path:
        """Where the committed table lies."""
        return DIRECTORY / f"{self.block}-{self.config}.json"

    def measure(self, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Run every shape on the RTL."""
        rows = []
        for row in self.rows():
            progress(f"{self.block}: {row['name']}")
            rows.append(row)
        header = {"spec_version": SPEC_VERSION, "block": self.block, "config": self.config}
        method = {"method": self.method} if self.method else {}
        times = {"times": self.times()} if self.times else {}
        return {**header, "clock_mhz": self.clock_mhz, **method, **times, "rows": rows}


MATRIX_SHAPES = (
    ("w4", 192, 576), ("w4", 576, 576), ("w4", 1536, 576), ("w4", 576, 1536), ("w4", 2048, 2048), ("w4", 4096, 4096),
    ("w8", 576, 576), ("w8", 2048, 2048), ("w2", 2048, 2048), ("w2s24", 2048, 2048),
)  # fmt: skip
HEAD_SHAPES = ((1, 16, 128), (1, 64, 128), (1, 256, 128), (1, 1024, 128), (1, 1536, 128), (1, 4096, 128))


def _matrix_rows() -> Iterable[dict[str, Any]]:
    import numpy as np

    from golden.spec.engine import SMALL
    from golden.spec.formats import WEIGHT_FORMATS
    from sw_stack.rtl.matvec import random_codes, run_matvec

    random = np.random.default_rng(1)
    for name, rows, inner in MATRIX_SHAPES:
        fmt = WEIGHT_FORMATS[name]
        codes = random_codes(random, fmt, rows, inner)
        scales = random.uniform(0.001, 0.02, (rows, inner // fmt.group))
        minima = -scales * 2 if fmt.asymmetric else None
        acts = random.integers(-127, 128, inner).astype(np.int8)
        run = run_matvec(codes, scales, minima, acts, (20000, -20), fmt, SMALL)
        yield {
            "name": f"{name} {rows} x {inner}",
            "shape": [rows, inner],
            "cycles": run.cycles,
            "bound_cycles": run.bound_cycles,
            "bytes": int(rows * inner * fmt.bits_per_weight / 8),
        }


def _head_rows() -> Iterable[dict[str, Any]]:
    import numpy as np

    from sw_stack.rtl.attention import run_head

    random = np.random.default_rng(1)
    for queries, tokens, head_size in HEAD_SHAPES:
        q, k, v = (
            random.standard_normal((n, head_size)).astype(np.float16) for n in (queries, tokens, tokens)
        )
        run = run_head(q, k, v)
        yield {
            "name": f"dense head, {queries} queries, {tokens} tokens x {head_size}",
            "shape": [queries, tokens, head_size],
            "cycles": run.cycles,
            "bound_cycles": run.bound_cycles,
            "bytes": 2 * k.nbytes,
        }


UNIT_SHAPES = ((2, 256), (8, 256), (2, 1024), (8, 1024), (40, 1536))
"""Heads per batch and tokens of the whole in-storage unit's runs, head size 128, dense."""
READ_NS = 500
"""Array read time of these runs: short, since the system model adds that of its own drive. The channels bind."""


def _unit_rows() -> Iterable[dict[str, Any]]:
    import numpy as np

    from golden.spec.storage import PAGE_BYTES, token_pages
    from sw_stack.rtl.attention import KernelConfig
    from sw_stack.rtl.storage import Cache, Job, UnitConfig, run

    random = np.random.default_rng(1)
    rate = KernelConfig().flash_bytes_per_cycle
    for heads, tokens in UNIT_SHAPES:
        cache, jobs = Cache(128, tail_in_dram=False), []
        for head in range(heads):
            q, k, v = (random.standard_normal((n, 128)).astype(np.float16) for n in (1, tokens, tokens))
            cache.add(0, head, k, v)
            jobs.append(Job(0, head, q, tokens))
        result = run(cache, jobs, UnitConfig(), read_ns=READ_NS)
        size = 2 * token_pages(tokens, 128) * PAGE_BYTES * heads
        yield {
            "name": f"dense, {heads} heads, {tokens} tokens x 128",
            "shape": [heads, tokens, 128],
            "cycles": result.cycles,
            "bound_cycles": size / rate,
            "bytes": size,
            "commands": heads,
        }


SPARF_SHAPES = (
    (2, 512, True, READ_NS),
    (16, 512, True, READ_NS),
    (16, 2048, True, READ_NS),
    (16, 4096, True, READ_NS),
    (16, 2048, False, READ_NS),
    (16, 4096, False, READ_NS),
    (16, 4096, True, 50_000),
    (16, 2048, False, 50_000),
)
"""Heads, tokens, whether the selected tokens lie in runs, and tR; r = 16 of 128 channels, one token in eight."""


def _sparf_rows() -> Iterable[dict[str, Any]]:
    import numpy as np

    from sw_stack.rtl import selections
    from sw_stack.rtl.attention import KernelConfig
    from sw_stack.rtl.batch_cycles import expected_cycles
    from sw_stack.rtl.storage import UnitConfig, run

    random = np.random.default_rng(1)
    rate = KernelConfig().flash_bytes_per_cycle
    for heads, tokens, clustered, read_ns in SPARF_SHAPES:
        batch = selections.batch(random, heads, tokens, clustered=clustered)
        cycles = run(batch.cache, batch.jobs, UnitConfig(), read_ns=read_ns).cycles
        followed = expected_cycles(batch.cache, batch.jobs, batch.traces, channels=8, read_ns=read_ns)
        job = batch.jobs[0]
        kind = "clustered" if clustered else "random"
        yield {
            "name": f"SparF {kind}, {heads} heads, {tokens} tokens x {selections.HEAD_SIZE}, tR {read_ns / 1000:g} us",
            "shape": [heads, tokens, selections.HEAD_SIZE],
            "r": job.r,
            "k": job.k,
            "m": batch.cache.m,
            "window": job.window,
            "run_tokens": selections.RUN_TOKENS if clustered else 0,
            "read_ns": read_ns,
            "cycles": cycles,
            "recurrence_cycles": round(followed),
            "bound_cycles": batch.page_bytes / rate,
            "bytes": batch.page_bytes,
            "commands": heads,
        }


LAYER_SHAPES = {
    "Llama-2-7B": (4096, 32, 32, 128, 11008), "Llama-3.1-8B": (4096, 32, 8, 128, 14336),
    "Llama-2-13B": (5120, 40, 40, 128, 13824), "Qwen2.5-7B": (3584, 28, 4, 128, 18944),
    "half of Llama-2-7B": (2048, 16, 16, 128, 5504), "SmolLM2-135M": (576, 9, 3, 64, 1536),
}  # fmt: skip
"""Hidden size, heads, KV heads, head size, FFN of the layers whose cycles are predicted."""
LAYER_CONTEXTS = (128, 2048)
HELD_TO_RTL = "recurrences that tests hold to the RTL, behind its HBM model"


def _layer_rows() -> Iterable[dict[str, Any]]:
    from golden.config import DecoderConfig
    from golden.spec.engine import STEP, U280, WORD_BYTES
    from golden.spec.formats import WEIGHT_FORMATS
    from golden.spec.memory import MemoryModel
    from sim.measured import cached_token_terms
    from sw_stack.compile.memory import MemoryTiming
    from sw_stack.rtl.layer import predict

    memory = MemoryModel()
    timing, port = MemoryTiming.of(memory), U280.channels * WORD_BYTES
    rate = port * timing.words_per_cycle
    for name, (hidden, heads, kv_heads, head_size, ffn) in LAYER_SHAPES.items():
        weights = 2 * hidden * head_size * (heads + kv_heads) + 3 * hidden * ffn
        per_token = cached_token_terms(heads, kv_heads, head_size)
        for fmt in WEIGHT_FORMATS.values():
            size = weights * fmt.bits_per_weight / 8
            macs = weights * (0.5 if fmt.sparse24 else 1.0) / (U280.lanes * STEP)
            for context in LAYER_CONTEXTS:
                model = DecoderConfig(
                    name, 1, hidden, heads, kv_heads, head_size, ffn, 64, context, 10000.0, 1e-5
                )
                found = predict(U280, fmt.name, model, 2, memory)
                yield {
                    "name": f"{name}, {fmt.name}, {context} tokens",
                    "shape": [hidden, heads, kv_heads, head_size, ffn, context],
                    "weights": fmt.name,
                    "cycles": found.layer_cycles,
                    # Of the bus: refreshes fall between layers too, and FIFOs carry words from one to the next.
                    "bound_cycles": found.layer_words / timing.bus_words_per_cycle,
                    "bytes": found.layer_words * port,
                    "weight_cycles": max(size / rate, macs),
                    **{term: amount * context for term, amount in per_token.items()},
                    "kv_heads": kv_heads,
                    "hidden": hidden,
                }


def _unit_times() -> dict[str, int]:
    from hw.storage.timing import unit_times

    return unit_times()


TABLES: tuple[Table, ...] = (
    Table("engine_layer", "u280", 225.0, _layer_rows, engines=(), method=HELD_TO_RTL),
    Table("mv_core", "small", 225.0, _matrix_rows, engines=("small",)),
    Table("attention_head", "one-kernel", 285.0, _head_rows),
    Table("storage_unit", "8-channels", 285.0, _unit_rows, engines=()),
    Table("storage_unit_sparf", "8-channels", 285.0, _sparf_rows, engines=(), times=_unit_times),
)


def measure(table: Table, progress: Callable[[str], None] = lambda _: None) -> None:
    """Run a table's shapes on the RTL and write the committed file."""
    from hw.flow.cache import write_atomically

    write_atomically(table.path, json.dumps(table.measure(progress), indent=1) + "\n")


def committed(table: Table) -> dict[str, Any]:
    """The committed table; `KVStrataError` naming the verb that measures it if it is missing or of another spec."""
    try:
        stored = json.loads(table.path.read_text())
    except (OSError, ValueError) as error:
        raise KVStrataError(f"{table.path.name} is missing or not JSON: run make calibrate") from error
    if stored.get("spec_version") != SPEC_VERSION:
        raise KVStrataError(f"{table.path.name} was measured under another spec version: run make calibrate")
    return stored


def check_committed(table: Table, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure again and demand the committed cycles; the table on success.

    Raises `KVStrataError` naming the first row whose cycles drifted.
    """
    stored, now = committed(table), table.measure(progress)
    for old, new in zip(stored["rows"], now["rows"]):
        if old != new:
            raise KVStrataError(
                f"{table.path.name}: {new['name']} takes {new['cycles']} cycles on the RTL, "
                f"the committed table says {old['cycles']}: run make calibrate"
            )
    if stored != now:
        raise KVStrataError(
            f"{table.path.name} does not hold the shapes that are measured: run make calibrate"
        )
    return now
