"""Deliberate mistakes, each of which a comparison of this suite must notice.

Every mutation replaces one rule of golden by a plausible wrong one; the same check passes without it and fails with it.
"""

import importlib.util
import pathlib

import gguf
import numpy as np
import pytest
import torch

from golden import attention, lambda_window, ops
from golden.exact_decoder import ExactDecoder
from golden.formats import packing, weights
from golden.lambda_window import LambdaWindow
from golden.policies import Dense, Heads, Sparq, sparq

_spec = importlib.util.spec_from_file_location("page", pathlib.Path(__file__).with_name("page.py"))
page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page)


def vectors(seed=0, n=32):
    return torch.from_numpy(np.random.default_rng(seed).integers(-(2**24), 2**24, (20, n)))


# --- checks: each compares golden with something that does not share its code -------------------------------
def a8_equals_page():
    got = ops.quantise_a8(vectors())
    return all(page.a8(x.tolist())[0] == c.tolist() for x, c in zip(vectors(), got.codes))


def kv_equals_page():
    got = ops.quantise_kv(vectors(), 4)
    return all(page.kv(x.tolist(), 4)[0] == c.tolist() for x, c in zip(vectors(), got.codes))


def norm_equals_page():
    w = ops.prepare_norm(torch.linspace(0.5, 2, 32), 1e-5)
    got = ops.rmsnorm(vectors(), w)
    expected = [page.rmsnorm(x.tolist(), w.weight.tolist(), w.exponent, w.eps) for x in vectors()]
    return got.tolist() == expected


def attention_equals_page():
    q, k, v = (
        vectors(1)[None, :3] >> 6,
        vectors(2).repeat(4, 1)[None] >> 6,
        vectors(3).repeat(4, 1)[None] >> 6,
    )
    kq, vq = ops.quantise_kv(k, 4), ops.quantise_kv(v, 4)
    live = torch.ones(3, 80, dtype=torch.bool)
    live[1, 40:] = False
    got = attention.attend(q, kq, vq, live)
    keys, values = ([page.kv(x, 4) for x in t[0].tolist()] for t in (k, v))
    return [page.attention(q[0, t].tolist(), keys, values, live[t].tolist()) for t in range(3)] == got[
        0
    ].tolist()


def output_ties_equal_page():
    """Accumulators half way between two outputs, of both signs."""
    codes = torch.tensor([[1, -1, 3, -3]]).T
    acc = ops.accumulate(codes, torch.tensor([[128.0]]).double())
    got = ops.scale_accumulator(acc, torch.full((4,), 1 << 15), torch.full((4,), -15))
    weight = [page.Fraction(128, 2**24)]
    return got.flatten().tolist() == [page.product([c], 1 << 15, -15, weight) for c in (1, -1, 3, -3)]


def gate_equals_page():
    g, u = vectors(4).flatten() >> 5, vectors(5).flatten() >> 5
    return ops.gate_product(g, u).tolist() == [page.gate(a, b) for a, b in zip(g.tolist(), u.tolist())]


def gguf_import_is_exact():
    w = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    raw = gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q4_1)
    q = weights.import_gguf_block(raw, "Q4_1", weights.WeightFormat("w4", 4, 32, True), None)
    return np.array_equal(
        q.dequantise().float().numpy(), gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_1)
    )


def packing_has_low_nibble_first():
    return packing.pack_fields(np.arange(8), 4).tolist() == [0x10, 0x32, 0x54, 0x76]


def ties_of_24_take_the_lower_index():
    return weights.magnitude_mask24(torch.ones(1, 8)).tolist() == [[True, True, False, False] * 2]


def ties_of_logits_take_the_lower_index():
    return ops.argmax_lowest(torch.tensor([[3, 7, 7, 1]])).tolist() == [1]


def ties_of_tokens_take_the_lower_index():
    return sparq.largest(torch.tensor([1.0, 2, 2, 2]), 2).tolist() == [False, True, True, False]


def lambda_dense_limit_is_dense(checkpoint):
    ids = torch.arange(50)
    a, b = ExactDecoder(checkpoint), ExactDecoder(checkpoint, window=LambdaWindow(4, 64))
    return torch.equal(a.forward(ids, a.new_cache()), b.forward(ids, b.new_cache()))


def sparq_dense_limit_is_dense():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 16, generator=rng, dtype=torch.float64) for n in (1, 30, 30))
    heads = Heads(q[:, None], q[:, None], k, k, v, torch.tensor([29]), lambda x, _: x)
    results = [p.attend(heads, p.select(heads)) for p in (Sparq(16, 1, r=3).dense_limit(30), Dense(16, 1))]
    return torch.allclose(*results)


# --- mutations ------------------------------------------------------------------------------------------
RND, BITLEN, SILU_TABLE = ops.rnd_shift, ops.bitlen, ops.sigmoid_table


def truncate(x, n):
    return (
        x >> n
        if isinstance(n, int) and n > 0
        else RND(x, n)
        if isinstance(n, int)
        else x >> n.clamp(min=0) << (-n).clamp(min=0)
    )


def ties_down(x, n):
    """To nearest, ties towards minus infinity."""
    return -RND(-x, n)


def high_nibble_first(fields, bits):
    lanes = fields.astype(np.uint8).reshape(-1, 8 // bits)[:, ::-1]
    return np.bitwise_or.reduce(lanes << (np.arange(8 // bits, dtype=np.uint8) * bits), axis=-1)


def swapped_import(raw, kind, fmt_w4, fmt_w8):
    swapped = raw.reshape(raw.shape[0], -1, 20).copy()
    swapped[..., 4:] = swapped[..., 4:] >> 4 | swapped[..., 4:] << 4
    return IMPORT(swapped.reshape(raw.shape), kind, fmt_w4, fmt_w8)


IMPORT = weights.import_gguf_block


def upper_mask(importance):
    return weights_mask(importance.flip(1)).flip(1)


weights_mask = weights.mask24


def no_sink_hand_over(self, positions):
    """Sinks live from the start, although the window still holds them."""
    live = LIVE(self, positions)
    live[:, : self.sinks] = True
    return live


LIVE = LambdaWindow.live


def alpha_without_the_rest(self, heads, selected):
    """The correction term dropped: only alpha times the exact part."""
    z = heads.q @ heads.k.mT[:, None] * heads.scale
    return 0.9 * (z.softmax(-1) @ heads.v[:, None])


def last_argmax(logits):
    return logits.shape[-1] - 1 - ops_argmax(logits.flip(-1))


ops_argmax = ops.argmax_lowest

MUTATIONS = {
    "a8-truncates": (ops, "rnd_shift", truncate, a8_equals_page),
    "output-rounds-ties-down": (ops, "rnd_shift", ties_down, output_ties_equal_page),
    "kv-truncates": (ops, "rnd_shift", truncate, kv_equals_page),
    "norm-truncates": (ops, "rnd_shift", truncate, norm_equals_page),
    "gate-truncates": (ops, "rnd_shift", truncate, gate_equals_page),
    "attention-truncates": (attention, "rnd_shift", truncate, attention_equals_page),
    "bit-length-off-by-one": (attention, "bitlen", lambda x: BITLEN(x) + 1, attention_equals_page),
    "scores-forget-the-minimum": (attention, "scores", None, attention_equals_page),
    "one-more-tile-bit": (attention, "P_CODE_BITS", 6, attention_equals_page),
    "sigmoid-table-shifted": (ops, "sigmoid_table", lambda: SILU_TABLE().roll(1), gate_equals_page),
    "nibbles-swapped-in-memory": (packing, "pack_fields", high_nibble_first, packing_has_low_nibble_first),
    "nibbles-swapped-on-import": (weights, "import_gguf_block", swapped_import, gguf_import_is_exact),
    "24-ties-to-the-upper": (weights, "mask24", upper_mask, ties_of_24_take_the_lower_index),
    "logit-ties-to-the-upper": (ops, "argmax_lowest", last_argmax, ties_of_logits_take_the_lower_index),
    "sparq-loses-v-bar": (Sparq, "attend", alpha_without_the_rest, sparq_dense_limit_is_dense),
    "sinks-counted-twice": (LambdaWindow, "live", no_sink_hand_over, lambda_dense_limit_is_dense),
}


def forgetful(q, k, scale):
    return SCORES(q, k._replace(minimum=k.minimum * 0), scale)


SCORES = attention.scores
MUTATIONS["scores-forget-the-minimum"] = (attention, "scores", forgetful, attention_equals_page)


def call(check, tiny):
    return check(tiny) if check is lambda_dense_limit_is_dense else check()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_turns_its_check_red(name, tiny, monkeypatch):
    owner, attribute, wrong, check = MUTATIONS[name]
    assert call(check, tiny), "the check must pass without the mutation"
    monkeypatch.setattr(owner, attribute, wrong)
    assert not call(check, tiny)


def test_upper_ties_of_tokens_are_noticed(monkeypatch):
    assert ties_of_tokens_take_the_lower_index()
    monkeypatch.setattr(sparq, "largest", lambda keys, n: torch.tensor([False, False, True, True]))
    assert not ties_of_tokens_take_the_lower_index()


def test_a_mutated_ring_is_noticed(tiny, monkeypatch):
    """Ring order is part of the bits: prefill and steps agree only because both follow it."""
    decoder, ids = ExactDecoder(tiny, window=LambdaWindow(2, 50)), torch.arange(90)
    before = decoder.forward(ids, decoder.new_cache())
    monkeypatch.setattr(lambda_window.LambdaWindow, "ring_tokens", lambda self, p: (
        p[:, None] - (p[:, None] - torch.arange(self.ring).flip(0)) % self.ring))  # fmt: skip
    assert not torch.equal(before, decoder.forward(ids, decoder.new_cache()))
