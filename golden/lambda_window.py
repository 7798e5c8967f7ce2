"""Exact Lambda-shaped attention of the engine: sinks plus a recent window in a ring (docs/formats.md section 8.1).

Letters as in golden.attention; W window, R ring slots, D limit distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from golden.attention import ScoreScale, attend_partial, finish, group_heads, pad_slots, scores
from golden.ops import KVCodes
from golden.spec import KVStrataError
from golden.spec.formats import ATTN_TILE

QUERY_BLOCK = 64
"""Queries gathered at once: bounds memory, since each has its own order of slots."""


@dataclass(frozen=True)
class LambdaWindow:
    """Sinks, window W, ring R (0: W rounded up to whole tiles), limit distance D (0: W), all in tokens."""

    sinks: int = 4
    window: int = 1024
    ring: int = 0
    limit: int = 0

    def __post_init__(self) -> None:
        """Refuse parameters that contradict, and fill the defaults."""
        if not 0 <= self.sinks <= ATTN_TILE:
            raise KVStrataError(f"a Lambda window holds 0 to {ATTN_TILE} sinks, got {self.sinks}.")
        if self.window < 1:
            raise KVStrataError(f"a Lambda window must be at least 1 token, got {self.window}.")
        object.__setattr__(self, "ring", self.ring or -(-self.window // ATTN_TILE) * ATTN_TILE)
        object.__setattr__(self, "limit", self.limit or self.window)
        if self.ring % ATTN_TILE or self.ring < self.window:
            raise KVStrataError(
                f"a ring must be a multiple of {ATTN_TILE} slots and hold the window of {self.window}, got {self.ring}."
            )
        if self.limit < 1:
            raise KVStrataError(f"the limit distance must be at least 1 token, got {self.limit}.")

    @property
    def sink_slots(self) -> int:
        """Slots before the ring: one tile if there are sinks."""
        return ATTN_TILE if self.sinks else 0

    def ring_tokens(self, positions: Tensor) -> Tensor:
        """[T, R]: the token that each ring slot holds for queries at `positions`; below 0 where still empty."""
        slot = torch.arange(self.ring)
        return positions[:, None] - (positions[:, None] - slot) % self.ring

    def live(self, positions: Tensor) -> Tensor:
        """[T, sink_slots + R]: the slots that take part for queries at `positions`."""
        tokens = self.ring_tokens(positions)
        window = (tokens >= 0) & (tokens > positions[:, None] - self.window)
        sinks = torch.arange(self.sink_slots) < (positions[:, None] - self.window + 1).clamp(0, self.sinks)
        return torch.cat((sinks, window), 1)


def attend_lambda(
    q: Tensor,
    q_limit: Tensor,
    k: KVCodes,
    v: KVCodes,
    sink_k: KVCodes,
    positions: Tensor,
    shape: LambdaWindow,
) -> Tensor:
    """Outputs [Hq, T, dh] in q16.

    q, q_limit: [Hq, T, dh] rotated to their positions and to D; k, v: [Hkv, S, dh] by token, k after RoPE;
    sink_k: [Hkv, min(sinks, S), dh] before RoPE; positions: [T], the last queries of the S tokens.
    """
    return torch.cat(
        [
            _attend_block(q[:, part], q_limit[:, part], k, v, sink_k, positions[part], shape)
            for part in (slice(i, i + QUERY_BLOCK) for i in range(0, len(positions), QUERY_BLOCK))
        ],
        1,
    )


def _attend_block(
    q: Tensor,
    q_limit: Tensor,
    k: KVCodes,
    v: KVCodes,
    sink_k: KVCodes,
    positions: Tensor,
    shape: LambdaWindow,
) -> Tensor:
    hkv, scale = k.codes.shape[0], ScoreScale.of(q.shape[-1])
    first = max(0, int(positions[0]) - shape.window + 1)
    recent = KVCodes(*(x[:, first : int(positions[-1]) + 1] for x in k))
    # A slot outside the window is dead, so any token may stand in for it.
    tokens = shape.ring_tokens(positions)
    index = (tokens - first).clamp(0, recent.codes.shape[1] - 1)
    z = scores(group_heads(q, hkv), recent, scale)
    z = z.gather(-1, index.expand(*z.shape[:2], *index.shape))
    slot_v = KVCodes(*(x[:, tokens.clamp(0, v.codes.shape[1] - 1)] for x in v))
    if shape.sinks:
        sink_z = scores(group_heads(q_limit, hkv), pad_slots(sink_k, ATTN_TILE), scale)
        z = torch.cat((sink_z, z), -1)
        sink_v = pad_slots(KVCodes(*(x[:, : sink_k.codes.shape[1]] for x in v)), ATTN_TILE)
        slot_v = KVCodes(*(torch.cat((s[:, None].expand(-1, len(positions), *s.shape[1:]), x), 2)
                           for s, x in zip(sink_v, slot_v)))  # fmt: skip
    return finish(attend_partial(z, shape.live(positions), slot_v)).flatten(0, 1)
