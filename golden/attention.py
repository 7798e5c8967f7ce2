"""Exact attention of the engine: online softmax by tiles of 32 slots (docs/formats.md section 8).

Letters: Hq query heads, Hkv KV heads, T query tokens, S slots, dh head size, G = Hq / Hkv.
Mask polarity: `live` is true where a slot takes part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from golden import ops
from golden.ops import A8, KVCodes, bitlen, int24, rnd_shift, sat
from golden.spec import KVStrataError
from golden.spec.engine import SOFTMAX_EMPTY
from golden.spec.formats import ACC_PRESHIFT, ATTN_TILE, L_EXTRA_FRAC, P_CODE_BITS, P_FRAC, VEC_BITS, VEC_FRAC

HEAD_SIZE_MAX = 256
"""Largest head size: `|acc|` stays below 256 * 127 * 2**15 * 2**24 < 2**54 and fits the 56-bit accumulator."""


@dataclass(frozen=True)
class ScoreScale:
    """log2(e)/sqrt(dh) as a 16-bit mantissa C with exponent e_C."""

    mantissa: int
    exponent: int

    @classmethod
    def of(cls, head_size: int) -> ScoreScale:
        """The constant of a head size (even, at most 256)."""
        if head_size % 2 or not 2 <= head_size <= HEAD_SIZE_MAX:
            raise KVStrataError(f"the head size must be even and 2 to {HEAD_SIZE_MAX}, got {head_size}.")
        value = math.log2(math.e) / math.sqrt(head_size)
        exponent = 16 - math.frexp(value)[1]
        return cls(math.floor(value * 2.0**exponent + 0.5), exponent)

    def times(self, q: A8) -> tuple[Tensor, Tensor]:
        """Mantissa sm' and right shift -se' that quantised queries' scales and this constant make together."""
        return rnd_shift(q.mantissa * self.mantissa, 16), -(q.exponent + 16 - self.exponent)

    def log2(self, x: Tensor) -> Tensor:
        """Sums of products (q16) as scores in log2 units."""
        return rnd_shift(x * self.mantissa, self.exponent)


class Scale(Protocol):
    """What turns dot products into scores: one constant, or one of each query."""

    def times(self, q: A8) -> tuple[Tensor, Tensor]: ...

    def log2(self, x: Tensor) -> Tensor: ...


class Partial(NamedTuple):
    """Unfinished softmax of one set of slots: maximum m (whole log2 units), sum l, outputs o [..., dh]."""

    m: Tensor
    l: Tensor
    o: Tensor


EMPTY_M = SOFTMAX_EMPTY
"""Maximum of a partial that has seen no live slot."""


def scores(q: A8, k: KVCodes, scale: Scale) -> Tensor:
    """z [Hkv, G, T, S] in log2 units, q16, of q [Hkv, G, T, dh] and k [Hkv, S, dh]."""
    # float32 is exact here: |sum a*code| <= 256 * 127 * 255 < 2**24.
    dots = (q.codes.float() @ k.codes.float().transpose(-1, -2)[:, None]).long()
    acc = int24(k.scale)[:, None, None] * dots
    acc += int24(k.minimum)[:, None, None] * q.codes.sum(-1, keepdim=True)
    mantissa, shift = scale.times(q)
    scaled = rnd_shift(acc, ACC_PRESHIFT) * mantissa[..., None]
    return sat(rnd_shift(scaled, shift[..., None]), VEC_BITS)


def attend_partial(z: Tensor, live: Tensor, v: KVCodes) -> Partial:
    """Partial [Hkv, G, T] of scores z [Hkv, G, T, S], live [T, S] and v [Hkv, S, dh] (or [Hkv, T, S, dh]).

    S must be a multiple of the tile (pad with dead slots). All tiles are evaluated at once: the running
    maximum is a prefix maximum, and only the two truncating shifts need the tiles in order.
    """
    *head, s = z.shape
    tiles = s // ATTN_TILE
    z = z.unflatten(-1, (tiles, ATTN_TILE))
    live = live.unflatten(-1, (tiles, ATTN_TILE)).expand(z.shape)
    dead_z = torch.iinfo(torch.int64).min // 4
    top = torch.where(live, z, dead_z).amax(-1)
    ceiling = (top + (1 << VEC_FRAC) - 1) >> VEC_FRAC
    running = torch.cummax(torch.where(live.any(-1), ceiling, EMPTY_M), -1).values
    p = ops.exp2_neg(((running << VEC_FRAC)[..., None] - z).clamp(min=0))
    p = torch.where(live, p, 0)
    tile_o = _tile_outputs(p, v, tiles)
    tile_l = p.sum(-1) << L_EXTRA_FRAC
    before = torch.cat((torch.full_like(running[..., :1], EMPTY_M), running[..., :-1]), -1)
    d = (running - before).clamp(max=63)
    l, o = torch.zeros(head, dtype=torch.int64), torch.zeros(*head, v.codes.shape[-1], dtype=torch.int64)
    for i in range(tiles):
        l = (l >> d[..., i]) + tile_l[..., i]
        o = (o >> d[..., i, None]) + tile_o[..., i, :]
    return Partial(running[..., -1], l, o)


def _tile_outputs(p: Tensor, v: KVCodes, tiles: int) -> Tensor:
    """What each tile adds to o: [Hkv, G, T, tiles, dh] of p [Hkv, G, T, tiles, 32]."""
    own = v.codes.ndim == 4  # each query has its own order of slots
    scalars = (x.unflatten(-1, (tiles, ATTN_TILE)) for x in (int24(v.scale), int24(v.minimum)))
    scale, minimum = (x[:, None] if own else x[:, None, None] for x in scalars)
    w = p * scale
    sh = (bitlen(w.amax(-1)) - P_CODE_BITS).clamp(min=P_FRAC)
    w8 = rnd_shift(w, sh[..., None]).clamp(max=127)
    # float32 is exact: 32 * 127 * 255 < 2**24.
    codes = v.codes.float().unflatten(-2, (tiles, ATTN_TILE))
    sums = torch.einsum("hgtis,htisd->hgtid" if own else "hgtis,hisd->hgtid", w8.float(), codes).long()
    minima = rnd_shift((p * minimum).sum(-1), P_FRAC)
    return (sums << (sh - P_FRAC)[..., None]) + minima[..., None]


def merge(a: Partial, b: Partial) -> Partial:
    """Two partials of disjoint slots: the smaller maximum is aligned by the same truncating shifts."""
    m = torch.maximum(a.m, b.m)
    da, db = ((m - x.m).clamp(max=63) for x in (a, b))
    return Partial(m, (a.l >> da) + (b.l >> db), (a.o >> da[..., None]) + (b.o >> db[..., None]))


def finish(p: Partial) -> Tensor:
    """Normalised outputs [..., dh] in q16; zeros where no slot was live."""
    live = p.l > 0
    bits = torch.where(live, bitlen(p.l), 31)
    short = torch.where(live, p.l >> (bits - 16), 1 << 15)
    reciprocal = torch.div((1 << 31) - 1, short, rounding_mode="floor")
    o = rnd_shift(p.o, (bits - 31)[..., None]) * reciprocal[..., None]
    return torch.where(live[..., None], sat(rnd_shift(o, 23), VEC_BITS), 0)


def pad_slots(kv: KVCodes, slots: int) -> KVCodes:
    """Zero slots appended on the slot axis until there are `slots`."""
    extra = slots - kv.codes.shape[-2]
    if extra == 0:
        return kv
    pad = torch.nn.functional.pad
    return KVCodes(pad(kv.codes, (0, 0, 0, extra)), pad(kv.scale, (0, extra)), pad(kv.minimum, (0, extra)))


def padded(live: Tensor) -> Tensor:
    """Live flags [T, S] with dead slots appended up to a whole tile."""
    return torch.nn.functional.pad(live, (0, -live.shape[-1] % ATTN_TILE))


def group_heads(q: Tensor, kv_heads: int) -> A8:
    """A8 of q [Hq, T, dh] (q16, rotated) as [Hkv, G, T, dh].

    Raises KVStrataError if the query heads are not a multiple of the KV heads.
    """
    if q.shape[0] % kv_heads:
        raise KVStrataError(f"query heads must be a multiple of KV heads, got {q.shape[0]} and {kv_heads}.")
    return ops.quantise_a8(q.unflatten(0, (kv_heads, -1)))


def attend(q: Tensor, k: KVCodes, v: KVCodes, live: Tensor) -> Tensor:
    """Outputs [Hq, T, dh] in q16 of q [Hq, T, dh] (q16, rotated), k and v [Hkv, S, dh], live [T, S]."""
    live = padded(live)
    a8 = group_heads(q, k.codes.shape[0])
    z = scores(a8, pad_slots(k, live.shape[-1]), ScoreScale.of(q.shape[-1]))
    return finish(attend_partial(z, live, pad_slots(v, live.shape[-1]))).flatten(0, 1)
