"""Any combination of weights, cache and policy at every level: prompts, steps and batches to the same bits."""

import copy

import numpy as np
import pytest
import torch

from golden.accuracy import prefill
from golden.compression import Recipe, calibrate_k_offset, compress
from golden.config import DecoderConfig
from golden.exact_decoder import ExactDecoder
from golden.formats.weights import QuantisedWeight
from golden.levels import build, decoder_class, set_attention
from golden.policies import Dense, Lambda, Sparf, Sparq
from golden.policy_decoder import PolicyDecoder
from golden.spec import KVStrataError
from golden.storage.decoder import Sparsity, StorageDecoder
from golden.storage.policy_decoder import StoragePolicyDecoder
from tests.golden.conftest import random_checkpoint

ODD = DecoderConfig("odd", layers=1, hidden=192, heads=16, kv_heads=1, head_size=20, ffn=64, vocab=50, context=256,
                    rope_base=5e4, norm_eps=1e-6)  # fmt: skip
"""A head size that is no power of two, more queries per KV head than a drive holds, widths of groups of 64."""
HEAD, GROUP = ODD.head_size, ODD.group
POLICIES = {
    "dense": Dense(HEAD, GROUP),
    "lambda-limit": Lambda(HEAD, GROUP, 5, 33),
    "lambda-cache": Lambda(HEAD, GROUP, 5, 33, "cache"),
    "sparq": Sparq(HEAD, GROUP, r=7, ratio=0.3),
    "sparf": Sparf(HEAD, GROUP, r=7, ratio=0.3),
}
KV = ("float", "kv8", "kv4", "kivi4", "kivi2")
WEIGHTS = ("w8", "w4-g64", "w2-g32", "w2s24 magnitude")
PROMPT = 99
"""KIVI has one old group from token 96 on; the last tile, page and group of tokens are begun."""


@pytest.fixture(scope="module")
def odd():
    return random_checkpoint(11, ODD)


@pytest.fixture(scope="module")
def weights(odd):
    return {name: compress(odd, Recipe.parse(name)) for name in WEIGHTS}


@pytest.fixture(scope="module")
def offset(odd):
    return calibrate_k_offset(odd, [tokens(200, 1)]) + 20_000


@pytest.fixture(scope="module")
def decoders(odd, weights):
    """A decoder per level, class and weights; tests set what attends."""
    made = {}

    def decoder(level, kv, policy, name, k_offset=None, activations="a8"):
        key = decoder_class(level, kv, policy, k_offset is not None), name, activations
        if key not in made:
            made[key] = build(odd, level, weights[name], kv, policy, activations)
        set_attention(made[key], kv, policy, k_offset)
        return made[key]

    return decoder


def tokens(n, seed=0):
    return torch.randint(0, ODD.vocab, (n,), generator=torch.Generator().manual_seed(seed))


IDS = tokens(PROMPT + 4)


def prompted(decoder):
    """A cache behind a prompt that the policy computes by its own rule."""
    cache = decoder.new_cache()
    prefill(decoder, IDS[:PROMPT], cache)
    return cache


def after(decoder, steps=(4,), cache=None):
    """Logits of the steps behind the prompt; a cache that is given stays as it is."""
    cache = copy.deepcopy(cache) or prompted(decoder)
    return torch.cat([decoder.forward(part, cache) for part in IDS[PROMPT:].split(steps)])


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", POLICIES)
def test_every_combination_is_exact_in_steps_and_in_batches(decoders, kv, name):
    for format_ in WEIGHTS:
        decoder = decoders("exact", kv, POLICIES[name], format_)
        cache, other = prompted(decoder), tokens(3, 5)
        whole = after(decoder, cache=cache)
        assert torch.equal(whole, after(decoder, [1, 3], cache)), format_
        batch = decoder.forward_batch([(IDS[PROMPT:], cache), (other, decoder.new_cache())])
        assert torch.equal(batch[0], whole[-1]), format_
        assert torch.equal(batch[1], decoder.forward(other, decoder.new_cache())[-1]), format_
        assert whole.unique().numel() > 100, format_


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", POLICIES)
def test_every_combination_follows_its_float_form(decoders, kv, name):
    """Same weights, cache format and policy in float32: what remains is rounding, of KIVI's window to KV8 too."""
    bound = {"kivi4": 0.2, "kivi2": 0.2}.get(kv, 0.12)
    for format_ in ("w8", "w2s24 magnitude"):
        exact = decoders("exact", kv, POLICIES[name], format_)
        a = exact.real_logits(after(exact))
        b = after(decoders("float", kv, POLICIES[name], format_)).double()
        assert ((a - b).norm() / b.norm()) < bound, format_


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", POLICIES)
def test_a_k_offset_goes_with_every_policy_and_cache(decoders, offset, kv, name):
    """Scores shift alike and sinks lose the same, so the result stays near the float policy's, which adds it back."""
    exact = decoders("exact", kv, POLICIES[name], "w8", offset)
    cache = prompted(exact)
    a = exact.real_logits(after(exact, cache=cache))
    assert torch.equal(a, exact.real_logits(after(exact, [3, 1], cache)))
    plain = decoders("exact", kv, POLICIES[name], "w8")
    assert not torch.equal(a, plain.real_logits(after(plain)))
    b = after(decoders("float", kv, POLICIES[name], "w8", offset)).double()
    assert (a - b).norm() / b.norm() < (0.2 if "kivi" in kv else 0.12)


FORGETFUL = {
    "kv8": (PolicyDecoder, lambda self, layer, q, scale: 0),
    "float": (StoragePolicyDecoder, lambda self, layer, head, q: np.zeros(len(q), np.float32)),
}


@pytest.mark.parametrize("kv", FORGETFUL)
def test_sinks_that_keep_the_offset_are_noticed(decoders, offset, monkeypatch, kv):
    """The correction of section 8.2 is what keeps sinks comparable with the window."""
    policy, errors = POLICIES["lambda-limit"], []
    reference = after(decoders("float", "float", policy, "w8")).double()
    for wrong in (False, True):
        if wrong:
            monkeypatch.setattr(FORGETFUL[kv][0], "_lost", FORGETFUL[kv][1])
        decoder = decoders("exact", kv, policy, "w8", offset * 8)
        got = decoder.real_logits(after(decoder))
        errors.append(((got - reference).norm() / reference.norm()).item())
    assert errors[0] < 0.5 * errors[1], errors


@pytest.mark.parametrize("name", ["dense", "sparf"])
def test_the_units_own_combinations_have_its_bits(name):
    """Head size and group of the RTL: the decoder with any policy and the unit's decoder agree."""
    model = random_checkpoint(2, DecoderConfig("unit", 1, 64, 2, 1, 64, 64, 40, 128, 1e4, 1e-5))
    policy = {"dense": Dense(64, 2), "sparf": Sparf(64, 2, r=16, ratio=0.25, local=4)}[name]
    unit = StorageDecoder(model, "w4", None if name == "dense" else Sparsity(16, 4, 4))
    other, ids = StoragePolicyDecoder(model, "w4", policy), tokens(37) % 40
    assert torch.equal(unit.forward(ids, unit.new_cache()), other.forward(ids, other.new_cache()))


@pytest.mark.parametrize("name", [n for n in POLICIES if n != "dense"])
def test_the_dense_limit_over_binary16_is_dense_to_the_bit(decoders, name):
    decoder = decoders("exact", "float", POLICIES["dense"], "w8")
    ids = tokens(40)
    dense = decoder.forward(ids, decoder.new_cache())
    decoder.policy = POLICIES[name]
    assert not torch.equal(decoder.forward(ids, decoder.new_cache()), dense)
    decoder.policy = POLICIES[name].dense_limit(40)
    assert torch.equal(decoder.forward(ids, decoder.new_cache()), dense)


@pytest.mark.parametrize("kv", ["kv4", "float"])
@pytest.mark.parametrize("name", ["sparq", "sparf"])
def test_selections_of_both_levels_count_the_same_bytes(decoders, kv, name):
    """The record of an exact step is the float policy's: as many tokens, channels and bytes."""
    found = {}
    for level in ("exact", "float"):
        decoder = decoders(level, kv, POLICIES[name], "w8")
        records = found[level] = []

        def collect(layer, what, o, decoder=decoder, records=records):
            if what == "selection":
                records.append(o["selection"])
            elif what == "attention" and "selected" in o:
                records.extend(decoder.policy.records(o["heads"], o["selected"], layer))

        cache = decoder.new_cache()
        prefill(decoder, tokens(PROMPT), cache)
        decoder.probe = collect
        decoder.hidden([3], cache)
        decoder.probe = None
    (a,), (b,) = found["exact"], found["float"]
    assert (a.position, a.layer, a.kv_head, len(a.channels), len(a.tokens)) == (
        b.position, b.layer, b.kv_head, len(b.channels), len(b.tokens))  # fmt: skip
    assert len(set(a.tokens) & set(b.tokens)) > 0.8 * len(a.tokens)


def test_the_engine_computes_what_it_has_and_nothing_else():
    at = lambda kv, policy, offset=False: decoder_class("exact", kv, policy, offset)  # noqa: E731
    assert at("kv4", POLICIES["dense"]) is at("kv8", POLICIES["lambda-limit"]) is ExactDecoder
    assert at("kv4", POLICIES["dense"], True) is at("kv4", Lambda(20, 16, 0, 33), True) is ExactDecoder
    for kv, policy, offset in (("kivi4", "dense", False), ("kv4", "lambda-cache", False), ("kv4", "sparf", False),
                               ("kv4", "lambda-limit", True)):  # fmt: skip
        assert at(kv, POLICIES[policy], offset) is PolicyDecoder
    assert at("kv4", Lambda(20, 16, sinks=33, window=64)) is PolicyDecoder
    assert at("float", POLICIES["sparq"]) is StoragePolicyDecoder


def test_contradictions_are_named(odd, weights, offset):
    with pytest.raises(KVStrataError, match="model's head size and group, 20 and 16, got 64 and 3"):
        build(odd, "exact", "w4", "kv4", Dense(64, 3))
    with pytest.raises(KVStrataError, match="k must be at most the model's context of 256 tokens, got 257"):
        build(odd, "float", {}, "kv4", Sparq(20, 16, k=257))
    with pytest.raises(KVStrataError, match="the exact level computes with quantised weights, got floats in"):
        build(odd, "exact", compress(odd, Recipe("float")), "kv4")
    with pytest.raises(KVStrataError, match="weights of the float level must be tensors by name, got w4"):
        build(odd, "float", "w4")
    with pytest.raises(KVStrataError, match="a level must be float or exact, got rtl"):
        build(odd, "rtl", "w4")
    with pytest.raises(KVStrataError, match=r"a K offset must have shape \(1, 1, 20\), got \(1, 20\)"):
        build(odd, "exact", "w4", "kv4", k_offset=offset[0])
    with pytest.raises(KVStrataError, match=r"a K offset must lie within \+-512, got 512"):
        build(odd, "exact", "w4", "kv4", k_offset=torch.full((1, 1, 20), 1 << 25))
    with pytest.raises(KVStrataError, match="the limit distance must be at least 1 token, or 0 .* got -3"):
        Lambda(20, 16, limit=-3)
    some = dict(weights["w8"])
    del some["layers.0.up"]
    with pytest.raises(KVStrataError, match=r"those of the engine form with its layers\.0\.up, missing here"):
        build(odd, "exact", some)
    some["layers.0.up"] = some["layers.0.down"]
    with pytest.raises(
        KVStrataError, match=r"ready-made layers\.0\.up must have shape \(64, 192\), got \(192, 64\)"
    ):
        build(odd, "exact", some)
    assert all(isinstance(w, QuantisedWeight) for w in some.values())
    with pytest.raises(KVStrataError, match="a weight format must be one of w8, w4, w2, w2s24, got w3"):
        ExactDecoder(odd, "w3")
    with pytest.raises(KVStrataError, match="a KV format must be one of kv4, kv8, got kv3"):
        ExactDecoder(odd, "w4", "kv3")
    with pytest.raises(KVStrataError, match=r"head size must be one of \(64, 128\), not 20"):
        StorageDecoder(odd)
