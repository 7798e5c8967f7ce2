"""Accuracy rows: resumed, keyed by everything that decides them, and a page whose numbers are the rows'."""

import json

import pytest
import torch

from golden import accuracy, loaders
from golden.accuracy import (
    Bench,
    Results,
    check_rows,
    measure_rows,
    missing,
    prefill,
)
from golden.accuracy_page import page, pareto_front, pareto_plot, table
from golden.accuracy_rows import Row, check_row, combinations, grid, parse_policy
from golden.compression import Recipe
from golden.float_decoder import FloatDecoder
from golden.loaders import load
from golden.policies import Sparq
from golden.spec import KVStrataError
from golden.spec.policies import SparfCosts
from sw_stack.cli import main
from sw_stack.cli.accuracy import shares, write_page

RESULT = {"name": "float float float dense (float)", "context": 1024, "level": "float", "weights": "float",
          "activations": "float", "kv": "float", "policy": "dense", "perplexity": 12.5, "top1_agreement": 1.0,
          "kl_nats": -1e-12, "attention_error": 0.0, "passkey": 0.5, "bits_per_weight": 16.0,
          "weight_bytes_per_token": 100_000_000, "kv_bytes_per_token": 5e6}  # fmt: skip


def shorten(patch):
    """One short segment instead of two long ones."""
    patch.setattr(accuracy, "ENDS", (300,))
    patch.setattr(accuracy, "TAIL", 24)


@pytest.fixture
def short(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def rows(smollm2, tmp_path_factory):
    directory = tmp_path_factory.mktemp("accuracy")
    wanted = [Row(48), Row(48, kv="kv4"), Row(48, policy="sparf:16,0.25"),
              Row(48, "exact", Recipe("w4"), "a8", "kv8")]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return wanted, list(measure_rows(wanted, smollm2, directory)), directory


def test_the_reference_row_is_perfect_and_others_are_not(rows):
    reference, kv4, sparf, exact = rows[1]
    assert reference["top1_agreement"] == 1
    assert abs(reference["kl_nats"]) < 1e-5
    assert reference["attention_error"] == 0
    for row in (kv4, sparf, exact):
        assert 0 < row["kl_nats"] < 3
        assert 0 < row["attention_error"] < 1.5
        assert len(row["attention_error_by_layer"]) == 30
    assert reference["passkey"] == 1.0


@pytest.mark.slow
def test_rows_of_the_in_storage_unit(rows, short, smollm2, tmp_path):
    """Dense binary16 attention beats the quantised caches; SparF reads pages as the float policy does."""
    wanted = [Row(48, "exact", Recipe("w4"), "a8", "float", p) for p in ("dense", "sparf:16,0.25")]
    dense, sparf = measure_rows(wanted, smollm2, tmp_path)
    assert 0 < dense["kl_nats"] < sparf["kl_nats"] < 3
    assert dense["kv_bytes_per_token"] == 30 * 3 * 48 * 2 * 128
    assert 90 * 4096 * (2 + 4) <= sparf["kv_bytes_per_token"] <= 90 * (4096 * (4 + 16) + 128)


def test_bytes_come_from_the_formats(rows):
    reference, kv4, sparf, exact = rows[1]
    assert reference["kv_bytes_per_token"] == 30 * 3 * 48 * 2 * 128
    assert kv4["kv_bytes_per_token"] == 30 * 3 * 48 * 2 * 36
    assert exact["kv_bytes_per_token"] == 30 * 3 * 48 * 2 * 68
    # one 4 KiB page per 32 tokens of K and of V, and up to 16 pages of four channels, for 90 heads
    assert 90 * 4096 * (2 + 4) <= sparf["kv_bytes_per_token"] <= 90 * (4096 * (4 + 16) + 128)
    layers = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
    assert exact["weight_bytes_per_token"] == layers * 5 // 8 + 49152 * 576 * 34 // 32
    assert (exact["bits_per_weight"], reference["bits_per_weight"]) == (5.0, 16.0)


def test_kept_rows_are_not_measured_again(rows, smollm2):
    wanted, done, directory = rows
    sha = done[0]["text_sha256"]
    results = Results(directory / "results.sqlite")
    assert missing(wanted, smollm2, sha, results) == []
    assert missing([Row(49)], smollm2, sha, results) == [Row(49)]
    assert missing(wanted[:1], smollm2, "another text", results) == wanted[:1]
    assert results.get(wanted[1].key(smollm2, sha)) == json.loads(json.dumps(done[1]))
    assert {p.suffix for p in directory.iterdir()} == {".sqlite", ".safetensors"}


def test_every_row_of_the_grid_is_legal_and_its_own(smollm2):
    every = list(grid())
    assert len({r.key(smollm2, "t") for r in every}) == len(every)
    for row in every:
        check_row(row)
    check_rows(every, smollm2)
    assert {r.context for r in every} == {256, 1024, 2048, 4096, 8192}


def test_prompts_are_computed_by_the_policys_own_rule(tiny):
    policy = Sparq(16, 2, r=4, ratio=0.1)
    sparse, dense = FloatDecoder(tiny, policy=policy), FloatDecoder(tiny)
    ids = torch.arange(60)
    a, b = sparse.new_cache(), dense.new_cache()
    prefill(sparse, ids, a)
    dense.hidden(ids, b)
    assert sparse.policy is policy
    step = [decoder.hidden([3], cache) for decoder, cache in ((dense, a), (dense, b))]
    assert torch.equal(*step)
    assert not torch.allclose(sparse.hidden([4], a), dense.hidden([4], b))


def test_combinations_are_rows_of_their_own_and_are_shared_out():
    caches, policies = ["float", "kivi4-centred"], ["dense", "sparq:8,0.5"]
    levels = ["exact", "float", "float-a8"]
    rows = combinations([256, 512], ["w4", "w2s24-g64 sparsegpt gptq"], caches, policies, levels)
    assert len({(r.name, r.context) for r in rows}) == len(rows) == 48
    assert rows[0] == Row(256, "exact", Recipe("w4"), "a8", "float", "dense")
    assert {(r.level, r.activations) for r in rows} == {("exact", "a8"), ("float", "float"), ("float", "a8")}
    assert Recipe.parse(rows[-1].recipe.name) == rows[-1].recipe == Recipe("w2s24", 64, "sparsegpt", "gptq")
    parts = shares(rows, 5)
    assert sorted(map(id, rows)) == sorted(id(r) for part in parts for r in part)
    assert all(len({(r.recipe, r.level) for r in part}) == 1 for part in parts)
    assert len(shares([r for r in rows if r.level == "exact" and r.recipe == Recipe("w4")], 4)) == 4


def test_pages_of_a_drive_are_counted_for_binary16_alone(smollm2, tmp_path):
    bench = Bench(smollm2, tmp_path)
    costs = bench._costs(Row(256, "exact", Recipe("w4"), "a8", "kv8", "sparf:16,0.125"))
    same = bench._costs(Row(256, "exact", Recipe("w4"), "a8", "kv8", "sparq:16,0.125"))
    assert costs.expected(256) == same.expected(256)
    assert isinstance(bench._costs(Row(256, policy="sparf:16,0.125")), SparfCosts)


def test_a_part_of_the_grid_leaves_the_page_alone(smollm2, monkeypatch, capsys):
    monkeypatch.setattr("hw.flow.cache.write_atomically", lambda *_: pytest.fail("wrote the page"))
    write_page([RESULT], 66, smollm2, "topics", "ab" * 32)
    assert "docs/accuracy.md stays as it is: 1 of 66 rows" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("text", ["nothing", "lambda-limit:4", "sparq:16", "sparf:a,b", "dense:1"])
def test_unknown_policies_are_named(text):
    with pytest.raises(KVStrataError, match=f"a policy must be dense, .* got {text}"):
        parse_policy(text, 64, 3)


def test_impossible_rows_are_named(short, smollm2, tmp_path):
    bench = Bench(smollm2, tmp_path)
    with pytest.raises(KVStrataError, match="a context must be 25 to 299 tokens, got 300"):
        bench.windows(300)
    with pytest.raises(KVStrataError, match="the exact level computes with a8 and a KV format of float, kv8"):
        bench.decoder(Row(48, "exact", Recipe("w4"), "a8", "kv3"))
    with pytest.raises(
        KVStrataError, match="the exact level computes with quantised weights, got float wanda a8"
    ):
        bench.decoder(Row(48, "exact", Recipe("float", prune="wanda"), "a8", "kv4"))


def test_page_and_plot_show_the_rows(smollm2):
    worse = RESULT | {
        "name": "float float kv4 dense (float)",
        "kv": "kv4",
        "perplexity": 1.25e6,
        "kl_nats": 0.25,
    }
    text = page([RESULT, worse], 66, smollm2, "topics", "ab" * 32)
    assert "2 of the 66" in text
    assert "| 12.50 | 100.0% | 0.000 |" in text
    assert "| 1.2e+06 |" in text
    assert "KV4 per head and token alone: times 100,000 (KL 0.250)." in text
    assert "105.00" in table([RESULT])  # MB per token: weights and KV
    assert len(pareto_plot([RESULT, worse]).axes) == 1
    assert pareto_front([(1, 5), (2, 6), (3, 4), (3, 3)]) == [0, 3]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--jobs", "0"], "the number of jobs must be at least 1, got 0"),
    (["no such row"], "a filter must leave at least one row of the grid, got"),
    (["--model", "/nowhere/m.gguf"], "a GGUF model must be an existing file, got /nowhere/m.gguf"),
    (["--policy", "sparq:65,0.1"], "r must be 1 to the head size 64, got 65"),
    (["--policy", "sparf:16,2"], "its ratio in (0, 1], got 0 and 2.0"),
    (["--policy", "lambda-limit:4+0"], "sinks >= 0 and a window of at least 1, got 4 and 0"),
    (["--policy", "h2o"], "a policy must be dense, lambda-limit:S+W, lambda-cache:S+W, sparq:r,share or sparf:r,share"),
    (["--weights", "w4-g48"], "the group size of w4 must be one of (32, 64, 128), got 48"),
    (["--weights", "w2s24"], "w2s24 needs a pruning method (magnitude, wanda, sparsegpt), got none"),
    (["--weights", "w4 best"], "prune must be one of none, magnitude, wanda, sparsegpt, got best"),
    (["--weights", "w4 gptq nearest"], "a format with -gGROUP, pruning and rounding at most, got w4 gptq nearest"),
    (["--weights", "float"], "the exact level computes with quantised weights, got float a8 kv4 dense (exact)"),
    (["--kv", "kv3"], "a KV format of float, kv8, kv4, kivi4, kivi2, got w4 a8 kv3 dense (exact)"),
    (["--kv", "kv3", "--level", "float"], "a KV representation must be one of float, kv8, kv4, kivi4, kivi2, got kv3"),
    (["--level", "rtl"], "a level must be one of float, float-a8, exact, got rtl"),
    (["--level", "exact-a8"], "a level must be one of float, float-a8, exact, got exact-a8"),
    (["--kv", "kv8", "--context", "192"], "a context must be 193 to 8192 tokens, got 192"),
    (["--kv", "kv8", "--context", "9000"], "a context must be 193 to 8192 tokens, got 9000"),
    (["--no-measure"], "the table needs at least one measured row, got none: run make accuracy"),
])  # fmt: skip
def test_the_verb_answers_bad_input_in_one_sentence(
    arguments, message, smollm2, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("KVSTRATA_BUILD", str(tmp_path))
    monkeypatch.setattr(loaders, "load", lambda path=None: load(path) if path else smollm2)
    with pytest.raises(SystemExit) as end:
        main(["accuracy", *arguments])
    assert end.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())
