"""Every vectorised operator against the page transcribed in plain integers, over hypothesis inputs and corners."""

import importlib.util
import pathlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden import ops
from golden.attention import ScoreScale, attend, attend_partial, finish, merge, scores
from golden.ops import KVCodes
from golden.spec import KVStrataError

_spec = importlib.util.spec_from_file_location("page", pathlib.Path(__file__).with_name("page.py"))
page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page)

LOW, HIGH = -(2**31), 2**31 - 1
CORNERS = [0, 1, -1, 2**15 - 1, 2**15, -(2**15), 2**16, LOW, HIGH, 127 * 2**9, 3]
q16 = st.one_of(
    st.sampled_from(CORNERS), st.integers(LOW, HIGH), st.integers(-(2**20), 2**20), st.integers(-99, 99)
)
vectors = st.lists(q16, min_size=1, max_size=24)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@given(st.integers(-(2**50), 2**50), st.integers(-8, 60))
def test_rounding_shift(x, n):
    assert ops.rnd_shift(tensor(x), n).item() == page.rnd_shift(x, n)
    assert ops.rnd_shift(tensor([x]), tensor([n])).item() == page.rnd_shift(x, n)


@pytest.mark.parametrize(
    ("x", "n", "expected"), [(1, 1, 1), (-1, 1, 0), (3, 1, 2), (-3, 1, -1), (5, 2, 1), (6, 2, 2)]
)
def test_ties_go_towards_plus_infinity(x, n, expected):
    assert ops.rnd_shift(tensor(x), n).item() == expected


@given(st.integers(-(2**61), 2**61))
def test_bit_length(x):
    assert ops.bitlen(tensor(x)).item() == abs(x).bit_length()


def test_fp16_is_numpys_rounding_of_float64():
    rng = np.random.default_rng(3)
    values = np.concatenate([
        rng.standard_normal(100_000) * 2.0 ** rng.integers(-30, 17, 100_000),
        np.array([0.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 65504, 65519.9, 2.0**-14 - 2.0**-25]),
        np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11]),
        # just above a tie: through float32 it would become the tie and then round down
        np.array([1 + 2.0**-11 + 2.0**-40, 1 - 2.0**-12 - 2.0**-40]),
    ])  # fmt: skip
    values = values[np.abs(values) < 65520]
    assert np.array_equal(
        ops.fp16(torch.from_numpy(values)).numpy(), values.astype(np.float16).astype(np.float64)
    )


def test_fp16_saturates_and_refuses_what_is_not_finite():
    assert ops.fp16(torch.tensor([1e9, -1e9], dtype=torch.float64)).tolist() == [65504, -65504]
    with pytest.raises(KVStrataError, match=r"must be finite before it becomes fp16, got nan\."):
        ops.fp16(torch.tensor([float("nan")], dtype=torch.float64))


@given(vectors)
def test_a8(x):
    got = ops.quantise_a8(tensor(x))
    assert (got.codes.tolist(), got.mantissa.item(), got.exponent.item()) == page.a8(x)
    assert got.codes.abs().max() <= 127
    assert 0 <= got.mantissa.item() < 2**16


@given(st.lists(q16, min_size=8, max_size=8), st.lists(st.integers(-30000, 30000), min_size=8, max_size=8),
       st.integers(-6, 20), st.integers(0, 2**40))  # fmt: skip
def test_rmsnorm(x, w, f, en):
    got = ops.rmsnorm(tensor(x), ops.NormWeight(tensor(w), f, en))
    assert got.tolist() == page.rmsnorm(x, w, f, en)


@given(st.lists(q16, min_size=8, max_size=8), st.integers(0, 8191))
def test_rope(x, position):
    cos, sin = ops.rope_table(tensor([position]), 8, 100000.0)
    assert ops.rope(tensor([x]), cos, sin)[0].tolist() == page.rope(x, cos[0].tolist(), sin[0].tolist())


@given(vectors, st.sampled_from([4, 8]))
def test_kv_quantisation(x, bits):
    got = ops.quantise_kv(tensor(x), bits)
    codes, scale, minimum = page.kv(x, bits)
    assert got.codes.tolist() == codes
    assert (Fraction(got.scale.item()), Fraction(got.minimum.item())) == (scale, minimum)


@given(st.one_of(st.integers(0, 2**20), st.integers(0, 2**33)))
def test_exp2(x):
    assert ops.exp2_neg(tensor(x)).item() == page.exp2_neg(x)


@given(q16, q16)
def test_sigmoid_and_gate(g, u):
    assert ops.sigmoid(tensor(g)).item() == page.sigmoid(g)
    assert ops.gate_product(tensor(g), tensor(u)).item() == page.gate(g, u)


@given(q16, q16)
def test_residual_saturates(x, y):
    assert ops.residual(tensor(x), tensor(y)).item() == page.sat(x + y, 32)


def random_head(seed: int, slots: int, dh: int, spread: float):
    rng = np.random.default_rng(seed)
    draw = lambda *s: (rng.standard_normal(s) * spread * 65536).clip(-(2**31), 2**31 - 1).astype(np.int64)  # noqa: E731
    return tensor(draw(1, 3, dh)), tensor(draw(1, slots, dh)), tensor(draw(1, slots, dh))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 9999), st.integers(1, 100), st.sampled_from([16, 64, 128, 256]),
       st.sampled_from([0.01, 1, 400, 30_000]), st.sampled_from([4, 8]))  # fmt: skip
def test_attention_of_a_head(seed, slots, dh, spread, bits):
    q, k, v = random_head(seed, slots, dh, spread)
    kq, vq = ops.quantise_kv(k, bits), ops.quantise_kv(v, bits)
    live = torch.from_numpy(np.random.default_rng(seed).random((3, slots)) < 0.7)
    live[2] = False
    got = attend(q, kq, vq, live)
    keys = [page.kv(row, bits) for row in k[0].tolist()]
    values = [page.kv(row, bits) for row in v[0].tolist()]
    for t in range(3):
        assert got[0, t].tolist() == page.attention(q[0, t].tolist(), keys, values, live[t].tolist())


def test_attention_corners():
    dh = 32
    same = KVCodes(
        torch.full((1, 40, dh), 5), torch.full((1, 40), 0.5).double(), torch.full((1, 40), -1.0).double()
    )
    live = torch.ones(1, 40, dtype=torch.bool)
    # all-equal values: the mixture is that value, to the 7-bit codes of probability times scale (2.5 / 128)
    out = attend(torch.full((1, 1, dh), 65536), same, same, live)
    assert (out - int(1.5 * 65536)).abs().max() <= 2.5 / 128 * 65536
    # no live slot: zeros, never NaN
    assert attend(torch.full((1, 1, dh), 65536), same, same, ~live).abs().sum() == 0
    # a zero query: uniform weights
    assert (
        attend(torch.zeros(1, 1, dh, dtype=torch.int64), same, same, live) - int(1.5 * 65536)
    ).abs().max() <= 8
    # one huge score takes all
    peak = KVCodes(same.codes.clone(), same.scale, same.minimum)
    peak.codes[0, 17] = 15
    out = attend(torch.full((1, 1, dh), 500 * 65536), peak, peak, live)
    assert (out - int(6.5 * 65536)).abs().max() <= 7.5 / 128 * 65536


def test_bad_input_is_named():
    with pytest.raises(KVStrataError, match=r"KV codes must have \[2, 4, 8\] bits, got 3\."):
        ops.quantise_kv(tensor([1, 2]), 3)
    kv = ops.quantise_kv(torch.ones(2, 4, 16, dtype=torch.int64), 4)
    with pytest.raises(KVStrataError, match="query heads must be a multiple of KV heads, got 3 and 2"):
        attend(torch.ones(3, 1, 16, dtype=torch.int64), kv, kv, torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(KVStrataError, match="head size must be even and 2 to 256, got 258"):
        attend(torch.ones(1, 1, 258, dtype=torch.int64), *[ops.quantise_kv(torch.ones(1, 4, 258).long(), 4)] * 2,
               torch.ones(1, 4, dtype=torch.bool))  # fmt: skip
    with pytest.raises(KVStrataError, match="RMSNorm needs finite weights and eps >= 0"):
        ops.prepare_norm(torch.ones(8), -1.0)


def partial_of(seed, slots, spread=3.0):
    q, k, v = random_head(seed, slots, 32, spread)
    k, v = ops.quantise_kv(k, 8), ops.quantise_kv(v, 8)
    z = scores(ops.quantise_a8(q[:, None]), k, ScoreScale.of(32))
    return z, v, torch.ones(3, slots, dtype=torch.bool)


def cut(kv, part):
    return KVCodes(*(x[:, part] for x in kv))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 4))
def test_partials_of_two_places_merge_to_the_whole(seed, tiles, more):
    """Engine and drive each hold some tiles: their merge is the whole up to the 7-bit probabilities."""
    z, v, live = partial_of(seed, 32 * (tiles + more))
    here, there = slice(0, 32 * tiles), slice(32 * tiles, None)
    parts = [attend_partial(z[..., s], live[:, s], cut(v, s)) for s in (here, there)]
    whole, merged, swapped = attend_partial(z, live, v), merge(*parts), merge(*parts[::-1])
    assert all(torch.equal(a, b) for a, b in zip(merged, swapped))
    assert torch.equal(merged.m, whole.m)
    value_range = (v.scale.max() * 255 * 65536).item()
    assert (finish(merged) - finish(whole)).abs().max() <= value_range / 256
    nothing = attend_partial(z[..., here], ~live[:, here], cut(v, here))
    assert torch.equal(finish(merge(nothing, parts[1])), finish(parts[1]))
    assert finish(merge(nothing, nothing)).abs().sum() == 0


def test_dense_attention_follows_torchs_kernel():
    q, k, v = (
        ops.to_q16(torch.randn(4, 70, 64, generator=torch.Generator().manual_seed(i))) for i in range(3)
    )
    live = torch.ones(70, 70, dtype=torch.bool).tril()
    got = ops.from_q16(attend(q, ops.quantise_kv(k, 8), ops.quantise_kv(v, 8), live))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(ops.from_q16(x).half().float() for x in (q, k, v)), is_causal=True
    )
    # 8-bit q, K and V and 7-bit probabilities against values of size 3
    assert (got - expected).abs().max() < 0.08
    assert (got - expected).abs().mean() < 0.01


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9999), st.sampled_from([32, 96, 576]), st.integers(1, 5))
def test_products_do_not_depend_on_the_order_of_their_terms(seed, k, parts):
    """Any order and any split of the inner dimension gives the same accumulator, up to the row limit of section 3."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (3, k), generator=rng)
    weights = torch.randint(-(1 << 47) // (127 * k), (1 << 47) // (127 * k), (4, k), generator=rng).double()
    order = torch.randperm(k, generator=rng)
    whole = ops.accumulate(codes, weights)
    assert torch.equal(whole, ops.accumulate(codes[:, order], weights[:, order]))
    split = [
        ops.accumulate(a, b) for a, b in zip(codes.tensor_split(parts, 1), weights.tensor_split(parts, 1))
    ]
    assert torch.equal(whole, torch.stack(split).sum(0))
    assert [sum(int(a) * int(b) for a, b in zip(codes[0], row)) for row in weights] == whole[0].tolist()
