"""binary16 and binary32 arithmetic of the in-storage unit, as docs/formats-storage.md section 1 defines it.

Arrays in, arrays out, any shape: float16 operands, float32 results, int64 integers. No function returns a negative
zero, and NaN is always the canonical pattern.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from golden.spec.storage import F16_NAN, F32_NAN, SCORE_BITS, SCORE_FRAC

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

_TINY = 2.0**-126
_NAN32 = np.array(F32_NAN, np.uint32).view(np.float32)
_NAN16 = np.array(F16_NAN, np.uint16).view(np.float16)
SCORE_LIMIT = (1 << (SCORE_BITS - 1)) - 1
"""Greatest magnitude of a score."""


def _canonical(x: NDArray) -> F32:
    """binary32 of exact-or-rounded values: tiny ones and zeros become +0, any NaN the canonical one."""
    x = np.where(np.abs(x) < _TINY, np.float32(0), np.asarray(x, np.float32))
    return np.where(np.isnan(x), _NAN32, x)


def mul(a: F16, b: F16) -> F32:
    """Product of binary16 numbers, exact in binary32."""
    with np.errstate(invalid="ignore"):
        return _canonical(np.asarray(a, np.float32) * np.asarray(b, np.float32))


def add(a: F32, b: F32) -> F32:
    """Sum, nearest, ties to even."""
    with np.errstate(invalid="ignore", over="ignore"):
        return _canonical(np.asarray(a, np.float32) + np.asarray(b, np.float32))


def tree(x: F32) -> F32:
    """Sum along the last axis by adding neighbours, with +0 behind up to a power of two."""
    if extra := (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]:
        x = np.concatenate((x, np.zeros((*x.shape[:-1], extra), np.float32)), -1)
    while x.shape[-1] > 1:
        x = add(x[..., 0::2], x[..., 1::2])
    return x[..., 0]


def scale2(x: F32, d: I64) -> F32:
    """x * 2**-d for d >= 0."""
    with np.errstate(under="ignore"):
        return _canonical(np.ldexp(np.asarray(x, np.float64), -np.minimum(d, 400)))


def mulint(x: F32, n: I64, f: I64) -> F32:
    """x * n * 2**-f for an unsigned 17-bit n: one rounding (41 significant bits are exact in binary64)."""
    with np.errstate(invalid="ignore", under="ignore", over="ignore"):
        return _canonical(np.ldexp(np.asarray(x, np.float64) * n, -np.asarray(f)))


def to_fp16(x: F32) -> F16:
    """binary16, nearest, ties to even; overflow is infinity."""
    with np.errstate(over="ignore", under="ignore"):
        y = np.asarray(x, np.float32).astype(np.float16) + np.float16(0)
    return np.where(np.isnan(y), _NAN16, y)


def score(s: F32, c: I64, frac: I64) -> I64:
    """Q16 score in log2 units of a dot product: s * c * 2**-frac, ties away from zero, saturated.

    NaN and -inf give the least score, +inf the greatest; `poison` and `dead` tell them apart.
    """
    s = np.asarray(s, np.float32)
    mantissa, exponent = np.frexp(np.where(np.isfinite(s), s, np.float32(0)))
    f = np.abs(mantissa.astype(np.float64) * 2**24).astype(np.int64)
    n = np.clip(np.asarray(frac) + 24 - SCORE_FRAC - exponent, -20, 62)
    product = f * c
    half = np.where(n > 0, 1 << np.maximum(n - 1, 0), 0)
    magnitude = np.where(n > 0, (product + half) >> np.maximum(n, 0), product << np.maximum(-n, 0))
    z = np.where(s < 0, -1, 1) * np.minimum(magnitude, SCORE_LIMIT)
    z = np.where(np.isnan(s) | np.isneginf(s), -SCORE_LIMIT, z)
    return np.where(np.isposinf(s), SCORE_LIMIT, z)


def poison(s: F32) -> NDArray[np.bool_]:
    """Scores that make the whole head NaN, as they would an IEEE softmax."""
    return np.isnan(s) | np.isposinf(s)


def p_integer(p: F16) -> I64:
    """A probability as a multiple of 2**-24."""
    return (np.asarray(p, np.float64) * 2**24).astype(np.int64)


def magnitude_integer(q: F16) -> I64:
    """|q| as a multiple of 2**-24; exponent 31 is taken as an ordinary one, so the result is always a number."""
    bits = np.asarray(q, np.float16).view(np.uint16).astype(np.int64)
    exponent, mantissa = (bits >> 10) & 31, bits & 1023
    return np.where(exponent == 0, mantissa, (1024 + mantissa) << np.maximum(exponent - 1, 0))
