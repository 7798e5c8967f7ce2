"""Memory images of weights and KV vectors (docs/formats.md section 3.1), and back.

A group is its codes, then the fp16 scale, then the fp16 minimum where the format has one; all little endian.
Codes fill bytes from the low bits up. A 2:4 quad takes 7 bits: pattern (3), first kept code (2), second (2).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from golden.formats.weights import QuantisedWeight
from golden.ops import KVCodes
from golden.spec import KVStrataError
from golden.spec.formats import SPARSE24_PATTERNS, KVFormat, WeightFormat


def pack_fields(fields: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., n*bits/8] of unsigned fields [..., n], field 0 in the lowest bits of byte 0."""
    if fields.size and (fields.min() < 0 or fields.max() >= 1 << bits):
        raise KVStrataError(f"a packed field must fit {bits} bits, got {fields.min()}..{fields.max()}.")
    if fields.shape[-1] * bits % 8:
        raise KVStrataError(f"packed fields must fill whole bytes, got {fields.shape[-1]} of {bits} bits.")
    if bits == 8:
        return fields.astype(np.uint8)
    if 8 % bits == 0:
        lanes = fields.astype(np.uint8).reshape(*fields.shape[:-1], -1, 8 // bits)
        return np.bitwise_or.reduce(lanes << (np.arange(8 // bits, dtype=np.uint8) * bits), axis=-1)
    expanded = (fields[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(expanded.reshape(*fields.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack_fields`: uint8 [..., n]."""
    if 8 % bits == 0:
        lanes = packed[..., None] >> (np.arange(8 // bits, dtype=np.uint8) * bits)
        return (lanes & ((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)
    flat = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, bits)
    return (flat << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def sparse24_fields(codes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """7-bit quad fields [..., K/4] of codes [..., K] in {-3,-1,1,3} where kept."""
    quads, mask = codes.reshape(*codes.shape[:-1], -1, 4), kept.reshape(*kept.shape[:-1], -1, 4)
    pattern = _PATTERN_OF_MASK[(mask << np.arange(4)).sum(-1)]
    if (pattern > 5).any():
        raise KVStrataError("a 2:4 group must keep exactly two of every four weights, got another count.")
    where = _PATTERN_POSITIONS[pattern]
    fields = (np.take_along_axis(quads, where, -1).astype(np.int64) + 3) // 2
    return (pattern + 8 * fields[..., 0] + 32 * fields[..., 1]).astype(np.uint8)


def sparse24_codes(fields: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [..., K] and kept bool [..., K] of 7-bit quads; KVStrataError for patterns 6 and 7."""
    pattern = fields & 7
    if (pattern > 5).any():
        raise KVStrataError(f"a 2:4 pattern must be 0 to 5, got {int(pattern.max())}.")
    where = _PATTERN_POSITIONS[pattern]
    values = np.stack(((fields >> 3) & 3, (fields >> 5) & 3), -1).astype(np.int8) * 2 - 3
    codes = np.zeros((*fields.shape, 4), np.int8)
    np.put_along_axis(codes, where, values, -1)
    kept = np.zeros((*fields.shape, 4), bool)
    np.put_along_axis(kept, where, True, -1)
    return codes.reshape(*fields.shape[:-1], -1), kept.reshape(*fields.shape[:-1], -1)


_PATTERN_POSITIONS = np.array(SPARSE24_PATTERNS)
_PATTERN_OF_MASK = np.full(16, 7)
for _code, (_a, _b) in enumerate(SPARSE24_PATTERNS):
    _PATTERN_OF_MASK[(1 << _a) | (1 << _b)] = _code


def stored_fields(weight: QuantisedWeight) -> tuple[np.ndarray, int]:
    """Unsigned fields [N, K] (or quads [N, K/4]) and their bits, as they lie in memory."""
    codes = weight.codes.numpy()
    if weight.format.sparse24:
        assert weight.kept is not None
        return sparse24_fields(codes, weight.kept.numpy()), 7
    return codes.view(np.uint8) if weight.format.bits == 8 else codes.astype(np.uint8), weight.format.bits


def pack_weight(weight: QuantisedWeight) -> np.ndarray:
    """The row-major memory image: uint8 [N, K/G, group bytes]."""
    n, k = weight.shape
    fields, bits = stored_fields(weight)
    parts = [pack_fields(fields.reshape(n, k // weight.format.group, -1), bits), _half_bytes(weight.scale)]
    if weight.minimum is not None:
        parts.append(_half_bytes(weight.minimum))
    return np.concatenate(parts, -1)


def unpack_weight(image: np.ndarray, fmt: WeightFormat) -> QuantisedWeight:
    """The inverse of `pack_weight`; KVStrataError for an image of another size or an illegal pattern."""
    expected = fmt.code_bytes_per_group + fmt.scale_bytes_per_group
    if image.ndim != 3 or image.shape[-1] != expected:
        raise KVStrataError(
            f"a {fmt.name} image must be [N, K/G, {expected}] bytes, got shape {image.shape}."
        )
    n, end = image.shape[0], fmt.code_bytes_per_group
    scale = _halves(image[..., end : end + 2])
    minimum = _halves(image[..., end + 2 : end + 4]) if fmt.asymmetric else None
    kept = None
    if fmt.sparse24:
        codes, kept_array = sparse24_codes(unpack_fields(image[..., :end], 7))
        kept = torch.from_numpy(kept_array.reshape(n, -1))
    else:
        codes = unpack_fields(image[..., :end], fmt.bits).view(np.int8)
    return QuantisedWeight(fmt, torch.from_numpy(codes.reshape(n, -1).copy()), scale, minimum, kept).check()


def pack_kv(kv: KVCodes, fmt: KVFormat) -> np.ndarray:
    """Memory image uint8 [..., dh*bits/8 + 4] of KV vectors: codes, fp16 scale, fp16 minimum."""
    codes = pack_fields(kv.codes.numpy().astype(np.uint8), fmt.bits)
    return np.concatenate((codes, _half_bytes(kv.scale), _half_bytes(kv.minimum)), -1)


def unpack_kv(image: np.ndarray, fmt: KVFormat) -> KVCodes:
    """The inverse of `pack_kv`; KVStrataError for an image without codes or a scale that is not finite."""
    if image.shape[-1] <= 4:
        raise KVStrataError(
            f"a {fmt.name} image must be codes and 4 bytes behind them, got shape {image.shape}."
        )
    scale, minimum = _halves(image[..., -4:-2]), _halves(image[..., -2:])
    for name, values in (("scale", scale), ("minimum", minimum)):
        if not torch.isfinite(values).all():
            raise KVStrataError(f"a {name} of {fmt.name} must be finite, got NaN or infinity.")
    codes = torch.from_numpy(unpack_fields(image[..., :-4], fmt.bits).astype(np.int64))
    return KVCodes(codes, scale, minimum)


def _half_bytes(values: Tensor) -> np.ndarray:
    halves = values.numpy().astype("<f2")
    return halves[..., None].view(np.uint8)


def _halves(raw: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float64))
