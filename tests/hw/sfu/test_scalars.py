"""Per-vector scalars against plain integers: every kind, corner vectors, stalls, latency."""

import random

import pytest

from hw.engine.sfu.lanes import N1_BIAS
from hw.engine.sfu.scalars import ScalarKind, ScalarUnit
from hw.lib import arith
from hw.lib.testing import pauses, through
from tests.hw.sfu import reference as ref


def request(kind: ScalarKind, v: int, x: list[int], **fields) -> dict:
    zero = {"total": 0, "shift": 0, "epsilon": 0, "factor": 0, "exponent": 0, "wide": 0}
    return {"kind": kind, "v": v, "least": min(x), "most": max(x)} | zero | fields


def case_a8(rng, v, x):
    factor, exponent = rng.choice([(0, 0), (47274, 18), (33427, 18), (65535, 20), (32768, 17)])
    amax = max(map(abs, x))
    _, sm, se = ref.a8(x)
    output = {"pre": 8, "mult": sm, "post": -se}
    if factor:
        output |= {"mult": ref.rs(sm * factor, 16), "post": -se - 16 + exponent}
    lanes = {}
    if amax:
        sh = amax.bit_length() - 16
        D = -(-amax // (1 << sh)) if sh > 0 else amax << -sh
        lanes = {"m1": (127 << 24) // D, "n1": 24 + sh + N1_BIAS}
    return request(ScalarKind.A8, v, x, factor=factor, exponent=exponent), lanes, output


def case_square_shift(rng, v, x):
    s = max(0, max(map(abs, x)).bit_length() - 15)
    return request(ScalarKind.SQUARE_SHIFT, v, x), {"m1": 1, "n1": s + N1_BIAS}, {}


def case_norm(rng, v, x):
    En = rng.choice([0, 1, 24_739, (1 << 48) - 1, rng.randint(0, 1 << 40)])
    s, r, n1 = ref.rms_scale(x, En)
    total = sum(ref.rs(e, s) ** 2 for e in x)
    fields = {"total": total, "shift": s, "epsilon": En}
    return request(ScalarKind.NORM, v, x, **fields), {"m1": r, "n1": n1 + N1_BIAS}, {}


def case_kv(rng, v, x):
    bits = rng.choice([4, 8])
    minimum, scale = ref.kv_scale(x, bits)
    lanes = {"m0": int(minimum * 65536), "scale": ref.bits16(scale), "minimum": ref.bits16(minimum), "m1": 0}
    if scale:
        M, E = scale, 0
        while M >= 2048:
            M, E = M / 2, E + 1
        while M < 1024:
            M, E = M * 2, E - 1
        lanes |= {"m1": ((1 << 26) - 1) // int(M), "n1": 42 + E + N1_BIAS}
    return request(ScalarKind.KV, v, x, wide=bits == 8), lanes, {}


CASES = {
    ScalarKind.A8: case_a8,
    ScalarKind.SQUARE_SHIFT: case_square_shift,
    ScalarKind.NORM: case_norm,
    ScalarKind.KV: case_kv,
}


def scenario(rng, kinds, count):
    cases = []
    for v in range(count):
        x = ref.vector(rng, rng.choice([32, 64]), rng.choice(ref.KINDS))
        if rng.random() < 0.3:
            x = [e >> rng.randint(5, 28) for e in x]
        cases.append(CASES[rng.choice(kinds)](rng, v % 256, x))
    return cases


def check(kinds, seed, count, stall=0.0):
    cases = scenario(random.Random(seed), kinds, count)
    got, _, _ = through(ScalarUnit(), [c[0] for c in cases], pauses(seed, stall), pauses(seed + 7, stall))
    for (req, lanes, output), result in zip(cases, got):
        assert (result.v, result.kind) == (req["v"], req["kind"])
        for name, want in lanes.items():
            assert getattr(result.lanes, name) == want, f"scalar {name} of {req}"
        for name, want in output.items():
            assert getattr(result.output, name) == want, f"scalar {name} of {req}"


@pytest.mark.parametrize("kind", list(ScalarKind), ids=lambda k: k.name.lower())
def test_each_kind_equals_plain_integers(kind):
    check([kind], seed=kind.value, count=150)


@pytest.mark.parametrize("seed", range(2))
def test_mixed_kinds_under_stalls(seed):
    check(list(ScalarKind), seed=50 + seed, count=80, stall=0.3)


@pytest.mark.parametrize("kind", list(ScalarKind), ids=lambda k: k.name.lower())
def test_latency_and_period_are_the_stated_cycles(kind):
    cases = scenario(random.Random(3), [kind], 12)
    _, entered, left = through(ScalarUnit(), [c[0] for c in cases])
    assert left[0] - entered[0] == ScalarUnit.latency(kind)
    assert {b - a for a, b in zip(left, left[1:])} == {ScalarUnit.period(kind)}


def test_mutations_turn_the_comparison_red(monkeypatch):
    monkeypatch.setattr(arith, "round_half", lambda y: y >> 1)
    with pytest.raises(AssertionError, match="scalar"):
        check([ScalarKind.A8], seed=0, count=40)
