"""Number formats of the engine: constants of the integer arithmetic in docs/formats.md.

Letters used everywhere: K inner dimension, N output rows, dh head size, S cached tokens, G group size.
"""

from __future__ import annotations

from dataclasses import dataclass

from golden.spec import KVStrataError

# --- vector register format -------------------------------------------------------------------------
VEC_BITS = 32
"""Every vector element on chip between matrix products: signed, saturating."""
VEC_FRAC = 16
"""Fraction bits of the vector register format (value = integer * 2**-16)."""

# --- fp16 as an integer -----------------------------------------------------------------------------
FP16_FRAC = 24
"""Every finite fp16 number is an integer multiple of 2**-24."""

# --- matrix products --------------------------------------------------------------------------------
ACC_BITS = 48
"""Accumulator of a matrix product: exact, so any order gives the same bits. One DSP48E2 wide."""
ACC_FRAC = FP16_FRAC
ACC_PRESHIFT = 8
"""An accumulator is rounded by this many bits before it meets the activation scale."""

# --- int8 activations (A8) --------------------------------------------------------------------------
A8_MAX = 127
A8_SCALE_BITS = 16
A8_DIV127 = 33026
"""round(64 * 2**16 / 127): scale mantissa = rnd_shift(D * A8_DIV127, 16)."""
A8_SCALE_EXP_BIAS = 22
"""scale = mantissa * 2**(sh - 22), with sh = bitlen(amax) - 16 and amax in the vector format."""
A8_RECIP_SHIFT = 24
"""R = floor(127 * 2**24 / D); code = rnd_shift(x * R, 24 + sh)."""

# --- KV cache ---------------------------------------------------------------------------------------
KV_CLIP_BITS = 26
"""K and V saturate to this many signed bits in the vector format (+-512) when appended."""
KV_RANGE_DIV = {2: (87381, 18), 4: (69905, 20), 8: (65793, 24)}
"""bits -> (round(2**f / (2**bits - 1)), f): scale = fp16(range * c * 2**-(f + 16))."""

# --- attention --------------------------------------------------------------------------------------
ATTN_TILE = 32
"""Tokens per online-softmax step; part of the format, because rescaling truncates once per tile."""
P_FRAC = 15
"""Fraction bits of an unnormalised probability: 1.0 is 2**15."""
P_CODE_BITS = 7
"""Probabilities times V scales enter the array as unsigned 7-bit codes with a shift per tile."""
L_EXTRA_FRAC = 16
"""Extra fraction bits of the running softmax sum, so that rescaling loses nothing visible."""
ATTN_ACC_BITS = 56

# --- tables -----------------------------------------------------------------------------------------
EXP2_SEGMENTS_LOG2 = 6
SIGMOID_SEGMENTS_LOG2 = 8
SIGMOID_RANGE_LOG2 = 4
"""The sigmoid table spans [0, 16)."""
ROPE_FRAC = 14
"""cos and sin are int16 with 14 fraction bits, so that 1.0 is exact."""


@dataclass(frozen=True)
class WeightFormat:
    """A weight format: codes per group along K with an fp16 scale and, where asymmetric, an fp16 minimum.

    `weight = code * scale + minimum`. Codes are stored as unsigned fields of `bits`; `offset` is what is
    subtracted from a stored field to get the code that the multiplier sees.
    """

    name: str
    bits: int
    group: int
    asymmetric: bool
    sparse24: bool = False

    @property
    def code_min(self) -> int:
        """Least multiplier operand."""
        if self.sparse24:
            return -3
        return 0 if self.asymmetric else -(1 << (self.bits - 1)) + (1 if self.bits == 8 else 0)

    @property
    def code_max(self) -> int:
        """Greatest multiplier operand."""
        if self.sparse24:
            return 3
        return (1 << self.bits) - 1 if self.asymmetric else (1 << (self.bits - 1)) - 1

    @property
    def code_bytes_per_group(self) -> int:
        """Bytes of codes (and patterns) of one group in the memory image."""
        return self.group * 7 // 32 if self.sparse24 else self.group * self.bits // 8

    @property
    def scale_bytes_per_group(self) -> int:
        """Bytes of fp16 scale and, where asymmetric, fp16 minimum of one group."""
        return 4 if self.asymmetric else 2

    @property
    def bits_per_weight(self) -> float:
        """Storage per original weight, scale and minimum included."""
        return 8 * (self.code_bytes_per_group + self.scale_bytes_per_group) / self.group


W8 = WeightFormat("w8", 8, 32, asymmetric=False)
"""int8 in [-127, 127], fp16 scale: holds a GGUF Q8_0 tensor exactly."""
W4 = WeightFormat("w4", 4, 32, asymmetric=True)
"""Unsigned 4-bit codes, fp16 scale and minimum: holds a GGUF Q4_1 tensor exactly."""
W2 = WeightFormat("w2", 2, 64, asymmetric=True)
"""Unsigned 2-bit codes, fp16 scale and minimum."""
W2S24 = WeightFormat("w2s24", 2, 128, asymmetric=False, sparse24=True)
"""2:4 sparse: per four weights one 3-bit pattern and two 2-bit codes of {-3,-1,+1,+3}, times half a scale."""

WEIGHT_FORMATS: dict[str, WeightFormat] = {f.name: f for f in (W8, W4, W2, W2S24)}

SPARSE24_PATTERNS: tuple[tuple[int, int], ...] = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Positions of the two kept weights of four, by pattern code 0 to 5; codes 6 and 7 are illegal."""
SPARSE24_CODES: tuple[int, ...] = (-3, -1, 1, 3)
"""Multiplier operand by stored 2-bit code: 2 * code - 3."""


@dataclass(frozen=True)
class KVFormat:
    """KV cache of the engine: per head and token, unsigned codes with fp16 scale and minimum."""

    name: str
    bits: int

    def bytes_per_vector(self, head_size: int) -> int:
        """Bytes of one K or V vector of one head: codes, scale and minimum."""
        return head_size * self.bits // 8 + 4


KV4 = KVFormat("kv4", 4)
KV8 = KVFormat("kv8", 8)
KV_FORMATS: dict[str, KVFormat] = {f.name: f for f in (KV4, KV8)}


def weight_format(name: str) -> WeightFormat:
    """A weight format by name; KVStrataError for an unknown one."""
    if name not in WEIGHT_FORMATS:
        raise KVStrataError(f"a weight format must be one of {', '.join(WEIGHT_FORMATS)}, got {name}.")
    return WEIGHT_FORMATS[name]


def kv_format(name: str) -> KVFormat:
    """A format of the engine's KV cache by name; KVStrataError for an unknown one."""
    if name not in KV_FORMATS:
        raise KVStrataError(f"a KV format must be one of {', '.join(KV_FORMATS)}, got {name}.")
    return KV_FORMATS[name]
