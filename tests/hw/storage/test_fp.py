"""The floating-point units against numpy's own binary16 and binary32, operand by operand."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from amaranth.sim import Simulator

from golden.spec.storage import SOFTMAX_SCALE
from golden.storage import fp as golden
from hw.storage import fp

COUNT = 3000


@pytest.fixture
def module():
    """The units under test; the mutation tests put a broken copy in its place."""
    return fp


def run(dut, inputs, outputs):
    """Feed one operand set per cycle; the outputs `dut.latency` cycles later."""
    results = []
    sets = list(zip(*inputs.values()))

    async def bench(ctx):
        for cycle in range(len(sets) + dut.latency):
            if cycle < len(sets):
                for name, value in zip(inputs, sets[cycle]):
                    ctx.set(getattr(dut, name), value)
            if cycle >= dut.latency:
                results.append(tuple(ctx.get(output) for output in outputs))
            await ctx.tick()

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(bench)
    sim.run()
    return results


def halves(rng, count=COUNT):
    """Binary16 patterns: any bits, small exponents, and the corner values."""
    bits = rng.integers(0, 1 << 16, count)
    bits[: count // 4] &= 0x8FFF
    corners = [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x3C00]
    bits[-len(corners) :] = rng.permutation(corners)
    return bits.astype(np.uint16)


def singles(rng, count=COUNT, special=True):
    """Binary32 patterns without subnormals and -0: near each other in exponent, far, tiny, huge, special."""
    exponent = rng.integers(100, 155, count)
    exponent[: count // 4] = rng.integers(1, 255, count // 4)
    exponent[count // 4 : count // 3] = rng.integers(1, 5, count // 3 - count // 4)
    mantissa = rng.integers(0, 1 << 23, count)
    mantissa[::5] &= rng.integers(0, 1 << 23, len(mantissa[::5])) & ~0xFFF
    mantissa[1::7] |= 0x7FFFF0
    bits = (rng.integers(0, 2, count) << 31) | (exponent << 23) | mantissa
    corners = [0, 0x3F800000, 0xBF800000, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF]
    corners += [0x7F800000, 0xFF800000, 0x7FC00000] if special else []
    places = rng.integers(0, count, 40 * len(corners))
    bits[places] = np.tile(corners, 40)
    return bits.astype(np.uint32)


def as_float(bits):
    return bits.view(np.float32)


def bits32(x):
    return np.asarray(x, np.float32).view(np.uint32)


def unpack(pattern):
    """An fp16 pattern as the integer of its unpacked form."""
    sign, exponent, fraction = pattern >> 15, (pattern >> 10) & 31, pattern & 1023
    if exponent == 0:
        if fraction == 0:
            return 0
        zeros = 10 - int(fraction).bit_length()
        return ((fraction << (zeros + 1)) & 1023) | ((16 - zeros) << 10) | (sign << 16)
    return fraction | ((63 if exponent == 31 else exponent + 16) << 10) | (sign << 16)


def check(got, expected, *operands):
    for index, (a, b) in enumerate(zip(got, expected)):
        assert a == b, (
            f"operands {[hex(int(o[index])) for o in operands]}: got {int(a):#x}, expected {int(b):#x}"
        )


def test_unpack_of_every_pattern_class(module):
    patterns = [int(p) for p in halves(np.random.default_rng(1))]
    dut = module.Unpack16()
    got = [o for (o,) in run(dut, {"i": patterns}, [dut.o.as_value()])]
    check(got, [unpack(p) for p in patterns], patterns)


def test_product_is_exact(module):
    rng = np.random.default_rng(2)
    a, b = halves(rng), halves(rng)
    dut = module.Mul16()
    inputs = {
        "a": [module.UNPACKED.from_bits(unpack(int(x))) for x in a],
        "b": [module.UNPACKED.from_bits(unpack(int(x))) for x in b],
    }
    got = [o for (o,) in run(dut, inputs, [dut.o])]
    check(got, bits32(golden.mul(a.view(np.float16), b.view(np.float16))), a, b)


@pytest.mark.parametrize("seed", [3, 4])
def test_sum_rounds_to_nearest_even(seed, module):
    rng = np.random.default_rng(seed)
    a, b = singles(rng), singles(rng)
    close = rng.integers(0, COUNT, 800)
    b[close] = (
        a[close]
        ^ (rng.integers(0, 4, 800) << 30).astype(np.uint32)
        ^ rng.integers(0, 1 << 12, 800).astype(np.uint32)
    )
    b = np.where((b & 0x7F800000) == 0, np.uint32(0), b)
    b = np.where(np.isnan(as_float(b)), np.uint32(0x7FC00000), b)
    dut = module.Add32()
    got = [o for (o,) in run(dut, {"a": a.tolist(), "b": b.tolist()}, [dut.o])]
    check(got, bits32(golden.add(as_float(a), as_float(b))), a, b)


def test_scaling_by_powers_of_two(module):
    rng = np.random.default_rng(5)
    x, d = singles(rng), rng.integers(0, 256, COUNT)
    d[::3] = rng.integers(0, 4, len(d[::3]))
    dut = module.Scale32()
    got = [o for (o,) in run(dut, {"i": x.tolist(), "d": d.tolist()}, [dut.o])]
    check(got, bits32(golden.scale2(as_float(x), d)), x, d)


@pytest.mark.parametrize(("c", "frac"), [(SOFTMAX_SCALE[64], 19), (SOFTMAX_SCALE[128], 19), (131071, 15)])
def test_score(c, frac, module):
    s = singles(np.random.default_rng(6))
    dut = module.Score()
    inputs = {"s": s.tolist(), "c": [c] * COUNT, "frac": [frac] * COUNT}
    got = run(dut, inputs, [dut.o.z, dut.o.poison, dut.o.dead])
    x = as_float(s)
    z = golden.score(x, np.array(c), np.array(frac))
    for index, result in enumerate(got):
        expected = (z[index], golden.poison(x[index]), np.isneginf(x[index]))
        assert result == expected, f"s = {int(s[index]):#x}: got {result}, expected {expected}"


def test_product_with_an_integer(module):
    rng = np.random.default_rng(7)
    x, n, f = singles(rng), rng.integers(0, 1 << 17, COUNT), rng.integers(0, 64, COUNT)
    n[::4] >>= rng.integers(0, 17, len(n[::4]))
    n[1::50] = 65536
    dut = module.MulInt32()
    got = [o for (o,) in run(dut, {"i": x.tolist(), "n": n.tolist(), "f": f.tolist()}, [dut.o])]
    check(got, bits32(golden.mulint(as_float(x), n, f)), x, n, f)


def test_conversion_to_binary16(module):
    rng = np.random.default_rng(8)
    x = singles(rng)
    x[::2] = (x[::2] & 0x807FFFFF) | (rng.integers(98, 146, len(x[::2])) << 23).astype(np.uint32)
    x[::9] &= np.uint32(0xFFFFF000)
    dut = module.ToFp16()
    got = [o for (o,) in run(dut, {"i": x.tolist()}, [dut.o])]
    check(got, golden.to_fp16(as_float(x)).view(np.uint16), x)


MUTATIONS = [
    (test_unpack_of_every_pattern_class, {}, "(held[:10] << 1) << zeros", "held[:10] << zeros"),
    (
        test_product_is_exact,
        {},
        "* Cat(vb.frac, Const(1, 1))",
        "* Cat(Const(0, 1), vb.frac[1:], Const(1, 1))",
    ),
    (test_product_is_exact, {}, "bad | (infinite & zero)", "bad"),
    (
        test_sum_rounds_to_nearest_even,
        {"seed": 3},
        "total_8[3] & (total_8[:3].any() | total_8[4])",
        "total_8[3]",
    ),
    (test_sum_rounds_to_nearest_even, {"seed": 3}, "Cat(sticky_3 | below,", "Cat(below,"),
    (test_sum_rounds_to_nearest_even, {"seed": 3}, "tiny_9 | zero_9", "zero_9"),
    (test_scaling_by_powers_of_two, {}, "difference[8] | (difference == 0)", "difference[8]"),
    (test_score, {"c": 66856, "frac": 19}, "(fine[1:] + fine[0])", "(fine[1:] + 0)"),
    (
        test_product_with_an_integer,
        {},
        "shifted_6[18] & (shifted_6[:18].any() | shifted_6[19])",
        "shifted_6[18]",
    ),
    (test_conversion_to_binary16, {}, "moved_2[24] & (moved_2[:24].any() | moved_2[25])", "moved_2[24]"),
]


@pytest.mark.parametrize(
    ("test", "arguments", "right", "wrong"), MUTATIONS, ids=[m[2][:30] for m in MUTATIONS]
)
def test_a_wrong_unit_turns_its_test_red(test, arguments, right, wrong):
    source = Path(fp.__file__).read_text()
    assert source.count(right) == 1, f"{right!r} stands {source.count(right)} times in the source"
    mutant = types.ModuleType("mutant")
    mutant.__file__ = fp.__file__
    sys.modules["mutant"] = mutant
    exec(compile(source.replace(right, wrong), fp.__file__, "exec"), mutant.__dict__)
    with pytest.raises(AssertionError, match="expected"):
        test(**arguments, module=mutant)
