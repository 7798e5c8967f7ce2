"""Exact argtopk: the order in which SparF selects channels and tokens (docs/formats-storage.md, section 6).

Order: the larger key first; among equal keys the lower index first. Keys are integers, so the order is total and
does not depend on how a sort is implemented. Letters: G queries of a KV head, n candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from golden.spec import KVStrataError

TOKEN_KEY_BITS = 32
"""Token keys: signed; eight saturated scores add up to less than the greatest value, which the window takes."""


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


def select_tokens(scores: Tensor, k: int, *, window: int = 0) -> Tensor:
    """The `k` tokens with the largest summed score: scores [G, S] integers (Q16, 29 bits) -> int64 [k], ascending."""
    if scores.dim() != 2 or scores.dtype.is_floating_point:
        raise KVStrataError(f"scores are [G, S] integers, not {scores.dtype} {tuple(scores.shape)}")
    return argtopk(scores.to(torch.int64).sum(dim=0), k, window=window)
