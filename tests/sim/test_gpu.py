"""The GPU model against measured A100 kernels, across GPUs, and its limits."""

import csv
import math
from collections import defaultdict
from dataclasses import replace

import pytest

from sim.describe.base import ConfigError, listed, load
from sim.describe.devices import Gpu
from sim.devices import gpu as kernels
from sim.devices import gpu_attention as attention
from sim.devices.gpu_check import MEASURED, errors, planned_tokens, predicted_ms, preset_of


@pytest.fixture(scope="module")
def a100():
    return load(Gpu, "a100-80")


@pytest.mark.parametrize(
    ("kind", "mean", "worst"),
    [("proj", 0.05, 0.13), ("attn_decode", 0.07, 0.18), ("attn_prefill", 0.08, 0.15)],
)
def test_measured_kernels(kind, mean, worst):
    found = [abs(e) for op, signed in errors().items() if kind in op for e in signed]
    assert len(found) >= 4
    assert sum(found) / len(found) <= mean
    assert max(found) <= worst


def rows_of(kind):
    """(row, tokens that its kernel's split was planned for) of all measured rows of a kind of operator."""
    rows = list(csv.DictReader(MEASURED.read_text().splitlines()))
    planned = planned_tokens(rows)
    return [(r, planned.get(r["source"])) for r in rows if kind in r["op"]]


def mean_error(gpu, constants, rows):
    modelled = [predicted_ms(gpu, row, planned, constants) / float(row["median_ms"]) for row, planned in rows]
    return sum(abs(math.log(m)) for m in modelled) / len(rows)


def fitted(gpu, constants, rows, fields):
    """Coordinate descent over `fields` of the GPU or of the attention constants, from 30% above all of them."""
    state = {f: 1.3 * getattr(gpu if hasattr(gpu, f) else constants, f) for f in fields}

    def built(values):
        of_gpu = {f: min(v, 1.0) if "share" in f else v for f, v in values.items() if hasattr(gpu, f)}
        return gpu.replaced(**of_gpu), replace(
            constants, **{f: v for f, v in values.items() if f not in of_gpu}
        )

    step, best = 0.2, mean_error(*built(state), rows)
    while step > 0.004:
        trials = [state | {f: state[f] * way} for f in fields for way in (1 + step, 1 / (1 + step))]
        errors_of = [mean_error(*built(t), rows) for t in trials]
        if min(errors_of) < best:
            best, state = min(errors_of), trials[errors_of.index(min(errors_of))]
        else:
            step /= 2
    return built(state)


@pytest.mark.parametrize(
    ("kind", "fields", "limit"),
    [
        ("proj", ("bandwidth_share", "tensor_share", "kernel_floor_us"), 0.06),
        ("attn_decode", ("block_us", "group_cost", "over_products", "block_gb_per_s"), 0.12),
    ],
)
def test_half_of_the_measured_kernels_predicts_the_other_half(a100, kind, fields, limit):
    rows, held_out = rows_of(kind), []
    for even in (0, 1):
        gpu, constants = fitted(a100, attention.FITTED, rows[even::2], fields)
        held_out.append(mean_error(gpu, constants, rows[1 - even :: 2]))
    assert max(held_out) <= limit


def test_three_of_the_four_measured_prefills_predict_the_fourth(a100):
    rows, held_out = rows_of("attn_prefill"), []
    for one in range(len(rows)):
        rest = rows[:one] + rows[one + 1 :]
        gpu, constants = fitted(a100, attention.FITTED, rest, ("prefill_block_us", "softmax_clocks"))
        held_out.append(mean_error(gpu, constants, rows[one : one + 1]))
    assert len(held_out) == 4
    assert sum(held_out) / 4 <= 0.2


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
    short = attention.decode(a100, 64, 512, 32, 32, 128).seconds
    assert short < attention.decode(a100, 64, 1024, 32, 32, 128).seconds


def test_a_wave_more_costs_a_step(a100):
    # 108 SMs: 108 tiles of 128 x 128 run at once, 109 need another wave or smaller tiles.
    full = kernels.gemm(a100, 128, 8192, 108 * 128).seconds
    over = kernels.gemm(a100, 128, 8192, 109 * 128).seconds
    assert over > full * 1.02


def test_a_profile_of_an_unknown_device_is_refused(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("device,op,M_tokens,K,N,median_ms\nmi300,qkv_proj,1,4096,4096,0.05\n")
    with pytest.raises(ConfigError, match="p.csv: no preset for device 'mi300'; known: a10, a100-40"):
        errors(path)


@pytest.mark.parametrize("text", ["", "device,op\n"])
def test_a_profile_without_rows_is_refused(tmp_path, text):
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match="p.csv holds no row"):
        errors(path)


def test_names_of_published_profiles_find_their_presets():
    names = {"A100": "a100-80", "h100": "h100", "A40": "a40", "RTX4090": "rtx-4090", "H100_PCIe": "h100-pcie"}
    assert {name: preset_of(name) for name in names} == names


SM_FLOPS = {512, 1024, 2048, 4096}
"""FLOP per SM and clock of the generations' tensor cores (fp16, fp32 accumulation)."""


@pytest.mark.parametrize("name", listed("gpu"))
def test_every_preset_is_consistent_with_its_generation_and_its_roofline(name):
    gpu = load(Gpu, name)
    assert min(abs(gpu.flops_per_clock / flops - 1) for flops in SM_FLOPS) < 0.03
    vector = kernels.gemm(gpu, 1, 4096, 12288).seconds
    assert 0.6 <= 2 * 4096 * 12288 / vector / (gpu.hbm_gb_per_s * 1e9) <= 0.95
    matrix = kernels.gemm(gpu, 8192, 8192, 8192).seconds
    assert 0.45 <= 2 * 8192**3 / matrix / (gpu.fp16_tflops * 1e12) <= 0.92
    cached = attention.decode(gpu, 128, 2048, 32, 32, 128).seconds
    assert 0.7 <= 128 * 2048 * 32 * 512 / cached / (gpu.hbm_gb_per_s * 1e9) <= 0.97
    scores = attention.prefill(gpu, 8, 2048, 0, 32, 128).seconds
    assert 0.15 <= 4 * 8 * 32 * 128 * 2048**2 / scores / (gpu.fp16_tflops * 1e12) <= 0.75


def test_attention_on_hopper_gains_as_published_over_ampere(a100):
    # FlashAttention-2 (mma.sync) runs 1.5 to 2 times as fast on an H100 as on an A100; peaks differ by 3.2.
    shape = (4, 4096, 0, 32, 128)
    gain = attention.prefill(a100, *shape).seconds / attention.prefill(load(Gpu, "h100"), *shape).seconds
    assert 1.5 <= gain <= 2.0


def test_splitting_the_cache_fills_an_idle_machine(a100):
    # Four blocks alone would stream 4 x 11.6 GB/s; split they reach a good part of the memory's rate.
    seconds = attention.decode(a100, 1, 32_768, 32, 4, 128).seconds
    assert 32_768 * 4 * 512 / seconds >= 0.5 * a100.hbm_gb_per_s * 1e9
    assert attention.split_tokens(4, 32_768, 216) == 640
    assert attention.split_tokens(216, 32_768, 216) == 32_768
    # Planned for 4,096 tokens in three parts, a cache of 1,024 leaves two of them empty.
    planned = attention.decode(a100, 16, 1024, 32, 4, 128, planned=4096).seconds
    assert planned > 1.5 * attention.decode(a100, 16, 1024, 32, 4, 128).seconds
