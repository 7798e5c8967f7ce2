"""Pruning and rounding: what calibration must improve, and must not break."""

import pytest
import torch

from golden.compression import (
    Calibration,
    Recipe,
    bits_per_weight,
    compress,
    compress_matrix,
    hessian_of,
    wanda_mask24,
)
from golden.float_decoder import FloatDecoder
from golden.formats.kv import codec
from golden.formats.weights import QuantisedWeight
from golden.spec import KVStrataError

N, K = 24, 128


@pytest.fixture(scope="module")
def layer():
    """A matrix and the Hessian of correlated inputs with a few loud channels."""
    rng = torch.Generator().manual_seed(7)
    x = torch.randn(512, K, generator=rng, dtype=torch.float64) @ torch.randn(
        K, K, generator=rng, dtype=torch.float64
    )
    x[:, ::17] *= 6
    return torch.randn(N, K, generator=rng, dtype=torch.float64), x.T @ x


def output_error(weight, got, hessian):
    value = got.dequantise() if isinstance(got, QuantisedWeight) else got
    e = value - weight
    return (e @ hessian * e).sum().item()


@pytest.mark.parametrize(("plain", "better"), [
    (Recipe("w4"), Recipe("w4", rounding="gptq")),
    (Recipe("w2"), Recipe("w2", rounding="gptq")),
    (Recipe("w8"), Recipe("w8", rounding="gptq")),
    (Recipe("w2s24", prune="magnitude"), Recipe("w2s24", prune="magnitude", rounding="gptq")),
    (Recipe("w2s24", prune="sparsegpt"), Recipe("w2s24", prune="sparsegpt", rounding="gptq")),
    (Recipe("float", prune="magnitude"), Recipe("float", prune="wanda")),
    (Recipe("float", prune="wanda"), Recipe("float", prune="sparsegpt")),
])  # fmt: skip
def test_calibration_lowers_the_output_error(layer, plain, better):
    weight, hessian = layer
    errors = [output_error(weight, compress_matrix(weight, r, hessian), hessian) for r in (plain, better)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("prune", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_every_24_recipe_keeps_two_of_four(layer, prune, rounding):
    weight, hessian = layer
    got = compress_matrix(weight, Recipe("w2s24", prune=prune, rounding=rounding), hessian)
    assert (got.kept.view(N, -1, 4).sum(-1) == 2).all()
    assert ((got.codes != 0) == got.kept).all()
    pruned = compress_matrix(weight, Recipe("float", prune=prune), hessian)
    assert ((pruned.view(N, -1, 4) != 0).sum(-1) == 2).all()


def test_white_inputs_make_wanda_magnitude_and_gptq_nearest(layer):
    """With H = identity there is nothing to compensate."""
    weight, eye = layer[0], torch.eye(K, dtype=torch.float64)
    assert torch.equal(wanda_mask24(weight, eye), wanda_mask24(weight, 3 * eye))
    for plain, better in ((Recipe("w4"), Recipe("w4", rounding="gptq")),
                          (Recipe("float", prune="magnitude"), Recipe("float", prune="sparsegpt"))):  # fmt: skip
        a, b = (compress_matrix(weight, r, eye) for r in (plain, better))
        same = torch.equal(a.codes, b.codes) if isinstance(a, QuantisedWeight) else torch.allclose(a, b)
        assert same


def test_calibration_collects_what_each_matrix_reads(tiny):
    windows = [torch.arange(20), torch.arange(30, 50)]
    text = Calibration(tiny, windows)
    assert set(text.hessians(0)) == {f"layers.0.{n}" for n in ("q", "o", "up", "down")}
    rng = torch.Generator().manual_seed(1)
    names = [f"layers.0.{name}" for name in tiny.config.linear_shapes()]
    first = {n: torch.randn(tiny.float32(n).shape, generator=rng) / 8 for n in names}
    text.replace(0, first)
    # The second layer's inputs come through the first one as it was replaced.
    decoder, seen = FloatDecoder(tiny, weights=first), []
    decoder.probe = lambda layer, name, o: seen.append(o["x"]) if (layer, name) == (1, "linear.up") else None
    for w in windows:
        decoder.forward(w, decoder.new_cache())
    x = torch.cat(seen).double()
    assert torch.allclose(hessian_of(text.hessians(1), "layers.1.up"), x.T @ x)


def test_a_recipe_that_needs_calibration_gets_text(tiny):
    with pytest.raises(KVStrataError, match="the recipe w4 gptq needs calibration, got none"):
        compress(tiny, Recipe("w4", rounding="gptq"))
    with pytest.raises(KVStrataError, match="at least one window of tokens, got none"):
        compress(tiny, Recipe("w4", rounding="gptq"), [])


def test_gptq_through_a_whole_model_beats_rounding(tiny):
    """Calibrated layer by layer, on other tokens than those that judge."""
    rng = torch.Generator().manual_seed(5)
    windows, judge = torch.randint(0, 96, (6, 64), generator=rng), torch.randint(0, 96, (64,), generator=rng)
    reference = FloatDecoder(tiny)
    exact = reference.forward(judge, reference.new_cache())
    errors = []
    for rounding in ("nearest", "gptq"):
        decoder = FloatDecoder(tiny, weights=compress(tiny, Recipe("w4", 32, rounding=rounding), windows))
        errors.append(float((decoder.forward(judge, decoder.new_cache()) - exact).norm()))
    assert errors[1] < 0.95 * errors[0], errors


def test_bits_are_those_of_the_packed_image(tiny):
    weights = compress(tiny, Recipe("w4"))
    packed = sum(w.packed_bytes for n, w in weights.items() if n.startswith("layers."))
    count = sum(w.codes.numel() for n, w in weights.items() if n.startswith("layers."))
    assert bits_per_weight(weights) == packed * 8 / count == 5.0
    assert bits_per_weight(compress(tiny, Recipe("w2s24", 64, "magnitude"))) == 2.0
    assert bits_per_weight(compress(tiny, Recipe("float"))) == 16.0


@pytest.mark.parametrize(("values", "message"), [
    ({"format": "w3"}, "format must be one of w8, w4, w2, w2s24, float, got w3"),
    ({"prune": "random"}, "prune must be one of none, magnitude, wanda, sparsegpt, got random"),
    ({"rounding": "awq"}, "rounding must be one of nearest, gptq, got awq"),
    ({"format": "w2s24"}, "w2s24 needs a pruning method .* got none"),
    ({"format": "w4", "prune": "wanda"}, "w4 is dense and cannot hold a 2:4 mask, got prune wanda"),
])  # fmt: skip
def test_contradicting_recipes_are_named(values, message):
    with pytest.raises(KVStrataError, match=message):
        Recipe(**values)


def test_missing_calibration_is_named(layer):
    with pytest.raises(KVStrataError, match="the recipe w4 gptq needs calibration, got none"):
        compress_matrix(layer[0], Recipe("w4", rounding="gptq"))
    with pytest.raises(
        KVStrataError, match=r"calibration must cover layers\.0\.gate, got no inputs for layers\.0\.up"
    ):
        hessian_of({}, "layers.0.gate")


@pytest.mark.parametrize("kv", ["kv8", "kv4", "kivi4", "kivi2"])
def test_representations_give_the_same_in_steps_and_in_prefill(tiny, kv):
    decoder = FloatDecoder(tiny, torch.float64, kv=kv)
    ids = torch.randint(0, 96, (150,), generator=torch.Generator().manual_seed(0))
    whole = decoder.forward(ids, decoder.new_cache())
    cache = decoder.new_cache()
    cuts = [ids[:70], *ids[70:140].split(1), ids[140:]]
    steps = torch.cat([decoder.forward(c, cache) for c in cuts])
    assert torch.allclose(whole, steps, atol=1e-9)
    exact = FloatDecoder(tiny, torch.float64)
    assert not torch.allclose(whole, exact.forward(ids, exact.new_cache()), atol=1e-4)


def test_kivi_keeps_the_recent_window_and_quantises_by_channel():
    kivi = codec("kivi4")
    k = torch.randn(1, 200, 8, dtype=torch.float64) * torch.tensor([1, 1, 1, 1, 1, 1, 1, 50.0])
    seen_k, seen_v = kivi.view(k, k, 200)
    old = kivi.old(200)
    assert old == 128
    assert torch.equal(seen_k[:, old:], k[:, old:])
    # a loud channel does not coarsen its neighbours in K; per-token V suffers from it
    assert (seen_k - k)[:, :old, :7].abs().max() < 0.4
    assert (seen_v - k)[:, :old, :7].abs().max() > 1
    with pytest.raises(KVStrataError, match="must be one of float, kv8, kv4, kivi4, kivi2, got kv3"):
        codec("kv3")
