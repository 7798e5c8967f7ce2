"""GPU kernel times: roofline ceilings, tile waves, memory-level parallelism and a floor per kernel.

M tokens, K inner, N outputs. Times are device times of one kernel; what a framework spends between kernels is a
separate term (`Tuning.layer_overhead_us`). Weights come from memory each time: the layers of a decoder evict one
another from L2. Shaped on measured A100 latencies (sim/data/gpu_ops_a100.csv): `make bench` reports the error against
them, a test that of one half of the rows with the constants fitted on the other. Other GPUs follow from their clock,
SMs, tensor rate and bandwidth. Attention is in `sim.devices.gpu_attention`.
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
L2_BYTES_PER_CLOCK = 38.0
"""Operands that an SM takes from L2 per clock, of a port of 64 B: tiles that reuse theirs too little wait for it
(SIM-GPU-L2)."""
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
    reuse = gpu.flops_per_clock * gpu.tensor_share / L2_BYTES_PER_CLOCK
    products = _best_tiling_s(gpu.sm_count, flops_per_s, bytes_per_s, reuse, m, k, n)
    return combined(gpu, size / bytes_per_s, products)


@lru_cache(maxsize=8192)
def _best_tiling_s(
    sm_count: int, flops_per_s: float, bytes_per_s: float, full_reuse: float, m: float, k: float, n: float
) -> float:
    """Whole waves of tiles over the SMs, the best tile and split; a split of K adds a pass over fp32 partial sums.

    `full_reuse` is the FLOP per byte of operands from which L2 keeps up with the tensor cores of an SM.
    """
    best = math.inf
    for rows, cols in TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / cols)
        each = 2 * rows * cols * k * sm_count / flops_per_s
        each /= min(1.0, rows * cols / (rows + cols) / full_reuse)
        for split in SPLITS:
            partials = 8 * m * n * split / bytes_per_s if split > 1 else 0.0
            best = min(best, math.ceil(tiles * split / sm_count) * each / split + partials)
    return best


def elementwise(gpu: Gpu, size_bytes: float) -> Kernel:
    """Norms, activations, residuals, copies: `size_bytes` read and written in all."""
    return combined(gpu, size_bytes / (gpu.hbm_gb_per_s * 1e9 * gpu.bandwidth_share), 0.0)


def combined(gpu: Gpu, memory: float, compute: float, floor_us: float | None = None) -> Kernel:
    """A kernel that waits for memory and for arithmetic side by side, both in seconds, above its floor (default: that
    of a matrix kernel)."""
    power = SOFT_MAX_POWER
    busy = (memory**power + compute**power) ** (1 / power)
    floor = (gpu.kernel_floor_us if floor_us is None else floor_us) * 1e-6
    bound = "latency" if floor > busy else "memory" if memory >= compute else "compute"
    return Kernel(floor + busy, bound)
