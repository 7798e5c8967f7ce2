"""Error of each exact operator against float64, measured over its whole domain.

Each measurement returns the greatest error and says of what; docs/formats.md holds the table, a test measures it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from golden import ops
from golden.attention import attend

SEED = 20260


@dataclass(frozen=True)
class OperatorError:
    """The greatest error of an operator: measured `value` in `unit`, over `domain`."""

    operator: str
    domain: str
    value: float
    unit: str


def _random(*shape: int, spread: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(SEED)
    return torch.randn(*shape, generator=rng, dtype=torch.float64) * spread


def _magnitudes(rows: int, n: int, low: int, high: int) -> Tensor:
    """q16 vectors [rows, n] whose sizes spread evenly over 2**low..2**high (in integers)."""
    exponents = torch.linspace(low, high, rows, dtype=torch.float64)[:, None]
    return ops.sat((_random(rows, n) * 2**exponents).round().long(), 32)


def exp2_error() -> OperatorError:
    """All fractions at integer parts 0 to 16, and far beyond."""
    x = torch.arange(17 << 16)
    exact = torch.exp2(-x.double() / 65536)
    error = (ops.exp2_neg(x).double() / 32768 - exact).abs().max().item()
    far = ops.exp2_neg(torch.tensor([20 << 16, 1 << 33])).max().item()
    assert far == 0
    return OperatorError(
        "exp2(-x)", "x in [0, 17), every Q16 value; 0 from 17 on", error, "absolute (1.0 is 2^15)"
    )


def sigmoid_error() -> OperatorError:
    """Every Q16 value of +-18."""
    x = torch.arange(-18 << 16, 18 << 16)
    error = (ops.sigmoid(x).double() / 65536 - torch.sigmoid(x.double() / 65536)).abs().max().item()
    return OperatorError("sigmoid", "every Q16 value of +-18", error, "absolute")


def silu_error() -> OperatorError:
    """Every Q16 value of +-18, then the whole range by steps."""
    x = torch.cat((torch.arange(-18 << 16, 18 << 16), torch.arange(-(2**31), 2**31, 65537)))
    real = x.double() / 65536
    error = (ops.silu(x).double() / 65536 - real * torch.sigmoid(real)).abs() / (1 + real.abs())
    return OperatorError("SiLU", "whole range", error.max().item(), "of 1 + |x|")


def reciprocal_error() -> OperatorError:
    """floor((2^31 - 1) / L), every 16-bit L with its top bit set."""
    l = torch.arange(1 << 15, 1 << 16)
    error = (
        (torch.div((1 << 31) - 1, l, rounding_mode="floor").double() * l.double() / 2**31 - 1)
        .abs()
        .max()
        .item()
    )
    return OperatorError("1/L of softmax and scales", "every 16-bit divisor", error, "relative")


def rsqrt_error() -> OperatorError:
    """floor((2^31 - 1) / isqrt(u)), u over [2^30, 2^32)."""
    u = torch.cat((torch.arange(1 << 30, 1 << 32, 4093), torch.tensor([1 << 30, (1 << 32) - 1])))
    r = torch.div((1 << 31) - 1, ops.isqrt(u), rounding_mode="floor").double() / 2**31
    return OperatorError(
        "1/sqrt(u)", "u in [2^30, 2^32)", (r * torch.sqrt(u.double()) - 1).abs().max().item(), "relative"
    )


def rmsnorm_error() -> OperatorError:
    """Vectors of 576 with rms from 2^-6 to 2^13."""
    x, weight = _magnitudes(400, 576, 10, 29), 1 + 0.2 * _random(576)
    got = ops.from_q16(ops.rmsnorm(x, ops.prepare_norm(weight, 1e-5)))
    real = ops.from_q16(x)
    exact = real * torch.rsqrt(real.square().mean(-1, keepdim=True) + 1e-5) * weight
    return OperatorError(
        "RMSNorm", "n = 576, rms 2^-6 to 2^13", (got - exact).abs().max().item(), "absolute (output rms 1)"
    )


def layernorm_error() -> OperatorError:
    """Vectors as above with a mean of their own size, which is taken out before (golden.engine_form)."""
    spread, weight, bias = _magnitudes(400, 576, 12, 29), 1 + 0.2 * _random(576), _random(576)
    real = ops.from_q16(spread) + ops.from_q16(spread[:, :1])
    centred = ops.to_q16(real - real.mean(-1, keepdim=True))
    normed = ops.rmsnorm(centred, ops.prepare_norm(weight, 1e-5))
    got = ops.from_q16(ops.residual(normed, ops.to_q16(bias)))
    exact = torch.nn.functional.layer_norm(real, (576,), weight, bias, 1e-5)
    return OperatorError(
        "LayerNorm",
        "n = 576, rms 2^-4 to 2^13, mean taken out before",
        (got - exact).abs().max().item(),
        "absolute (output rms 1)",
    )


def rope_error() -> OperatorError:
    """Positions 0 to 8191, vectors of size up to 2^9."""
    positions = torch.arange(8192)
    x = _magnitudes(8192, 64, 10, 24)
    got = ops.from_q16(ops.rope(x, *ops.rope_table(positions, 64, 100000.0)))
    angles = ops.rope_angles(positions, 64, 100000.0)
    real = ops.from_q16(x)
    x0, x1 = real[:, 0::2], real[:, 1::2]
    exact = torch.stack(
        (x0 * angles.cos() - x1 * angles.sin(), x0 * angles.sin() + x1 * angles.cos()), -1
    ).flatten(-2)
    size = real.norm(dim=-1, keepdim=True) + 2.0**-10
    return OperatorError(
        "RoPE", "positions 0 to 8191", ((got - exact).abs() / size).max().item(), "of the vector's length"
    )


def a8_error() -> OperatorError:
    """Vectors of every size from one unit to saturation."""
    x = _magnitudes(600, 256, 0, 31)
    real = ops.from_q16(x)
    step = real.abs().amax(-1, keepdim=True).clamp(min=2.0**-16) / 127
    error = ((ops.dequantise_a8(ops.quantise_a8(x)) - real).abs() / step).max().item()
    return OperatorError("A8", "whole range", error, "steps of amax/127 (0.5 is ideal)")


def kv_error(bits: int) -> OperatorError:
    """Vectors of every size within +-512."""
    x = ops.sat(_magnitudes(600, 64, 4, 23), 26)
    real = ops.from_q16(x)
    step = (real.amax(-1, keepdim=True) - real.amin(-1, keepdim=True)) / ((1 << bits) - 1) + 2.0**-16
    error = ((ops.dequantise_kv(ops.quantise_kv(x, bits)) - real).abs() / step).max().item()
    return OperatorError(f"KV{bits}", "within +-512", error, "steps of range/(2^b - 1) (0.5 is ideal)")


def product_error() -> OperatorError:
    """The matrix product of codes against float64 on the same codes: scaling and output rounding alone."""
    x, weight = _magnitudes(200, 128, 8, 24), (_random(64, 128) * 2**24).round()
    a8 = ops.quantise_a8(x)
    got = ops.from_q16(ops.scale_accumulator(ops.accumulate(a8.codes, weight), a8.mantissa, a8.exponent))
    exact = ops.dequantise_a8(a8) @ weight.T / 2**24
    error = (got - exact).abs() / (2.0**-16 + exact.abs() * 2.0**-16)
    return OperatorError(
        "matrix product", "same codes", error.max().item(), "of 2^-16 (1 + |y|) (0.5 is ideal)"
    )


def attention_error(bits: int) -> OperatorError:
    """Softmax and mixing against float64 on the same codes of q, K and V."""
    worst = 0.0
    for slots in (1, 31, 32, 300, 1500):
        for spread in (0.3, 2.0, 8.0):
            q, k, v = (
                ops.to_q16(_random(2, n, 64, spread=s))
                for n, s in ((4, spread), (slots, spread), (slots, 1.0))
            )
            kq, vq = ops.quantise_kv(k, bits), ops.quantise_kv(v, bits)
            got = ops.from_q16(attend(q, kq, vq, torch.ones(4, slots, dtype=torch.bool)))
            z = ops.dequantise_a8(ops.quantise_a8(q)) @ ops.dequantise_kv(kq).mT / math.sqrt(64)
            exact = z.softmax(-1) @ ops.dequantise_kv(vq)
            spread_v = ops.dequantise_kv(vq).amax() - ops.dequantise_kv(vq).amin()
            worst = max(worst, ((got - exact).abs().max() / spread_v).item())
    return OperatorError(f"attention, KV{bits}", "1 to 1,500 slots, same codes", worst, "of the range of V")


MEASUREMENTS: tuple[Callable[[], OperatorError], ...] = (
    exp2_error, sigmoid_error, silu_error, reciprocal_error, rsqrt_error, rmsnorm_error, layernorm_error, rope_error,
    a8_error, lambda: kv_error(4), lambda: kv_error(8), product_error,
    lambda: attention_error(4), lambda: attention_error(8),
)  # fmt: skip


def table() -> str:
    """The Markdown table of docs/formats.md section 11."""
    lines = ["| operator | domain | greatest error | unit |", "|---|---|---|---|"]
    lines += [
        f"| {e.operator} | {e.domain} | {e.value:.2g} | {e.unit} |" for e in (m() for m in MEASUREMENTS)
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the table to standard output."""
    import sys

    sys.stdout.write(table() + "\n")


if __name__ == "__main__":
    main()
