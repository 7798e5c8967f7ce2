"""Sweeps: nothing lost or done twice over kill -9, the same bytes for any worker count, and clear refusals."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sim import sweep as sweeps
from sim.describe.base import ConfigError
from sim.pareto import front
from sim.store import Store, StoreError, write_parquet
from sim.sweep import SweepError, evaluate, run
from sim.sweepfile import load_sweep

GRID = """
scheme = ["flexgen-ssd", "gpu-recompute"]
[workload]
batch = [1, 4, 16, 64, 256]
output_tokens = 32
[set]
"ssd.read_us" = [40.0, 50.0, 60.0]
[objectives]
tokens_per_s = "max"
energy_j_per_token = "min"
"""
SEARCH = """
scheme = ["flexgen-ssd", "flexgen-gds"]
method = "search"
points = 40
[workload]
batch = [4, 16, 64]
output_tokens = 16
[range]
"ssd.read_us" = [20.0, 90.0]
[objectives]
tokens_per_s = "max"
cost_usd_per_million_tokens = "min"
"""


def written(tmp_path, text, name="grid"):
    path = tmp_path / f"{name}.toml"
    path.write_text(text)
    return path


def test_a_grid_gives_every_point_once_in_order(tmp_path):
    sweep = load_sweep(written(tmp_path, GRID))
    with Store(tmp_path / "s.sqlite") as store:
        rows = run(sweep, store, workers=1)
    assert [r["workload.batch"] for r in rows[:6]] == [1, 1, 1, 4, 4, 4]
    assert len(rows) == 30
    refused = [r for r in rows if r["status"] == "refused"]
    assert {(r["scheme"], r["workload.batch"]) for r in refused} == {("flexgen-ssd", 256)}
    assert "a batch of" in refused[0]["error"]


@pytest.mark.parametrize("text", [GRID, SEARCH])
def test_results_do_not_depend_on_the_number_of_processes(tmp_path, text):
    sweep = load_sweep(written(tmp_path, text))
    tables = []
    for workers in (1, 2):
        with Store(tmp_path / f"{workers}.sqlite") as store:
            tables.append(json.dumps(run(sweep, store, workers=workers)))
    assert tables[0] == tables[1]


def test_a_search_improves_on_its_first_batch_and_resumes_without_work(tmp_path, monkeypatch):
    sweep = load_sweep(written(tmp_path, SEARCH))
    with Store(tmp_path / "s.sqlite") as store:
        rows = run(sweep, store, workers=1)
        first = max(r["tokens_per_s"] for r in rows[:20])
        assert max(r["tokens_per_s"] for r in rows) >= first
        monkeypatch.setattr(sweeps, "evaluate", lambda *_: pytest.fail("computed again"))
        assert run(sweep, store, workers=1) == rows


def test_random_points_are_seeded_and_stay_in_range(tmp_path):
    text = SEARCH.replace('"search"', '"random"')
    points = list(load_sweep(written(tmp_path, text)).listed_points())
    assert points == list(load_sweep(written(tmp_path, text)).listed_points())
    assert all(20 <= p["ssd.read_us"] <= 90 for p in points)
    assert len({p["ssd.read_us"] for p in points}) == 40


KILLED = """
import sys, time
from pathlib import Path
from sim import sweep
from sim.store import Store
from sim.sweepfile import load_sweep
inner = sweep.evaluate
def slow(point, fidelity):
    time.sleep(0.05)
    return inner(point, fidelity)
sweep.evaluate = slow
with Store(Path(sys.argv[2])) as store:
    sweep.run(load_sweep(Path(sys.argv[1])), store, workers=1)
"""


def stored(path):
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(path) as db:
            return db.execute("SELECT COUNT(*) FROM points").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_kill_minus_nine_loses_nothing_and_repeats_nothing(tmp_path):
    file, path = written(tmp_path, GRID), tmp_path / "s.sqlite"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(file), str(path)])
    deadline = time.monotonic() + 60
    while stored(path) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = stored(path)
    assert 8 <= before < 30
    sweep = load_sweep(file)
    computed = []
    with Store(path) as store:
        rows = run(sweep, store, workers=1, progress=lambda done, total: computed.append(done))
    assert len(rows) == 30
    assert len(computed) == 30 - before
    with Store(tmp_path / "fresh.sqlite") as store:
        assert run(sweep, store, workers=1) == rows


def test_a_worker_that_dies_is_one_sentence_and_keeps_what_is_stored(tmp_path, monkeypatch):
    sweep = load_sweep(written(tmp_path, GRID))

    with Store(tmp_path / "s.sqlite") as store:
        # Forked workers inherit the patched function, and leave as a segmentation fault would make them.
        monkeypatch.setattr(sweeps, "evaluate", lambda *_: os._exit(1))
        with pytest.raises(
            SweepError, match="a worker process of sweep grid died; 0 points are stored in .*resumes"
        ):
            run(sweep, store, workers=2)
        monkeypatch.undo()
        assert len(run(sweep, store, workers=2)) == 30


def test_a_dask_cluster_gives_the_same_table(tmp_path):
    distributed = pytest.importorskip("dask.distributed")
    sweep = load_sweep(written(tmp_path, GRID))
    with Store(tmp_path / "a.sqlite") as store:
        local = run(sweep, store, workers=1)
    with (
        distributed.LocalCluster(1, processes=False, threads_per_worker=1, dashboard_address=None) as cluster,
        Store(tmp_path / "b.sqlite") as store,
    ):
        assert run(sweep, store, scheduler=cluster.scheduler_address) == local


def test_changed_calibration_is_computed_anew(tmp_path, calibration):
    sweep = load_sweep(written(tmp_path, GRID))
    with Store(tmp_path / "s.sqlite") as store:
        run(sweep, store, workers=1)
        before = len(store.known())
        (calibration / "new.json").write_text("{}")
        assert len(run(sweep, store, workers=1)) == before == 30
        assert len(store.known()) == 60


def test_two_sweeps_share_a_store_and_its_points(tmp_path):
    one, other = load_sweep(written(tmp_path, GRID)), load_sweep(written(tmp_path, GRID, "other"))
    with Store(tmp_path / "s.sqlite") as store:
        rows = run(one, store, workers=1)
        assert run(other, store, workers=1) == rows
        assert len(store.known()) == 30


def test_an_edited_machine_file_is_computed_anew(tmp_path):
    machine = tmp_path / "mine.toml"
    text = 'name = "mine"\ngpu = "a6000"\ngpu_count = {}\n[source]\ngpu_count = "mine"\n'
    machine.write_text(text.format(1))
    file = f'machine = "{machine}"\nscheme = "gpu-resident"\n[workload]\nbatch = 8\noutput_tokens = 8\n'
    sweep = load_sweep(written(tmp_path, file))
    with Store(tmp_path / "s.sqlite") as store:
        assert len(run(sweep, store, workers=1)) == 1
        machine.write_text(text.format(2))
        assert len(run(sweep, store, workers=1)) == 1
        assert len(store.known()) == 2


def test_parquet_holds_the_table(tmp_path):
    import polars as pl

    sweep = load_sweep(written(tmp_path, GRID))
    with Store(tmp_path / "s.sqlite") as store:
        rows = run(sweep, store, workers=1)
    write_parquet(rows, tmp_path / "t.parquet")
    frame = pl.read_parquet(tmp_path / "t.parquet")
    assert frame["tokens_per_s"].to_list() == [r.get("tokens_per_s") for r in rows]


def test_a_corrupt_store_is_refused(tmp_path):
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"not a database at all" * 99)
    with pytest.raises(StoreError, match=r"sweep store .*s.sqlite is not a readable database .*move it away"):
        Store(path)


def test_a_store_that_was_cut_short_is_refused(tmp_path):
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        run(load_sweep(written(tmp_path, GRID)), store, workers=1)
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(StoreError, match="is not a readable database .*move it away to start anew"):
        Store(path).known()


def test_a_damaged_row_is_named_and_computed_again_once_removed(tmp_path):
    path, sweep = tmp_path / "s.sqlite", load_sweep(written(tmp_path, GRID))
    with Store(path) as store:
        rows = run(sweep, store, workers=1)
    database = sqlite3.connect(path)
    database.execute("UPDATE points SET result = '{\"tokens' WHERE ordinal = 3")
    database.commit()
    with (
        Store(path) as store,
        pytest.raises(StoreError, match="holds a damaged row: DELETE FROM points") as caught,
    ):
        run(sweep, store, workers=1)
    removal = str(caught.value).split(": ")[1].removesuffix(" removes it, and the sweep computes it again")
    database.execute(removal)
    database.commit()
    with Store(path) as store:
        assert run(sweep, store, workers=1) == rows


def test_a_store_that_cannot_be_created_is_one_sentence():
    with pytest.raises(StoreError, match="sweep store /proc/s.sqlite cannot be created"):
        Store(Path("/proc/s.sqlite"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "scheme =",
            'machine = "referenc"\nscheme =',
            "unknown machine preset 'referenc' .did you mean reference",
        ),
        (
            "scheme =",
            'model = "opt-13"\nscheme =',
            r"unknown model preset 'opt-13' \(did you mean opt-13b\?\)",
        ),
        ('"flexgen-ssd", ', '"flexgen-sd", ', r"unknown scheme 'flexgen-sd' \(did you mean flexgen-ssd\?\)"),
        ("tokens_per_s", "token_per_s", r"unknown objective 'token_per_s' \(did you mean tokens_per_s\?\)"),
        ("batch =", "bach =", r"unknown field workload.bach \(did you mean batch\?\)"),
        ("[set]", "[range]", r"field range.ssd.read_us"),
        ("ssd.read_us", "ssd.red_us", r"unknown field ssd.red_us \(did you mean read_us\?\)"),
        ("ssd.read_us", "sd.read_us", r"unknown field sd.read_us"),
        (
            "ssd.read_us",
            "framework.gpu_batch",
            r"unknown field framework.gpu_batch \(did you mean gpu_batches\?\)",
        ),
        ("scheme =", "schem =", r"unknown field schem = .*did you mean scheme"),
    ],
)
def test_a_broken_sweep_file_is_one_sentence(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message):
        load_sweep(written(tmp_path, GRID.replace(old, new, 1)))


def test_a_range_in_a_grid_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a grid takes lists under \[set\], not \[range\]"):
        load_sweep(written(tmp_path, SEARCH.replace('"search"', '"grid"')))


def test_a_sweep_varies_the_framework(tmp_path):
    text = GRID.replace('"ssd.read_us" = ', '"framework.layer_overhead_us" = ').replace("[set]", "[set]", 1)
    with Store(tmp_path / "s.sqlite") as store:
        rows = [r for r in run(load_sweep(written(tmp_path, text)), store, workers=1) if r["status"] == "ok"]
    rates = {
        r["framework.layer_overhead_us"]: r["tokens_per_s"] for r in rows if r["scheme"] == "gpu-recompute"
    }
    assert len(rates) > 1
    assert len(set(rates.values())) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "at least one worker process, got workers = 0"),
        ({"scheduler": "nowhere:port"}, "no Dask scheduler answers at 'nowhere:port'"),
    ],
)
def test_where_a_sweep_cannot_run_is_one_sentence(tmp_path, arguments, message):
    with Store(tmp_path / "s.sqlite") as store, pytest.raises(SweepError, match=message):
        run(load_sweep(written(tmp_path, GRID)), store, **arguments)


def test_an_unknown_device_field_is_a_refusal_with_its_reason():
    point = {"machine": "reference", "model": "opt-13b", "scheme": "flexgen-ssd", "ssd.red_us": 4}
    status, reason = evaluate(point, "flow")
    assert status == "refused"
    assert "did you mean read_us" in reason


def test_the_front_keeps_only_what_nothing_beats():
    rows = [{"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a": 3, "b": 1}, {"a": 2, "b": 3}, {"a": 0, "b": 9}]
    assert front(rows, {"a": True, "b": True}) == [{"a": 3, "b": 1}, {"a": 2, "b": 3}, {"a": 0, "b": 9}]
    assert front(rows, {"a": True, "b": False}) == [{"a": 3, "b": 1}]


ACCURACY = """
machine = "reference"
scheme = ["flexgen-ssd", "flexgen-sparq"]
accuracy_table = "{table}"
[workload]
batch = [16, 32]
output_tokens = 16
[objectives]
tokens_per_s = "max"
accuracy_top1 = "max"
"""


def test_accuracy_is_looked_up_and_never_guessed(tmp_path):
    import polars as pl

    table = tmp_path / "a.parquet"
    row = {"weights": "float", "activations": "float", "kv": "float", "policy": "dense", "context": 256}
    sparse = {**row, "policy": "sparq:16,0.125", "context": 1024, "top1_agreement": 0.84}
    short = {**sparse, "context": 256, "top1_agreement": 0.9}
    pl.DataFrame([{**row, "top1_agreement": 1.0}, sparse, short]).write_parquet(table)
    sweep = load_sweep(written(tmp_path, ACCURACY.format(table=table)))
    with Store(tmp_path / "s.sqlite") as store:
        rows = run(sweep, store, workers=1)
    assert {r["scheme"]: r["accuracy_top1"] for r in rows} == {"flexgen-ssd": 1.0, "flexgen-sparq": 0.84}
    best = front(rows, {"tokens_per_s": True, "accuracy_top1": True})
    assert {r["scheme"] for r in best} == {"flexgen-ssd", "flexgen-sparq"}
    pl.DataFrame([{**row, "top1_agreement": 1.0}]).write_parquet(tmp_path / "b.parquet")
    other = load_sweep(written(tmp_path, ACCURACY.format(table=tmp_path / "b.parquet")))
    with Store(tmp_path / "s.sqlite") as store:
        assert {
            r["accuracy_top1"] for r in run(other, store, workers=1) if r["scheme"] == "flexgen-sparq"
        } == {None}


def test_accuracy_as_an_objective_needs_its_table(tmp_path):
    with pytest.raises(ConfigError, match="objective accuracy_top1 needs accuracy_table"):
        load_sweep(written(tmp_path, ACCURACY.replace('accuracy_table = "{table}"\n', "")))
    sweep = load_sweep(written(tmp_path, ACCURACY.format(table="nowhere.parquet")))
    with (
        Store(tmp_path / "s.sqlite") as store,
        pytest.raises(
            ConfigError, match="accuracy table nowhere.parquet cannot be read: run `make accuracy`"
        ),
    ):
        run(sweep, store, workers=1)
