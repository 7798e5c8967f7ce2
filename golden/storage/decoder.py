"""The exact decoder with attention in the drive, or split between engine and drive.

`StorageDecoder`: projections, feed-forward networks and norms in the engine's integers, attention of every token in the
in-storage unit's binary16, dense or SparF. `HybridDecoder`: sinks and a recent window by the engine's exact attention
over its quantised cache, the tokens between in the drive, partials merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from golden import attention, ops
from golden.exact_decoder import ExactDecoder
from golden.formats.weights import QuantisedWeight
from golden.loaders.checkpoint import Checkpoint
from golden.ops import KVCodes
from golden.spec import KVStrataError
from golden.spec.formats import KV_FORMATS, L_EXTRA_FRAC, P_FRAC
from golden.spec.policies import Selection, always_recent, attended
from golden.spec.storage import MAX_GROUP_QUERIES, check_head_size
from golden.storage.attention import Far, Softmax, SparfTrace, exact, mean_value, sparf
from golden.storage.fp import F16, to_fp16

SUM_FRAC = 40
"""Unit of a drive's softmax sum: 2^-40; the engine's is 2^-(P_FRAC + L_EXTRA_FRAC)."""
MERGE_FRAC = 16
SHIFT_LIMIT = 62


class SparfSize(NamedTuple):
    """Channels, tokens and recent window of a SparF step."""

    r: int
    k: int
    window: int


@dataclass(frozen=True)
class Sparsity:
    """SparF at any context: r channels, one token in `ratio`, the most recent `window` of them (0: a quarter)."""

    r: int = 16
    ratio: int = 8
    window: int = 0

    def at(self, tokens: int) -> SparfSize:
        """For a context of `tokens` tokens."""
        k = attended(tokens, Fraction(1, self.ratio), self.window)
        return SparfSize(self.r, k, always_recent(k, self.window))


@dataclass(frozen=True)
class Split:
    """FPGA+CSD: the first `sinks` and the last `window` tokens on the engine, those between in the drive.

    The engine has a slot per token until all sinks + window are taken; then a new token takes the oldest one's place.
    """

    sinks: int = 4
    window: int = 64

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise KVStrataError(
                f"a split has sinks >= 0 and a window >= 1; got {self.sinks} and {self.window}"
            )

    def older(self, tokens: int) -> int:
        """Tokens of a context that the drive holds: [sinks, sinks + older)."""
        return max(0, tokens - self.window - self.sinks)

    def slot(self, token: int) -> int:
        """Slot of a token's K and V on the engine."""
        return token if token < self.sinks else self.sinks + (token - self.sinks) % self.window

    def held(self, tokens: int) -> list[int]:
        """The token in each live slot, at a context of `tokens` tokens."""
        kept = [t for t in range(tokens) if t < self.sinks or t >= self.sinks + self.older(tokens)]
        return sorted(kept, key=self.slot)


class EngineShare(NamedTuple):
    """What the engine makes of its tokens: softmax maximum m and sum l [...], and outputs y Q16 [..., dh]."""

    m: Tensor
    l: Tensor
    y: Tensor

    @classmethod
    def of(cls, partial: attention.Partial) -> EngineShare:
        """Of an unfinished partial."""
        return cls(partial.m, partial.l, attention.finish(partial))


def half(x: Tensor) -> np.ndarray:
    """Q16 to binary16, nearest, ties to even."""
    return ops.from_q16(x).numpy().astype(np.float16)


def merge(engine: EngineShare, outputs: Tensor, maximum: Tensor, total: Tensor) -> Tensor:
    """Q16 [..., dh] of the engine's share [...] and a drive's outputs (Q16) with their softmax state [...].

    Weights `l * 2^M` in a common unit, the engine's share as Q16 (floor), one rounding: exact integers, and the
    engine's output alone where the drive holds nothing (total 0).
    """
    live = (engine.l > 0) & (total > 0)
    d = engine.m - maximum
    mine = engine.l << (SUM_FRAC - P_FRAC - L_EXTRA_FRAC)
    mine, other = mine >> (-d).clamp(0, SHIFT_LIMIT), total >> d.clamp(0, SHIFT_LIMIT)
    surplus = (ops.bitlen(torch.maximum(mine, other)) - 44).clamp(min=0)
    mine, other = mine >> surplus, other >> surplus
    share = torch.div(mine << MERGE_FRAC, (mine + other).clamp(min=1), rounding_mode="floor")
    share = torch.where(live, share, (engine.l > 0).long() << MERGE_FRAC)[..., None]
    blended = share * engine.y + ((1 << MERGE_FRAC) - share) * outputs
    return ops.rnd_shift(blended, MERGE_FRAC)


def engine_partial(q: Tensor, keys: Tensor, values: Tensor, bits: int) -> attention.Partial:
    """Partial [Hkv, G] of one token's q [Hq, dh] over keys and values [S, Hkv, dh], quantised as the cache is."""
    k, v = (ops.quantise_kv(x.transpose(0, 1), bits) for x in (keys, values))
    live = attention.padded(torch.ones(1, len(keys), dtype=torch.bool))
    k, v = (attention.pad_slots(KVCodes(x.codes.float(), x.scale, x.minimum), live.shape[-1]) for x in (k, v))
    a8 = attention.group_heads(q[:, None], k.codes.shape[0])
    z = attention.scores(a8, k, attention.ScoreScale.of(q.shape[-1]))
    p = attention.attend_partial(z, live, v)
    return attention.Partial(p.m[..., 0], p.l[..., 0], p.o[..., 0, :])


class StoredCache:
    """k and v of a sequence as they were computed, Q16 [S, Hkv, dh] per layer."""

    def __init__(self, layers: int, kv_heads: int, head_size: int) -> None:
        self.length = 0
        empty = torch.zeros(0, kv_heads, head_size, dtype=torch.int64)
        self.k, self.v = [empty] * layers, [empty] * layers


class StorageDecoder(ExactDecoder):
    """The exact decoder with in-storage attention over binary16 k and v; dense without `sparsity`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: str | dict[str, QuantisedWeight] = "w4",
        sparsity: Sparsity | None = None,
    ) -> None:
        super().__init__(checkpoint, weights)
        self.sparsity = sparsity
        self.check_unit()

    def check_unit(self) -> None:
        """Raises KVStrataError for a model that the unit's RTL does not hold."""
        check_head_size(self.config.head_size)
        if self.config.group > MAX_GROUP_QUERIES:
            raise KVStrataError(f"a KV head serves 1 to {MAX_GROUP_QUERIES} queries, not {self.config.group}")

    def new_cache(self) -> StoredCache:  # type: ignore[override]
        """An empty cache."""
        c = self.config
        return StoredCache(c.layers, c.kv_heads, c.head_size)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache: StoredCache) -> Tensor:  # type: ignore[override]
        """Rotate, store, attend: every token over all tokens up to itself."""
        turned = self.store(layer, self.by_head(q, k, v), cache)
        return self.attend(layer, turned["q"], cache.k[layer], cache.v[layer])

    def by_head(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Q16 [T, H, dh] of each."""
        return {n: x.view(len(x), -1, self.config.head_size) for n, x in (("q", q), ("k", k), ("v", v))}

    def store(self, layer: int, heads: dict[str, Tensor], cache: StoredCache) -> dict[str, Tensor]:
        """Append k, less its offset, and v; q and k as rotated."""
        positions = torch.arange(cache.length, cache.length + len(heads["q"]))
        turned = {
            name: self.rotate(layer, name, heads[name].transpose(0, 1), positions).transpose(0, 1)
            for name in ("q", "k")
        }
        key = self.centred(layer, turned["k"].transpose(0, 1)).transpose(0, 1)
        cache.k[layer] = torch.cat([cache.k[layer], key])
        cache.v[layer] = torch.cat([cache.v[layer], heads["v"]])
        return turned

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Q16 [T, Hq * dh] of the last T tokens' q [T, Hq, dh] over k and v [S, Hkv, dh]."""
        if self.sparsity is None:
            return self.attend_masked(
                q, k, v, torch.arange(len(k)) <= torch.arange(len(k) - len(q), len(k))[:, None]
            )
        return self.token_by_token(layer, q, k, v)

    def token_by_token(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start = len(k) - len(q)
        return torch.stack(
            [self.token(layer, q[t], k[: start + t + 1], v[: start + t + 1]) for t in range(len(q))]
        )

    def attend_masked(
        self, q: Tensor, k: Tensor, v: Tensor, live: Tensor, far: Sequence[Far] | None = None
    ) -> Tensor:
        """Q16 [T, Hq * dh] of q [T, Hq, dh] over the tokens that are live, bool [T, S]; `far` of each KV head.

        Groups of tokens beyond a query change none of its bits, so all queries go together.
        """
        group, steps, selected = self.config.group, len(q), live.numpy().repeat(self.config.group, 0)
        outputs = []
        for head in range(self.config.kv_heads):
            queries = half(q[:, head * group : (head + 1) * group].reshape(steps * group, -1))
            there = far[head] if far else None
            y, _ = exact(queries, half(k[:, head]), half(v[:, head]), selected, there)
            outputs.append(ops.to_q16(to_fp16(y).astype(np.float64)).view(steps, -1))
        return torch.cat(outputs, 1)

    def token(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Q16 [Hq * dh] of q [Hq, dh] over k and v [S, Hkv, dh]."""
        outputs = [self.head(layer, q, k, v, h)[0] for h in range(self.config.kv_heads)]
        return ops.to_q16(np.concatenate(outputs).astype(np.float64)).flatten()

    def head(self, layer: int, q: Tensor, k: Tensor, v: Tensor, head: int) -> tuple[F16, Softmax]:
        """In-storage attention of one KV head's queries: output [G, dh] and the softmax state it ended in."""
        group = self.config.group
        queries, keys, values = half(q[head * group : (head + 1) * group]), half(k[:, head]), half(v[:, head])
        if self.sparsity is None:
            y, state = exact(queries, keys, values, np.ones(len(keys), bool))
            return to_fp16(y), state
        s = self.sparsity.at(len(keys))
        trace = sparf(queries, keys, values, mean_value(values), r=s.r, top=s.k, window=s.window)
        self.record(layer, head, len(keys), trace)
        return trace.output, trace.state

    def record(self, layer: int, head: int, tokens: int, trace: SparfTrace) -> None:
        """The selection record of a step at a context of `tokens` tokens, for a probe."""
        chosen = (tuple(x.tolist()) for x in (trace.channels, trace.tokens))
        self._observe(layer, "selection", selection=Selection(tokens - 1, layer, head, *chosen))


class HybridDecoder(StorageDecoder):
    """The exact decoder with attention split between engine and drive."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        split: Split,
        weights: str = "w4",
        kv: str = "kv4",
        sparsity: Sparsity | None = None,
    ) -> None:
        super().__init__(checkpoint, weights, sparsity)
        self.split, self.bits = split, KV_FORMATS[kv].bits

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Token by token: each has its own window."""
        return self.token_by_token(layer, q, k, v)

    def token(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Engine over sinks and window, in-storage attention over the tokens between, merged."""
        first, older = self.split.sinks, self.split.older(len(k))
        between = slice(first, first + older)
        near = torch.tensor(self.split.held(len(k)))
        partial = EngineShare.of(engine_partial(q, k[near], v[near], self.bits))
        own = EngineShare(*(x.flatten(0, 1) for x in partial))
        if not older:
            return own.y.flatten()
        outcomes = [self.head(layer, q, k[between], v[between], h) for h in range(self.config.kv_heads)]
        outputs = ops.to_q16(np.concatenate([y for y, _ in outcomes]).astype(np.float64))
        maximum, total = (
            torch.from_numpy(np.concatenate([getattr(state, n) for _, state in outcomes]))
            for n in ("maximum", "sum")
        )
        return merge(own, outputs, maximum, total).flatten()
