"""Benchmarks of the system model: speed, agreement of its fidelities, error of its sampling, and reproduction."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SWEEP = """
machine = "instinfer"
scheme = ["csd-dense", "csd-sparf"]
[workload]
batch = [16, 32, 64, 128, 256]
[set]
csd_count = [1, 2, 4, 5]
"csd.channels" = [4, 8, 12, 16, 24]
"csd.read_us" = [20.0, 35.0, 50.0, 60.0, 62.0]
"""
FIDELITY_CASES = (
    ("csd-dense", {}),
    ("csd-sparf", {}),
    ("csd-sparf", {"csd.arbitration": "transfer-first"}),
    ("csd-sparf", {"csd_count": 4}),
    ("csd-dense", {"csd.arbitration": "transfer-first"}),
    ("csd-dense", {"csd.dies_per_channel": 11, "csd.retry_rate": 0.003}),
    ("csd-dense", {"csd.dies_per_channel": 16}),
    ("csd-dense", {"csd.cache_read": True}),
    ("flexgen-ssd", {}),
    ("flexgen-gds", {}),
    ("flexgen-sparq", {}),
)
SAMPLING_CASES = (
    ("csd-dense", 64),
    ("csd-sparf", 64),
    ("flexgen-ssd", 16),
    ("gpu-resident", 4),
    ("zero-inference", 16),
)


def _best_of(repeats: int, work: Callable[[], Any]) -> float:
    """Least CPU seconds of several runs: what one core needs, whatever else the machine does."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def _row(name: str, value: float, unit: str, target: float | None, better: str) -> dict[str, Any]:
    return {"id": name, "value": value, "unit": unit, "target": target, "better": better}


def run() -> list[dict[str, Any]]:
    """All rows of this area."""
    return [*_speed(), *_growth(), *_agreement(), *_reproduction(), *_kernels()]


def _speed() -> list[dict[str, Any]]:
    from sim.api import simulate
    from sim.describe.base import load
    from sim.describe.devices import Csd
    from sim.describe.workload import Workload
    from sim.devices.flash_pages import closed_loop, stream
    from sim.store import Store
    from sim.sweep import run as sweep
    from sim.sweepfile import load_sweep

    one = _best_of(7, lambda: simulate("instinfer", "opt-13b", "csd-dense", Workload(batch=64)))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "bench.toml"
        file.write_text(SWEEP)
        start = time.perf_counter()
        with Store(Path(scratch) / "bench.sqlite") as store:
            points = len(sweep(load_sweep(file), store, workers=2))
        rate = points / (time.perf_counter() - start)
    worn = load(Csd, "instcsd").replaced(retry_rate=0.003)
    pages = 400_000 / _best_of(3, lambda: stream(worn, 400_000))
    random_reads = 50_000 / _best_of(3, lambda: closed_loop(worn, 50_000, 64))
    code = "import time; s = time.process_time(); import sim.api; print(time.process_time() - s)"
    imports = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    return [
        _row("sim.flow.ms_per_run", 1e3 * one, "ms", 50, "lower"),
        _row("sim.sweep.points_per_s", rate, "points/s", 1000 / 30, "higher"),
        _row("sim.page.pages_per_s", pages, "pages/s", 200_000, "higher"),
        _row("sim.page.random_pages_per_s", random_reads, "pages/s", None, "higher"),
        _row("sim.import_s", min(imports), "s", 0.5, "lower"),
    ]


def _growth() -> list[dict[str, Any]]:
    """Cost of a flow run over context, batch and drives: the largest over the smallest."""
    from sim.api import simulate
    from sim.describe.model import load_model
    from sim.describe.workload import Workload

    model = load_model("llama-3.1-8b").replaced(max_positions=2**21)
    rows = []
    for name, points in {
        "context": [(4, 2**n, 1) for n in (10, 14, 17, 20)],
        "drives": [(1000, 256, n) for n in (1, 10, 100, 1000)],
    }.items():
        times = []
        for batch, tokens, drives in points:
            work = Workload(batch=batch if name == "drives" else 1, input_tokens=tokens, output_tokens=64)
            changes = {
                "csd_count": drives,
                "csd_partition": "sequences",
                "csd.buffer_gb": 64.0,
                "gpu": "h100",
            }
            times.append(
                _best_of(
                    3, lambda w=work, c=changes: simulate("instinfer", model, "csd-dense", w, overrides=c)
                )
            )
        rows.append(_row(f"sim.flow.growth_with_{name}", times[-1] / times[0], "x", 1.5, "lower"))
    return rows


def _agreement() -> list[dict[str, Any]]:
    from sim.api import bind, evaluate, simulate
    from sim.describe.workload import Workload

    ratios = []
    for scheme, changes in FIDELITY_CASES:
        work = Workload(batch=16, input_tokens=1024, output_tokens=64)
        flow, page = (simulate("instinfer", "opt-13b", scheme, work, f, changes) for f in ("flow", "page"))
        ratios.append(flow.tokens_per_s / page.tokens_per_s)
    errors = []
    for scheme, batch in SAMPLING_CASES:
        bound = bind(
            "instinfer", "opt-13b", scheme, Workload(batch=batch, input_tokens=512, output_tokens=256)
        )
        every = evaluate(bound, every_step=True, all_layers=True)
        errors.append(100 * abs(evaluate(bound).tokens_per_s / every.tokens_per_s - 1))
    return [
        _row("sim.flow_over_page.worst", max(ratios), "x", 1.05, "lower"),
        _row("sim.flow_over_page.least", min(ratios), "x", 0.95, "higher"),
        _row("sim.sampling.worst_error_pct", max(errors), "%", 1, "lower"),
    ]


def _reproduction() -> list[dict[str, Any]]:
    from sim import others
    from sim.reproduce import reproduce, summary

    stats = summary(reproduce())
    beyond = [abs(o.error) for o in reproduce(others.rows())]
    return [
        _row("sim.reproduce.mean_abs_error_pct", stats["mean_abs_error_pct"], "%", 10, "lower"),
        _row("sim.reproduce.worst_abs_error_pct", stats["worst_abs_error_pct"], "%", 25, "lower"),
        _row("sim.reproduce.calibration_rows", stats["calibration_rows"], "rows", 4, "lower"),
        _row("sim.reproduce.predicted_rows", stats["predicted_rows"], "rows", None, "higher"),
        _row("sim.reproduce.contradicted_rows", stats["contradicted_rows"], "rows", None, "lower"),
        _row(
            "sim.reproduce.mean_with_contradicted_pct",
            stats["mean_abs_error_pct_with_contradicted"], "%", None, "lower",
        ),
        _row(
            "sim.reproduce.worst_with_contradicted_pct",
            stats["worst_abs_error_pct_with_contradicted"], "%", None, "lower",
        ),
        _row("sim.reproduce.others_mean_abs_error_pct", 100 * sum(beyond) / len(beyond), "%", None, "lower"),
    ]  # fmt: skip


def _kernels() -> list[dict[str, Any]]:
    from sim.devices.gpu_check import errors

    return [
        _row(
            f"sim.gpu.{op.replace(' ', '.')}.mean_abs_error_pct",
            100 * sum(map(abs, found)) / len(found),
            "%",
            None,
            "lower",
        )
        for op, found in errors().items()
    ]
