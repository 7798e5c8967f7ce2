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
        if limit < 0:
            raise KVStrataError(
                f"the limit distance must be at least 1 token, or 0 for the window, got {limit}."
            )
        self.costs = LambdaCosts(head_size, group, sinks=sinks, window=window)
        self.positions = positions
        self.limit = limit

    @property
    def sink_keys(self) -> str:
        """Which keys of sinks outside the window are scored: `raw` (before RoPE) or `turned`."""
        return "raw" if self.positions == "limit" else "turned"

    @property
    def sink_distance(self) -> int:
        """Position that the query is rotated to for sinks outside the window."""
        return (
            (self.limit or self.costs.window)
            if self.positions == "limit"
            else (self.costs.sinks + self.costs.window - 1)
        )

    def in_window(self, positions: Tensor, tokens: int) -> Tensor:
        """bool [T, tokens]: the first `tokens` tokens in the window of queries at `positions`, later ones included."""
        return torch.arange(tokens) > positions[:, None] - self.costs.window

    def live(self, positions: Tensor, tokens: int) -> Tensor:
        """bool [T, tokens]: the first `tokens` tokens that queries at `positions` attend to."""
        every = torch.arange(tokens)
        seen = self.in_window(positions, tokens) | (every < self.costs.sinks)
        return seen & (every <= positions[:, None])

    def select(self, heads: Heads) -> Selected:
        """Window, and sinks that have left it."""
        live = self.live(heads.positions, heads.k.shape[1])
        return Selected(live.expand(heads.k.shape[0], *live.shape))

    def attend(self, heads: Heads, selected: Selected) -> Tensor:
        """Two branches in one softmax."""
        z = heads.q @ heads.k.transpose(-1, -2)[:, None] * heads.scale
        n = min(self.costs.sinks, heads.k.shape[1])
        if n:
            inside = self.in_window(heads.positions, n)
            z[..., :n] = torch.where(inside, z[..., :n], self._sink_scores(heads, n))
        return softmax_mix(z, selected.tokens[:, None], heads.v)

    def _sink_scores(self, heads: Heads, n: int) -> Tensor:
        keys = heads.k_raw if self.sink_keys == "raw" else heads.k
        q = heads.rotate(heads.q_raw, torch.full_like(heads.positions, self.sink_distance))
        return q @ keys[:, :n].transpose(-1, -2)[:, None] * heads.scale

    def kept(self, length: int) -> Tensor:
        """Sinks and window."""
        tokens = torch.arange(length)
        return (tokens < self.costs.sinks) | (tokens > length - 1 - self.costs.window)
