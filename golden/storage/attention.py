"""Exact attention of the in-storage unit, dense and SparF (docs/formats-storage.md, sections 2 to 6).

Letters: G queries of one KV head, dh head size, S tokens. q is float16 [G, dh], k and v float16 [S, dh]; outputs
float16 [G, dh]. SparF after InstInfer (arXiv 2409.04992), its L1 ratio inside the square root, alpha over the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from golden.spec import KVStrataError
from golden.spec.storage import (
    ALPHA_FRAC,
    EXP2_TABLE,
    GROUP_TOKENS,
    L_EXTRA_FRAC,
    MAX_GROUP_QUERIES,
    MAX_TOKENS,
    RATIO_FRAC,
    RECIPROCAL_BITS,
    SCALE_BITS,
    SCALE_FRAC,
    SCORE_FRAC,
    TOKEN_BITS,
    check_head_size,
    softmax_scale,
)
from golden.storage.fp import (
    F16,
    F32,
    I64,
    add,
    magnitude_integer,
    mul,
    mulint,
    p_integer,
    poison,
    scale2,
    score,
    to_fp16,
    tree,
)
from golden.storage.topk import argtopk

_T = np.array(EXP2_TABLE, np.int64)


@dataclass(frozen=True)
class SparfTrace:
    """What SparF decided on the way, for tests and for the selection record."""

    channels: I64
    """Marked channels, ascending [r]."""
    scores: I64
    """Pooled keys [S]."""
    tokens: I64
    """Selected tokens, ascending [k]."""
    alpha: I64
    """Q16 [G]."""
    output: F16
    state: Softmax
    """Approximate softmax over all tokens: its maximum and sum weigh the output against other partials."""


def check_shapes(q: F16, k: F16, v: F16) -> None:
    """Raises KVStrataError unless q [G, dh] and k, v [S, dh] are float16 of a size the unit holds."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != np.float16 or x.ndim != 2:
            raise KVStrataError(f"{name} must be a float16 matrix, not {x.dtype} of shape {x.shape}")
    check_head_size(q.shape[1])
    if not 1 <= q.shape[0] <= MAX_GROUP_QUERIES:
        raise KVStrataError(f"a KV head serves 1 to {MAX_GROUP_QUERIES} queries, not {q.shape[0]}")
    if k.shape != v.shape or k.shape[1] != q.shape[1] or not 1 <= len(k) <= MAX_TOKENS:
        raise KVStrataError(
            f"k and v must both be [S, {q.shape[1]}] with S of 1 to {MAX_TOKENS}, not {k.shape} and {v.shape}"
        )


def exp2_fp16(x: I64) -> F16:
    """2**-x for Q16 x >= 0, as binary16."""
    i, segment, u = np.minimum(x >> 16, 40), (x >> 10) & 63, x & 1023
    p0 = _T[segment] - (((_T[segment] - _T[segment + 1]) * u + 512) >> 10)
    shift = np.maximum(4, i - 9)
    rounded = (p0 + (1 << (shift - 1))) >> shift
    bits = np.where(i <= 25, (np.maximum(0, 13 - i) << 10) + rounded, 0)
    return bits.astype(np.uint16).view(np.float16)


@dataclass
class Softmax:
    """Running online softmax of G queries: maximum in whole log2 units, sum, and the probabilities of a group."""

    queries: int

    def __post_init__(self) -> None:
        self.seen = np.zeros(self.queries, bool)
        self.maximum = np.zeros(self.queries, np.int64)
        self.sum = np.zeros(self.queries, np.int64)
        self.poisoned = np.zeros(self.queries, bool)

    def step(self, s: F32, c: I64, frac: I64, present: NDArray[np.bool_]) -> tuple[I64, F16, I64]:
        """One group: s [G, 16], c and frac [G], present [16]. Returns scores [G, 16], p [G, 16] and d [G]."""
        z, p, d, _ = self.steps(s[None], c, frac, present[None])
        return z[0], p[0], d[0]

    def steps(self, s: F32, c: I64, frac: I64, present: NDArray[np.bool_]) -> tuple[I64, F16, I64, I64]:
        """Groups in ascending order: s [n, G, 16], present [n, 16] or [n, G, 16]. Returns scores and p [n, G, 16], d
        [n, G] and the maximum after each group [n, G]."""
        present = present if present.ndim == 3 else present[:, None]
        z = score(s, c[:, None], frac[:, None])
        self.poisoned |= (poison(s) & present).any((0, 2))
        live = present & ~np.isneginf(s)
        top = -(-np.where(live, z, _NEVER).max(2) >> SCORE_FRAC)
        before = np.where(self.seen, self.maximum, _NEVER)
        running = np.maximum.accumulate(np.concatenate((before[None], np.where(live.any(2), top, _NEVER))))
        seen, new = running[:-1] > _NEVER, running[1:]
        d = np.where(seen, new - running[:-1], 0)
        p = np.where(live, exp2_fp16(np.maximum((new[..., None] << SCORE_FRAC) - z, 0)), np.float16(0))
        for shift, more in zip(np.minimum(d, 63), p_integer(p).sum(2) << L_EXTRA_FRAC):
            self.sum = (self.sum >> shift) + more
        new = np.where(new > _NEVER, new, self.maximum)
        self.maximum, self.seen = new[-1], running[-1] > _NEVER
        return z, p, d, new


_NEVER = -(1 << 40)
"""Below any maximum: no live token yet."""
BLOCK_ELEMENTS = 1 << 21
"""Products computed at once: bounds memory; results do not depend on it."""


def reciprocal(l: I64) -> tuple[I64, I64]:
    """(rl, n): 1 / l is rl * 2**-(33 + n - 17), with n = bitlen(l); (0, 40) where l is 0."""
    n = np.array([int(x).bit_length() or 40 for x in l], np.int64)
    top = l >> (n - RECIPROCAL_BITS)
    rl = np.where(l > 0, ((1 << 33) - 1) // np.maximum(top, 1), 0)
    return rl, n


def _pad(x: NDArray) -> NDArray:
    """Rows up to a whole number of groups, zeros behind; [groups, 16, ...]."""
    groups = -(-len(x) // GROUP_TOKENS)
    padded = np.zeros((groups * GROUP_TOKENS, *x.shape[1:]), x.dtype)
    padded[: len(x)] = x
    return padded.reshape(groups, GROUP_TOKENS, *x.shape[1:])


class Far(NamedTuple):
    """The first n tokens where they are scored by another query and key: q float16 [G, dh], k float16 [n, dh], where
    bool [G, n], and what each query's scores there lose, binary32 [G]."""

    q: F16
    k: F16
    where: NDArray[np.bool_]
    lost: F32

    def scores(self, s: F32, start: int) -> F32:
        """s [G, 16] of the group of tokens at `start` with the far ones in place."""
        part = slice(start, start + GROUP_TOKENS)
        far = add(tree(mul(self.q[:, None], self.k[None, part])), -self.lost[:, None])
        n = far.shape[1]
        return np.concatenate((np.where(self.where[:, part], far, s[:, :n]), s[:, n:]), 1)


def exact(q: F16, k: F16, v: F16, selected: NDArray[np.bool_], far: Far | None = None) -> tuple[F32, Softmax]:
    """y [G, dh] of exact attention over the selected tokens (bool [S], or [G, S] by query), and the final state."""
    queries, dh = q.shape
    c = np.full(queries, softmax_scale(dh), np.int64)
    frac = np.full(queries, SCALE_FRAC, np.int64)
    state = Softmax(queries)
    o = np.zeros((queries, dh), np.float32)
    kg, vg, marks = (
        _pad(k),
        _pad(v),
        _pad(selected.T).swapaxes(1, -1),
    )  # marks [groups, 16] or [groups, G, 16]
    used = np.flatnonzero(marks.reshape(len(marks), -1).any(1))
    blocks = min(len(used), 1 + len(used) * kg[0].size * queries // BLOCK_ELEMENTS)
    for at in np.array_split(used, blocks) if len(used) else ():
        s = tree(mul(q[None, :, None], kg[at, None]))
        if far is not None:
            for i in np.flatnonzero(at * GROUP_TOKENS < len(far.k)):
                s[i] = far.scores(s[i], at[i] * GROUP_TOKENS)
        _, p, d, _ = state.steps(s, c, frac, marks[at])
        present = marks[at].reshape(len(at), -1, 1, GROUP_TOKENS)
        products = np.where(present, mul(p[:, :, None], vg[at].swapaxes(1, 2)[:, None]), np.float32(0))
        for shift, more in zip(d, tree(products)):
            o = add(scale2(o, shift[:, None]), more)
    rl, n = reciprocal(state.sum)
    y = mulint(o, rl[:, None], n[:, None] - 24)
    bad = state.poisoned | (state.sum == 0)
    return np.where(bad[:, None], np.float32(np.nan), y), state


def normalised(q: F16, k: F16, v: F16, selected: NDArray[np.bool_]) -> F32:
    """y [G, dh] of exact attention over the selected tokens (bool [S])."""
    return exact(q, k, v, selected)[0]


def dense(q: F16, k: F16, v: F16) -> F16:
    """Dense attention of one KV head's queries over all S tokens, to the bit."""
    check_shapes(q, k, v)
    return to_fp16(normalised(q, k, v, np.ones(len(k), bool)))


def mean_value(v: F16) -> F16:
    """v-bar float16 [dh]: the exact sum of V (multiples of 2^-24) over the count, rounded to binary16; what IEEE sums
    give where an element is not finite."""
    odd = ~np.isfinite(v)
    total = (np.where(odd, 0, v).astype(np.float64) * (1 << 24)).astype(np.int64).sum(0)
    with np.errstate(invalid="ignore"):
        special = np.where(odd, v, 0).astype(np.float32).sum(0)
    return to_fp16((total / (len(v) * float(1 << 24))).astype(np.float16) + special)


def channel_keys(q: F16) -> I64:
    """Channel weights [dh] as ordered integers: the bit pattern of the binary32 sum of |q| over the group."""
    total = np.zeros(q.shape[1], np.float32)
    for row in q:
        total = add(total, np.abs(row).astype(np.float32))
    return total.view(np.uint32).astype(np.int64)


def largest(keys: I64, count: int) -> I64:
    """Indices of the `count` largest keys, the lower index first among equals; ascending."""
    return argtopk(torch.from_numpy(keys), count).numpy()


def approximate_scale(q: F16, channels: I64) -> tuple[I64, I64]:
    """(C, frac) per query [G]: log2(e) / sqrt(dh * ||q[i]||1 / ||q||1)."""
    magnitudes = magnitude_integer(q)
    c, frac = [], []
    for row in magnitudes:
        a, b = int(row[channels].sum()), int(row.sum())
        u = min((1 << 32) - 1, (b << RATIO_FRAC) // a) if a else (1 << 32) - 1
        scaled = softmax_scale(q.shape[1]) * isqrt(u << 8) >> 16
        e = max(0, scaled.bit_length() - SCALE_BITS)
        c.append(scaled >> e)
        frac.append(SCALE_FRAC - e)
    return np.array(c, np.int64), np.array(frac, np.int64)


def _approximate(q: F16, k: F16, channels: I64) -> tuple[I64, I64, I64, Softmax]:
    """Scores [S, G], P [S, G], maximum of each token's group [S, G], and the final softmax state."""
    queries = len(q)
    c, frac = approximate_scale(q, channels)
    s = np.zeros((queries, len(k)), np.float32)
    for channel in channels:
        s = add(s, mul(q[:, channel, None], k[None, :, channel]))
    state = Softmax(queries)
    groups, present = _pad(s.T).swapaxes(1, 2), _pad(np.ones(len(k), bool))
    scores, probabilities, _, m = state.steps(groups, c, frac, present)
    z, p = (x.swapaxes(1, 2).reshape(-1, queries)[: len(k)] for x in (scores, p_integer(probabilities)))
    return z, p, np.repeat(m, GROUP_TOKENS, 0)[: len(k)], state


def share_keys(weights: I64, rl: I64, n: I64, z: I64) -> I64:
    """Keys [S] that rank tokens by the sum of the group's probabilities (Q31), where equal by the sum of its scores."""
    share = (((weights >> (n - 24)) * rl) >> 9).sum(1)
    place = np.empty(len(z), np.int64)
    place[np.argsort(-z.sum(1), kind="stable")] = np.arange(len(z))
    return (share << TOKEN_BITS) - place


def check_selection(tokens: int, head_size: int, r: int, k: int, window: int) -> None:
    """Raises KVStrataError for r, k or window outside what the unit accepts."""
    if not 1 <= r <= head_size:
        raise KVStrataError(f"r must be 1 to the head size {head_size}, not {r}")
    if not 1 <= k <= tokens:
        raise KVStrataError(f"k must be 1 to the {tokens} tokens, not {k}")
    if not 0 <= window <= k:
        raise KVStrataError(f"the window must be 0 to k = {k}, not {window}")


def sparf(q: F16, k: F16, v: F16, vbar: F16, *, r: int, top: int, window: int) -> SparfTrace:
    """SparF attention: r channels, `top` tokens of which the `window` most recent always; vbar float16 [dh]."""
    check_shapes(q, k, v)
    return sparse(q, k, v, vbar, r=r, top=top, window=window)


def sparse(
    q: F16, k: F16, v: F16, vbar: F16, *, r: int, top: int, window: int, shares: bool = False
) -> SparfTrace:
    """SparF of any head size and group. `shares` ranks tokens as SparQ does: by their probabilities."""
    tokens = len(k)
    check_selection(tokens, q.shape[1], r, top, window)
    channels = largest(channel_keys(q), r)
    z, p, m, state = _approximate(q, k, channels)
    weights = (p << L_EXTRA_FRAC) >> np.minimum(state.maximum - m, 63)
    rl, n = reciprocal(state.sum)
    keys = share_keys(weights, rl, n, z) if shares else z.sum(1)
    chosen = argtopk(torch.from_numpy(keys), top, window=window).numpy()
    alpha = ((weights[chosen].sum(0) >> (n - 24)) * rl + (1 << 23)) >> 24
    alpha = np.full(len(q), 1 << ALPHA_FRAC) if top == tokens else np.minimum(alpha, 1 << ALPHA_FRAC)
    selected = np.zeros(tokens, bool)
    selected[chosen] = True
    y = normalised(q, k, v, selected)
    y = np.where((state.poisoned | (state.sum == 0))[:, None], np.float32(np.nan), y)
    mean = np.asarray(vbar, np.float16).astype(np.float32)[None]
    one, shift = np.int64(1 << ALPHA_FRAC), np.array(ALPHA_FRAC)
    mixed = add(mulint(y, alpha[:, None], shift), mulint(mean, (one - alpha)[:, None], shift))
    return SparfTrace(channels, keys, chosen, alpha, to_fp16(mixed), state)
