"""Representations of the KV cache at the algorithm level: what a policy sees of K and V.

Letters: Hkv KV heads, S tokens, dh head size. Codecs map float K and V [Hkv, S, dh] to the values that storage
holds; `blocks` cuts a run of queries so that the stored values are the same for all queries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from golden import ops
from golden.spec import KVStrataError
from golden.spec.policies import FP16, KV4_TOKENS, KV8_TOKENS, Representation

NAMES = ("float", "kv8", "kv4", "kivi4", "kivi2")


@dataclass(frozen=True)
class Codec:
    """`float`: as computed; `kv4`, `kv8`: the engine's codes per head and token (docs/formats.md section 7)."""

    name: str
    representation: Representation
    bits: int = 0

    def blocks(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Runs of query positions that see the same stored values."""
        yield start, end

    def new(self, x: Tensor) -> Tensor:
        """Values stored for new tokens [Hkv, T, dh]."""
        if not self.bits:
            return x
        return ops.dequantise_kv(ops.quantise_kv(ops.to_q16(x), self.bits)).to(x.dtype)

    def view(self, k: Tensor, v: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """K and V as queries of the block that ends before position `end` see them."""
        return k[:, :end], v[:, :end]


@dataclass(frozen=True)
class KiviCodec(Codec):
    """KIVI: K per channel over groups of tokens, V per token, both asymmetric in float; the recent window stays as is.

    A group of `group` tokens is quantised once it lies wholly before the last `recent` tokens (rounded to groups).
    """

    group: int = 32
    recent: int = 64

    def blocks(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """A block ends where the next group becomes old."""
        while start < end:
            stop = min(end, (start // self.group + 1) * self.group)
            yield start, stop
            start = stop

    def new(self, x: Tensor) -> Tensor:
        """Full precision until old."""
        return x

    def old(self, end: int) -> int:
        """Tokens already quantised for queries of the block that ends before `end`."""
        return max(0, (end - 1) // self.group * self.group - self.recent) // self.group * self.group

    def view(self, k: Tensor, v: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Old tokens quantised, recent ones as computed."""
        old = self.old(end)
        if not old:
            return k[:, :end], v[:, :end]
        groups = k[:, :old].unflatten(1, (-1, self.group))
        old_k = _round_trip(groups, self.bits, 2).flatten(1, 2)
        return torch.cat((old_k, k[:, old:end]), 1), torch.cat(
            (_round_trip(v[:, :old], self.bits, -1), v[:, old:end]), 1
        )


def _round_trip(x: Tensor, bits: int, axis: int) -> Tensor:
    """Asymmetric quantisation along an axis and back, scale and minimum in saturating binary16."""
    low = _half(x.amin(axis, keepdim=True))
    scale = _half((x.amax(axis, keepdim=True) - low) / ((1 << bits) - 1))
    safe = torch.where(scale > 0, scale, 1.0)
    codes = torch.floor((x - low) / safe + 0.5).clamp(0, (1 << bits) - 1)
    return torch.where(scale > 0, codes, 0.0) * scale + low


def _half(x: Tensor) -> Tensor:
    return x.clamp(-ops.FP16_MAX, ops.FP16_MAX).half().to(x.dtype)


def codec(name: str) -> Codec:
    """A representation by name; KVStrataError for an unknown one."""
    if name == "float":
        return Codec(name, FP16)
    if name in ("kv8", "kv4"):
        return Codec(name, KV8_TOKENS if name == "kv8" else KV4_TOKENS, int(name[2:]))
    if name.startswith("kivi") and name in NAMES:
        bits = int(name[4:])
        # Scale and minimum per channel and group of 32 tokens for K, per token for V: 4 bytes per 32 or dh values.
        return KiviCodec(name, Representation(name, bits, 4), bits)
    raise KVStrataError(f"a KV representation must be one of {', '.join(NAMES)}, got {name}.")
