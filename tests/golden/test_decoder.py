"""The decoder: incremental cache equals prefill bit for bit, batches equal singles, levels against oracles."""

import importlib.util
import json
import pathlib

import pytest
import torch

from golden.compression import calibrate_k_offset
from golden.exact_decoder import ExactDecoder
from golden.float_decoder import FloatDecoder
from golden.lambda_window import LambdaWindow
from golden.llama import Text, build, english_text, generate, perplexity, token_nll
from golden.spec import KVStrataError

ORACLE = pathlib.Path(__file__).parent / "data" / "smollm2_oracle.json"
MODES = {"dense": None, "lambda": LambdaWindow(3, 20), "lambda-no-sink": LambdaWindow(0, 33, limit=7),
         "ring-larger": LambdaWindow(2, 20, ring=64)}  # fmt: skip


def in_steps(decoder, ids, cuts):
    cache, rows, start = decoder.new_cache(), [], 0
    for n in cuts:
        rows.append(decoder.forward(ids[start : start + n], cache))
        start += n
    return torch.cat(rows)


def tokens(n, seed=0, vocab=96):
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv", ["kv4", "kv8"])
@pytest.mark.parametrize("mode", MODES)
def test_prefill_equals_steps_bit_for_bit(tiny, mode, kv):
    decoder = ExactDecoder(tiny, "w4", kv, MODES[mode])
    ids = tokens(101)
    whole = decoder.forward(ids, decoder.new_cache())
    # Single tokens at an empty cache, where windows begin to drop tokens, and at the first tile's end.
    cuts = [1, 1, 16, *[1] * 5, 6, *[1] * 6, 31, 1, 34]
    assert torch.equal(whole, in_steps(decoder, ids, cuts))
    assert torch.equal(whole[-1:], decoder.forward(ids, decoder.new_cache(), last_only=True))


@pytest.mark.parametrize("weights", ["w8", "w4", "w2", "w2s24"])
def test_every_weight_format_runs_and_batches_equal_singles(tiny, weights):
    decoder = ExactDecoder(tiny, weights)
    prompts = [tokens(5, 1), tokens(33, 2), tokens(1, 3)]
    single = [decoder.forward(p, decoder.new_cache())[-1] for p in prompts]
    caches = [decoder.new_cache() for _ in prompts]
    batch = decoder.forward_batch(list(zip(prompts, caches)))
    assert all(torch.equal(a, b) for a, b in zip(single, batch))
    again = decoder.forward_batch([([7], c) for c in caches])
    alone = [decoder.forward(torch.cat((p, torch.tensor([7]))), decoder.new_cache())[-1] for p in prompts]
    assert all(torch.equal(a, b) for a, b in zip(again, alone))


@pytest.mark.parametrize("sinks", [0, 4])
def test_lambda_dense_limit_is_dense(tiny, sinks):
    ids = tokens(90)
    dense, wide = ExactDecoder(tiny), ExactDecoder(tiny, window=LambdaWindow(sinks, 90))
    assert torch.equal(dense.forward(ids, dense.new_cache()), wide.forward(ids, wide.new_cache()))


def test_a_k_offset_changes_codes_but_not_what_is_attended(tiny):
    """With fine codes the logits stay: softmax ignores a vector common to all keys."""
    offset = calibrate_k_offset(tiny, [tokens(200, 5)])
    assert offset.shape == (2, 2, 16)
    ids = tokens(60)
    plain, centred = (
        ExactDecoder(tiny, "w8", "kv8"),
        ExactDecoder(tiny, "w8", "kv8", k_offset=offset + (1 << 16)),
    )
    a, b = (d.real_logits(d.forward(ids, d.new_cache())) for d in (plain, centred))
    assert not torch.equal(a, b)
    assert (a - b).pow(2).mean().sqrt() < 0.03 * a.std()
    centred.window = LambdaWindow(4, 20)
    with pytest.raises(
        KVStrataError, match="a K offset shifts all scores of one query alike, so sinks must be 0, got 4"
    ):
        centred.forward(ids, centred.new_cache())


def test_the_offset_is_the_mean_of_the_rotated_keys(tiny):
    window, seen = tokens(50, 3), {}
    decoder = FloatDecoder(tiny)
    decoder.probe = lambda layer, name, o: seen.update({layer: o["heads"].k}) if name == "attention" else None
    decoder.hidden(window, decoder.new_cache())
    expected = torch.stack([seen[i].double().mean(1) for i in (0, 1)])
    assert (calibrate_k_offset(tiny, [window]) / 65536 - expected).abs().max() <= 2.0**-17 + 1e-9


def test_lambda_window_limits_what_is_seen(tiny):
    decoder = ExactDecoder(tiny, window=LambdaWindow(0, 8))
    near, far = tokens(60), tokens(60)
    far[:20] = tokens(20, 9)
    a, b = (decoder.forward(x, decoder.new_cache())[-1] for x in (near, far))
    assert torch.equal(a, b)  # two layers reach back 14 tokens
    full = ExactDecoder(tiny)
    assert not torch.equal(*(full.forward(x, full.new_cache())[-1] for x in (near, far)))


def test_exact_level_follows_float64_with_the_same_weights(tiny):
    """w8, kv8: quantisation noise alone remains, so the logits stay close; a wrong scale anywhere would not."""
    exact = ExactDecoder(tiny, "w8", "kv8")
    quantised = {name: m.weight for name, m in exact.matrices.items()}
    reference = FloatDecoder(tiny, torch.float64, quantised)
    ids = tokens(64)
    a = exact.real_logits(exact.forward(ids, exact.new_cache()))
    b = reference.forward(ids, reference.new_cache())
    assert (a - b).pow(2).mean().sqrt() / b.std() < 0.03


def test_threads_do_not_change_a_bit(tiny):
    decoder, ids, before = ExactDecoder(tiny), tokens(40), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(decoder.forward(ids, decoder.new_cache()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_probe_hands_out_the_operands_of_a_real_layer(tiny):
    decoder, seen = ExactDecoder(tiny), {}
    decoder.probe = lambda layer, name, operands: seen.setdefault((layer, name), operands)
    decoder.forward(tokens(4), decoder.new_cache())
    got = seen[1, "linear.down"]
    manual = (got["a8"].codes.double() @ got["weight"].integers().T).long()
    assert torch.equal(manual, got["acc"])
    assert {name for layer, name in seen if layer == 0} == {
        "norm.attn", "linear.q", "linear.k", "linear.v", "rope.q", "rope.k", "kv", "attention", "linear.o",
        "residual.attn", "norm.ffn", "linear.gate", "linear.up", "gate", "linear.down", "residual.ffn",
    }  # fmt: skip


@pytest.mark.parametrize(("ids", "message"), [
    ([], "must be given at least one token"),
    ([96], r"token id must lie in 0\.\.95, got 96"),
    ([1] * 257, "must fit the context of 256 tokens, got 257"),
])  # fmt: skip
def test_bad_tokens_are_named(tiny, ids, message):
    decoder = FloatDecoder(tiny)
    with pytest.raises(KVStrataError, match=message):
        decoder.forward(ids, decoder.new_cache())


@pytest.mark.parametrize(("values", "message"), [
    ({"sinks": 33}, "0 to 32 sinks, got 33"), ({"window": 0}, "at least 1 token, got 0"),
    ({"window": 40, "ring": 32}, "hold the window of 40, got 32"), ({"limit": -1}, "limit distance .* got -1"),
])  # fmt: skip
def test_contradicting_windows_are_named(values, message):
    with pytest.raises(KVStrataError, match=message):
        LambdaWindow(**values)


@pytest.mark.parametrize(("arguments", "message"), [
    (("fast",), "a level must be one of float, exact, got fast"),
    (("exact", "w3"), "a weight format must be one of w8, w4, w2, w2s24, got w3"),
    (("exact", "w4", "kv2"), "a KV format must be one of kv4, kv8, got kv2"),
])  # fmt: skip
def test_unknown_levels_and_formats_are_named(tiny, arguments, message):
    with pytest.raises(KVStrataError, match=message):
        build(tiny, *arguments)


def test_generate_needs_a_tokenizer_for_text_and_a_positive_count(tiny):
    with pytest.raises(KVStrataError, match="needs a checkpoint with a tokenizer"):
        generate(tiny, "hello", 3)
    with pytest.raises(KVStrataError, match="at least 1, got 0"):
        generate(tiny, [1], 0)
    answer = generate(tiny, [1, 2, 3], 5, level="exact")
    assert len(answer.tokens) == 5
    assert answer.logits.shape == (5, 96)
    assert answer.logits.argmax(-1).tolist() == answer.tokens


# --- the real model -----------------------------------------------------------------------------------
def test_float_logits_match_the_frozen_oracle(smollm2):
    """transformers' float32 Llama on the same GGUF, frozen by `make oracle`."""
    oracle = json.loads(ORACLE.read_text())
    assert oracle["magic"] == "kvstrata-oracle-1", "regenerate the oracle with: make oracle"
    assert oracle["model_sha256"] == smollm2.sha256, (
        "the model changed: regenerate the oracle with: make oracle"
    )
    assert smollm2.tokenizer.encode(oracle["text"]) == oracle["tokens"]
    decoder = FloatDecoder(smollm2)
    logits = decoder.forward(oracle["tokens"], decoder.new_cache())
    expected = torch.tensor(oracle["logits"])
    got = logits[:, oracle["vocabulary"]]
    assert (got - expected).abs().max() < 5e-3  # logits reach 30; float32 in another order of operations
    assert logits.argmax(-1).tolist() == oracle["argmax"]


@pytest.mark.slow
def test_float_logits_match_transformers(smollm2):
    from golden.loaders import smollm2_path

    spec = importlib.util.spec_from_file_location(
        "oracle", pathlib.Path(__file__).with_name("regenerate_oracle.py")
    )
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    other = oracle.transformers_model(smollm2_path())
    ids = torch.tensor(smollm2.tokenizer.encode(english_text().text[:4000])[:512])
    with torch.no_grad():
        expected = other(ids[None]).logits[0]
    decoder = FloatDecoder(smollm2)
    got = decoder.forward(ids, decoder.new_cache())
    assert (got - expected).abs().max() < 2e-2
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.998


def test_real_text_is_predicted_at_both_levels(smollm2):
    """Perplexity of 128 tokens: the half-split RoPE pairing, a permuted head or a wrong scale exceeds 100."""
    found = {}
    for level in ("float", "exact"):
        decoder = build(smollm2, level, kv="kv8")
        found[level] = perplexity(decoder, smollm2, tokens=128, context=128)
    assert found["float"].value < 30
    assert found["exact"].value < found["float"].value * 1.25
    assert found["exact"].text_sha256 == english_text().sha256
    assert found["exact"].tokens == 127


def test_perplexity_refuses_short_texts(smollm2):
    decoder = FloatDecoder(smollm2)
    with pytest.raises(KVStrataError, match="must have at least 64 tokens, got"):
        perplexity(decoder, smollm2, Text("short", "One line."), tokens=64, context=64)
    with pytest.raises(KVStrataError, match="a text must be an existing file, got /nowhere"):
        english_text("/nowhere")


def test_nll_is_the_log_likelihood():
    logits = torch.randn(5, 7, dtype=torch.float64)
    targets = torch.tensor([0, 6, 3, 2, 2])
    expected = -(logits.softmax(-1)[torch.arange(5), targets]).log()
    assert torch.allclose(token_nll(logits, targets), expected)
