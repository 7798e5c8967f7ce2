"""The output scaler against plain integers, and broken hardware that the array's tests must notice."""

import dataclasses
import random

import pytest
from amaranth.sim import Simulator

from hw.engine import array, drain, lane
from hw.engine.array import LanePair
from hw.engine.drain import PRE_BITS, ScaleLane
from tests.hw import test_rce


def rounded(value, shift):
    return (value + (1 << (shift - 1))) >> shift if shift else value


def scaled(acc, pre, mult, post):
    return max(-(2**31), min(2**31 - 1, rounded(rounded(acc, pre) * mult, post)))


def scale_cases(count=200):
    rng = random.Random(9)
    for _ in range(count):
        pre = rng.choice((0, 8, 8, rng.randrange(30)))
        size = rng.randrange(1, PRE_BITS + pre - 1)
        sign = rng.choice((-1, 1))
        yield (
            sign * rng.randrange(1 << min(size, 54)),
            pre,
            rng.randrange(1 << 17),
            rng.choice((6, 23, 37, rng.randrange(64))),
        )
    for tie in (-3, -1, 1, 3):
        yield tie << 7, 8, 1 << 15, 15  # exactly between two results of the first rounding
        yield tie << 8, 8, 1 << 5, 6


def run_scale():
    dut, cases, got, rng = ScaleLane(), list(scale_cases()), [], random.Random(4)

    async def bench(ctx):
        for acc, pre, mult, post in [*cases, *[cases[-1]] * ScaleLane.latency]:
            for move in [0] * rng.randrange(3) + [1]:
                ctx.set(dut.acc, acc if move else ~acc)
                ctx.set(dut.scale, {"pre": pre, "mult": mult, "post": post})
                ctx.set(dut.move, move)
                await ctx.tick()
            got.append(ctx.get(dut.y))

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    simulator.add_testbench(bench)
    simulator.run()
    for case, y in zip(cases, got[ScaleLane.latency - 1 :]):
        assert y == scaled(*case), case


def test_output_scale_is_the_format():
    run_scale()


def test_truncation_instead_of_rounding_is_noticed(monkeypatch):
    monkeypatch.setattr(drain, "round_half", lambda y: y >> 1)
    with pytest.raises(AssertionError):
        run_scale()


def test_missing_saturation_is_noticed(monkeypatch):
    monkeypatch.setattr(drain, "saturate", lambda x, bits: x[:bits].as_signed())
    with pytest.raises(AssertionError):
        run_scale()


def test_a_broken_multiplier_is_noticed(monkeypatch):
    real = LanePair._operands

    def broken(self, j, *operands):
        o = real(self, j, *operands)
        return dataclasses.replace(o, shared=o.shared & ~1) if j == 17 else o

    monkeypatch.setattr(LanePair, "_operands", broken)
    with pytest.raises(AssertionError):
        test_rce.test_dense_dots_are_exact_for_every_code_width(8)


def test_swapped_positions_of_a_pattern_are_noticed(monkeypatch):
    real = array._selects
    monkeypatch.setattr(
        array, "_selects", lambda patterns, sparse: real((patterns[1], patterns[0], patterns[2]), sparse)
    )
    with pytest.raises(AssertionError):
        test_rce.test_every_pattern_and_code_pair_of_a_quad()


def test_a_wrong_subnormal_scale_is_noticed(monkeypatch):
    monkeypatch.setattr(lane, "half_shift", lambda half: (half.exponent - 1)[:5])
    with pytest.raises(AssertionError):
        test_rce.test_lane_scales_accumulates_and_rescales_exactly(lane.Multipliers.LUTS)
