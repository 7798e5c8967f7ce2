"""Policies: dense limits, published equations, both faces' bytes, causality, refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden.float_decoder import rotate
from golden.policies import Dense, Heads, Lambda, Sparf, Sparq
from golden.policies.base import _true
from golden.policies.sparq import largest
from golden.policies.split import finish, merge, partial
from golden.spec import KVStrataError
from golden.spec.policies import KV4_TOKENS, DenseCosts, LambdaCosts, Selection, SparfCosts, SparqCosts
from golden.spec.storage import PageKind
from golden.storage.attention import sparf as storage_sparf
from golden.storage.layout import channel_marks, token_marks

DH, G, HKV = 16, 2, 3


def heads_of(s=40, t=None, seed=0, spread=1.0):
    """The last t queries of s tokens, in float64."""
    t = s if t is None else t
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64) * spread  # noqa: E731
    q_raw, k_raw, v = draw(HKV, G, s, DH), draw(HKV, s, DH), draw(HKV, s, DH)
    turn = lambda x, positions: rotate(x, positions, 10000.0)  # noqa: E731
    every = torch.arange(s)
    return Heads(
        turn(q_raw, every)[:, :, s - t :],
        q_raw[:, :, s - t :],
        turn(k_raw, every),
        k_raw,
        v,
        every[s - t :],
        turn,
    )


def run(policy, heads):
    return policy.attend(heads, policy.select(heads))


POLICIES = {
    "lambda-limit": lambda: Lambda(DH, G, sinks=2, window=8),
    "lambda-cache": lambda: Lambda(DH, G, sinks=2, window=8, positions="cache"),
    "sparq": lambda: Sparq(DH, G, r=4, k=8, local=2),
    "sparf": lambda: Sparf(DH, G, r=4, ratio=0.25, local=2, m=4),
}


@pytest.mark.parametrize("name", POLICIES)
def test_dense_limit_is_dense(name):
    heads, policy = heads_of(40), POLICIES[name]()
    dense = run(Dense(DH, G), heads)
    assert torch.allclose(run(policy.dense_limit(40), heads), dense, atol=1e-13)
    assert not torch.allclose(run(policy, heads), dense, atol=1e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_sees_no_future_and_equals_its_row_of_a_prefill(name):
    policy, heads = POLICIES[name](), heads_of(40)
    whole = run(policy, heads)
    last = Heads(heads.q[:, :, 20:21], heads.q_raw[:, :, 20:21], heads.k[:, :21], heads.k_raw[:, :21], heads.v[:, :21],
                 heads.positions[20:21], heads.rotate)  # fmt: skip
    assert torch.allclose(run(policy, last)[:, :, 0], whole[:, :, 20], atol=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_one_token_and_all_equal_scores_are_finite(name):
    policy = POLICIES[name]()
    one = heads_of(1)
    assert torch.allclose(run(policy, one), one.v[:, None].expand(HKV, G, 1, DH))
    flat = heads_of(33)
    zero = Heads(flat.q * 0, flat.q_raw * 0, flat.k, flat.k_raw, flat.v, flat.positions, flat.rotate)
    assert torch.isfinite(run(policy, zero)).all()
    huge = heads_of(33, spread=1e4)
    assert torch.isfinite(run(policy, huge)).all()


def test_lambda_limit_by_hand():
    """One query, sinks scored at the limit distance with un-rotated keys."""
    policy, heads, t = Lambda(DH, G, sinks=2, window=8, limit=5), heads_of(30, 1), 29
    selected = policy.select(heads)
    assert selected.tokens[0, 0].nonzero()[:, 0].tolist() == [0, 1, *range(22, 30)]
    q_far = heads.rotate(heads.q_raw, torch.tensor([5]))
    z = torch.cat((q_far @ heads.k_raw[:, None, :2].mT, heads.q @ heads.k[:, None, 22:].mT), -1) / DH**0.5
    v = torch.cat((heads.v[:, :2], heads.v[:, 22:]), 1)
    assert torch.allclose(policy.attend(heads, selected), z.softmax(-1) @ v[:, None])
    assert policy.kept(t + 1).nonzero()[:, 0].tolist() == [0, 1, *range(22, 30)]


def test_streaming_positions_by_hand():
    """Keys rotated by their index in the cache of sinks + window, query at the last index."""
    policy, heads = Lambda(DH, G, sinks=3, window=6, positions="cache"), heads_of(30, 1)
    kept = [0, 1, 2, *range(24, 30)]
    index = torch.arange(len(kept))
    k = heads.rotate(heads.k_raw[:, kept], index)
    z = heads.rotate(heads.q_raw, index[-1:]) @ k[:, None].mT / DH**0.5
    assert torch.allclose(run(policy, heads), z.softmax(-1) @ heads.v[:, None, kept])


def test_sparq_by_the_published_equations():
    """One KV head, written out per step of the paper with explicit indices."""
    r, k, local = 4, 9, 3
    policy, heads = Sparq(DH, G, r=r, k=k, local=local), heads_of(30, 1, seed=4)
    got = run(policy, heads)
    for h in range(HKV):
        q, keys, v = heads.q[h, :, 0], heads.k[h], heads.v[h]
        i = q.abs().sum(0).topk(r).indices
        share = q[:, i].abs().sum(-1) / q.abs().sum(-1)
        s_hat = torch.stack(
            [(q[g, i] @ keys[:, i].T / math.sqrt(DH * share[g])).softmax(-1) for g in range(G)]
        )
        ranked = s_hat.sum(0)[: 30 - local].topk(k - local).indices
        j = torch.cat((ranked, torch.arange(30 - local, 30)))
        for g in range(G):
            alpha = s_hat[g, j].sum()
            assert 0 <= alpha <= 1
            exact = (q[g] @ keys[j].T / math.sqrt(DH)).softmax(-1) @ v[j]
            assert torch.allclose(got[h, g, 0], alpha * exact + (1 - alpha) * v.mean(0))


def test_sparf_of_a_single_query_is_sparq_and_groups_pool_before_the_softmax():
    heads = heads_of(50, 3)
    grouped = [p(DH, G, r=4, k=8, local=2).select(heads).tokens for p in (Sparq, Sparf)]
    assert not torch.equal(*grouped)
    heads = replace(heads, q=heads.q[:, :1], q_raw=heads.q_raw[:, :1])
    assert torch.equal(
        run(Sparq(DH, 1, r=4, k=8, local=2), heads), run(Sparf(DH, 1, r=4, k=8, local=2, m=2), heads)
    )


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(0, 20))
def test_largest_takes_lower_indices_of_ties(keys, k):
    chosen = largest(torch.tensor(keys, dtype=torch.float64), k)
    expected = sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:k]
    assert chosen.nonzero()[:, 0].tolist() == sorted(expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 16), st.sampled_from([0.1, 0.125, 0.5, 1.0]), st.integers(0, 20),
       st.integers(0, 99))  # fmt: skip
def test_alpha_and_counts_hold_for_any_setting(s, r, ratio, local, seed):
    policy = Sparq(DH, G, r=r, ratio=ratio, local=local)
    heads = heads_of(s, min(s, 4), seed)
    selected = policy.select(heads)
    assert (selected.weights >= 0).all()
    assert (selected.weights <= 1 + 1e-12).all()
    for i, position in enumerate(heads.positions.tolist()):
        assert (selected.tokens[:, i].sum(-1) == policy.costs.k(position + 1)).all()
        recent = min(local or max(1, policy.costs.k(position + 1) // 4), position + 1)
        assert selected.tokens[:, i, position + 1 - recent : position + 1].all()
    assert (selected.channels.sum(-1) == r).all()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("s", [1, 7, 8, 33, 64])
def test_both_faces_count_the_same_bytes(name, s):
    """The tensor face counts from its masks, the other from the record alone."""
    policy, heads = POLICIES[name](), heads_of(s, 1)
    selected = policy.select(heads)
    for record in policy.records(heads, selected, layer=5):
        cost = policy.costs.step(record)
        tokens = selected.tokens[record.kv_head, 0]
        assert record.context == s
        if name == "sparf":
            pages = (
                tokens.view(-1).nonzero()[:, 0].div(policy.costs.page_tokens, rounding_mode="floor").unique()
            )
            groups = selected.channels[record.kv_head, 0].view(-1, 4).any(-1).sum().item()
            blocks = math.ceil(s / (2048 // 4))
            assert cost.k_token_bytes == cost.v_token_bytes == len(pages) * 4096
            assert cost.k_channel_bytes == groups * blocks * 4096
        else:
            assert cost.k_token_bytes == cost.v_token_bytes == int(tokens.sum()) * DH * 2
            channels = 0 if selected.channels is None else int(selected.channels[record.kv_head, 0].sum())
            assert cost.k_channel_bytes == channels * s * 2
            assert cost.read_bytes == policy.costs.expected(s).read_bytes
        assert int(policy.kept(s).sum()) >= int(tokens.sum())


def test_published_element_counts():
    """SparQ: S*r + 2*k*dh + 4*dh against 2*S*dh + 2*dh (its own writes counted in both)."""
    s, r, k, dh = 2048, 32, 128, 128
    sparq, dense = SparqCosts(dh, r=r, tokens=k), DenseCosts(dh)
    elements = (sparq.expected(s).read_bytes + 2 * dh * 2 + dh * 2) // 2  # + new k, v and the new v-bar
    assert elements == s * r + 2 * k * dh + 4 * dh
    assert dense.expected(s).read_bytes // 2 == 2 * s * dh


def test_random_selection_touches_most_pages():
    """InstInfer's arithmetic: 1/8 of tokens at random touches 88% of 16-token pages, 16 of 128 channels 24% at m=2."""
    costs = [SparfCosts(128, r=16, ratio=0.125, local=1, m=m) for m in (2, 8)]
    rng = torch.Generator().manual_seed(0)
    pages, groups = 0.0, [0.0, 0.0]
    for _ in range(50):
        tokens = tuple(sorted(torch.randperm(4096, generator=rng)[:512].tolist()))
        channels = tuple(sorted(torch.randperm(128, generator=rng)[:16].tolist()))
        record = Selection(4095, 0, 0, channels, tokens)
        pages += costs[0].step(record).k_token_bytes / 4096 / 256 / 50
        for i, c in enumerate(costs):
            full = c.channel_blocks(4096) * (128 // c.m) * 4096
            groups[i] += c.step(record).k_channel_bytes / full / 50
    assert abs(pages - 0.88) < 0.01
    assert abs(groups[0] - 0.24) < 0.02
    assert abs(groups[1] - 0.67) < 0.03


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([64, 128]), st.sampled_from([2, 4, 8]), st.integers(1, 3000), st.integers(0, 999))
def test_pages_are_those_of_the_flash_layout(dh, m, context, seed):
    """The drive's own layout marks exactly the pages that the policy's costs count."""
    rng = torch.Generator().manual_seed(seed)
    tokens = tuple(sorted(torch.randperm(context, generator=rng)[: max(1, context // 8)].tolist()))
    channels = tuple(sorted(torch.randperm(dh, generator=rng)[:16].tolist()))
    cost = SparfCosts(dh, r=16, m=m).step(Selection(context - 1, 0, 0, channels, tokens))
    read = lambda marks: sum(mark.mask != 0 for mark in marks) * 4096  # noqa: E731
    assert cost.k_token_bytes == read(token_marks(PageKind.K_TOKEN, tokens, context, dh))
    assert cost.v_token_bytes == read(token_marks(PageKind.V_TOKEN, tokens, context, dh))
    assert cost.k_channel_bytes == read(channel_marks(channels, context, dh, m))


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=20, max_size=20), st.integers(0, 99))
def test_split_partials_merge_to_dense(owners, seed):
    heads = heads_of(20, 2, seed)
    z = heads.q @ heads.k[:, None].mT / DH**0.5
    owner = torch.tensor(owners)
    parts = [partial(z, heads.causal & (owner == d), heads.v[:, None]) for d in range(3)]
    merged = finish(merge(parts))
    assert torch.allclose(merged, run(Dense(DH, G), heads), atol=1e-12)
    assert torch.allclose(merged, finish(merge([merge(parts[:2]), parts[2]])), atol=1e-12)


@pytest.mark.parametrize("policy", [Sparq, Sparf])
def test_the_least_share_keeps_the_current_token(policy):
    """A share that rounds to no token at all must not end in a softmax over nothing."""
    heads = heads_of(40, 1)
    chosen = policy(DH, G, r=1, ratio=1e-9)
    assert chosen.select(heads).tokens.sum(-1).unique().tolist() == [1]
    assert torch.isfinite(run(chosen, heads)).all()


def test_nothing_live_gives_zeros():
    z, v = torch.ones(1, 4), torch.ones(4, 3)
    none = partial(z, torch.zeros(1, 4, dtype=torch.bool), v)
    assert finish(merge([none, none])).tolist() == [[0, 0, 0]]


def test_representation_changes_bytes():
    costs = DenseCosts(64, representation=KV4_TOKENS)
    assert costs.expected(10).read_bytes == 10 * 2 * 36


@pytest.mark.parametrize(("make", "message"), [
    (lambda: LambdaCosts(64, sinks=-1), "needs sinks >= 0 and a window of at least 1, got -1"),
    (lambda: LambdaCosts(64, window=0), "window of at least 1, got 4 and 0"),
    (lambda: SparqCosts(64, r=65), "r must be 1 to the head size 64, got 65"),
    (lambda: SparqCosts(64, ratio=0.0), r"ratio in \(0, 1\], got 0 and 0.0"),
    (lambda: SparqCosts(64, local=-1), "local window must not be negative, got -1"),
    (lambda: SparqCosts(64, tokens=8, local=9), "must fit in k = 8 tokens, got 9"),
    (lambda: SparfCosts(64, m=3), "must be 2, 4 or 8 and divide the head size, got 3"),
    (lambda: SparfCosts(64, representation=KV4_TOKENS), "stores fp16 on flash, got kv4"),
    (lambda: Lambda(64, positions="absolute"), "must be one of limit, cache, got absolute"),
])  # fmt: skip
def test_contradictions_are_named(make, message):
    with pytest.raises(KVStrataError, match=message):
        make()


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_drives_arithmetic_follows_the_algorithm(seed, group):
    """golden.storage computes SparF in fp16 to the bit; it selects and mixes what this level does."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, 64)).astype(np.float16) for n in (group, 200, 200))
    v_bar = v.astype(np.float64).mean(0).astype(np.float16)
    trace = storage_sparf(q, k, v, v_bar, r=16, top=40, window=10)
    q64, k64, v64 = (torch.from_numpy(x.astype(np.float64))[None] for x in (q, k, v))
    heads = Heads(
        q64[None, 0][:, :, None], q64[None, 0][:, :, None], k64, k64, v64, torch.tensor([199]), lambda x, _: x
    )
    policy = Sparf(64, group, r=16, k=40, local=10)
    selected = policy.select(heads)
    assert _true(selected.channels[0, 0]) == tuple(trace.channels)
    assert len(set(_true(selected.tokens[0, 0])) & set(trace.tokens.tolist())) >= 39
    assert np.abs(trace.alpha / 65536 - selected.weights[0, :, 0].numpy()).max() < 0.01
    assert np.abs(policy.attend(heads, selected)[0, :, 0].numpy() - trace.output).max() < 0.02
