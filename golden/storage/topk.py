"""Exact argtopk: which channels and which tokens SparF selects (docs/formats-storage.md, section 6).

Order: the larger key first; among equal keys the lower index first. Keys are integers, so the order is total and
does not depend on how a sort is implemented. Letters: G queries of a KV head, dh head size, n candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from golden.spec import KVStrataError

CHANNEL_KEY_BITS = 48
"""Channel weights: unsigned, unit 2**-24; eight infinities of 2**17 each stay far below."""
TOKEN_KEY_BITS = 32
"""Token keys: signed; eight saturated scores add up to less than the greatest value, which the window takes."""
FP16_INFINITY_WEIGHT = 1 << 41
"""Infinity and NaN count as 2**17 in units of 2**-24: twice the largest finite magnitude."""


def argtopk(keys: Tensor, k: int, *, window: int = 0) -> Tensor:
    """Indices of the `k` largest of `keys` [n] (integers), ascending.

    The last `window` indices are selected whatever their keys and count towards k. Ties go to the lower index.
    Returns int64 [k]. Raises KVStrataError unless 0 <= window <= k <= n, or for keys that are not integers.
    """
    if keys.dim() != 1 or keys.dtype.is_floating_point:
        raise KVStrataError(f"top-k keys are one axis of integers, not {keys.dtype} {tuple(keys.shape)}")
    n = keys.shape[0]
    if not 0 <= k <= n:
        raise KVStrataError(f"k must lie in 0..{n}, the number of candidates, not {k}")
    if not 0 <= window <= k:
        raise KVStrataError(f"the window must lie in 0..{k}, the number of selected tokens, not {window}")
    rest = torch.sort(keys[: n - window].to(torch.int64), descending=True, stable=True).indices[: k - window]
    return torch.cat([rest.sort().values, torch.arange(n - window, n)])


def channel_weights(q: Tensor) -> Tensor:
    """Sum of |q| over the group, exact: q [G, dh] float16 -> int64 [dh] in units of 2**-24.

    Infinity and NaN count as 2**17, so that of single queries a channel that holds one is selected first.
    """
    if q.dim() != 2 or q.dtype != torch.float16:
        raise KVStrataError(f"queries are [G, dh] float16, not {q.dtype} {tuple(q.shape)}")
    magnitude = q.to(torch.float64).abs()
    weight = torch.where(magnitude.isfinite(), magnitude * 2**24, float(FP16_INFINITY_WEIGHT))
    return weight.to(torch.int64).sum(dim=0)


def select_channels(q: Tensor, r: int) -> Tensor:
    """The `r` channels with the largest summed |q| of the group: q [G, dh] float16 -> int64 [r], ascending."""
    return argtopk(channel_weights(q), r)


def select_tokens(scores: Tensor, k: int, *, window: int = 0) -> Tensor:
    """The `k` tokens with the largest summed score: scores [G, S] integers (Q16, 29 bits) -> int64 [k], ascending."""
    if scores.dim() != 2 or scores.dtype.is_floating_point:
        raise KVStrataError(f"scores are [G, S] integers, not {scores.dtype} {tuple(scores.shape)}")
    return argtopk(scores.to(torch.int64).sum(dim=0), k, window=window)
