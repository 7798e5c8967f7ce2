"""The exact attention of the in-storage unit against torch, and its own promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden.spec import KVStrataError
from golden.spec.storage import EXP2_TABLE
from golden.storage import attention, fp, vector_sets


def head(rng, queries, tokens, head_size, spread=2.0):
    q = (rng.normal(size=(queries, head_size)) * spread).astype(np.float16)
    k, v = (rng.normal(size=(tokens, head_size)).astype(np.float16) for _ in range(2))
    return q, k, v


def reference(q, k, v):
    q, k, v = (torch.from_numpy(x).double() for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0].numpy()


def bits(x):
    return x.view(np.uint16)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("tokens", [1, 16, 17, 300, 2000])
@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])
def test_dense_is_close_to_float64(head_size, tokens, spread):
    q, k, v = head(np.random.default_rng(tokens), 3, tokens, head_size, spread)
    expected = reference(q, k, v)
    error = np.abs(attention.dense(q, k, v) - expected)
    # fp16 output: half an ulp of the result, and p rounded to 11 bits against |v| of up to 5
    assert error.max() < 2**-11 * np.abs(expected).max() + 2**-11


def test_exponential_error_over_the_whole_range():
    x = np.arange(0, 27 << 16, 7)
    p = attention.exp2_fp16(x).astype(np.float64)
    exact = 2.0 ** (-x / 65536)
    normal = x <= 14 << 16
    assert np.abs(p / exact - 1)[normal].max() < 2**-11 + 2**-14
    assert np.abs(p - exact)[~normal].max() <= 2**-25 + 2**-28
    assert attention.exp2_fp16(np.array([0]))[0] == 1
    assert (np.diff(attention.exp2_fp16(np.arange(0, 28 << 16, 64)).astype(np.float64)) <= 0).all()
    assert attention.exp2_fp16(np.array([26 << 16]))[0] == 0
    assert len(EXP2_TABLE) == 65


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_arithmetic_matches_torch(seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 1 << 16, 200).astype(np.uint16).view(np.float16) for _ in range(2))
    product = torch.from_numpy(a).float() * torch.from_numpy(b).float() + 0.0
    np.testing.assert_array_equal(fp.mul(a, b), product.numpy())
    x, y = fp.mul(a, b), fp.mul(b, a[::-1].copy())
    total = torch.from_numpy(x) + torch.from_numpy(y) + 0.0
    np.testing.assert_array_equal(fp.add(x, y), total.numpy())
    np.testing.assert_array_equal(fp.to_fp16(x), (torch.from_numpy(x).half() + 0.0).numpy())
    assert not np.signbit(fp.mul(a, b)[fp.mul(a, b) == 0]).any()


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("queries", [1, 3])
def test_sparf_at_its_dense_limit_is_dense(head_size, queries):
    q, k, v = head(np.random.default_rng(1), queries, 133, head_size)
    mean = v.mean(0, dtype=np.float32).astype(np.float16)
    for r in (1, head_size):
        trace = attention.sparf(q, k, v, mean, r=r, top=133, window=5)
        np.testing.assert_array_equal(bits(trace.output), bits(attention.dense(q, k, v)))


def sparf_reference(q, k, v, mean, trace):
    """Algorithm 1 of the paper in float64, for the selection that the exact model made."""
    q, k, v, mean = (torch.from_numpy(x).double() for x in (q, k, v, mean))
    i, j = torch.from_numpy(trace.channels), torch.from_numpy(trace.tokens)
    ratio = q[:, i].abs().sum(1, keepdim=True) / q.abs().sum(1, keepdim=True)
    approximate = torch.softmax(q[:, i] @ k[:, i].T / torch.sqrt(q.shape[1] * ratio), 1)
    alpha = approximate[:, j].sum(1, keepdim=True)
    exact = torch.softmax(q @ k[j].T / q.shape[1] ** 0.5, 1) @ v[j]
    return alpha.numpy(), (alpha * exact + (1 - alpha) * mean).numpy()


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(("queries", "tokens"), [(1, 500), (3, 700)])
def test_sparf_follows_the_published_algorithm(head_size, queries, tokens):
    q, k, v = head(np.random.default_rng(5), queries, tokens, head_size)
    mean = v.mean(0, dtype=np.float32).astype(np.float16)
    trace = attention.sparf(q, k, v, mean, r=16, top=tokens // 8, window=8)
    alpha, expected = sparf_reference(q, k, v, mean, trace)
    np.testing.assert_allclose(trace.alpha / 65536, alpha[:, 0], atol=2e-4)
    np.testing.assert_allclose(trace.output, expected, atol=2e-3)
    weights = np.abs(q.astype(np.float64)).sum(0)
    assert set(trace.channels) == set(np.argsort(-weights)[:16])
    assert set(range(tokens - 8, tokens)) <= set(trace.tokens)
    assert len(trace.tokens) == tokens // 8


def test_equal_keys_select_the_lower_index():
    np.testing.assert_array_equal(attention.largest(np.array([3, 5, 5, 1, 5]), 2), [1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 65, "top": 4, "window": 0}, "r must be 1 to the head size 64, not 65"),
        ({"r": 4, "top": 21, "window": 0}, "k must be 1 to the 20 tokens, not 21"),
        ({"r": 4, "top": 4, "window": 5}, "the window must be 0 to k = 4, not 5"),
    ],
)
def test_bad_selections_are_refused(arguments, message):
    q, k, v = head(np.random.default_rng(0), 1, 20, 64)
    with pytest.raises(KVStrataError, match=message):
        attention.sparf(q, k, v, v[0], **arguments)


def test_bad_shapes_are_refused():
    q, k, v = head(np.random.default_rng(0), 1, 20, 64)
    with pytest.raises(KVStrataError, match="k must be a float16 matrix, not float32"):
        attention.dense(q, k.astype(np.float32), v)
    with pytest.raises(KVStrataError, match="head size must be one of"):
        attention.dense(q[:, :60], k, v)
    with pytest.raises(KVStrataError, match="serves 1 to 8 queries, not 9"):
        attention.dense(np.repeat(q, 9, 0), k, v)


def test_nan_and_infinity_poison_as_ieee_softmax_does():
    q, k, v = head(np.random.default_rng(0), 2, 40, 64)
    k[3, 0] = np.nan
    assert np.isnan(attention.dense(q, k, v)).all()
    q, k, v = head(np.random.default_rng(0), 2, 40, 64)
    q[:, 0], k[:, 0], k[7, 0] = 1, 0, -np.inf
    kept = np.arange(40) != 7
    np.testing.assert_allclose(attention.dense(q, k, v), reference(q, k[kept], v[kept]), atol=2e-3)


@pytest.mark.parametrize("head", [vector_sets.seeded(3), vector_sets.corners()], ids=["seeded", "corners"])
def test_queries_with_their_own_tokens_are_as_each_alone(head):
    q, k, v = head
    selected = np.random.default_rng(0).random((len(q), len(k))) < 0.3
    selected[1, :40] = False
    together, state = attention.exact(q, k, v, selected)
    for i in range(len(q)):
        alone, ended = attention.exact(q[i : i + 1], k, v, selected[i])
        assert np.array_equal(together[i : i + 1].view(np.uint32), alone.view(np.uint32))
        assert (state.sum[i], state.maximum[i]) == (ended.sum[0], ended.maximum[0])


@pytest.mark.parametrize("size", [1, 2, 20, 96])
def test_a_tree_of_any_length_is_that_of_its_power_of_two(size):
    x = np.random.default_rng(size).normal(size=(3, size)).astype(np.float32)
    whole = np.zeros((3, 1 << (size - 1).bit_length()), np.float32)
    whole[:, :size] = x
    assert np.array_equal(fp.tree(x), fp.tree(whole))
    np.testing.assert_allclose(fp.tree(x), x.astype(np.float64).sum(1), atol=1e-4)


@pytest.mark.parametrize("block", [1, 4000, 1 << 30])
def test_blocks_of_groups_change_no_bit(block, monkeypatch):
    q, k, v = head(np.random.default_rng(2), 3, 117, 64)
    selected = np.random.default_rng(3).random((3, 117)) < 0.4
    before, state = attention.exact(q, k, v, selected)
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", block)
    again, ended = attention.exact(q, k, v, selected)
    assert np.array_equal(before.view(np.uint32), again.view(np.uint32))
    assert (state.sum == ended.sum).all()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33])
@pytest.mark.parametrize("values", ["equal", "one-huge", "denormal"])
def test_corners_at_group_boundaries(tokens, values):
    """Equal scores mix equally, one huge score takes all, denormals count: dense, SparF and SparQ alike."""
    q, k, v = head(np.random.default_rng(tokens), 2, tokens, 64)
    if values == "equal":
        k[:] = k[0]
    elif values == "one-huge":
        q[:], k[:] = 50, -50
        k[tokens // 2] = 50
    else:
        q, k, v = ((x / 2**15 / 2**6).astype(np.float16) for x in (q, k, v))
    expected = reference(q, k, v)
    mean = attention.mean_value(v)
    outputs = [attention.dense(q, k, v)] + [
        attention.sparse(q, k, v, mean, r=64, top=tokens, window=0, shares=s).output for s in (False, True)
    ]
    for y in outputs:
        assert np.abs(y - expected).max() <= 2e-3 * np.abs(v).max() + 2**-24
    chosen = attention.sparse(q, k, v, mean, r=8, top=max(1, tokens // 4), window=0, shares=True).tokens
    if values == "equal":
        assert chosen.tolist() == list(range(max(1, tokens // 4)))
    elif values == "one-huge":
        assert tokens // 2 in chosen


def test_the_mean_of_values_is_exact_and_says_what_is_not_finite():
    v = np.array([[1, 6e-8, 65504, np.inf, np.inf, np.nan], [2, 0, 65504, 1, -np.inf, 1]], np.float16)
    assert attention.mean_value(v).tolist()[:4] == [1.5, 0.0, 65504, np.inf]
    assert np.isnan(attention.mean_value(v)[4:]).all()
    assert bits(attention.mean_value(-v[:, :2]))[1] == 0  # no negative zero


def test_sparq_ranks_a_group_by_its_probabilities():
    """By hand: one query is sure of token 0, the other spreads; the sum of scores would prefer token 2."""
    q = np.zeros((2, 64), np.float16)
    q[0, 0], q[1, 1] = 8, 8
    k = np.zeros((4, 64), np.float16)
    k[0, :2], k[2, :2], k[1, :2], k[3, :2] = (8, -20), (6, 4), (-9, 3.8), (-9, 3.9)
    pick = lambda shares: attention.sparse(q, k, k, k[0], r=2, top=1, window=0, shares=shares).tokens.tolist()  # noqa: E731
    assert (pick(True), pick(False)) == ([0], [2])


@pytest.mark.parametrize("sinks", [1, 15, 16, 20])
def test_far_sinks_are_scored_by_their_own_query_and_key(sinks):
    rng = np.random.default_rng(sinks)
    q, k, v = head(rng, 3, 45, 64)
    far_q, far_k, _ = head(rng, 3, sinks, 64)
    where, lost = rng.random((3, sinks)) < 0.6, rng.normal(size=3).astype(np.float32)
    live = np.ones((3, 45), bool)
    got, _ = attention.exact(q, k, v, live, attention.Far(far_q, far_k, where, lost))
    z = q.astype(np.float64) @ k.T.astype(np.float64)
    far = far_q.astype(np.float64) @ far_k.T.astype(np.float64) - lost[:, None]
    z[:, :sinks] = np.where(where, far, z[:, :sinks])
    p = np.exp(z / 8 - (z / 8).max(1, keepdims=True))
    np.testing.assert_allclose(got, p @ v.astype(np.float64) / p.sum(1, keepdims=True), atol=4e-3)
