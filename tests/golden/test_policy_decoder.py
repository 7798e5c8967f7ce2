"""Any KV policy over any quantised cache: the engine's bits where it has them, dense limits, steps, records, error."""

import pytest
import torch

from golden import ops
from golden.accuracy import parse_policy
from golden.attention import ScoreScale
from golden.exact_decoder import ExactDecoder
from golden.float_decoder import FloatDecoder
from golden.formats.kv import codec
from golden.lambda_window import LambdaWindow
from golden.policies import Dense, Lambda, Sparf, Sparq
from golden.policy_decoder import KiviStore, PolicyDecoder, TokenStore, channel_scores, select
from golden.spec import KVStrataError

HEAD, GROUP = 16, 2
POLICIES = {
    "dense": Dense(HEAD, GROUP),
    "sparq": Sparq(HEAD, GROUP, r=4, ratio=0.25),
    "sparf": Sparf(HEAD, GROUP, r=4, ratio=0.25),
    "lambda-limit": Lambda(HEAD, GROUP, 4, 40),
    "lambda-cache": Lambda(HEAD, GROUP, 4, 40, "cache"),
}


def tokens(n, seed=0):
    return torch.randint(0, 96, (n,), generator=torch.Generator().manual_seed(seed))


def logits(decoder, ids, cuts=None):
    cache, rows = decoder.new_cache(), []
    for part in ids.split(cuts or len(ids)):
        rows.append(decoder.forward(part, cache))
    return torch.cat(rows)


@pytest.fixture(scope="module")
def decoders(tiny):
    """One decoder per representation; tests set its policy."""
    return {kv: PolicyDecoder(tiny, "w4", kv) for kv in ("kv8", "kv4", "kivi4", "kivi2")}


@pytest.mark.parametrize("kv", ["kv8", "kv4"])
def test_dense_attention_has_the_engines_bits(tiny, decoders, kv):
    ids = tokens(90)
    decoders[kv].policy = POLICIES["dense"]
    assert torch.equal(logits(decoders[kv], ids), logits(ExactDecoder(tiny, "w4", kv), ids))


def test_a_lambda_window_in_one_tile_has_the_engines_bits(tiny, decoders):
    """Beyond one tile the ring orders slots otherwise; with all of it in one, order does not matter."""
    ids, decoder = tokens(30), decoders["kv4"]
    decoder.policy = Lambda(HEAD, GROUP, 0, 20)
    assert torch.equal(
        logits(decoder, ids), logits(ExactDecoder(tiny, "w4", "kv4", LambdaWindow(0, 20, limit=20)), ids)
    )


@pytest.mark.parametrize("kv", ["kv4", "kivi2"])
@pytest.mark.parametrize("name", POLICIES)
def test_prompt_and_steps_agree_to_the_bit(decoders, kv, name):
    ids, decoder = tokens(135), decoders[kv]
    decoder.policy = POLICIES[name]
    assert torch.equal(logits(decoder, ids), logits(decoder, ids, [64, 1, 1, 30, 39]))


@pytest.mark.parametrize("kv", ["kv4", "kivi4"])
@pytest.mark.parametrize("name", [n for n in POLICIES if n != "dense"])
def test_the_dense_limit_is_dense_to_the_bit(decoders, kv, name):
    ids, decoder = tokens(135), decoders[kv]
    decoder.policy = POLICIES["dense"]
    dense = logits(decoder, ids)
    decoder.policy = POLICIES[name]
    assert not torch.equal(logits(decoder, ids), dense)
    decoder.policy = POLICIES[name].dense_limit(135)
    assert torch.equal(logits(decoder, ids), dense)


def test_a_short_kivi_cache_is_all_recent(tiny, decoders):
    decoder = decoders["kivi2"]
    decoder.policy = POLICIES["dense"]
    old = codec("kivi2").recent + 32
    short = logits(decoder, tokens(old))
    assert torch.equal(short, logits(ExactDecoder(tiny, "w4", "kv8"), tokens(old)))
    longer = logits(decoder, tokens(old + 33))[old:]
    assert not torch.equal(longer, logits(ExactDecoder(tiny, "w4", "kv8"), tokens(old + 33))[old:])


def test_more_bits_and_full_precision_are_nearer_to_the_float_policy(tiny, decoders):
    ids = tokens(150, 3)
    for name in ("dense", "sparq", "lambda-cache"):
        errors = []
        for kv in ("kivi2", "kivi4", "kv8"):
            policy = POLICIES[name]
            decoders[kv].policy = policy
            weights = {n: m.weight for n, m in decoders[kv].matrices.items()}
            same = FloatDecoder(tiny, torch.float64, weights, "a8", policy=policy)
            real = decoders[kv].real_logits(logits(decoders[kv], ids))
            errors.append(float((real - logits(same, ids)).norm() / real.norm()))
        assert errors[0] > errors[1] > errors[2], (name, errors)
        assert errors[2] < 0.2, (name, errors)


@pytest.mark.parametrize("bits", [2, 4])
def test_scores_by_channel_are_those_of_the_stored_values(bits):
    rng = torch.Generator().manual_seed(bits)
    k = torch.randn(2, 64, HEAD, generator=rng, dtype=torch.float64) * torch.arange(1, HEAD + 1)
    q = torch.randn(2, GROUP, 3, HEAD, generator=rng, dtype=torch.float64)
    stored = ops.quantise_kv(ops.to_q16(k).unflatten(1, (2, 32)).transpose(2, 3), bits)
    values = ops.dequantise_kv(stored).transpose(2, 3).flatten(1, 2)
    z = channel_scores(ops.to_q16(q), stored, ScoreScale.of(HEAD)).double() / 65536
    exact = q @ values.transpose(1, 2)[:, None] * HEAD**-0.5 * 1.4426950408889634
    # Half a step of the folded query's A8 codes on every code of K, and its rounding to q16.
    folded = (q[..., None, :] * stored.scale[:, None, None]).abs().amax(-1)
    worst = 0.5 * folded / 127 * stored.codes.sum(2).amax(-1)[:, None, None] * HEAD**-0.5 * 1.443 + 1e-3
    assert ((z - exact).abs().unflatten(-1, (2, 32)).amax(-1) <= worst).all()
    assert (z - exact).abs().mean() < 0.25 * worst.mean()


def test_selections_are_recorded_with_the_bytes_that_the_policy_expects(decoders):
    decoder, found = decoders["kivi4"], []
    decoder.policy = POLICIES["sparq"]
    cache = decoder.new_cache()
    decoder.hidden(tokens(120), cache)
    decoder.probe = lambda layer, what, o: found.append(o["selection"]) if what == "selection" else None
    decoder.hidden([5], cache)
    decoder.probe = None
    costs = decoder.policy.costs
    assert len(found) == 4
    for record in found:
        assert costs.step(record).read_bytes == costs.expected(121).read_bytes
        assert set(range(121 - costs.window(121), 121)) <= set(record.tokens)


def test_equal_scores_select_the_lowest_tokens_and_channels():
    policy = Sparq(HEAD, GROUP, r=3, k=4, local=1)
    store = TokenStore(4, 2, HEAD)
    store.append(0, torch.full((2, 20, HEAD), 1 << 16), torch.zeros(2, 20, HEAD, dtype=torch.int64))
    q = torch.full((2, GROUP, 1, HEAD), 1 << 16)
    found = select(policy, q, store, torch.tensor([19]), 20, ScoreScale.of(HEAD))
    assert found.channels[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert found.live[0, 0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 19]
    assert found.alpha.unique().tolist() == [round(65536 * 4 / 20)]


def test_groups_do_not_depend_on_how_tokens_arrive():
    rng = torch.Generator().manual_seed(1)
    k, v = (torch.randint(-(1 << 17), 1 << 17, (2, 130, HEAD), generator=rng) for _ in range(2))
    whole, parts = (KiviStore(codec("kivi4"), 2, HEAD) for _ in range(2))
    whole.append(0, k, v)
    start = 0
    for n in (1, 31, 40, 58):
        parts.append(start, k[:, start : start + n], v[:, start : start + n])
        start += n
    q, scale = torch.randint(-(1 << 17), 1 << 17, (2, GROUP, 1, HEAD), generator=rng), ScoreScale.of(HEAD)
    assert torch.equal(whole.scores(q, 130, scale), parts.scores(q, 130, scale))
    assert all(torch.equal(a, b) for a, b in zip(whole.values(130), parts.values(130)))


def test_a_float_cache_and_unknown_policies_are_refused(tiny):
    with pytest.raises(KVStrataError, match="the engine's cache holds codes.* must not be float"):
        PolicyDecoder(tiny, "w4", "float").new_cache()
    with pytest.raises(KVStrataError, match="a policy must be dense"):
        PolicyDecoder(tiny, "w4", "kv4", parse_policy("h2o:5", HEAD, GROUP))
