"""Stimulus and expected output of the in-storage unit's blocks, for the vector files of `golden.vector_sets`.

binary32 values are written as their bits (uint32), binary16 as binary16; docs/formats-storage.md defines the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from golden.spec.storage import SCALE_FRAC, SOFTMAX_SCALE, PageKind
from golden.storage import fp, layout
from golden.storage.attention import Softmax, dense, exp2_fp16, reciprocal, sparf
from golden.storage.topk import argtopk

Arrays = dict[str, Any]
TOKENS, HEAD, QUERIES = 75, 64, 2
"""A whole page of 16 tokens several times and an odd rest."""
SPECIAL = np.array(
    [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01],
    np.uint16,
).view(np.float16)
"""Zeros, subnormals, the least normal, ones, the largest finite, infinities and a NaN."""


def seeded(seed: int) -> tuple[NDArray, NDArray, NDArray]:
    """q [G, dh], k and v [S, dh] of a size that makes softmax neither flat nor a single token."""
    rng = np.random.default_rng(seed)
    shapes = (QUERIES, HEAD), (TOKENS, HEAD), (TOKENS, HEAD)
    q, k, v = ((rng.standard_normal(shape) * 1.5).astype(np.float16) for shape in shapes)
    return q, k, v


def corners() -> tuple[NDArray, NDArray, NDArray]:
    """Heads with special values: the first query meets them in K, the second is all zero; V holds them in one token."""
    q, k, v = seeded(99)
    q[1] = 0
    k[3:20] = k[3]
    k[: len(SPECIAL) - 3, 5] = SPECIAL[:-3]
    v[11, : len(SPECIAL)] = SPECIAL
    return q, k, v


def operators(q: NDArray, k: NDArray, v: NDArray) -> Iterator[tuple[str, Arrays]]:
    """Every block's operands and results around one KV head."""
    yield "storage-dense", {"q": q, "k": k, "v": v, "y": dense(q, k, v)}
    yield from selections(q, k, v)
    yield from arithmetic(q, k)
    yield from pages(k, v)


def selections(q: NDArray, k: NDArray, v: NDArray) -> Iterator[tuple[str, Arrays]]:
    """SparF with what it decided on the way, and its top-k alone."""
    mean = v.astype(np.float64).mean(0)
    vbar = np.where(np.isfinite(mean), mean, 0).astype(np.float16)
    r, top, window = q.shape[1] // 8, max(1, len(k) // 8), min(4, max(1, len(k) // 8))
    trace = sparf(q, k, v, vbar, r=r, top=top, window=window)
    setting = {"r": np.array(r), "top": np.array(top), "window": np.array(window)}
    decided = {"channels": trace.channels, "keys": trace.scores, "tokens": trace.tokens, "alpha": trace.alpha}
    yield "storage-sparf", {"q": q, "k": k, "v": v, "vbar": vbar, **setting, **decided, "y": trace.output}
    chosen = argtopk(torch.from_numpy(trace.scores), top, window=window).numpy()
    yield (
        "storage-topk",
        {"keys": trace.scores, "k": setting["top"], "window": setting["window"], "y": chosen},
    )


def arithmetic(q: NDArray, k: NDArray) -> Iterator[tuple[str, Arrays]]:
    """Products, sums, the dot product's tree, and the softmax of one group of tokens."""
    a, b = q[:1], k[:16]
    products = fp.mul(a, b)
    bits, flipped = products.view(np.uint32), products[::-1]
    yield "storage-mul", {"a": np.broadcast_to(a, b.shape), "b": b, "y": bits}
    total = fp.add(products, flipped).view(np.uint32)
    yield "storage-add", {"a": bits, "b": flipped.view(np.uint32), "y": total}
    sums = fp.tree(products)
    yield "storage-dot", {"q": a, "k": b, "y": sums.view(np.uint32)}
    state, present = Softmax(1), np.arange(16) != 7
    scale, frac = np.array([SOFTMAX_SCALE[q.shape[1]]]), np.array([SCALE_FRAC])
    z, p, _ = state.step(np.resize(sums, 16)[None], scale, frac, present)
    rl, n = reciprocal(state.sum)
    yield (
        "storage-softmax",
        {"scores": np.resize(sums, 16).view(np.uint32), "scale": scale, "frac": frac, "present": present}
        | {"z": z, "p": p, "maximum": state.maximum, "sum": state.sum, "reciprocal": rl, "bits": n},
    )
    x = np.unique(np.abs(z[z > -(1 << 40)]))
    yield "storage-exp2", {"x": x, "y": exp2_fp16(x)}


def pages(k: NDArray, v: NDArray) -> Iterator[tuple[str, Arrays]]:
    """What the filter passes of a page of each kind when every third entry is marked."""
    tokens, head_size = k.shape
    for kind, x in ((PageKind.K_TOKEN, k), (PageKind.V_TOKEN, v)):
        mark = layout.token_marks(kind, range(0, tokens, 3), tokens, head_size)[0]
        yield _page(kind, mark, layout.pack(kind, x)[mark.index], head_size, 0)
    mark = layout.channel_marks(range(0, head_size, 3), tokens, head_size, 8)[0]
    yield _page(PageKind.K_CHANNEL, mark, layout.pack(PageKind.K_CHANNEL, k, 8)[mark.index], head_size, 8)


def _page(kind: PageKind, mark: layout.PageMark, page: NDArray, head_size: int, m: int) -> tuple[str, Arrays]:
    name = f"storage-filter-{kind.name.lower().replace('_', '-')}"
    bits = np.array([mark.mask >> i & 1 for i in range(64)], np.uint8)
    raw, passed = page.view(np.uint16), layout.filtered(mark, page, head_size, m).view(np.uint16)
    return name, {"page": raw, "mask": bits, "head_size": np.array(head_size), "m": np.array(m), "y": passed}
