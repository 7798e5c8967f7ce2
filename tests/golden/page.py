"""docs/formats.md transcribed once more, in plain Python integers: the oracle of golden.ops and golden.attention.

Written from the page alone, one element at a time, sharing nothing with the vectorised code.
"""

import math
from fractions import Fraction


def rnd_shift(x: int, n: int) -> int:
    return (x + (1 << (n - 1))) >> n if n > 0 else x << -n


def sat(x: int, b: int) -> int:
    return max(-(1 << (b - 1)), min((1 << (b - 1)) - 1, x))


def fp16(v: Fraction) -> Fraction:
    """Nearest binary16, ties to even, saturating: by exact rationals."""
    if v == 0:
        return Fraction(0)
    e = math.frexp(float(abs(v)))[1]  # only a guess; fixed below
    while abs(v) >= Fraction(2) ** e:
        e += 1
    while abs(v) < Fraction(2) ** (e - 1):
        e -= 1
    quantum = Fraction(2) ** max(e - 11, -24)
    q, r = divmod(abs(v), quantum)
    up = r * 2 > quantum or (r * 2 == quantum and q % 2)
    value = min((q + up) * quantum, Fraction(65504))
    return value if v > 0 else -value


def a8(x: list[int]) -> tuple[list[int], int, int]:
    amax = max(abs(v) for v in x)
    if amax == 0:
        return [0] * len(x), 0, 0
    sh = amax.bit_length() - 16
    d = math.ceil(Fraction(amax) / Fraction(2) ** sh)
    r = 127 * 2**24 // d
    return [rnd_shift(v * r, 24 + sh) for v in x], rnd_shift(d * 33026, 16), sh - 22


def product(codes: list[int], sm: int, se: int, weights: list[Fraction]) -> int:
    acc = sum(c * w * 2**24 for c, w in zip(codes, weights))
    assert acc.denominator == 1
    return sat(rnd_shift(rnd_shift(int(acc), 8) * sm, -se), 32)


def rmsnorm(x: list[int], w: list[int], f: int, en: int) -> list[int]:
    s = max(0, max(abs(v) for v in x).bit_length() - 15)
    v = max(1, sum(rnd_shift(e, s) ** 2 for e in x) + rnd_shift(en, 2 * s))
    j = -40
    while not 2**30 <= (v >> 2 * j if j > 0 else v << -2 * j) < 2**32:
        j += 1
    u = v >> 2 * j if j > 0 else v << -2 * j
    r = (2**31 - 1) // math.isqrt(u)
    return [sat(rnd_shift(rnd_shift(e * r, 9 + j + s) * k, f + 6), 32) for e, k in zip(x, w)]


def rope(x: list[int], c: list[int], s: list[int]) -> list[int]:
    y = []
    for i in range(len(x) // 2):
        y.append(sat(rnd_shift(x[2 * i] * c[i] - x[2 * i + 1] * s[i], 14), 32))
        y.append(sat(rnd_shift(x[2 * i] * s[i] + x[2 * i + 1] * c[i], 14), 32))
    return y


def kv(x: list[int], b: int) -> tuple[list[int], Fraction, Fraction]:
    x = [sat(v, 26) for v in x]
    mn, spread = min(x), max(x) - min(x)
    c, f = {4: (69905, 20), 8: (65793, 24)}[b]
    minimum, scale = fp16(Fraction(mn, 2**16)), fp16(Fraction(spread * c, 2 ** (f + 16)))
    m0 = minimum * 2**16
    assert m0.denominator == 1
    if scale == 0:
        return [0] * len(x), scale, minimum
    e = -60
    while scale / Fraction(2) ** e > 2047:
        e += 1
    m = scale / Fraction(2) ** e
    assert m.denominator == 1
    assert 1024 <= m <= 2047
    rk = (2**26 - 1) // int(m)
    return [max(0, min(2**b - 1, rnd_shift((v - int(m0)) * rk, 42 + e))) for v in x], scale, minimum


def exp2_neg(x: int) -> int:
    t = [math.floor(2**15 * 2 ** (-k / 64) + 0.5) for k in range(65)]
    i, f = x >> 16, x & 0xFFFF
    k, r = f >> 10, f & 1023
    return rnd_shift(t[k] - rnd_shift((t[k] - t[k + 1]) * r, 10), min(i, 31))


def sigmoid(x: int) -> int:
    a = abs(x)
    if a >= 16 << 16:
        sg = 65535
    else:
        s = [min(65535, math.floor(2**16 / (1 + math.exp(-k / 16)) + 0.5)) for k in range(257)]
        k, r = a >> 12, a & 4095
        sg = s[k] + rnd_shift((s[k + 1] - s[k]) * r, 12)
    return 65536 - sg if x < 0 else sg


def gate(g: int, u: int) -> int:
    return sat(rnd_shift(rnd_shift(g * sigmoid(g), 16) * u, 16), 32)


def attention(q: list[int], keys: list, values: list, live: list[bool]) -> list[int]:
    """One head: keys and values are kv() results by slot."""
    dh = len(q)
    a, sm, se = a8(q)
    value = math.log2(math.e) / math.sqrt(dh)
    ec = 0
    while math.floor(value * 2**ec + 0.5) < 2**15:
        ec += 1
    smp, sep = rnd_shift(sm * math.floor(value * 2**ec + 0.5), 16), se + 16 - ec
    m, l, o, first = 0, 0, [0] * dh, True
    for start in range(0, len(keys), 32):
        slots = [t for t in range(start, min(start + 32, len(keys))) if live[t]]
        if not slots:
            continue
        z = {}
        for t in slots:
            codes, scale, minimum = keys[t]
            acc = int(scale * 2**24) * sum(x * y for x, y in zip(a, codes)) + int(minimum * 2**24) * sum(a)
            z[t] = sat(rnd_shift(rnd_shift(acc, 8) * smp, -sep), 32)
        top = -(-max(z.values()) >> 16)
        d = 0 if first else min(63, max(m, top) - m)
        m, first = (top if first else max(m, top)), False
        p = {t: exp2_neg((m << 16) - z[t]) for t in slots}
        l = (l >> d) + (sum(p.values()) << 16)
        w = {t: p[t] * int(values[t][1] * 2**24) for t in slots}
        sh = max(max(w.values()).bit_length() - 7, 15)
        w8 = {t: min(127, rnd_shift(w[t], sh)) for t in slots}
        minima = rnd_shift(sum(p[t] * int(values[t][2] * 2**24) for t in slots), 15)
        for i in range(dh):
            o[i] = (o[i] >> d) + (sum(w8[t] * values[t][0][i] for t in slots) << (sh - 15)) + minima
    if first:
        return [0] * dh
    g = l.bit_length() - 31
    rl = (2**31 - 1) // (l >> (l.bit_length() - 16))
    return [sat(rnd_shift(rnd_shift(v, g) * rl, 23), 32) for v in o]
