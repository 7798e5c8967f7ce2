"""Exact integer operators of the engine: what docs/formats.md says, vectorised.

Conventions. Every tensor is torch.int64 unless a line says otherwise; `q16` is the vector format (signed 32 bit,
16 fraction bits, saturating). Letters: T tokens, n vector length, dh head size. Operators act on the last
axis, any leading axes are a batch. Nothing here is approximate: the same input gives the same bits whatever
the batch, because every reduction is exact or its order is part of the format.

Section numbers are those of docs/formats.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from golden.spec import KVStrataError
from golden.spec.formats import (
    A8_DIV127,
    A8_MAX,
    A8_RECIP_SHIFT,
    A8_SCALE_BITS,
    A8_SCALE_EXP_BIAS,
    ACC_PRESHIFT,
    EXP2_SEGMENTS_LOG2,
    FP16_FRAC,
    KV_CLIP_BITS,
    KV_RANGE_DIV,
    P_FRAC,
    ROPE_FRAC,
    SIGMOID_RANGE_LOG2,
    SIGMOID_SEGMENTS_LOG2,
    VEC_BITS,
    VEC_FRAC,
)

FP16_MAX = 65504.0


# --- section 1: conventions ---------------------------------------------------------------------------
def rnd_shift(x: Tensor, n: int | Tensor) -> Tensor:
    """Shift right by n (left if negative), to nearest, ties towards plus infinity; n at most 62."""
    if isinstance(n, int):
        if n <= 0:
            return x << -n
        return (x + (1 << (n - 1))) >> n
    right = n.clamp(min=0)
    half = (torch.ones_like(right) << right) >> 1
    return ((x << (-n).clamp(min=0)) + half) >> right


def sat(x: Tensor, bits: int) -> Tensor:
    """Clamp to the signed range of `bits`."""
    return x.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def bitlen(x: Tensor) -> Tensor:
    """Bits of |x|; 0 for 0. Exact below 2**62 although it uses frexp: each half fits a float64."""
    x = x.abs()
    high = x >> 31
    top = torch.frexp(high.double())[1].long() + 31
    return torch.where(high > 0, top, torch.frexp(x.double())[1].long())


def fp16(v: Tensor) -> Tensor:
    """Nearest binary16, ties to even, beyond 65504 becomes 65504; float64 in, float64 holding binary16 out.

    torch converts float64 to half through float32 and so rounds twice; this rounds once.
    Raises KVStrataError for NaN and infinity.
    """
    if not torch.isfinite(v).all():
        bad = v[~torch.isfinite(v)].flatten()[0].item()
        raise KVStrataError(f"a scale or minimum must be finite before it becomes fp16, got {bad}.")
    exponent = torch.frexp(v)[1].clamp(min=-13)
    quantum = torch.ldexp(torch.ones_like(v), exponent - 11)
    return (torch.round(v / quantum) * quantum).clamp(-FP16_MAX, FP16_MAX)


def int24(h: Tensor) -> Tensor:
    """A binary16 number as the integer h * 2**24 (any float dtype that holds it exactly)."""
    return (h.double() * (1 << FP16_FRAC)).long()


def to_q16(x: Tensor | np.ndarray | Sequence[float]) -> Tensor:
    """Real numbers to the vector format, nearest with ties up, saturating. For tests and embeddings."""
    value = torch.as_tensor(x, dtype=torch.float64)
    if not torch.isfinite(value).all():
        raise KVStrataError("a vector must be finite before it becomes Q16, got NaN or infinity.")
    bound = float(1 << (VEC_BITS - 1))
    return sat(torch.floor((value * (1 << VEC_FRAC)).clamp(-bound, bound) + 0.5).long(), VEC_BITS)


def from_q16(x: Tensor) -> Tensor:
    """The vector format as float64, exactly."""
    return x.double() / (1 << VEC_FRAC)


# --- section 2: A8 ------------------------------------------------------------------------------------
class A8(NamedTuple):
    """Codes [..., n] in -127..127 and one scale `mantissa * 2**exponent` per vector, both [...]."""

    codes: Tensor
    mantissa: Tensor
    exponent: Tensor


def quantise_a8(x: Tensor) -> A8:
    """One q16 vector [..., n] per token to int8 codes with one scale."""
    amax = x.abs().amax(-1)
    shift = torch.where(amax > 0, bitlen(amax) - 16, torch.zeros_like(amax))
    up = shift.clamp(min=0)
    divisor = ((amax << (-shift).clamp(min=0)) + (1 << up) - 1) >> up
    live = amax > 0
    reciprocal = torch.div(A8_MAX << A8_RECIP_SHIFT, divisor.clamp(min=1), rounding_mode="floor")
    reciprocal = torch.where(live, reciprocal, torch.zeros_like(reciprocal))
    codes = rnd_shift(x * reciprocal[..., None], (A8_RECIP_SHIFT + shift)[..., None])
    mantissa = rnd_shift(divisor * A8_DIV127, A8_SCALE_BITS)
    exponent = torch.where(live, shift - A8_SCALE_EXP_BIAS, torch.zeros_like(shift))
    return A8(codes, mantissa, exponent)


def dequantise_a8(a: A8) -> Tensor:
    """float64 values of A8 codes, in units of 1.0."""
    scale = torch.ldexp(a.mantissa.double(), a.exponent)
    return a.codes.double() * scale[..., None]


# --- section 4: matrix product ------------------------------------------------------------------------
def accumulate(codes: Tensor, weight_ints: Tensor) -> Tensor:
    """acc [T, N] of A8 codes [T, K] and weight integers [N, K] (float64, unit 2**-24).

    Exact: a legal tensor keeps every partial sum below 2**47, so float64 never rounds.
    """
    return (codes.double() @ weight_ints.T).long()


def scale_accumulator(acc: Tensor, mantissa: Tensor, exponent: Tensor) -> Tensor:
    """acc [..., N] times the activation scale [...] to q16."""
    scaled = rnd_shift(acc, ACC_PRESHIFT) * mantissa[..., None]
    return sat(rnd_shift(scaled, -exponent[..., None]), VEC_BITS)


# --- section 5: RMSNorm -------------------------------------------------------------------------------
class NormWeight(NamedTuple):
    """Prepared offline: weight*sqrt(n) as int16 [n] with one exponent f, and En = round(n * eps * 2**32)."""

    weight: Tensor
    exponent: int
    eps: int


NORM_EXPONENT_MIN = -6
NORM_EXPONENT_MAX = 30


def prepare_norm(weight: Tensor, eps: float) -> NormWeight:
    """The RMSNorm weight [n] and epsilon in the engine's form.

    Raises KVStrataError for a weight that is not finite or too large for int16 at the least exponent.
    """
    n = weight.shape[-1]
    scaled = weight.double() * math.sqrt(n)
    top = scaled.abs().max().item()
    if not math.isfinite(top) or not eps >= 0 or not math.isfinite(eps):
        raise KVStrataError(f"RMSNorm needs finite weights and eps >= 0, got weight {top}, eps {eps}.")
    f = NORM_EXPONENT_MAX
    while f > NORM_EXPONENT_MIN and math.floor(top * 2.0**f + 0.5) > 32767:
        f -= 1
    integers = torch.floor(scaled * 2.0**f + 0.5).long()
    if integers.abs().max() > 32767:
        raise KVStrataError(f"RMSNorm weight times sqrt(n) must stay below 2**21, got {top}.")
    return NormWeight(integers, f, round(n * eps * 2**32))


def rmsnorm(x: Tensor, norm: NormWeight) -> Tensor:
    """q16 [..., n] to q16 [..., n]."""
    s = (bitlen(x.abs().amax(-1)) - 15).clamp(min=0)
    squares = rnd_shift(x, s[..., None]).square().sum(-1)
    v = (squares + rnd_shift(torch.full_like(squares, norm.eps), 2 * s)).clamp(min=1)
    j = torch.div(bitlen(v) - 31, 2, rounding_mode="floor")
    u = (v << (-2 * j).clamp(min=0)) >> (2 * j).clamp(min=0)
    r = torch.div((1 << 31) - 1, isqrt(u), rounding_mode="floor")
    t = rnd_shift(x * r[..., None], (9 + j + s)[..., None])
    return sat(rnd_shift(t * norm.weight, norm.exponent + 6), VEC_BITS)


def isqrt(u: Tensor) -> Tensor:
    """floor(sqrt(u)) for 0 <= u < 2**52 (float64's correctly rounded root cannot cross an integer there)."""
    return torch.sqrt(u.double()).floor().long()


# --- section 6: RoPE ----------------------------------------------------------------------------------
def rope_angles(positions: Tensor, head_size: int, base: float) -> Tensor:
    """Angles [T, dh/2] in float64."""
    i = torch.arange(0, head_size, 2, dtype=torch.float64)
    return positions.double()[:, None] * base ** (-i / head_size)


def rope_table(positions: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin as int16 values with 14 fraction bits, each [T, dh/2]."""
    angles = rope_angles(positions, head_size, base)
    return tuple(torch.floor(f(angles) * (1 << ROPE_FRAC) + 0.5).long() for f in (torch.cos, torch.sin))  # type: ignore[return-value]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of q16 [..., T, dh] by table rows [T, dh/2]."""
    x0, x1 = x[..., 0::2], x[..., 1::2]
    y0 = sat(rnd_shift(x0 * cos - x1 * sin, ROPE_FRAC), VEC_BITS)
    y1 = sat(rnd_shift(x0 * sin + x1 * cos, ROPE_FRAC), VEC_BITS)
    return torch.stack((y0, y1), -1).flatten(-2)


# --- section 7: KV cache ------------------------------------------------------------------------------
class KVCodes(NamedTuple):
    """Codes [..., dh] in 0..2**b-1; scale and minimum [...] as float64 holding binary16."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor


def quantise_kv(x: Tensor, bits: int) -> KVCodes:
    """One q16 K or V vector [..., dh] of one head to codes with an fp16 scale and minimum."""
    if bits not in KV_RANGE_DIV:
        raise KVStrataError(f"KV codes must have {sorted(KV_RANGE_DIV)} bits, got {bits}.")
    x = sat(x, KV_CLIP_BITS)
    low = x.amin(-1)
    multiplier, f = KV_RANGE_DIV[bits]
    minimum = fp16(torch.ldexp(low.double(), torch.tensor(-VEC_FRAC)))
    scale = fp16(torch.ldexp(((x.amax(-1) - low) * multiplier).double(), torch.tensor(-(f + VEC_FRAC))))
    mantissa, exponent = fp16_parts(scale)
    reciprocal = torch.div((1 << 26) - 1, mantissa.clamp(min=1), rounding_mode="floor")
    offset = x - (minimum * (1 << VEC_FRAC)).long()[..., None]
    codes = rnd_shift(offset * reciprocal[..., None], (42 + exponent)[..., None])
    codes = torch.where((mantissa > 0)[..., None], codes.clamp(0, (1 << bits) - 1), torch.zeros_like(codes))
    return KVCodes(codes, scale, minimum)


def dequantise_kv(kv: KVCodes) -> Tensor:
    """float64 values [..., dh]."""
    return kv.codes.double() * kv.scale[..., None] + kv.minimum[..., None]


def fp16_parts(h: Tensor) -> tuple[Tensor, Tensor]:
    """A positive binary16 as M * 2**E with 1024 <= M <= 2047 (subnormals too); (0, 0) for zero."""
    fraction, exponent = torch.frexp(h.double())
    mantissa = (fraction * 2048).long()
    return mantissa, torch.where(mantissa > 0, exponent.long() - 11, torch.zeros_like(mantissa))


# --- section 9: exp2, sigmoid, SiLU -------------------------------------------------------------------
@cache
def exp2_table() -> Tensor:
    """T[k] = round(2**15 * 2**(-k/64)), k = 0..64."""
    n = 1 << EXP2_SEGMENTS_LOG2
    return torch.tensor([math.floor(2**P_FRAC * 2 ** (-k / n) + 0.5) for k in range(n + 1)])


@cache
def _exp2_fraction() -> Tensor:
    """p0 for each of the 65,536 fractions: the interpolation done once."""
    table, f = exp2_table(), torch.arange(1 << VEC_FRAC)
    k, r = f >> (VEC_FRAC - EXP2_SEGMENTS_LOG2), f & ((1 << (VEC_FRAC - EXP2_SEGMENTS_LOG2)) - 1)
    return table[k] - rnd_shift((table[k] - table[k + 1]) * r, VEC_FRAC - EXP2_SEGMENTS_LOG2)


def exp2_neg(x: Tensor) -> Tensor:
    """2**-x for x >= 0 in q16 (up to 33 bits): 16 bits, 1.0 = 2**15."""
    p0 = _exp2_fraction()[x & ((1 << VEC_FRAC) - 1)]
    return rnd_shift(p0, (x >> VEC_FRAC).clamp(max=31))


@cache
def sigmoid_table() -> Tensor:
    """S[k] = min(65535, round(2**16 / (1 + e**(-k/16)))), k = 0..256."""
    step = 2.0 ** (SIGMOID_RANGE_LOG2 - SIGMOID_SEGMENTS_LOG2)
    values = [
        math.floor(2**16 / (1 + math.exp(-k * step)) + 0.5) for k in range((1 << SIGMOID_SEGMENTS_LOG2) + 1)
    ]
    return torch.tensor([min(65535, v) for v in values])


def sigmoid(x: Tensor) -> Tensor:
    """Sigmoid of q16, 16 fraction bits, 1..65535."""
    magnitude = x.abs()
    bits = VEC_FRAC + SIGMOID_RANGE_LOG2 - SIGMOID_SEGMENTS_LOG2
    table = sigmoid_table()
    k, r = (magnitude >> bits).clamp(max=(1 << SIGMOID_SEGMENTS_LOG2) - 1), magnitude & ((1 << bits) - 1)
    inside = table[k] + rnd_shift((table[k + 1] - table[k]) * r, bits)
    saturated = magnitude >= 1 << (VEC_FRAC + SIGMOID_RANGE_LOG2)
    value = torch.where(saturated, torch.full_like(inside, 65535), inside)
    return torch.where(x < 0, 65536 - value, value)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) in q16."""
    return rnd_shift(x * sigmoid(x), 16)


def gate_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in q16."""
    return sat(rnd_shift(silu(gate) * up, VEC_FRAC), VEC_BITS)


def relu(x: Tensor) -> Tensor:
    """max(x, 0) in q16."""
    return x.clamp(min=0)


# --- section 10: residual, embedding ------------------------------------------------------------------
def residual(x: Tensor, y: Tensor) -> Tensor:
    """Saturating sum of two q16 vectors."""
    return sat(x + y, VEC_BITS)


def embedding_row(codes: Tensor, scale: Tensor) -> Tensor:
    """q16 of int8 codes [..., n] with an fp16 scale already spread to [..., n]."""
    return sat(rnd_shift(codes * int24(scale), FP16_FRAC - VEC_FRAC), VEC_BITS)


def argmax_lowest(logits: Tensor) -> Tensor:
    """Index of the largest along the last axis, the lowest index among equals."""
    best = logits.amax(-1, keepdim=True)
    return (logits == best).int().argmax(-1)
