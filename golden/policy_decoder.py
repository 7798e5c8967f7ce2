"""The exact decoder with any KV policy over any quantised cache (docs/formats.md section 8.2).

The engine's integers as in `golden.exact_decoder`, extended where no RTL exists: KIVI's cache (K per channel, V per
token, the recent window at 8 bits), SparQ's and SparF's selection, StreamingLLM's cache positions. What both decoders
can compute they compute to the same bits.

Letters: Hkv KV heads, G queries of each, T query tokens, S stored tokens, dh head size, n groups of tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from golden import attention, ops
from golden.attention import Scale, ScoreScale
from golden.exact_decoder import ExactDecoder, SlotBuffer
from golden.formats.kv import Codec, KiviCodec, codec
from golden.formats.weights import QuantisedWeight
from golden.loaders.checkpoint import Checkpoint
from golden.ops import A8, KVCodes, bitlen, int24, rnd_shift, sat
from golden.policies import Dense, KVPolicy, Lambda, Sparf, Sparq
from golden.policies.sparq import largest
from golden.spec import KVStrataError
from golden.spec.formats import ATTN_TILE, FP16_FRAC, KV_CLIP_BITS, VEC_BITS, VEC_FRAC
from golden.spec.policies import Selection

RECENT_BITS = 8
"""KIVI's window "in full precision": at the exact level its tokens are KV8 vectors, the engine's finest form."""
QUERY_BLOCK = 64
"""Queries that attend at once: bounds memory; results do not depend on it."""
RATIO_FRAC = 24
MIX_FRAC = 16


class Store(ABC):
    """K (rotated) and V of one layer as the cache holds them."""

    @abstractmethod
    def append(self, start: int, k: Tensor, v: Tensor) -> None:
        """Store tokens q16 [Hkv, T, dh] from token `start`."""

    @abstractmethod
    def scores(self, q: Tensor, end: int, scale: Scale) -> Tensor:
        """z [Hkv, G, T, end] in log2 units, q16, of q [Hkv, G, T, dh] (q16, rotated)."""

    @abstractmethod
    def values(self, end: int) -> KVCodes:
        """V of the first `end` tokens as queries of a block that ends there see it."""


class TokenStore(Store):
    """Codes per head and token: the engine's own cache (section 7)."""

    def __init__(self, bits: int, kv_heads: int, head_size: int) -> None:
        self._bits = bits
        self._k, self._v = (SlotBuffer(kv_heads, head_size) for _ in range(2))

    def append(self, start: int, k: Tensor, v: Tensor) -> None:
        self._k.write(start, ops.quantise_kv(k, self._bits))
        self._v.write(start, ops.quantise_kv(v, self._bits))

    def scores(self, q: Tensor, end: int, scale: Scale) -> Tensor:
        return attention.scores(ops.quantise_a8(q), self._k.view(end), scale)

    def values(self, end: int) -> KVCodes:
        return self._v.view(end)


class KiviStore(Store):
    """K per channel over groups of tokens, V per token; tokens that are not old yet as KV8.

    A group's codes are made once, when its last token is stored, and used from when it is old.
    """

    def __init__(self, kivi: KiviCodec, kv_heads: int, head_size: int) -> None:
        self._kivi = kivi
        self._recent = TokenStore(RECENT_BITS, kv_heads, head_size)
        self._v = SlotBuffer(kv_heads, head_size)
        self._tail = torch.zeros(kv_heads, 0, head_size, dtype=torch.int64)
        self._groups: list[KVCodes] = []

    def append(self, start: int, k: Tensor, v: Tensor) -> None:
        self._recent.append(start, k, v)
        self._v.write(start, ops.quantise_kv(v, self._kivi.bits))
        whole, size = torch.cat((self._tail, k), 1), self._kivi.group
        for i in range(0, whole.shape[1] - size + 1, size):
            channels = whole[:, i : i + size].transpose(1, 2)
            self._groups.append(ops.quantise_kv(channels, self._kivi.bits))
        self._tail = whole[:, whole.shape[1] - whole.shape[1] % size :]

    def scores(self, q: Tensor, end: int, scale: Scale) -> Tensor:
        old = self._kivi.old(end)
        recent = self._recent.scores(q, end, scale)
        if not old:
            return recent
        groups = self._groups[: old // self._kivi.group]
        codes, k_scale, minimum = (
            torch.stack([getattr(g, name) for g in groups], 1) for name in KVCodes._fields
        )
        return torch.cat((channel_scores(q, KVCodes(codes, k_scale, minimum), scale), recent[..., old:]), -1)

    def values(self, end: int) -> KVCodes:
        old, recent = self._kivi.old(end), self._recent.values(end)
        return KVCodes(*(torch.cat((a[:, :old], b[:, old:]), 1) for a, b in zip(self._v.view(end), recent)))


def channel_scores(q: Tensor, k: KVCodes, scale: Scale) -> Tensor:
    """z [Hkv, G, T, n * tokens] of q [Hkv, G, T, dh] over K by channel: codes [Hkv, n, dh, tokens], scale [Hkv, n, dh].

    A group's scales are folded into the query before it is quantised, its minima are one sum per query and group.
    """
    q = sat(q, KV_CLIP_BITS)[..., None, :]
    folded = sat(rnd_shift(q * int24(k.scale)[:, None, None], FP16_FRAC), VEC_BITS)
    a8 = ops.quantise_a8(folded)
    # float32 is exact here: |sum a*code| <= 256 * 127 * 15 < 2**24.
    dots = torch.einsum("hgtnd,hnds->hgtns", a8.codes.float(), k.codes.float()).long()
    mantissa, shift = scale.times(a8)
    z = rnd_shift((dots << VEC_FRAC) * mantissa[..., None], shift[..., None])
    lowest = rnd_shift(q * int24(k.minimum)[:, None, None], FP16_FRAC).sum(-1)
    return sat(z + scale.log2(lowest)[..., None], VEC_BITS).flatten(-2)


class Chosen(NamedTuple):
    """What a step attends to: live [Hkv or 1, 1, T, S], marked channels bool [Hkv, T, dh], alpha q16 [Hkv, G, T]."""

    live: Tensor
    channels: Tensor | None = None
    alpha: Tensor | None = None


class QueryScale(NamedTuple):
    """A `golden.attention.Scale` per query: mantissa of 16 bits and exponent, [Hkv, G, T]."""

    mantissa: Tensor
    exponent: Tensor

    def times(self, q: A8) -> tuple[Tensor, Tensor]:
        """As ScoreScale's, of queries quantised once or once per group of tokens."""
        mantissa, exponent = (_like(x, q.mantissa) for x in self)
        return rnd_shift(q.mantissa * mantissa, 16), -(q.exponent + 16 - exponent)

    def log2(self, x: Tensor) -> Tensor:
        """As ScoreScale's, of [Hkv, G, T, ...]."""
        mantissa, exponent = (_like(y, x) for y in self)
        return rnd_shift(x * mantissa, exponent)


def _like(x: Tensor, other: Tensor) -> Tensor:
    return x.view(*x.shape, *[1] * (other.ndim - x.ndim))


def marked_scale(q: Tensor, channels: Tensor, scale: ScoreScale) -> QueryScale:
    """log2(e) / sqrt(dh * ||q[i]||1 / ||q||1) of each query [Hkv, G, T]; channels bool [Hkv, 1, T, dh]."""
    all_of, marked = q.abs().sum(-1), (q.abs() * channels).sum(-1)
    ratio = torch.div(all_of << RATIO_FRAC, marked.clamp(min=1), rounding_mode="floor")
    ratio = torch.where(marked > 0, ratio, 1 << RATIO_FRAC).clamp(max=(1 << 32) - 1)
    factor = (scale.mantissa * ops.isqrt(ratio)) >> RATIO_FRAC // 2
    surplus = (bitlen(factor) - 16).clamp(min=0)
    return QueryScale(factor >> surplus, scale.exponent - surplus)


def select(policy: Sparq, q: Tensor, store: Store, positions: Tensor, end: int, scale: ScoreScale) -> Chosen:
    """Channels, then tokens, of q [Hkv, G, T, dh]; every order has the lower index first among equals."""
    costs = policy.costs
    channels = largest(q.abs().sum(1), costs.r)
    marked = channels[:, None]
    z = store.scores(q * marked, end, marked_scale(q, marked, scale))
    causal = torch.arange(end) <= positions[:, None]
    lowest = torch.iinfo(torch.int64).min // 4
    top = z.masked_fill(~causal, lowest).amax(-1, keepdim=True)
    ceiling = (top + (1 << VEC_FRAC) - 1) >> VEC_FRAC << VEC_FRAC
    p = torch.where(causal, ops.exp2_neg((ceiling - z).clamp(min=0)), 0)
    total = p.sum(-1, keepdim=True)
    s = positions + 1
    k, window = (torch.tensor([f(n) for n in s.tolist()])[:, None] for f in (costs.k, costs.window))
    pooled = z.sum(1)
    if not isinstance(policy, Sparf):
        # A group ranks by its probabilities; where they are equal (most are zero) by the sum of its scores.
        share = torch.div(p << 31, total, rounding_mode="floor").sum(1)
        by_score = largest_rank(pooled.masked_fill(~causal, lowest))
        pooled = (share << 20) - by_score
    highest = torch.iinfo(torch.int64).max
    local = torch.arange(end) > positions[:, None] - window
    keys = pooled.masked_fill(local, highest).masked_fill(~causal, torch.iinfo(torch.int64).min)
    chosen = largest(keys, k)
    mass = (p * chosen[:, None]).sum(-1) << MIX_FRAC
    alpha = torch.div(mass + (total[..., 0] >> 1), total[..., 0], rounding_mode="floor")
    alpha = torch.where(k[:, 0] >= s, 1 << MIX_FRAC, alpha)
    return Chosen(chosen[:, None], channels, alpha)


def largest_rank(keys: Tensor) -> Tensor:
    """Place of each key in descending order, the lower index first among equals."""
    order = torch.sort(keys, dim=-1, descending=True, stable=True).indices
    places = torch.arange(keys.shape[-1]).expand(order.shape).contiguous()
    return torch.empty_like(order).scatter_(-1, order, places)


def mean_values(v: KVCodes, positions: Tensor) -> Tensor:
    """v-bar q16 [Hkv, T, dh]: mean of the stored values up to each position, floored, then rounded to q16."""
    stored = v.codes.long() * int24(v.scale)[..., None] + int24(v.minimum)[..., None]
    sums = stored.cumsum(1)[:, positions]
    mean = torch.div(sums, (positions + 1)[:, None], rounding_mode="floor")
    return sat(rnd_shift(mean, FP16_FRAC - VEC_FRAC), VEC_BITS)


class PolicyCache:
    """A store per layer, and what sinks need besides."""

    def __init__(self, stores: list[Store], sinks: list[SlotBuffer]) -> None:
        self.length = 0
        self.stores, self.sinks = stores, sinks


class PolicyDecoder(ExactDecoder):
    """The exact decoder under a KV policy of golden.policies (default: dense) and a representation of golden.formats.kv
    but `float`, whose exact form is the in-storage unit's (golden.storage.decoder)."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: str | dict[str, QuantisedWeight] = "w4",
        kv: str = "kv4",
        policy: KVPolicy | None = None,
        k_offset: Tensor | None = None,
    ) -> None:
        super().__init__(checkpoint, weights, k_offset=k_offset)
        self.policy = policy or Dense(self.config.head_size, self.config.group)
        self.codec = codec(kv)

    def _store(self) -> Store:
        shape = self.config.kv_heads, self.config.head_size
        if isinstance(self.codec, KiviCodec):
            return KiviStore(self.codec, *shape)
        if not self.codec.bits:
            raise KVStrataError(
                f"the engine's cache holds codes, so its representation must not be {self.codec.name}."
            )
        return TokenStore(self.codec.bits, *shape)

    def new_cache(self) -> PolicyCache:  # type: ignore[override]
        """An empty cache."""
        c = self.config
        sinks = [SlotBuffer(c.kv_heads, c.head_size) for _ in range(c.layers)]
        return PolicyCache([self._store() for _ in range(c.layers)], sinks)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache: PolicyCache) -> Tensor:  # type: ignore[override]
        """Rotate, store, select, attend; block by block where the stored values change."""
        c, start, steps = self.config, cache.length, q.shape[0]
        positions = torch.arange(start, start + steps)
        raw = {n: x.view(steps, -1, c.head_size).transpose(0, 1) for n, x in (("q", q), ("k", k), ("v", v))}
        turned = {n: self.rotate(layer, n, raw[n], positions) for n in ("q", "k")}
        store = cache.stores[layer]
        store.append(start, self.centred(layer, turned["k"]), raw["v"])
        self._store_sinks(cache.sinks[layer], start, raw["k"], turned["k"])
        parts = []
        for first, end in _blocks(self.codec, start, start + steps):
            block = slice(first - start, end - start)
            queries = turned["q"][:, block].unflatten(0, (c.kv_heads, c.group))
            limit = self._limit_query(layer, raw["q"][:, block])
            parts.append(
                self._attend(layer, queries, limit, store, cache.sinks[layer], positions[block], end)
            )
        y = torch.cat(parts, 2).flatten(0, 1)
        self._observe(layer, "attention", q=turned["q"], y=y)
        return y.transpose(0, 1).reshape(steps, -1)

    # --- Lambda's sinks -------------------------------------------------------------------------------
    def _store_sinks(self, sinks: SlotBuffer, start: int, raw: Tensor, turned: Tensor) -> None:
        """K of new sinks, before RoPE (limit) or after it (cache positions), in the engine's codes."""
        if not isinstance(self.policy, Lambda):
            return
        new = max(0, min(self.policy.costs.sinks - start, raw.shape[1]))
        if new:
            keys = raw if self.policy.sink_keys == "raw" else turned
            bits = RECENT_BITS if isinstance(self.codec, KiviCodec) else self.codec.bits
            sinks.write(start, ops.quantise_kv(keys[:, :new], bits))

    def _limit_query(self, layer: int, q: Tensor) -> Tensor | None:
        """Queries [Hkv, G, T, dh] rotated to where the policy scores its sinks from."""
        if not isinstance(self.policy, Lambda) or not self.policy.costs.sinks:
            return None
        turned = self.rotate(layer, "q", q, torch.tensor([self.policy.sink_distance]))
        return turned.unflatten(0, (self.config.kv_heads, self.config.group))

    # --- one block ------------------------------------------------------------------------------------
    def _attend(
        self,
        layer: int,
        q: Tensor,
        q_limit: Tensor | None,
        store: Store,
        sinks: SlotBuffer,
        positions: Tensor,
        end: int,
    ) -> Tensor:
        """Outputs q16 [Hkv, G, T, dh] of queries that see the first `end` tokens at most."""
        scale = ScoreScale.of(q.shape[-1])
        chosen = self._choose(q, store, positions, end, scale)
        z = store.scores(q, end, scale)
        if q_limit is not None and isinstance(self.policy, Lambda):
            n = min(self.policy.costs.sinks, end)
            far = attention.scores(ops.quantise_a8(q_limit), sinks.view(n), scale)
            far = sat(far - self._lost(layer, q, scale), VEC_BITS)
            z[..., :n] = torch.where(self.policy.in_window(positions, n), z[..., :n], far)
        values, extra = store.values(end), -end % ATTN_TILE
        z, live = (torch.nn.functional.pad(x, (0, extra)) for x in (z, chosen.live))
        y = attention.finish(attention.attend_partial(z, live, attention.pad_slots(values, end + extra)))
        if chosen.alpha is not None:
            alpha, v_bar = chosen.alpha[..., None], mean_values(values, positions)[:, None]
            y = rnd_shift(alpha * y + ((1 << MIX_FRAC) - alpha) * v_bar, MIX_FRAC)
            self._record(layer, chosen, positions)
        return y

    def _choose(self, q: Tensor, store: Store, positions: Tensor, end: int, scale: ScoreScale) -> Chosen:
        if isinstance(self.policy, Sparq):
            return select(self.policy, q, store, positions, end, scale)
        if isinstance(self.policy, Lambda):
            return Chosen(self.policy.live(positions, end)[None, None])
        return Chosen((torch.arange(end) <= positions[:, None])[None, None])

    def _lost(self, layer: int, q: Tensor, scale: ScoreScale) -> Tensor | int:
        """What the K offset takes from every score of q [Hkv, G, T, dh], so that sinks lose it too: [Hkv, G, T, 1]."""
        if self.k_offset is None:
            return 0
        products = sat(q, KV_CLIP_BITS) * self.k_offset[layer][:, None, None]
        return scale.log2(rnd_shift(products, VEC_FRAC).sum(-1, keepdim=True))

    def _record(self, layer: int, chosen: Chosen, positions: Tensor) -> None:
        if self.probe is None or chosen.channels is None:
            return
        for head in range(self.config.kv_heads):
            for t, position in enumerate(positions.tolist()):
                marked, tokens = (
                    tuple(x.nonzero()[:, 0].tolist())
                    for x in (chosen.channels[head, t], chosen.live[head, 0, t])
                )
                self._observe(layer, "selection", selection=Selection(position, layer, head, marked, tokens))


def _blocks(kv: Codec, start: int, end: int) -> list[tuple[int, int]]:
    """Runs of queries that see the same stored values, none longer than QUERY_BLOCK."""
    return [
        (i, min(i + QUERY_BLOCK, stop))
        for first, stop in kv.blocks(start, end)
        for i in range(first, stop, QUERY_BLOCK)
    ]
