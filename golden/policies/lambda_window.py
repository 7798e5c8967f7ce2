"""Lambda-shaped attention: sinks plus a window of recent tokens (LM-Infinite, StreamingLLM)."""

from __future__ import annotations

import torch
from torch import Tensor

from golden.policies.base import Heads, KVPolicy, Selected, softmax_mix
from golden.spec import KVStrataError
from golden.spec.policies import LambdaCosts

POSITIONS = ("limit", "cache")


class Lambda(KVPolicy):
    """Sinks plus window.

    positions `limit` (LM-Infinite): a sink outside the window is scored as if `limit` tokens away (default: the
    window), its key un-rotated, the query rotated to that position. `cache` (StreamingLLM): positions are indices in
    the cache of sinks + window, so that a sink s is (sinks + window - 1 - s) away once the cache is full.
    """

    costs: LambdaCosts

    def __init__(
        self,
        head_size: int,
        group: int = 1,
        sinks: int = 4,
        window: int = 1024,
        positions: str = "limit",
        limit: int = 0,
    ) -> None:
        if positions not in POSITIONS:
            raise KVStrataError(
                f"positions of a Lambda policy must be one of {', '.join(POSITIONS)}, got {positions}."
            )
        self.costs = LambdaCosts(head_size, group, sinks=sinks, window=window)
        self.positions = positions
        self.limit = limit

    def _window(self, heads: Heads) -> Tensor:
        tokens = torch.arange(heads.k.shape[1])
        return heads.causal & (tokens[None, :] > heads.positions[:, None] - self.costs.window)

    def select(self, heads: Heads) -> Selected:
        """Window, and sinks that have left it."""
        sink = torch.arange(heads.k.shape[1]) < self.costs.sinks
        live = self._window(heads) | (sink & heads.causal)
        return Selected(live.expand(heads.k.shape[0], *live.shape))

    def attend(self, heads: Heads, selected: Selected) -> Tensor:
        """Two branches in one softmax."""
        z = heads.q @ heads.k.transpose(-1, -2)[:, None] * heads.scale
        n = min(self.costs.sinks, heads.k.shape[1])
        if n:
            z[..., :n] = torch.where(self._window(heads)[:, :n], z[..., :n], self._sink_scores(heads, n))
        return softmax_mix(z, selected.tokens[:, None], heads.v)

    def _sink_scores(self, heads: Heads, n: int) -> Tensor:
        if self.positions == "limit":
            distance = torch.full_like(heads.positions, self.limit or self.costs.window)
            keys = heads.k_raw[:, :n]
        else:
            distance = torch.full_like(heads.positions, self.costs.sinks + self.costs.window - 1)
            keys = heads.k[:, :n]
        q = heads.rotate(heads.q_raw, distance)
        return q @ keys.transpose(-1, -2)[:, None] * heads.scale

    def kept(self, length: int) -> Tensor:
        """Sinks and window."""
        tokens = torch.arange(length)
        return (tokens < self.costs.sinks) | (tokens > length - 1 - self.costs.window)
