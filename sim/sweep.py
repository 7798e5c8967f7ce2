"""Exploration: run the points of a sweep over processes or a Dask cluster, storing each as it comes.

Points are independent, so workers only compute; the one process that started the sweep writes the store. A point that
cannot run (capacity, partition, no peer-to-peer) is a result too: its status is "refused" and its reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from golden.spec import KVStrataError
from sim import accuracy
from sim import store as stores
from sim.store import Store
from sim.sweepfile import Point, Sweep

Job = tuple[int, str, Point]
"""(ordinal, key, point)."""
Done = tuple[Job, str, Any]
SEARCH_BATCH = 20
"""Points that a search asks for together; fixed, so that results do not depend on the number of workers."""


class SweepError(KVStrataError):
    """A sweep stopped early; the message says what is stored and how to go on."""


def evaluate(point: Point, fidelity: str) -> tuple[str, Any]:
    """("ok", flat metrics) or ("refused", reason)."""
    from sim import api
    from sim.describe.base import CapacityError, ConfigError, build
    from sim.describe.workload import Workload

    named = {k: v for k, v in point.items() if k not in ("machine", "model", "scheme")}
    work = {k.removeprefix("workload."): v for k, v in named.items() if k.startswith("workload.")}
    overrides = {k: v for k, v in named.items() if not k.startswith("workload.")}
    try:
        workload = build(Workload, work, "workload")
        bound = api.bind(point["machine"], point["model"], point["scheme"], workload, overrides)
        result = api.evaluate(bound, fidelity, detail=False)
    except (CapacityError, ConfigError) as error:
        return "refused", str(error)
    return "ok", result.row()


def _evaluate_all(jobs: list[Job], fidelity: str) -> list[Done]:
    return [(job, *evaluate(job[2], fidelity)) for job in jobs]


def in_processes(jobs: list[Job], fidelity: str, workers: int) -> Iterator[Done]:
    """Chunks over local processes, in order of completion."""
    if workers < 1:
        raise SweepError(f"a sweep needs at least one worker process, got workers = {workers}")
    if workers == 1:
        for job in jobs:
            yield from _evaluate_all([job], fidelity)
        return
    size = max(1, min(16, len(jobs) // (4 * workers)))
    chunks = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    with ProcessPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(_evaluate_all, chunk, fidelity) for chunk in chunks]):
            yield from future.result()


def on_dask(jobs: list[Job], fidelity: str, scheduler: str) -> Iterator[Done]:
    """The same chunks on a Dask cluster at `scheduler` (host:port); the sweep file does not change."""
    from dask.distributed import Client, KilledWorker
    from dask.distributed import as_completed as as_dask_completed

    try:
        client = Client(scheduler, timeout="10s")
    except (OSError, ValueError, TypeError) as error:
        raise SweepError(f"no Dask scheduler answers at {scheduler!r} ({error})") from None
    with client:
        size = max(1, min(16, len(jobs) // 8))
        chunks = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        futures = [client.submit(_evaluate_all, chunk, fidelity, pure=False) for chunk in chunks]
        try:
            for future in as_dask_completed(futures):
                yield from future.result()
        except (KilledWorker, CancelledError, OSError) as error:
            raise BrokenProcessPool(f"a Dask worker or its scheduler is gone ({error})") from None


def run(
    sweep: Sweep,
    store: Store,
    workers: int = 2,
    scheduler: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Run what is not stored yet and return the table of the sweep: its points once each, in order.

    Raises SweepError when a worker dies; everything finished until then is stored, and the same call resumes.
    """
    inputs = stores.inputs_hash()
    known = store.known()
    keys: dict[str, None] = {}

    def compute(points: Iterable[tuple[int, Point]]) -> None:
        jobs = [(n, stores.key_of(p, sweep.fidelity, inputs), p) for n, p in points]
        keys.update(dict.fromkeys(job[1] for job in jobs))
        fresh = {job[1]: job for job in jobs if job[1] not in known}
        todo = list(fresh.values())
        source = (
            on_dask(todo, sweep.fidelity, scheduler)
            if scheduler
            else in_processes(todo, sweep.fidelity, workers)
        )
        try:
            for (ordinal, key, point), status, result in source:
                store.add(key, sweep.name, ordinal, point, status, result)
                known[key] = {"status": status, "result": result}
                progress(len(known), len(jobs))
        except BrokenProcessPool:
            raise SweepError(
                f"a worker process of sweep {sweep.name} died; {len(known)} points are stored in {store.path}, "
                "and the same command resumes with the rest"
            ) from None

    if sweep.method == "search":
        _search(sweep, lambda p: stores.key_of(p, sweep.fidelity, inputs), known, compute)
    else:
        compute(enumerate(sweep.listed_points()))
    return [with_accuracy(row, sweep) for row in store.table(keys)]


def with_accuracy(row: dict[str, Any], sweep: Sweep) -> dict[str, Any]:
    """The row with its measured accuracy, where the sweep names a table; results themselves are stored without."""
    if not sweep.accuracy_table or "numerics" not in row:
        return row
    return {**row, accuracy.METRIC: accuracy.top1(row["numerics"], Path(sweep.accuracy_table))}


def _search(
    sweep: Sweep,
    key_of: Callable[[Point], str],
    known: dict[str, dict[str, Any]],
    compute: Callable[[Iterable[tuple[int, Point]]], None],
) -> None:
    """Multi-objective search (NSGA-II). Seeded asks and fixed batches replay stored points on resumption."""
    import optuna
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.NSGAIISampler(seed=sweep.seed, population_size=SEARCH_BATCH)
    names = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
    directions = [names[way] for way in sweep.objectives.values()]
    study = optuna.create_study(directions=directions, sampler=sampler)
    for first in range(0, sweep.points, SEARCH_BATCH):
        trials = [study.ask() for _ in range(min(SEARCH_BATCH, sweep.points - first))]
        points = [_suggested(trial, sweep) for trial in trials]
        compute((first + i, point) for i, point in enumerate(points))
        for trial, point in zip(trials, points):
            outcome = known[key_of(point)]
            values = None
            if outcome["status"] == "ok":
                metrics = with_accuracy(outcome["result"], sweep)
                values = [metrics[m] for m in sweep.objectives]
            failed = values is None or any(v is None for v in values)
            state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
            study.tell(trial, None if failed else values, state=state)


def _suggested(trial: Any, sweep: Sweep) -> Point:
    point = {name: trial.suggest_categorical(name, values) for name, values in sweep.axes().items()}
    return point | {name: trial.suggest_float(name, low, high) for name, (low, high) in sweep.range.items()}
