"""The GPU model against measured A100 kernels, and its limits."""

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from sim.describe.base import load
from sim.describe.devices import Gpu
from sim.devices import gpu as kernels

ROWS = list(csv.DictReader(Path("sim/data/gpu_ops_a100.csv").read_text().splitlines()))


def predicted_ms(gpu, row):
    n = {k: int(v) for k, v in row.items() if v.isdigit()}
    if row["op"] == "attn_decode":
        shape = (n["batch"], n["kv_len"], n["q_heads"], n["kv_heads"], n["head_dim"])
        return 1e3 * kernels.attention_decode(gpu, *shape).seconds
    if row["op"] == "attn_prefill":
        shape = (n["batch"], n["q_len"], n["kv_len"], n["q_heads"], n["head_dim"])
        return 1e3 * kernels.attention_prefill(gpu, *shape).seconds
    return 1e3 * kernels.gemm(gpu, n["M_tokens"], n["K"], n["N"]).seconds


@pytest.fixture(scope="module")
def a100():
    return load(Gpu, "a100-80")


@pytest.mark.parametrize(
    ("kind", "mean", "worst"),
    [("proj", 0.08, 0.18), ("attn_decode", 0.15, 0.40), ("attn_prefill", 0.25, 0.40)],
)
def test_measured_kernels(a100, kind, mean, worst):
    errors = [abs(predicted_ms(a100, r) / float(r["median_ms"]) - 1) for r in ROWS if kind in r["op"]]
    assert sum(errors) / len(errors) <= mean
    assert max(errors) <= worst


def test_no_kernel_beats_its_roofline(a100):
    by_op = defaultdict(int)
    for m in (1, 7, 64, 300, 4096):
        for k, n in ((576, 1536), (4096, 12288), (8192, 28672)):
            kernel = kernels.gemm(a100, m, k, n)
            assert kernel.seconds >= 2 * m * k * n / (a100.fp16_tflops * 1e12)
            assert kernel.seconds >= 2 * (m * k + k * n + m * n) / (a100.hbm_gb_per_s * 1e9)
            by_op[kernel.bound] += 1
    assert set(by_op) == {"latency", "memory", "compute"}


def test_time_grows_with_every_dimension(a100):
    assert kernels.gemm(a100, 64, 4096, 4096).seconds <= kernels.gemm(a100, 2048, 4096, 4096).seconds
    short = kernels.attention_decode(a100, 64, 512, 32, 32, 128).seconds
    assert short < kernels.attention_decode(a100, 64, 1024, 32, 32, 128).seconds


def test_a_wave_more_costs_a_step(a100):
    # 108 SMs: 108 tiles of 128 x 128 run at once, 109 need another wave or smaller tiles.
    full = kernels.gemm(a100, 128, 8192, 108 * 128).seconds
    over = kernels.gemm(a100, 128, 8192, 109 * 128).seconds
    assert over > full * 1.02
