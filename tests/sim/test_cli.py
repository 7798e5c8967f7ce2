"""The verbs of the system model as a user meets them: JSON that parses, files that open, errors of one sentence."""

import json
import subprocess
import sys

import pytest

from sw_stack.cli import main


def run(capsys, *arguments):
    """(exit code, standard output, standard error) of a command line."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    shown = capsys.readouterr()
    return left.value.code or 0, shown.out, shown.err


def test_simulate_prints_full_results_as_json_and_writes_trace_and_table(capsys, tmp_path):
    import polars as pl

    trace, table = tmp_path / "t.json", tmp_path / "t.parquet"
    code, out, _ = run(
        capsys, "simulate", "flexgen-ssd", "gpu-recompute", "--batch", 16, "--set", "ssd_count=2",
        "--trace", trace, "--parquet", table, "--json",
    )  # fmt: skip
    assert code == 0
    results = json.loads(out)
    assert [r["scheme"] for r in results] == ["flexgen-ssd", "gpu-recompute"]
    assert json.loads(trace.read_text())["traceEvents"]
    assert pl.read_parquet(table)["tokens_per_s"].to_list() == [r["tokens_per_s"] for r in results]


def test_simulate_serves_arrivals(capsys):
    code, out, _ = run(
        capsys, "simulate", "gpu-resident", "--arrivals-per-s", 0.5, "--requests", 20, "--input-tokens", 128,
        "--output-tokens", 32, "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)[0]["latency_s.p99"] > 0


def test_sweep_runs_a_file_and_resumes(capsys, tmp_path):
    file, store = tmp_path / "s.toml", tmp_path / "s.sqlite"
    file.write_text('scheme = "flexgen-ssd"\n[workload]\nbatch = [8, 16]\noutput_tokens = 8\n')
    first = run(capsys, "sweep", file, "--store", store, "--workers", 1, "--json")
    again = run(capsys, "sweep", file, "--store", store, "--workers", 1, "--json")
    assert first[0] == 0
    assert json.loads(first[1]) == json.loads(again[1])
    assert len(json.loads(first[1])) == 2


def test_simulate_takes_framework_settings_and_searches_a_policy(capsys):
    base = ["simulate", "flexgen-dram", "--batch", 16, "--output-tokens", 8, "--json"]
    by_hand = [
        "--framework",
        "flexgen",
        "--set",
        "framework.kv_gpu_percent=0",
        "--set",
        "workload.input_tokens=256",
    ]
    code, out, _ = run(capsys, *base, *by_hand)
    assert code == 0
    policy = json.loads(out)[0]["policy"]
    assert (policy["kv_host_percent"], policy["cpu_attention"]) == (100, True)
    code, out, _ = run(capsys, *base, "--batch", 2, "--input-tokens", 256, "--best-policy")
    assert code == 0
    assert json.loads(out)[0]["tokens_per_s"] > 0


def test_device_lists_every_limit(capsys):
    code, out, _ = run(capsys, "device", "ssd", "980-pro-2tb", "--depth", 4, "--json")
    assert code == 0
    rows = {r["what"]: r for r in json.loads(out)}
    assert rows["sequential read"]["binding"] == "drive link"
    assert rows["random read, 4 KiB, depth 4 x 1: latency p99"]["unit"] == "us"


def test_reproduce_prints_rows_and_summary(capsys):
    code, out, _ = run(capsys, "reproduce", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["summary"]["calibration_rows"] <= 4
    assert len(data["rows"]) > 40
    assert len(data["findings"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "csd-dens"], "unknown scheme 'csd-dens' (did you mean csd-dense?)"),
        (["simulate", "gpu-resident", "--batch", "64"], "a batch of 13 would fit"),
        (["simulate", "gpu-resident", "--batch", "0"], "field batch:"),
        (["simulate", "gpu-resident", "--machine", "refernce"], "did you mean reference?"),
        (["simulate", "gpu-resident", "--set", "gpu.tdp_w"], "an override has the form device.field=value"),
        (["simulate", "gpu-resident", "--set", "gpu.tdp_w=-3"], "greater than 0, got -3"),
        (["simulate", "flexgen-ssd", "--framework", "flexgn"], "did you mean flexgen?"),
        (["simulate", "flexgen-ssd", "--set", "framework.gpu_bathes=2"], "did you mean gpu_batches?"),
        (["device", "ssd", "980-pro"], "did you mean 980-pro-2tb?"),
        (
            ["device", "ssd", "980-pro-2tb", "--kib", "nan"],
            "size, depth and threads must be positive, got nan KiB",
        ),
        (
            ["simulate", "csd-dense", "--machine", "t4-server"],
            "machine t4-server has none; with one: a100-server",
        ),
        (
            ["simulate", "csd-dense", "--set", "csd_count=3"],
            "40 heads of opt-13b do not divide over 3 drives; 2 would",
        ),
        (["simulate", "csd-dense", "--set", "p2p=false"], "machine reference has p2p = false"),
        (["simulate", "csd-dense", "--set", "csd.channel_gb_per_s=1400"], "is it in Gb/s or MB/s?"),
        (["simulate", "csd-dense", "--set", "csd.channel_gbps=11"], "so divide gigabits by 8"),
        (["simulate", "csd-dense", "--set", "csd.capacity_gb=20"], "of computational drives, "),
        (["simulate", "flexgen-ssd", "--set", "ssd.capacity_gb=20"], "GB of drives, "),
        (["simulate", "flexgen-dram", "--batch", "128"], "a batch of "),
        (["simulate", "--model", "opt-13"], "unknown model preset 'opt-13' (did you mean opt-13b?)"),
        (
            ["simulate", "--fidelity", "pages"],
            "one of analytic, flow, page, got 'pages' (did you mean page?)",
        ),
        (["simulate", "--framework", "flexgn"], "did you mean flexgen?"),
        (["simulate", "csd-dense", "--model", "sim"], "unknown model preset 'sim'"),
        (
            ["simulate", "gpu-resident", "--batch", "4", "--trace", "/proc/t.json"],
            "/proc/t.json cannot be written",
        ),
        (
            ["simulate", "gpu-resident", "--batch", "4", "--parquet", "/proc/t.p"],
            "table /proc/t.p cannot be written",
        ),
        (["reproduce", "--write", "/proc/r.md"], "/proc/r.md cannot be written"),
        (["sweep", "nowhere.toml"], "sweep file nowhere.toml does not exist"),
        (["sweep", "sim"], "sweep file sim cannot be read (Is a directory)"),
    ],
)
def test_bad_input_is_one_sentence_and_a_nonzero_exit(arguments, message):
    code = f"from sw_stack.cli import main; main({arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    message_lines = [line for line in done.stderr.strip().splitlines() if "100%" not in line]
    assert len(message_lines) == 1
