"""GPU kernel times: roofline ceilings, tile waves, memory-level parallelism and a floor per kernel.

M tokens, K inner, N outputs; q and kv are query and cached lengths. Times are device times of one kernel; what a
framework spends between kernels is a separate term (`Tuning.layer_overhead_us`). Shaped on measured A100 latencies
(sim/data/gpu_ops_a100.csv): `make bench` reports the error against them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from sim.describe.devices import Gpu
from sim.describe.model import FP16_BYTES

TILES = ((128, 256), (256, 128), (128, 128), (128, 64), (64, 128), (64, 64), (32, 128), (16, 128))
"""Output tiles of a tensor-core matrix product; small ones reuse operands less."""
SPLITS = (1, 2, 4, 8)
"""Ways to split K where the tiles alone do not fill the machine."""
FULL_REUSE = 42.0
"""Operand reuse (FLOP per operand element) from which a tile runs at the full tensor rate."""
SOFT_MAX_POWER = 4
"""Compute and memory overlap nearly perfectly: their combination is a high-power mean."""


@dataclass(frozen=True)
class Kernel:
    """Time of a kernel and what bounds it: "memory", "compute" or "latency"."""

    seconds: float
    bound: str


def gemm(gpu: Gpu, m: float, k: float, n: float) -> Kernel:
    """y[M, N] = x[M, K] w[K, N] in fp16 with fp32 accumulation."""
    size = FP16_BYTES * (m * k + k * n + m * n)
    bytes_per_s = gpu.hbm_gb_per_s * 1e9 * gpu.bandwidth_share
    flops_per_s = gpu.fp16_tflops * 1e12 * gpu.tensor_share
    return _combine(gpu, size / bytes_per_s, _best_tiling_s(gpu.sm_count, flops_per_s, bytes_per_s, m, k, n))


@lru_cache(maxsize=8192)
def _best_tiling_s(
    sm_count: int, flops_per_s: float, bytes_per_s: float, m: float, k: float, n: float
) -> float:
    """Whole waves of tiles over the SMs, the best tile and split; a split of K adds a pass over fp32 partial sums."""
    best = math.inf
    for rows, cols in TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / cols)
        each = 2 * rows * cols * k * sm_count / flops_per_s
        each /= min(1.0, rows * cols / (rows + cols) / FULL_REUSE)
        for split in SPLITS:
            partials = 8 * m * n * split / bytes_per_s if split > 1 else 0.0
            best = min(best, math.ceil(tiles * split / sm_count) * each / split + partials)
    return best


BLOCKS_PER_SM = 2
ATTENTION_BLOCK_US = 4.6
"""Prologue and epilogue of one attention block on its SM, seen at a 32-token cache (SIM-GPU-ATTENTION)."""
ATTENTION_GROUP_COST = 0.15
"""Further cost of a block per extra query head that shares its KV head."""
ATTENTION_BANDWIDTH_SHARE = 0.97
ATTENTION_TENSOR_SHARE = 0.40
ATTENTION_PREFILL_BLOCK_US = 15.0
"""Prologue, first loads and epilogue of one block of 128 queries (SIM-GPU-ATTENTION)."""
SPLIT_TOKENS = 512
"""Split-KV attention gives one block at least this many cached tokens."""


def attention_decode(gpu: Gpu, batch: int, kv: float, heads: int, kv_heads: int, head_size: int) -> Kernel:
    """One query token per sequence over `kv` cached tokens; reads K and V once."""
    size = batch * kv * kv_heads * head_size * 2 * FP16_BYTES
    blocks, slots = batch * kv_heads, gpu.sm_count * BLOCKS_PER_SM
    blocks *= max(1, min(slots // blocks, int(kv // SPLIT_TOKENS)))
    # Too few blocks cannot keep enough loads in flight; a quarter of the slots saturates half the memory.
    filled = max(blocks / (math.ceil(blocks / slots) * slots), 0.25)
    memory = size / (gpu.hbm_gb_per_s * 1e9 * ATTENTION_BANDWIDTH_SHARE) / filled
    each_us = ATTENTION_BLOCK_US * (1 + ATTENTION_GROUP_COST * (heads // kv_heads - 1))
    return _combine(gpu, memory, math.ceil(blocks / gpu.sm_count) * each_us * 1e-6)


def attention_prefill(gpu: Gpu, batch: int, q: int, kv: int, heads: int, head_size: int) -> Kernel:
    """Causal attention of `q` new tokens over `kv` cached ones and themselves; whole tiles are computed."""
    flops = 4 * batch * heads * head_size * q * (kv + q)
    # Blocks of unequal length share an SM, so they fill it but for the last of them.
    per_sm = max(1.0, batch * heads * math.ceil(q / 128) / gpu.sm_count)
    per_block = flops / (batch * heads * math.ceil(q / 128))
    each = per_block / (gpu.fp16_tflops * 1e12 * ATTENTION_TENSOR_SHARE / gpu.sm_count)
    return _combine(gpu, 0.0, per_sm * (each + ATTENTION_PREFILL_BLOCK_US * 1e-6))


def elementwise(gpu: Gpu, size_bytes: float) -> Kernel:
    """Norms, activations, residuals, copies: `size_bytes` read and written in all."""
    return _combine(gpu, size_bytes / (gpu.hbm_gb_per_s * 1e9 * gpu.bandwidth_share), 0.0)


def _combine(gpu: Gpu, memory: float, compute: float) -> Kernel:
    power = SOFT_MAX_POWER
    busy = (memory**power + compute**power) ** (1 / power)
    floor = gpu.kernel_floor_us * 1e-6
    bound = "latency" if floor > busy else "memory" if memory >= compute else "compute"
    return Kernel(floor + busy, bound)
