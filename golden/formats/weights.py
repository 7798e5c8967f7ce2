"""Weight formats W8, W4, W2 and W2 2:4 (docs/formats.md section 3).

Letters: N output rows, K inner dimension, G group size. A weight matrix is [N, K]; groups run along K.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from golden.ops import fp16, int24
from golden.spec import KVStrataError
from golden.spec.formats import A8_MAX, FP16_FRAC, WeightFormat

GROUPS = (32, 64, 128)
SPARSE24_GROUPS = (64, 128)
ROW_LIMIT = (1 << 47) / (A8_MAX * (1 << FP16_FRAC))
"""A row's sum of |weight| stays below this, so that no order of accumulation overflows 48 bits."""


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight matrix in an engine format: `weight = code * scale + minimum`.

    codes: int8 [N, K], the multiplier operand (2:4 formats hold 0 where a weight is dropped);
    scale, minimum: float64 [N, K/G] holding binary16 (minimum is None in symmetric formats);
    kept: bool [N, K], exactly two of every four, in 2:4 formats alone.
    """

    format: WeightFormat
    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    kept: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def packed_bytes(self) -> int:
        """Bytes of the memory image: codes, patterns, scales and minima."""
        n, k = self.shape
        return (
            n
            * (k // self.format.group)
            * (self.format.code_bytes_per_group + self.format.scale_bytes_per_group)
        )

    def dequantise(self) -> Tensor:
        """float64 [N, K]: the values that the integers stand for, exactly."""
        value = self.codes.double().unflatten(1, (-1, self.format.group))
        value *= self.scale[..., None]
        if self.minimum is not None:
            value += self.minimum[..., None]
        return value.flatten(1)

    def integers(self) -> Tensor:
        """float64 [N, K] of integers in units of 2**-24: the operand of the exact matrix product."""
        return self.dequantise().mul_(1 << FP16_FRAC)

    def check(self) -> QuantisedWeight:
        """Itself, if legal; KVStrataError names the broken rule, the row and the value."""
        lo, hi = self.codes.min().item(), self.codes.max().item()
        if lo < self.format.code_min or hi > self.format.code_max:
            raise KVStrataError(
                f"{self.format.name} codes must lie in {self.format.code_min}..{self.format.code_max}, got {lo}..{hi}."
            )
        for name, values in (("scale", self.scale), ("minimum", self.minimum)):
            if values is not None and not torch.isfinite(values).all():
                raise KVStrataError(f"a {name} of {self.format.name} must be finite, got NaN or infinity.")
        if not self.format.sparse24:
            lost = (self.codes.unflatten(1, (-1, self.format.group)) != 0).any(-1) & (self.scale == 0)
            if lost.any():
                row, group = lost.nonzero()[0].tolist()
                raise KVStrataError(
                    f"a scale of {self.format.name} must not be zero where codes are not, "
                    f"got 0 in row {row}, group {group}."
                )
        sums = self.dequantise().abs().sum(1)
        row = int(sums.argmax())
        if sums[row] >= ROW_LIMIT:
            raise KVStrataError(
                f"a row's sum of |weight| must stay below {ROW_LIMIT:.0f}, got {sums[row].item():.1f} in row {row}."
            )
        return self


def legal_groups(fmt: WeightFormat) -> tuple[int, ...]:
    """Group sizes that the engine scales: it steps through 64 original weights of a 2:4 matrix."""
    return SPARSE24_GROUPS if fmt.sparse24 else GROUPS


def check_matrix(weight: Tensor, fmt: WeightFormat) -> None:
    """Refuse what cannot be quantised: not a matrix, not finite, a width that does not divide."""
    if weight.ndim != 2:
        raise KVStrataError(f"a weight must be a matrix [N, K], got shape {tuple(weight.shape)}.")
    if fmt.group not in legal_groups(fmt):
        raise KVStrataError(
            f"the group size of {fmt.name} must be one of {legal_groups(fmt)}, got {fmt.group}."
        )
    if weight.shape[1] % fmt.group:
        raise KVStrataError(
            f"the inner dimension must divide by the group size {fmt.group} of {fmt.name}, got {weight.shape[1]}."
        )
    if not torch.isfinite(weight).all():
        raise KVStrataError(f"a weight must be finite before it becomes {fmt.name}, got NaN or infinity.")


def with_group(fmt: WeightFormat, group: int) -> WeightFormat:
    """The same format with another group size."""
    return fmt if fmt.group == group else replace(fmt, group=group)


def fitting_group(fmt: WeightFormat, k: int) -> WeightFormat:
    """The format with its default group, or the largest legal one that divides K."""
    for group in (fmt.group, *sorted(legal_groups(fmt), reverse=True)):
        if group <= fmt.group and k % group == 0:
            return with_group(fmt, group)
    raise KVStrataError(f"the inner dimension must divide by a group of {legal_groups(fmt)}, got {k}.")


def scales_asymmetric(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """fp16 scale and minimum [...] of groups [..., G].

    From least to greatest at four bits; two bits shrink that range about its centre to the least squared error.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    if bits != 2:
        minimum = fp16(low)
        return fp16((high - minimum).clamp(min=0) / ((1 << bits) - 1)), minimum
    best, best_error = (torch.zeros_like(low), torch.zeros_like(low)), torch.full_like(low, torch.inf)
    for shrink in RANGE_SEARCH:
        margin = (high - low) * (1 - shrink) / 2
        minimum = fp16(low + margin)
        scale = fp16((high - margin - minimum).clamp(min=0) / ((1 << bits) - 1))
        safe, offset = torch.where(scale > 0, scale, 1.0)[..., None], minimum[..., None]
        code = round_half_up((groups - offset) / safe).clamp(0, (1 << bits) - 1)
        error = (
            (torch.where(scale[..., None] > 0, code, 0.0) * scale[..., None] + offset - groups)
            .square()
            .sum(-1)
        )
        better = error < best_error
        best = torch.where(better, scale, best[0]), torch.where(better, minimum, best[1])
        best_error = torch.where(better, error, best_error)
    return best


RANGE_SEARCH = tuple(1.0 - 0.05 * i for i in range(13))
"""Shares of a group's range tried for two-bit codes."""


def round_half_up(x: Tensor) -> Tensor:
    """The one rounding of the project, on float64."""
    return torch.floor(x + 0.5)


def nearest_codes(value: Tensor, scale: Tensor, minimum: Tensor | None, fmt: WeightFormat) -> Tensor:
    """Codes nearest to `value` (float64, any shape that broadcasts with scale); 0 where the scale is 0."""
    safe = torch.where(scale > 0, scale, 1.0)
    x = (value if minimum is None else value - minimum) / safe
    if fmt.sparse24:
        code = (2 * torch.floor(x / 2) + 1).clamp(-3, 3)
    else:
        code = round_half_up(x).clamp(fmt.code_min, fmt.code_max)
    dead = torch.ones_like(code) if fmt.sparse24 else torch.zeros_like(code)
    return torch.where(scale > 0, code, dead)


def magnitude_mask24(weight: Tensor) -> Tensor:
    """bool [N, K]: the two largest magnitudes of every four along K, the lower index among equals."""
    return mask24(weight.abs())


def mask24(importance: Tensor) -> Tensor:
    """bool like `importance` [N, K]: the two most important of every four, the lower index among equals."""
    quads = importance.unflatten(1, (-1, 4))
    order = torch.sort(quads, dim=-1, descending=True, stable=True).indices[..., :2]
    return torch.zeros_like(quads, dtype=torch.bool).scatter_(-1, order, True).flatten(1)


SPARSE24_SEARCH = tuple(0.30 + 0.02 * i for i in range(18))
"""Fractions of the group's greatest magnitude tried as 3*scale is too coarse; the least squared error wins."""


def sparse24_scale(kept_values: Tensor, kept: Tensor) -> Tensor:
    """fp16 scale [N, K/G] of {-3,-1,1,3} codes for groups [N, K/G, G], by search on squared error."""
    top = kept_values.abs().amax(-1)
    best, best_error = fp16(top / 3), torch.full_like(top, torch.inf)
    for fraction in SPARSE24_SEARCH:
        scale = fp16(top * fraction)
        safe = torch.where(scale > 0, scale, 1.0)[..., None]
        code = (2 * torch.floor(kept_values / safe / 2) + 1).clamp(-3, 3)
        error = ((code * scale[..., None] - kept_values) * kept).square().sum(-1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def group_scales(
    groups: Tensor, fmt: WeightFormat, kept: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """fp16 scale and minimum [...] of groups [..., G] (float64), round-to-nearest rules."""
    if fmt.sparse24:
        assert kept is not None
        return sparse24_scale(groups * kept, kept), None
    if fmt.asymmetric:
        return scales_asymmetric(groups, fmt.bits)
    return fp16(groups.abs().amax(-1) / fmt.code_max), None


def quantise_weight(weight: Tensor, fmt: WeightFormat, kept: Tensor | None = None) -> QuantisedWeight:
    """Round-to-nearest quantisation of a weight matrix [N, K] (any float dtype).

    2:4 formats keep `kept` (bool [N, K]) or, without it, the two largest magnitudes of every four.
    Raises KVStrataError for shapes that do not divide, values that are not finite, an illegal mask.
    """
    check_matrix(weight, fmt)
    weight = weight.double()
    if fmt.sparse24:
        kept = magnitude_mask24(weight) if kept is None else kept
        check_mask24(kept, weight)
    groups = weight.unflatten(1, (-1, fmt.group))
    kept_groups = None if kept is None else kept.unflatten(1, (-1, fmt.group))
    scale, minimum = group_scales(groups, fmt, kept_groups)
    minimum_of = None if minimum is None else minimum[..., None]
    codes = nearest_codes(groups, scale[..., None], minimum_of, fmt).flatten(1)
    if fmt.sparse24:
        assert kept is not None
        codes = codes * kept
    found = QuantisedWeight(fmt, codes.to(torch.int8), scale, minimum, kept if fmt.sparse24 else None).check()
    if weight.any() and not scale.any() and (minimum is None or not minimum.any()):
        raise KVStrataError(
            f"a weight must not vanish in {fmt.name}, whose scales are fp16, got a greatest |weight| of "
            f"{weight.abs().max().item():.3g}."
        )
    return found


def check_mask24(kept: Tensor, weight: Tensor) -> None:
    """Refuse a mask that does not keep exactly two of every four."""
    if kept.shape != weight.shape:
        raise KVStrataError(
            f"a 2:4 mask must have the weight's shape {tuple(weight.shape)}, got {tuple(kept.shape)}."
        )
    counts = kept.unflatten(1, (-1, 4)).sum(-1)
    if not (counts == 2).all():
        bad = counts[counts != 2][0].item()
        raise KVStrataError(f"a 2:4 mask must keep exactly two of every four weights, got {bad}.")


# --- exact import of GGUF blocks -----------------------------------------------------------------------
def import_gguf_block(
    raw: np.ndarray, kind: str, fmt_w4: WeightFormat, fmt_w8: WeightFormat
) -> QuantisedWeight:
    """A Q4_1 tensor as w4 or a Q8_0 tensor as w8, bit for bit, without requantising.

    raw: uint8 [N, blocks * block_bytes] as `gguf` memory-maps it. A Q4_1 block is fp16 scale, fp16 minimum and
    16 bytes whose low nibbles are elements 0..15 and high nibbles elements 16..31; a Q8_0 block is fp16 scale
    and 32 int8. Codes under a scale of zero, which say nothing, become 0. Raises KVStrataError for a Q8_0 code of
    -128, which w8 does not hold.
    """
    block_bytes = {"Q4_1": 20, "Q8_0": 34}[kind]
    blocks = np.ascontiguousarray(raw).reshape(raw.shape[0], -1, block_bytes)
    scale = torch.from_numpy(blocks[..., 0:2].copy().view("<f2")[..., 0].astype(np.float64))
    if kind == "Q8_0":
        codes = torch.from_numpy(blocks[..., 2:].copy().view(np.int8))
        codes = codes * ((scale != 0)[..., None] | (codes < fmt_w8.code_min))
        return QuantisedWeight(fmt_w8, codes.flatten(1), scale).check()
    minimum = torch.from_numpy(blocks[..., 2:4].copy().view("<f2")[..., 0].astype(np.float64))
    packed = torch.from_numpy(blocks[..., 4:].copy())
    codes = torch.cat((packed & 15, packed >> 4), -1).to(torch.int8) * (scale != 0)[..., None]
    return QuantisedWeight(fmt_w4, codes.flatten(1), scale, minimum).check()


def weight_row_integers(q: QuantisedWeight, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row for a test vector: codes [K], int24 scales [K/G], int24 minima [K/G] (zeros if symmetric)."""
    scale = int24(q.scale[row]).numpy()
    minimum = np.zeros_like(scale) if q.minimum is None else int24(q.minimum[row]).numpy()
    return q.codes[row].numpy().astype(np.int64), scale, minimum
