"""Attention kernels of a GPU: blocks that stream cached keys and values, tiles of queries over them.

Decode: one block per (sequence, KV head), or several that split its cached tokens where these alone leave slots empty
(flash decoding). Two blocks share an SM. A block pays a prologue (indices, page table, first loads, its result), and
streams no faster than its loads in flight allow, so a machine with few blocks does not reach its bandwidth; blocks
beyond a whole wave run as a wave of their own.

Prefill: one block per 128 queries of a head over all keys before and in the chunk, masked ones included. Per key a
block pays its products at the tensor rate and its softmax in clocks of the SM, one after the other.

The constants were fitted on the 25 A100 rows of sim/data/gpu_ops_a100.csv (SIM-GPU-ATTENTION); they are times of
dependent accesses, shares, and clocks of an SM, so that other GPUs follow from their own clock, SMs and rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sim.describe.devices import Gpu
from sim.describe.model import FP16_BYTES
from sim.devices.gpu import Kernel, combined


@dataclass(frozen=True)
class Constants:
    """What the kernels cost beside bytes and products."""

    launch_us: float = 3.0
    block_us: float = 5.05
    """Prologue and epilogue of a decode block; an SM works them off one after the other."""
    group_cost: float = 0.12
    """Further cost of a decode block per extra query head that shares its KV head."""
    over_products: float = 1.12
    """Bandwidth over that of matrix kernels: long streams, without the tails of their tiles."""
    block_gb_per_s: float = 11.6
    """Rate of one block's stream: its loads in flight over the latency of memory."""
    prefill_block_us: float = 18.0
    """Prologue, first loads and epilogue of one block of queries."""
    softmax_clocks: float = 0.274
    """Clocks of an SM per score: scale, mask, maximum, exponential, sum, rescale, convert."""


FITTED = Constants()
BLOCKS_PER_SM = 2
MOST_BANDWIDTH = 0.97
"""Share of its data sheet's bandwidth that no memory exceeds: refresh and turnarounds."""
TILE_TOKENS = 128
"""Cached tokens of one step of a block, and queries of a prefill block."""
LEAST_SPLIT_TOKENS = 256
MOST_SPLITS = 128
GOOD_FILL = 0.85
"""The fewest splits that fill slots this well, relative to the best, are taken."""


def decode(
    gpu: Gpu,
    batch: int,
    kv: float,
    heads: int,
    kv_heads: int,
    head_size: int,
    planned: float | None = None,
    constants: Constants = FITTED,
) -> Kernel:
    """One query token per sequence over `kv` cached tokens; reads K and V once.

    `planned` is the length that the split was planned for, where that is not `kv`: kernels on a paged cache may plan
    for the whole of it, and then leave blocks without work.
    """
    c, slots = constants, gpu.sm_count * BLOCKS_PER_SM
    per_split = min(kv, split_tokens(batch * kv_heads, planned or kv, slots, planned is None))
    blocks = batch * kv_heads * math.ceil(kv / per_split)
    size = per_split * head_size * 2 * FP16_BYTES
    memory = _waves_s(gpu, blocks, slots, size, c)
    each = c.block_us * (1 + c.group_cost * (heads // kv_heads - 1)) * 1e-6
    queued = max(0.0, blocks / gpu.sm_count - 1) * each
    kernel = combined(gpu, memory, queued, c.launch_us)
    bound = "latency" if each + c.launch_us * 1e-6 > max(memory, queued) else kernel.bound
    return Kernel(kernel.seconds + each, bound)


def split_tokens(blocks: int, tokens: float, slots: int, exact: bool = True) -> float:
    """Tokens per block: whole tiles, by the fewest splits that fill the slots about as well as the best would."""
    tiles = math.ceil(tokens / TILE_TOKENS)
    if blocks >= 0.8 * slots:
        return tiles * TILE_TOKENS
    most = max(1, int(tokens // LEAST_SPLIT_TOKENS)) if exact else tiles
    fills: dict[int, float] = {}
    for splits in range(1, min(most, MOST_SPLITS) + 1):
        waves = blocks * splits / slots
        fills.setdefault(math.ceil(tiles / splits), waves / math.ceil(waves))
    best = max(fills.values())
    return next(n for n, fill in fills.items() if fill >= GOOD_FILL * best) * TILE_TOKENS


def _waves_s(gpu: Gpu, blocks: int, slots: int, size: float, c: Constants) -> float:
    """Whole waves share the memory's bandwidth; the last, partial one is as fast as its blocks can stream."""
    rate = gpu.hbm_gb_per_s * 1e9 * min(MOST_BANDWIDTH, gpu.bandwidth_share * c.over_products)
    alone = max(c.block_gb_per_s * 1e9, rate / slots)
    whole, rest = divmod(blocks, slots)
    return whole * size * slots / rate + (size / min(rate / rest, alone) if rest else 0.0)


def prefill(
    gpu: Gpu, batch: int, q: int, kv: int, heads: int, head_size: int, constants: Constants = FITTED
) -> Kernel:
    """Causal attention of `q` new tokens over `kv` cached ones and themselves; whole tiles are computed."""
    c, clock = constants, gpu.boost_mhz * 1e6
    blocks = batch * heads * math.ceil(q / TILE_TOKENS)
    product = 4 * head_size / (gpu.flops_per_clock * (gpu.attention_share or gpu.tensor_share))
    scores = TILE_TOKENS * (kv + q)
    each = c.prefill_block_us * 1e-6 + scores * (product + c.softmax_clocks) / clock
    # Two blocks share an SM, so the last wave counts by halves.
    waves = max(1.0, math.ceil(BLOCKS_PER_SM * blocks / gpu.sm_count) / BLOCKS_PER_SM)
    return combined(gpu, 0.0, waves * each, c.launch_us)
