"""The special-function unit's arithmetic in plain Python integers, written from docs/formats.md alone.

An oracle of its own beside golden/ops.py: integers without width, one element at a time, nothing shared with
either the golden model or the hardware.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction

T = [round(2**15 * 2 ** (-k / 64)) for k in range(65)]
S = [min(65535, round(2**16 / (1 + math.exp(-k / 16)))) for k in range(257)]


def rs(x: int, n: int) -> int:
    """rnd_shift of section 1."""
    if n <= 0:
        return x << -n
    return (x + (1 << (n - 1))) >> n


def sat(x: int, bits: int) -> int:
    return max(-(1 << (bits - 1)), min((1 << (bits - 1)) - 1, x))


def fp16(value: Fraction) -> float:
    """Nearest binary16, ties to even, magnitude at most 65504; through the platform's own conversion.

    The values that occur have at most 53 significant bits, so the double in between is exact.
    """
    exact = float(value)
    assert Fraction(exact) == value
    clamped = max(-65504.0, min(65504.0, exact))
    return struct.unpack("<e", struct.pack("<e", clamped))[0]


def bits16(half: float) -> int:
    return struct.unpack("<H", struct.pack("<e", half))[0]


def int24(half: float) -> int:
    return int(Fraction(half) * 2**24)


def a8(x: list[int]) -> tuple[list[int], int, int]:
    """Section 2: codes, scale mantissa, scale exponent."""
    amax = max(abs(v) for v in x)
    if amax == 0:
        return [0] * len(x), 0, 0
    sh = amax.bit_length() - 16
    D = math.ceil(Fraction(amax) / Fraction(2) ** sh)
    R = (127 << 24) // D
    return [rs(v * R, 24 + sh) for v in x], rs(D * 33026, 16), sh - 22


def scale_accumulator(acc: int, sm: int, se: int) -> int:
    """Section 4, last line."""
    return sat(rs(rs(acc, 8) * sm, -se), 32)


def rms_scale(x: list[int], En: int) -> tuple[int, int, int]:
    """Section 5: the shift s, the reciprocal r and the first shift count 9 + j + s."""
    amax = max(abs(v) for v in x)
    s = max(0, amax.bit_length() - 15)
    V = max(sum(rs(v, s) ** 2 for v in x) + rs(En, 2 * s), 1)
    j = next(j for j in range(-20, 20) if (1 << 30) <= math.floor(V * Fraction(4) ** -j) < (1 << 32))
    q = math.isqrt(math.floor(V * Fraction(4) ** -j))
    return s, ((1 << 31) - 1) // q, 9 + j + s


def rmsnorm(x: list[int], w: list[int], f: int, En: int) -> list[int]:
    _, r, n1 = rms_scale(x, En)
    return [sat(rs(rs(v * r, n1) * wi, f + 6), 32) for v, wi in zip(x, w)]


def rope(x: list[int], table: list[int]) -> list[int]:
    """Section 6; `table` holds (cos, sin) per pair."""
    y = []
    for i in range(0, len(x), 2):
        c, s = table[i], table[i + 1]
        y += [sat(rs(x[i] * c - x[i + 1] * s, 14), 32), sat(rs(x[i] * s + x[i + 1] * c, 14), 32)]
    return y


def kv_scale(x: list[int], bits: int) -> tuple[float, float]:
    """Section 7: minimum and scale."""
    c, f = {4: (69905, 20), 8: (65793, 24)}[bits]
    x = [sat(v, 26) for v in x]
    low, span = min(x), max(x) - min(x)
    return fp16(Fraction(low, 2**16)), fp16(Fraction(span * c, 2 ** (f + 16)))


def kv(x: list[int], bits: int) -> tuple[list[int], float, float]:
    """Section 7: codes, minimum, scale."""
    minimum, scale = kv_scale(x, bits)
    if scale == 0:
        return [0] * len(x), minimum, scale
    M, E = Fraction(scale), 0
    while M >= 2048:
        M, E = M / 2, E + 1
    while M < 1024:
        M, E = M * 2, E - 1
    Rk, m0 = ((1 << 26) - 1) // int(M), int(Fraction(minimum) * 2**16)
    codes = [rs((sat(v, 26) - m0) * Rk, 42 + E) for v in x]
    return [max(0, min((1 << bits) - 1, c)) for c in codes], minimum, scale


def exp2(x: int) -> int:
    """Section 9: exp2(-x), x >= 0 in Q16."""
    i, f = x >> 16, x & 0xFFFF
    k, r = f >> 10, f & 1023
    return rs(T[k] - rs((T[k] - T[k + 1]) * r, 10), min(i, 31))


def sigmoid(x: int) -> int:
    if abs(x) >= 16 << 16:
        sg = 65535
    else:
        k, r = abs(x) >> 12, abs(x) & 4095
        sg = S[k] + rs((S[k + 1] - S[k]) * r, 12)
    return 65536 - sg if x < 0 else sg


def silu(x: int) -> int:
    return rs(x * sigmoid(x), 16)


def gate(g: int, u: int) -> int:
    return sat(rs(silu(g) * u, 16), 32)


def add(x: int, y: int) -> int:
    return sat(x + y, 32)


def vector(rng, n: int, kind: str) -> list[int]:
    """Q16 test vectors by kind: ordinary, tiny, extreme, all equal, zero, one spike."""
    top = (1 << 31) - 1
    return {
        "ordinary": lambda: [sat(int(rng.gauss(0, 3 * 65536)), 32) for _ in range(n)],
        "wide": lambda: [rng.randint(-(1 << rng.randint(1, 31)), 1 << rng.randint(0, 30)) for _ in range(n)],
        "tiny": lambda: [rng.randint(-1, 1) for _ in range(n)],
        "extreme": lambda: [rng.choice([-top - 1, top, 0, 1, -1]) for _ in range(n)],
        "lowest": lambda: [-top - 1] * n,
        "equal": lambda: [rng.choice([12345, -777])] * n,
        "zero": lambda: [0] * n,
        "spike": lambda: [0] * (n - 1) + [rng.choice([1, -1, 65536, top, -top - 1])],
    }[kind]()


KINDS = ("ordinary", "wide", "tiny", "extreme", "lowest", "equal", "zero", "spike")


def softmax(
    z: list[int], live: list[int], scale: list[float], minimum: list[float]
) -> tuple[list[dict], dict, tuple[int, int]]:
    """Section 8 from the scores on: per tile of 32 the codes and the sidecar, the final output scale, and (M, l).

    `z` and the records are padded to whole tiles.
    """
    M, l, tiles = None, 0, []
    for at in range(0, len(z), 32):
        alive = [t for t in range(at, at + 32) if live[t]]
        if not alive:
            tiles.append({"codes": [0] * 32, "addend": 0, "shift": 0, "decay": 0})
            continue
        top = max(math.ceil(Fraction(z[t], 65536)) for t in alive)
        new = top if M is None else max(M, top)
        d = 63 if M is None else min(63, new - M)
        M = new
        p = {t: exp2((M << 16) - z[t]) for t in alive}
        l = (l >> d) + (sum(p.values()) << 16)
        w = {t: p[t] * int24(scale[t]) for t in alive}
        sh = max(max(w.values()).bit_length() - 7, 15)
        codes = [min(127, rs(w[t], sh)) if t in w else 0 for t in range(at, at + 32)]
        addend = rs(sum(p[t] * int24(minimum[t]) for t in alive), 15)
        tiles.append({"codes": codes, "addend": addend, "shift": sh - 15, "decay": d})
    if l == 0:
        return tiles, {"pre": 0, "mult": 0, "post": 23}, (-(1 << 20), 0)
    L = l >> (l.bit_length() - 16)
    return tiles, {"pre": l.bit_length() - 31, "mult": ((1 << 31) - 1) // L, "post": 23}, (M, l)


def attention_output(tiles: list[dict], final: dict, vcodes: list[list[int]]) -> list[int]:
    """What the matrix unit makes of the tiles (docs/engine.md section 3): outputs in Q16 for vcodes[slot][element]."""
    o = [0] * len(vcodes[0])
    for index, tile in enumerate(tiles):
        for i in range(len(o)):
            dot = sum(tile["codes"][t] * vcodes[32 * index + t][i] for t in range(32))
            o[i] = (o[i] >> tile["decay"]) + (dot << tile["shift"]) + tile["addend"]
    return [sat(rs(rs(v, final["pre"]) * final["mult"], final["post"]), 32) for v in o]
