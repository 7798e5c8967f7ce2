"""The GPU model against measured A100 kernels, and its limits."""

from collections import defaultdict

import pytest

from sim.describe.base import ConfigError, load
from sim.describe.devices import Gpu
from sim.devices import gpu as kernels
from sim.devices.gpu_check import errors


@pytest.fixture(scope="module")
def a100():
    return load(Gpu, "a100-80")


@pytest.mark.parametrize(
    ("kind", "mean", "worst"),
    [("proj", 0.08, 0.18), ("attn_decode", 0.15, 0.40), ("attn_prefill", 0.25, 0.40)],
)
def test_measured_kernels(kind, mean, worst):
    found = [abs(e) for op, signed in errors().items() if kind in op for e in signed]
    assert len(found) >= 4
    assert sum(found) / len(found) <= mean
    assert max(found) <= worst


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


def test_a_profile_of_an_unknown_device_is_refused(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("device,op,M_tokens,K,N,median_ms\nmi300,qkv_proj,1,4096,4096,0.05\n")
    with pytest.raises(ConfigError, match="p.csv: no preset for device 'mi300'; known: a100, h100"):
        errors(path)
